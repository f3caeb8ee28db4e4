"""NRRD and MetaImage files are read as ITK reads them, or refused in one line."""

import gzip
import random
import tracemalloc
import zlib

import numpy as np
import pytest

from unetr_flax.imaging import VolumeError, read_scan
from unetr_flax.imaging.file_grid_test import TURN

nib = pytest.importorskip("nibabel")

SHAPE = (6, 5, 4)
STORED = np.random.default_rng(0).integers(0, 99, SHAPE).astype("<i2")
BODY = STORED.tobytes(order="F")


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_files_that_itk_writes_are_read_as_itk_reads_them(tmp_path, dtype, compress, ending):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(STORED.T.astype(dtype))
    image.SetSpacing((0.7, 0.8, 3))
    image.SetOrigin((-50, 20, 7))
    # Axes that run in another order than the canonical ones, and are turned.
    image.SetDirection(TURN[[2, 0, 1], :3].ravel().tolist())
    path = tmp_path / f"scan{ending}"
    sitk.WriteImage(image, path, useCompression=compress)
    sitk.WriteImage(image, tmp_path / "itk.nii")
    scan, expected = read_scan(path), read_scan(tmp_path / "itk.nii")
    np.testing.assert_array_equal(scan.volume.array, expected.volume.array)
    np.testing.assert_allclose(scan.volume.affine, expected.volume.affine, atol=1e-5)
    scan.grid.write_labels(tmp_path / "out.nii.gz", scan.volume.array[..., 0] > 30)
    written = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(written.dataobj, STORED > 30)
    np.testing.assert_allclose(written.affine, nib.load(tmp_path / "itk.nii").affine, atol=1e-5)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_the_fourth_axis_is_channels_as_itk_writes_it(tmp_path, ending):
    sitk = pytest.importorskip("SimpleITK")
    stored = np.random.default_rng(0).integers(0, 99, (*SHAPE, 2)).astype(np.uint8)
    image = sitk.GetImageFromArray(stored.T, isVector=False)
    sitk.WriteImage(image, tmp_path / f"scan{ending}")
    array = read_scan(tmp_path / f"scan{ending}").volume.array
    np.testing.assert_array_equal(array[::-1, ::-1], stored)


def nrrd(body=BODY, **fields):
    """Returns the bytes of an NRRD file whose header has some other fields, or lacks those of None.

    Underscores in names stand for spaces.
    """
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "6 5 4",
        "space_directions": "(1,0,0) (0,2,0) (0,0,3)",
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space_origin": "(5,6,7)",
    } | fields
    lines = [f"{k.replace('_', ' ')}: {v}" for k, v in fields.items() if v is not None]
    return ("NRRD0004\n# a comment\n" + "\n".join(lines) + "\nkey:=value\n\n").encode() + body


