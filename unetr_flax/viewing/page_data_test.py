import base64
import gzip

import nibabel as nib
import numpy as np
import pytest

from unetr_flax.viewing.page_data import encode, gray_step

AFFINE = np.array([[0.8, 0, 0, -20], [0, 0.8, 0.3, 7], [0, 0, 3, -300], [0, 0, 0, 1]])


def decode(text):
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def scan(shape=(40, 36, 10)):
    image = np.random.default_rng(0).normal(0, 200, shape).astype(np.float32)
    labels = np.zeros(shape, np.uint16)
    labels[20:, :18] = 7
    return image, labels


def test_same_grid_where_it_fits():
    image, labels = scan()
    data = encode(image, labels, AFFINE, step=0.25, max_bytes=10**6)
    assert data.shape == image.shape
    decoded = decode(data.image)
    assert decoded.get_data_dtype() == np.int16
    np.testing.assert_allclose(decoded.affine, AFFINE)
    np.testing.assert_allclose(decoded.get_fdata(), image, atol=0.126)
    decoded = decode(data.labels)
    assert decoded.get_data_dtype() == np.uint8
    np.testing.assert_allclose(decoded.affine, AFFINE)
    np.testing.assert_array_equal(decoded.get_fdata(), labels)


@pytest.mark.parametrize("max_bytes", [3000, 12000, 25000])
def test_coarser_grid_keeps_the_extent(max_bytes):
    image, labels = scan()
    data = encode(image, labels, AFFINE, step=1, max_bytes=max_bytes)
    size = len(data.image) + len(data.labels)
    # Most of the room is used.
    assert 0.5 * max_bytes < size <= max_bytes
    for text in (data.image, data.labels):
        decoded = decode(text)
        assert decoded.shape == data.shape
        for edge in (0, 1):
            old = AFFINE @ [*(np.array(image.shape) * edge - 0.5), 1]
            new = decoded.affine @ [*(np.array(data.shape) * edge - 0.5), 1]
            np.testing.assert_allclose(new, old, atol=1e-4)
    # The slices are thick already: the axes with fine voxels become coarser first.
    if max_bytes > 10000:
        assert data.shape[2] == 10
    assert set(np.unique(decode(data.labels).get_fdata())) == {0, 7}


def test_more_than_255_labels():
    labels = np.arange(600).reshape(10, 10, 6)
    data = encode(labels.astype(np.float32), labels, AFFINE, step=1, max_bytes=10**6)
    np.testing.assert_array_equal(decode(data.labels).get_fdata(), labels)


def test_intensities_beyond_16_bits_are_clipped():
    image = np.array([-1e6, -5, 5, 1e6], np.float32).reshape(1, 1, 4)
    data = encode(image, np.zeros((1, 1, 4), np.uint8), AFFINE, step=1, max_bytes=10**6)
    assert decode(data.image).get_fdata().ravel().tolist() == [-32768, -5, 5, 32767]


def test_too_small():
    image, labels = scan()
    with pytest.raises(ValueError, match="max_bytes=10: too small"):
        encode(image, labels, AFFINE, step=1, max_bytes=10)


def test_gray_step():
    whole = np.array([[[0.0, 500.0]]], np.float32)
    assert gray_step(whole + 0.5, (-150, 250), calibrated=True) == 1
    assert gray_step(whole, (0, 500), calibrated=False) == 1
    assert gray_step(whole + 0.5, (0, 500), calibrated=False) == 0.5
    assert gray_step(whole * 1000, (0, 500_000), calibrated=False) == 500
