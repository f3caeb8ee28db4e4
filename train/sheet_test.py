import jax.numpy as jnp
import numpy as np
from matplotlib.image import imread

from train.data.crops import plain_crop
from train.data.loader import Batches
from train.data.preprocess import Sample
from train.sheet import draw_samples, save_sheet


def test_samples_are_those_of_training_and_the_stream_stays_where_it_is(tmp_path):
    label = np.zeros((8, 8, 6), np.int32)
    label[2:5, 3:6, 1:4] = 1
    samples = [Sample(str(i), label[..., None] + np.float32(i), label, (1, 1, 1)) for i in (1, 2)]
    batches = Batches(samples, plain_crop((8, 8, 6)), 2, seed=0)
    first = next(batches)
    batches.restore({"step": 0})
    images, targets = draw_samples(batches, lambda keys, x, y: (-x, y + 0 * jnp.sum(y)), 0, 3)
    assert images.shape == (3, 8, 8, 6, 1)
    np.testing.assert_array_equal(-images[:2], first["image"])
    np.testing.assert_array_equal(targets[0], label)
    assert batches.state() == {"step": 0}
    batches.close()
    save_sheet(tmp_path / "sheet.png", images, targets)
    picture = imread(tmp_path / "sheet.png")
    assert picture.std() > 0.1
    # Outlines are the only colors.
    colored = np.ptp(picture[..., :3], axis=-1) > 0.1
    assert colored[picture.shape[0] // 2 :].any()
    assert not colored[: picture.shape[0] // 2].any()