def metaimage(body=BODY, **fields):
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "5 6 7",
        "ElementSpacing": "1 2 3",
        "DimSize": "6 5 4",
        "ElementType": "MET_SHORT",
    } | fields
    # The field after which the voxels begin.
    fields["ElementDataFile"] = fields.pop("ElementDataFile", "LOCAL")
    lines = [f"{name} = {value}\n" for name, value in fields.items() if value is not None]
    return "".join(lines).encode() + body


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("raw.nrrd", nrrd()),
        ("gzip.nrrd", nrrd(gzip.compress(BODY, mtime=0), encoding="gzip")),
        ("big.nrrd", nrrd(STORED.astype(">i2").tobytes(order="F"), endian="big")),
        ("skip.nrrd", nrrd(b"skipped" + BODY, byte_skip="7")),
        (
            "ras.nrrd",
            nrrd(
                space="RAS",
                space_directions="(-1,0,0) (0,-2,0) (0,0,3)",
                space_origin="(-5,-6,7)",
            ),
        ),
        (
            "las.nrrd",
            nrrd(space="LAS", space_directions="(1,0,0) (0,-2,0) (0,0,3)", space_origin="(5,-6,7)"),
        ),
        ("no_space.nrrd", nrrd(space=None)),
        ("raw.mha", metaimage()),
        ("zlib.mha", metaimage(zlib.compress(BODY), CompressedData="True")),
        (
            "big.mha",
            metaimage(STORED.astype(">i2").tobytes(order="F"), BinaryDataByteOrderMSB="True"),
        ),
    ],
)
def test_variants_of_the_formats(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    scan = read_scan(tmp_path / name)
    np.testing.assert_array_equal(scan.volume.array[::-1, ::-1, :, 0], STORED)
    expected = np.diag([-1.0, -2.0, 3.0, 1.0])
    expected[:3, 3] = (-5, -6, 7)
    np.testing.assert_array_equal(scan.grid.affine, expected)


def test_channels_of_nrrd_may_be_any_axis(tmp_path):
    stored = np.random.default_rng(0).integers(0, 99, (2, *SHAPE)).astype(np.uint8)
    data = nrrd(
        stored.tobytes(order="F"),
        type="uint8",
        dimension="4",
        sizes="2 6 5 4",
        space_directions="none (1,0,0) (0,2,0) (0,0,3)",
        kinds="list domain domain domain",
    )
    (tmp_path / "scan.nrrd").write_bytes(data)
    array = read_scan(tmp_path / "scan.nrrd").volume.array
    np.testing.assert_array_equal(array[::-1, ::-1], np.moveaxis(stored, 0, -1))
    (tmp_path / "scan.nrrd").write_bytes(data.replace(b"list", b"RGBA-color"))
    with pytest.raises(VolumeError, match="kinds 'RGBA-color domain domain domain', must be"):
        read_scan(tmp_path / "scan.nrrd")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no header of NRRD"),
        (b"NRRD0004\ntype: short\n", "no end of its header"),
        (nrrd(encoding=None), "no field 'encoding'"),
        (nrrd(encoding="bzip2"), "encoding 'bzip2', must be one of raw, gz, gzip"),
        (nrrd(type="block"), "type 'block', must be one of"),
        (nrrd(endian=None), "endian '', must be one of little, big"),
        (nrrd(space="scanner-xyz"), "space 'scanner-xyz', must be one of"),
        (nrrd(data_file="other.raw"), "its voxels are in another file, must be in the same"),
        (nrrd(byte_skip="-1"), "skips .* are not read"),
        (nrrd(sizes="6 5"), "dimension 3 with sizes 6 5"),
        (nrrd(sizes="6 5 0"), r"shape \(6, 5, 0\), must be 3D"),
        (nrrd(dimension="2", sizes="6 5"), r"shape \(6, 5\), must be 3D"),
        (nrrd(sizes="60000 50000 4"), "claims 60000 x 50000 x 4 voxels of int16, 24000000000 byt"),
        (nrrd(BODY[:-1]), "claims 6 x 5 x 4 voxels of int16, 240 bytes; the file can hold 239"),
        (nrrd(gzip.compress(BODY, mtime=0)[:-9], encoding="gz"), "Compressed file ended before"),
        (
            nrrd(gzip.compress(BODY[:-1], mtime=0), encoding="gz"),
            "it ends 1 bytes before its last voxel",
        ),
        (nrrd(space_directions="(1,0,0) (0,2,0)"), "three numbers for each of three axes"),
        (nrrd(space_directions="(1,0,0) (0,2,0) (0,2,0)"), "affine must be finite and invert"),
        (nrrd(space_directions="(1,0,0) (0,2,0) (0,0,1e9)"), "voxels of 1 x 2 x 1e\\+09 mm"),
        (nrrd(space_origin="(1,2)"), "three numbers for each of three axes"),
        (nrrd(sizes="9" * 5000), "not a readable NRRD file"),
    ],
)
def test_nrrd_files_that_cannot_be_used(tmp_path, data, message):
    assert_refused(tmp_path / "scan.nrrd", data, message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no field NDims"),
        (b"\x93\x00\xff" * 99, "no header of MetaImage"),
        (metaimage(DimSize=None), "no field DimSize"),
        (metaimage(NDims="2"), "NDims 2 with DimSize 6 5 4"),
        (metaimage(DimSize="6 5 -4"), r"shape \(6, 5, -4\), must be 3D"),
        (metaimage(DimSize="60000 50000 4"), "claims 60000 x 50000 x 4 voxels of int16"),
        (metaimage(BODY[:-1]), "claims 6 x 5 x 4 voxels of int16, 240 bytes; the file can hold 23"),
        (metaimage(ElementType="MET_OTHER"), "1 numbers of type MET_OTHER in each voxel, must be"),
        (metaimage(ElementNumberOfChannels="3"), "3 numbers of type MET_SHORT in each voxel"),
        (metaimage(BinaryData="False"), "its voxels are text, must be binary"),
        (metaimage(BinaryData="maybe"), "BinaryData 'maybe', must be True or False"),
        (metaimage(ElementDataFile="LIST"), "must be LOCAL or the name of a file beside it"),
        (metaimage(ElementDataFile="s%03d.raw 1 9 1"), "must be LOCAL or the name of a file bes"),
        (metaimage(ElementDataFile="../scan.raw"), "must be LOCAL or the name of a file beside"),
        (metaimage(ElementDataFile="/etc/passwd"), "must be LOCAL or the name of a file beside"),
        (metaimage(ElementDataFile="other.raw"), "other.raw: no such file"),
        (metaimage(TransformMatrix="1 0 0 0 1"), "TransformMatrix '1 0 0 0 1', must be 9 num"),
        (metaimage(ElementSpacing="1 2 0"), "affine must be finite and invertible"),
        (metaimage(zlib.compress(BODY)[:-9], CompressedData="True"), "compressed data end before"),
        (metaimage(zlib.compress(BODY[:-1]), CompressedData="True"), "ends 1 bytes before its la"),
        (metaimage(BODY, CompressedData="True"), "incorrect header check"),
        (metaimage(HeaderSize="-1"), "HeaderSize -1, must be 0 or above"),
    ],
)
def test_metaimage_files_that_cannot_be_used(tmp_path, data, message):
    assert_refused(tmp_path / "scan.mha", data, message)


