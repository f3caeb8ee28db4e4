import contextlib
import gzip
import os
import socket
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from unetr_flax.imaging import VolumeError, read_labels, read_scan, stored_voxels, write_labels
from unetr_flax.imaging.nifti_file import open_nifti

nib = pytest.importorskip("nibabel")

SHAPE = (5, 6, 4)
STORED = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.int16)


def content(array=STORED, kind=nib.Nifti1Image, **fields):
    """Returns the bytes of a file whose header has some other fields."""
    image = kind(array, np.diag([1.0, 2.0, 3.0, 1.0]), dtype=array.dtype)
    data = image.to_bytes()
    header = kind.header_class(data[: kind.header_class.sizeof_hdr], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + data[header.sizeof_hdr :]


def assert_refused(path, message):
    """Checks what all functions say that read the file."""
    for read in (
        read_scan,
        read_labels,
        lambda like: write_labels(path.with_name("out.nii"), STORED, like),
    ):
        with pytest.raises(VolumeError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)


@contextlib.contextmanager
def peak_memory_below(limit):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "claim",
    [
        content(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
        content(dim=[4, 5, 6, 4, 32767, 1, 1, 1]),
        content(dim=[3, -1, 1, 1, 1, 1, 1, 1], glmin=2**31 - 1),
        content(kind=nib.Nifti2Image, dim=[3, 2**40, 2**40, 2**40, 1, 1, 1, 1]),
        content(vox_offset=1e9),
    ],
    ids=["volume", "channels", "freesurfer", "nifti2", "offset"],
)
def test_voxels_that_a_file_cannot_hold_are_refused_before_they_are_allocated(
    tmp_path, claim, compress
):
    (tmp_path / "scan.nii.gz").write_bytes(compress(claim))
    with peak_memory_below(1 << 20):
        assert_refused(tmp_path / "scan.nii.gz", "its header claims .* bytes; the file can hold ")


def test_one_byte_less_than_the_header_claims(tmp_path):
    (tmp_path / "scan.nii").write_bytes(content()[:-1])
    assert_refused(tmp_path / "scan.nii", "claims 5 x 6 x 4 voxels of int16, 592 bytes; the file c")
    (tmp_path / "scan.nii").write_bytes(content())
    np.testing.assert_array_equal(read_labels(tmp_path / "scan.nii")[0], STORED)


def test_a_compressed_file_that_goes_on_is_not_decompressed_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_voxels, "_CHUNK", 1 << 16)
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(content() + bytes(1 << 25), 6))
    with peak_memory_below(1 << 23):
        for read in (read_scan, read_labels):
            with pytest.raises(VolumeError, match="it goes on for more than 1048576 bytes after"):
                read(path)
    path.write_bytes(gzip.compress(content() + bytes(1 << 20)))
    np.testing.assert_array_equal(read_labels(path)[0], STORED)


