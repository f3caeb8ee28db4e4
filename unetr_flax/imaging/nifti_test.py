import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest

from unetr_flax.imaging.nifti import read_labels, read_volume, write_labels
from unetr_flax.imaging.volume import VolumeError

nib = pytest.importorskip("nibabel")

SHAPE = (5, 6, 4)
ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "SAL"]


def save(path, array, codes="RAS", spacing=(0.8, 0.9, 5.0), oblique=False):
    """Writes an array of the canonical grid to a file with another orientation."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-10, 20, 30)
    if oblique:
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
        affine = turn @ affine
    image = nib.Nifti1Image(array, affine)
    transform = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(image.as_reoriented(transform), path)
    return affine


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_reads_as_the_same_volume(tmp_path, codes, oblique):
    array = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    affine = save(tmp_path / "image.nii.gz", array, codes, oblique=oblique)
    volume = read_volume(tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(volume.array, array[..., None].astype(np.float32))
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    np.testing.assert_allclose(volume.spacing, (0.8, 0.9, 5.0), rtol=1e-6)


def test_fourth_axis_is_channels_and_scaling_is_applied(tmp_path):
    array = np.random.default_rng(0).random((*SHAPE, 2)).astype(np.float32)
    image = nib.Nifti1Image(array, np.eye(4))
    image.header.set_data_dtype(np.int16)
    nib.save(image, tmp_path / "image.nii")
    volume = read_volume(tmp_path / "image.nii")
    assert volume.array.shape == (*SHAPE, 2)
    np.testing.assert_allclose(volume.array, array, atol=1e-4)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_channels_of_every_orientation_stay_last(tmp_path, codes):
    array = np.random.default_rng(0).integers(0, 99, (*SHAPE, 2)).astype(np.int16)
    save(tmp_path / "image.nii.gz", array, codes, oblique=True)
    np.testing.assert_array_equal(read_volume(tmp_path / "image.nii.gz").array, array)


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_labels_go_back_onto_the_original_grid(tmp_path, codes, oblique):
    labels = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    save(tmp_path / "label.nii.gz", labels.astype(np.float32), codes, oblique=oblique)
    read, _ = read_labels(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(read, labels)
    assert read.dtype == np.int32
    write_labels(tmp_path / "out.nii.gz", read, like=tmp_path / "label.nii.gz")
    original, written = nib.load(tmp_path / "label.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(original.dataobj))
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.get_data_dtype() == np.uint8


def test_written_labels_have_the_space_of_the_original_and_nothing_of_its_intensities(tmp_path):
    image = nib.Nifti1Image(np.full((*SHAPE, 2), 7.5), np.diag([-2.0, 1.0, 3.0, 1.0]))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 4)
    image.header.set_xyzt_units("mm")
    image.header.set_data_dtype(np.int16)
    image.header["cal_max"] = 99
    nib.save(image, tmp_path / "image.nii.gz")
    labels = np.random.default_rng(0).integers(0, 4, SHAPE)
    write_labels(tmp_path / "out.nii.gz", labels, like=tmp_path / "image.nii.gz")
    written = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(written.dataobj, labels[::-1])
    assert written.header.get_xyzt_units()[0] == "mm"
    assert (written.header["qform_code"], written.header["sform_code"]) == (1, 4)
    assert written.header["cal_max"] == 0
    np.testing.assert_array_equal(read_labels(tmp_path / "out.nii.gz")[0], labels)


@pytest.mark.parametrize(("highest", "bits"), [(255, 8), (256, 16), (65535, 16)])
def test_written_labels_are_as_wide_as_they_need(tmp_path, highest, bits):
    save(tmp_path / "image.nii.gz", np.zeros(SHAPE, np.int16), "LPS")
    labels = np.zeros(SHAPE, np.int32)
    labels[1, 2, 3] = highest
    write_labels(tmp_path / "out.nii.gz", labels, like=tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(read_labels(tmp_path / "out.nii.gz")[0], labels)
    assert nib.load(tmp_path / "out.nii.gz").get_data_dtype().itemsize * 8 == bits


@pytest.mark.parametrize("value", [-1, 65536])
def test_labels_that_would_be_written_as_others_are_told(tmp_path, value):
    save(tmp_path / "image.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(VolumeError, match=rf"out\.nii: labels {value} to {value}, must be 0 to"):
        write_labels(tmp_path / "out.nii", np.full(SHAPE, value), tmp_path / "image.nii.gz")
    assert not (tmp_path / "out.nii").exists()


def test_labels_of_another_grid_are_not_written(tmp_path):
    save(tmp_path / "label.nii.gz", np.zeros(SHAPE, np.uint8), "PIR")
    with pytest.raises(VolumeError, match=r"grid \(5, 6, 4\), labels have \(4, 5, 6\)"):
        write_labels(tmp_path / "out.nii.gz", np.zeros((4, 5, 6), int), tmp_path / "label.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()


def _missing(path):
    pass


def _save_large(path):
    """Writes an image whose last voxel is not read in one block with the checksum after it."""
    save(path, np.random.default_rng(0).integers(0, 200, (40, 40, 40)).astype(np.uint8))


def _truncated(path):
    _save_large(path)
    path.write_bytes(path.read_bytes()[:5000])


def _empty(path):
    path.write_bytes(b"")


def _text(path):
    path.write_bytes(gzip.compress(b"this is not an image" * 100))


def _plane(path):
    nib.save(nib.Nifti1Image(np.zeros((5, 6), np.float32), np.eye(4)), path)


def _cut_in_the_checksum(path):
    _save_large(path)
    path.write_bytes(path.read_bytes()[:-4])


def _wrong_checksum(path):
    _save_large(path)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


def _header(offset, value):
    """Makes a function that writes a good file and overwrites bytes of its header."""

    def damage(path):
        save(path, np.zeros(SHAPE, np.float32))
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[offset : offset + len(value)] = value
        path.write_bytes(gzip.compress(content))

    return damage


_unknown_type = _header(70, struct.pack("<h", 4096))
_beyond_the_end = _header(40, struct.pack("<4h", 3, 30000, 30000, 30000))
_negative_size = _header(42, struct.pack("<h", -5))
_singular_affine = _header(280, struct.pack("<4f", 0, 0, 0, 0))
_nan_affine = _header(292, struct.pack("<f", np.nan))


def _colors(path):
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, [(c, np.uint8) for c in "RGB"]), np.eye(4)), path)


def _complex(path):
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.complex64), np.eye(4)), path)


def _beyond_float32(path):
    nib.save(nib.Nifti1Image(np.full(SHAPE, 1e300), np.eye(4)), path)


def _nan(path):
    array = np.zeros(SHAPE, np.float32)
    array[0, 0, :2] = np.nan
    save(path, array)


def test_a_label_map_of_several_volumes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "series.nii.gz"
    save(path, np.full((*SHAPE, 3), 0.5, np.float32))
    with pytest.raises(VolumeError, match=r"series\.nii\.gz: shape \(5, 6, 4, 3\), must be 3D$"):
        read_labels(path)


@pytest.mark.parametrize("reader", [read_volume, read_labels])
@pytest.mark.parametrize(
    "damage",
    [
        _missing,
        _truncated,
        _cut_in_the_checksum,
        _wrong_checksum,
        _empty,
        _text,
        pytest.param(_unknown_type, id="unknown_type"),
        pytest.param(_beyond_the_end, id="beyond_the_end"),
        pytest.param(_negative_size, id="negative_size"),
        pytest.param(_singular_affine, id="singular_affine"),
        pytest.param(_nan_affine, id="nan_affine"),
        _plane,
        _colors,
        _complex,
        _beyond_float32,
        _nan,
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_file(tmp_path, damage, reader):
    path = tmp_path / "image.nii.gz"
    damage(path)
    with pytest.raises(VolumeError) as error:
        reader(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", [read_volume, read_labels])
@pytest.mark.parametrize("damage", [_cut_in_the_checksum, _wrong_checksum])
def test_damage_after_the_last_voxel_is_found(tmp_path, damage, reader):
    path = tmp_path / "image.nii.gz"
    damage(path)
    with pytest.raises(VolumeError, match=r"not a readable NIfTI file \(C"):
        reader(path)


@pytest.mark.parametrize("damage", [_singular_affine, _nan_affine])
def test_affine_must_place_voxels_in_space(tmp_path, damage):
    path = tmp_path / "image.nii.gz"
    damage(path)
    for use in (read_volume, lambda like: write_labels(tmp_path / "o.nii", np.zeros(SHAPE), like)):
        with pytest.raises(VolumeError, match=r"image.nii.gz: affine must be finite and invertib"):
            use(path)


@pytest.mark.parametrize("name", ["image.png", "image.img", "image"])
def test_other_kinds_of_file_are_told(tmp_path, name):
    save(tmp_path / "label.nii", np.zeros(SHAPE, np.uint8))
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(VolumeError, match=rf"{name}: must end in \.nii or \.nii\.gz$"):
        read_volume(tmp_path / name)
    with pytest.raises(VolumeError, match=rf"{name}: must end in \.nii or \.nii\.gz$"):
        write_labels(tmp_path / name, np.zeros(SHAPE, int), like=tmp_path / "label.nii")
    assert (tmp_path / name).read_bytes() == b"something else"


def test_labels_must_be_whole_numbers(tmp_path):
    save(tmp_path / "label.nii.gz", np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(VolumeError, match="whole numbers"):
        read_labels(tmp_path / "label.nii.gz")


def test_without_nibabel_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['nibabel'] = None\n"
        "from unetr_flax.imaging.nifti import read_volume\n"
        "from unetr_flax.imaging.volume import VolumeError\n"
        "try: read_volume('x.nii')\n"
        "except VolumeError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout == "NIfTI files need nibabel: pip install 'unetr-flax[volumes]'\n"