def assert_refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(VolumeError, match=message) as error:
        read_scan(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("scan.nrrd", nrrd(gzip.compress(BODY + bytes(1 << 25), mtime=0), encoding="gzip")),
        ("scan.mha", metaimage(zlib.compress(BODY + bytes(1 << 25)), CompressedData="True")),
    ],
)
def test_compressed_data_that_go_on_are_not_decompressed_to_their_end(tmp_path, name, data):
    tracemalloc.start()
    try:
        assert_refused(tmp_path / name, data, "it goes on for more than 1048576 bytes after its l")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.mha"])
def test_mutated_files_are_read_or_refused(tmp_path, name):
    rng = random.Random(0)
    read = 0
    for number in range(400):
        if name == "scan.nrrd":
            data = nrrd(gzip.compress(BODY, mtime=0), encoding="gzip") if number % 2 else nrrd()
        else:
            compressed = metaimage(zlib.compress(BODY), CompressedData="True")
            data = compressed if number % 2 else metaimage()
        data = bytearray(data)
        for _ in range(rng.choice((1, 2, 4))):
            at = rng.randrange(len(data) - 4)
            data[at : at + 4] = rng.choice(
                (rng.randbytes(4), b"9999", b" -1 ", b"nan ", b"1e99", b"\n", data[at : at + 9])
            )
        if rng.random() < 0.2:
            del data[rng.randrange(4, len(data)) :]
        (tmp_path / name).write_bytes(data)
        try:
            scan = read_scan(tmp_path / name)
        except VolumeError as error:
            said = str(error)
        else:
            said = ""
            read += 1
            assert scan.volume.array.size < 1 << 20
        assert "\n" not in said
    assert 40 < read < 360