def test_the_content_tells_whether_a_file_is_compressed(tmp_path):
    (tmp_path / "scan.nii").write_bytes(gzip.compress(content()))
    (tmp_path / "scan.nii.gz").write_bytes(content())
    # As bgzip and pigz write: several members in one file.
    half = len(content()) // 2
    members = gzip.compress(content()[:half]) + gzip.compress(content()[half:])
    (tmp_path / "members.nii.gz").write_bytes(members)
    for name in ("scan.nii", "scan.nii.gz", "members.nii.gz"):
        np.testing.assert_array_equal(read_labels(tmp_path / name)[0], STORED)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"not a readable NIfTI file \(an empty file\)$"),
        (b"\x5c\x01\x00\x00", "no header of NIfTI-1 or NIfTI-2"),
        (content()[:347], "no header of NIfTI-1 or NIfTI-2"),
        (content(magic=b"ni1"), r"the header of a pair \.hdr and \.img, must be one file"),
        (content(magic=b""), "magic string '' is not valid"),
        (content(dim=[0, 5, 6, 4, 1, 1, 1, 1]), "0 axes, must be 1 to 7"),
        (content(dim=[3, 5, 0, 4, 1, 1, 1, 1]), r"shape \(5, 0, 4\), must be 3D"),
        (content(dim=[2, 5, 6, 4, 1, 1, 1, 1]), r"shape \(5, 6\), must be 3D"),
        (content(dim=[5, 5, 6, 2, 1, 2, 1, 1]), r"shape \(5, 6, 2, 1, 2\), must be 3D"),
        (content(vox_offset=np.nan), "not a readable NIfTI file"),
        (content(vox_offset=np.inf), "not a readable NIfTI file"),
        (content(vox_offset=0), "its header says that voxels begin at byte 0"),
        (content(vox_offset=-4), "not a readable NIfTI file"),
        (content(scl_slope=2, scl_inter=np.inf), "Valid slope but invalid intercept inf"),
        (content(datatype=128, bitpix=24), r"voxels are colors \(R, G, B\), must be real"),
        (content(datatype=2304, bitpix=32), r"voxels are colors \(R, G, B, A\), must be real"),
        (content(datatype=32, bitpix=64), "voxels are complex64, must be real"),
        (content(datatype=1, bitpix=1), "not a readable NIfTI file"),
        (content(srow_x=[1e9, 0, 0, 0]), r"voxels of 1e\+09 x 2 x 3 mm, must be 1e-06 to 10000 mm"),
        (content(srow_y=[0, 0, 0, 0]), "affine must be finite and invertible"),
        (content(srow_z=[0, 0, np.inf, 0]), "affine must be finite and invertible"),
        (content(kind=nib.Nifti2Image, intent_code=3002), "a CIFTI file, which has no voxel grid"),
    ],
)
def test_headers_that_cannot_be_used(tmp_path, data, message):
    (tmp_path / "scan.nii").write_bytes(data)
    assert_refused(tmp_path / "scan.nii", rf"scan\.nii: .*{message}")


def test_files_of_nibabel_without_an_affine(tmp_path):
    axes = (
        nib.cifti2.SeriesAxis(0, 1, 2),
        nib.cifti2.BrainModelAxis.from_mask(np.ones((2, 2, 2), bool), "cortex", np.eye(4)),
    )
    image = nib.Cifti2Image(np.zeros((2, 8), np.float32), axes)
    nib.save(image, tmp_path / "scan.dtseries.nii")
    assert_refused(tmp_path / "scan.dtseries.nii", "a CIFTI file, which has no voxel grid")


def _fifo(path):
    os.mkfifo(path)


def _loop(path):
    path.symlink_to(path.name)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_fifo, "a named pipe, must be a file"),
        (_loop, "cannot be opened .*symbolic links"),
        (_socket, "a socket, must be a file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, must be a file"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
        (lambda path: None, "no such file"),
    ],
)
def test_what_is_no_file_is_told_and_not_waited_for(tmp_path, monkeypatch, make, message):
    # Names of sockets are short.
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "scan.nii.gz") if make is not _socket else make(Path("scan.nii.gz"))
    assert_refused(tmp_path / "scan.nii.gz", rf"scan\.nii\.gz: {message}")


def test_a_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "scan.nii.gz").mkdir()
    with pytest.raises(VolumeError, match=r"scan\.nii\.gz: a folder without DICOM slices"):
        read_scan(tmp_path / "scan.nii.gz")
    with pytest.raises(VolumeError, match=r"scan\.nii\.gz: a folder, must be a file"):
        read_labels(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize("name", ["two\nlines\r\x1b[31m.nii", "no\udcffutf8.nii"])
def test_names_stay_one_printable_line(tmp_path, name):
    assert_refused(tmp_path / name, r"(two\\nlines\\r\\x1b\[31m|no\\udcffutf8)\.nii: no such file")
    (tmp_path / name).write_bytes(content())
    np.testing.assert_array_equal(read_labels(tmp_path / name)[0], STORED)


def test_voxels_that_do_not_fit_into_memory_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "scan.nii").write_bytes(content())

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    for read in (read_scan, read_labels):
        with pytest.raises(VolumeError, match=r"scan\.nii: its voxels are more than memory holds"):
            read(tmp_path / "scan.nii")


