"""Ranges of intensities that a view spreads from black to white."""

import numpy as np

# Width and level as radiologists know them: 400/50, 1500/-600, 1800/400 and 80/40.
CT_WINDOWS = {
    "Soft tissue": (-150.0, 250.0),
    "Lung": (-1350.0, 150.0),
    "Bone": (-500.0, 1300.0),
    "Brain": (0.0, 80.0),
}
PERCENTILES = {
    "1st to 99th percentile": (1.0, 99.0),
    "5th to 95th percentile": (5.0, 95.0),
    "All intensities": (0.0, 100.0),
}
LARGEST_SAMPLE = 1_000_000


def window_presets(
    channel: np.ndarray, window: tuple[float, float] | None
) -> dict[str, tuple[float, float]]:
    """Chooses windows for an image, the best first.

    Args:
      channel: intensities [X, Y, Z].
      window: the model's window for a CT, in Hounsfield units, which is offered with the usual
        windows of CT; None for images without a unit, which get percentiles of their nonzero
        voxels.

    Returns:
      Lowest and highest intensity by name; the lowest is always below the highest.
    """
    if window is not None:
        low, high = window
        return {"Model's window": (float(low), float(high)), **CT_WINDOWS}
    # A sample on a coarser grid: percentiles of all voxels would take seconds.
    step = max(1, round((channel.size / LARGEST_SAMPLE) ** (1 / 3)))
    sample = channel[::step, ::step, ::step]
    body = sample[sample != 0]
    if not body.size:
        body = sample.ravel()
    presets = {}
    for name, percentiles in PERCENTILES.items():
        low, high = (float(value) for value in np.percentile(body, percentiles))
        presets[name] = (low, high) if low < high else (low - 1, high + 1)
    return presets
