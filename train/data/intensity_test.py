import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from train.data import intensity

SHAPE = (9, 12, 10)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).gamma(2.0, size=(*SHAPE, 2)).astype(np.float32)


def channels(function, image):
    return np.stack([function(image[..., c].astype(float)) for c in range(image.shape[-1])], -1)


def check(ours, theirs):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_scale_and_shift(image):
    check(intensity.scale_and_shift(image, jnp.float32(1.2), jnp.float32(-0.3)), image * 1.2 - 0.3)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_contrast(image, factor):
    def plain(x):
        return np.clip((x - x.mean()) * factor + x.mean(), x.min(), x.max())

    check(intensity.change_contrast(image, jnp.float32(factor)), channels(plain, image))


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma(image, gamma, inverted):
    def plain(x):
        x = -x if inverted else x
        y = ((x - x.min()) / (x.max() - x.min())) ** gamma
        y = (y - y.mean()) / y.std() * x.std() + x.mean()
        return -y if inverted else y

    ours = intensity.change_gamma(jnp.asarray(image), jnp.float32(gamma), inverted=inverted)
    check(ours, channels(plain, image))


def test_gamma_leaves_a_constant_channel():
    image = jnp.full((4, 3, 5, 1), 2.5)
    np.testing.assert_array_equal(intensity.change_gamma(image, 1.3), image)


@pytest.mark.parametrize("sigma", [0.5, 0.83, 1.0, 2.0])
def test_blur(image, sigma):
    def plain(x):
        return ndimage.gaussian_filter(x, sigma)

    check(intensity.blur(jnp.asarray(image), jnp.float32(sigma)), channels(plain, image))


@pytest.mark.parametrize("zoom", [0.5, 0.63, 0.9, 1.0])
def test_lower_resolution(image, zoom):
    def plain(x):
        options = {"mode": "nearest", "grid_mode": True}
        coarse = [round(n * zoom) / n for n in x.shape]
        small = ndimage.zoom(x, coarse, order=0, **options)
        return ndimage.zoom(small, np.divide(x.shape, small.shape), order=1, **options)

    ours = intensity.lower_resolution(jnp.asarray(image), jnp.float32(zoom))
    check(ours, channels(plain, image))


def test_noise(image):
    noise = intensity.add_noise(jax.random.key(0), jnp.asarray(image), 0.2) - image
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(0.2, rel=0.05)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.1