def scaled_mask(labels, slope, intercept=0.0, dtype=np.int16):
    """Returns the bytes of a mask that is stored with a slope and an intercept."""
    stored = np.rint((labels - intercept) / slope).astype(dtype)
    return content(stored, scl_slope=slope, scl_inter=intercept)


@pytest.mark.parametrize("highest", [1, 3, 104])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_masks_that_were_stored_with_slope_and_intercept(tmp_path, dtype, highest):
    labels = np.random.default_rng(0).integers(0, highest + 1, SHAPE)
    image = nib.Nifti1Image(labels.astype(np.float64), np.eye(4))
    image.set_data_dtype(dtype)
    nib.save(image, tmp_path / "nibabel.nii")
    assert nib.load(tmp_path / "nibabel.nii").dataobj.slope != 1
    np.testing.assert_array_equal(read_labels(tmp_path / "nibabel.nii")[0], labels)
    mask = scaled_mask(labels, (highest + 0.3) / 120, -0.1, dtype)
    (tmp_path / "scan.nii").write_bytes(mask)
    np.testing.assert_array_equal(read_labels(tmp_path / "scan.nii")[0], labels)


def test_integers_between_which_a_whole_number_was_rounded_away_are_no_labels(tmp_path):
    stored = np.full(SHAPE, 3, np.int16)
    stored[1, 2, 3] = 4
    (tmp_path / "scan.nii").write_bytes(content(stored, scl_slope=1 / 3))
    message = r"must be whole numbers of 32 bits, voxel \(1, 2, 3\) of the file is 1\.3333"
    with pytest.raises(VolumeError, match=message):
        read_labels(tmp_path / "scan.nii")


@pytest.mark.parametrize("value", ["0.5", "nan", "inf", "3e+09", "1.00000012"])
def test_the_first_voxel_that_is_no_label_is_shown(tmp_path, value):
    array = np.ones(SHAPE, np.float32)
    array[1, 0, 2] = array[0, 0, 3] = float(value)
    (tmp_path / "scan.nii").write_bytes(content(array))
    with pytest.raises(VolumeError, match=r"voxel \(0, 0, 3\)|voxel \(1, 0, 2\)") as error:
        read_labels(tmp_path / "scan.nii")
    assert str(error.value).endswith(f"of the file is {value}")


def test_wide_integers_are_compared_exactly(tmp_path):
    array = np.full(SHAPE, 2**31 - 1, np.int64)
    (tmp_path / "scan.nii").write_bytes(content(array))
    assert (read_labels(tmp_path / "scan.nii")[0] == 2**31 - 1).all()
    (tmp_path / "scan.nii").write_bytes(content(array + 1))
    with pytest.raises(VolumeError, match=r"of the file is 2\.14748365e\+09$"):
        read_labels(tmp_path / "scan.nii")


def test_headers_are_read_without_the_voxels(tmp_path):
    # The last voxels are missing, which only reading them shows.
    stored = np.random.default_rng(0).integers(0, 9, (40, 40, 40)).astype(np.int16)
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(content(stored))[:-3000])
    file = open_nifti(tmp_path / "scan.nii.gz")
    assert file.grid.shape == (40, 40, 40)
    with pytest.raises(VolumeError, match="not a readable NIfTI file"):
        file.read_stored()


def test_magic_and_length_of_the_header_are_those_of_the_standard():
    data = content()
    assert struct.unpack("<i", data[:4]) == (348,)
    assert data[344:348] == b"n+1\0"
