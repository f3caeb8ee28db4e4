"""A picture of augmented samples, drawn at the start of a run to be looked at."""

from pathlib import Path

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.data.loader import Batches
from train.data.targets import IGNORED
from train.step import Augment
from train.visualize import axial_view

SAMPLES = 8
INCHES = 1.6  # width and height of a sample
DPI = 120


def draw_samples(
    batches: Batches, augment: Augment | None, seed: int, samples: int = SAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Draws augmented samples as training will see them; the batches go back to their place.

    Args:
      batches: the stream of crops.
      augment: what happens to crops on the device, see `train.data.augment`; nothing if None.
      seed: seed of what the device draws; a run draws other numbers than this picture.
      samples: number of samples.

    Returns:
      Images [samples, *spatial, C] and targets [samples, *spatial].
    """
    place = batches.state()
    drawn, count = [], 0
    while count < samples:
        batch = next(batches)
        drawn.append((batch["image"], batch["label"]))
        count += len(batch["label"])
    batches.restore(place)
    images, targets = (np.concatenate(x)[:samples] for x in zip(*drawn, strict=True))
    if augment is not None:
        keys = jax.random.split(jax.random.key(seed), samples)
        images, targets = jax.device_get(jax.jit(augment)(keys, images, targets))
    return images, targets


def save_sheet(path: Path, images: np.ndarray, targets: np.ndarray) -> None:
    """Writes a PNG with a column for each sample: the image, and the outlines of its labels.

    Shown is the first channel of the axial slice with the most foreground.

    Args:
      path: the PNG.
      images: [samples, X, Y, Z, C].
      targets: [samples, X, Y, Z].
    """
    columns = len(images)
    figure = Figure((columns * INCHES, 2 * INCHES), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns, squeeze=False)
    for column, image, target in zip(axes.T, images[..., 0], targets, strict=True):
        foreground = np.where(target == IGNORED, 0, target)
        plane = int(np.count_nonzero(foreground, axis=(0, 1)).argmax())
        gray, classes = (axial_view(x[..., plane]) for x in (image, foreground))
        low, high = np.percentile(image, (0.5, 99.5))
        for panel in column:
            panel.imshow(gray, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            panel.set_axis_off()
        for label in np.unique(classes[classes > 0]):
            mask = classes == label
            # A class that fills the plane has no outline.
            if not mask.all():
                color = f"C{int(label) % 10}"
                column[1].contour(mask, levels=[0.5], colors=[color], linewidths=0.8)
    figure.savefig(path)
