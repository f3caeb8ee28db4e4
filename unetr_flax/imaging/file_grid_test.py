import itertools
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from unetr_flax.imaging import VolumeError, file_grid, read_scan
from unetr_flax.imaging.file_grid import FileGrid

nib = pytest.importorskip("nibabel")

SHAPE = (5, 6, 4)
ORDERS = [
    "".join(codes)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*axes)
]
SHEAR = np.eye(4)
SHEAR[0, 1] = SHEAR[1, 2] = 0.2
TURN = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.25), (-3, 20, 7.5))
PLACEMENTS = {"straight": np.eye(4), "oblique": TURN, "sheared": TURN @ SHEAR}


def affine_of(codes, placement="oblique", spacing=(0.8, 0.9, 5.0)):
    """Makes an affine whose axes run as the codes say, before they are turned or sheared."""
    axes = nib.orientations.axcodes2ornt(codes)
    columns = np.zeros((4, 4))
    columns[axes[:, 0].astype(int), np.arange(3)] = axes[:, 1] * spacing
    columns[3, 3] = 1
    return PLACEMENTS[placement] @ columns


def turned(degrees, spacing=(0.8, 0.9, 5.0)):
    """Makes an affine turned about the third axis; near 45 degrees rounding swaps two axes."""
    a = np.radians(degrees)
    matrix = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    return nib.affines.from_matvec(matrix * spacing, (-3, 20, 7.5))


def save(path, array, affine=None, kind=None, endianness="<"):
    """Writes an array along a file's axes, as it is."""
    kind = kind or nib.Nifti1Image
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(array.dtype.newbyteorder(endianness))
    nib.save(kind(array, affine_of("LPS") if affine is None else affine, header), path)


def assert_same_grid(path, like):
    written, original = nib.load(path), nib.load(like)
    assert type(written) is type(original)
    assert written.header.endianness == original.header.endianness
    assert written.shape[:3] == original.shape[:3]
    for field in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b"):
        np.testing.assert_array_equal(written.header[field], original.header[field])
    for field in ("quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
        np.testing.assert_array_equal(written.header[field], original.header[field])
    np.testing.assert_array_equal(written.header["pixdim"][:4], original.header["pixdim"][:4])
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.header.get_xyzt_units()[0] == original.header.get_xyzt_units()[0]
    return np.asanyarray(written.dataobj)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("codes", ORDERS)
def test_thresholds_go_back_voxel_for_voxel_from_all_48_orders(tmp_path, codes, placement):
    stored = np.random.default_rng(0).integers(-99, 99, SHAPE).astype(np.int16)
    save(tmp_path / "scan.nii", stored, affine_of(codes, placement))
    scan = read_scan(tmp_path / "scan.nii")
    assert nib.aff2axcodes(scan.volume.affine) == tuple("RAS")
    assert scan.volume.array.shape == (*scan.grid.canonical_shape, 1)
    scan.grid.write_labels(tmp_path / "out.nii", scan.volume.array[..., 0] > 10)
    written = assert_same_grid(tmp_path / "out.nii", tmp_path / "scan.nii")
    np.testing.assert_array_equal(written, stored > 10)
    assert written.dtype == np.uint8


def test_flipped_and_permuted_copies_are_one_scan(tmp_path):
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=SHAPE), affine_of("LPS"))
    for codes in ORDERS:
        transform = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
        )
        nib.save(image.as_reoriented(transform), tmp_path / f"{codes}.nii")
    first, *others = (read_scan(tmp_path / f"{codes}.nii").volume for codes in ORDERS)
    for other in others:
        np.testing.assert_array_equal(other.array, first.array)
        np.testing.assert_allclose(other.affine, first.affine, atol=1e-5)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("endianness", "<>")
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_every_format_and_dtype(tmp_path, dtype, kind, endianness, ending):
    stored = np.random.default_rng(0).integers(0, 99, SHAPE).astype(dtype)
    path, out = tmp_path / f"scan{ending}", tmp_path / f"out{ending}"
    save(path, stored, None, kind, endianness)
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.volume.array[::-1, ::-1, :, 0], stored)
    scan.grid.write_labels(out, scan.volume.array[..., 0].astype(int) * 9)
    written = assert_same_grid(out, path)
    np.testing.assert_array_equal(written, stored.astype(int) * 9)
    assert written.dtype == np.dtype(np.uint16).newbyteorder(endianness)


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, -3), (-2, 0), (1, 10), (0, 7), (np.nan, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_slope_and_intercept_are_read_as_nibabel_does_and_not_written(
    tmp_path, dtype, slope, intercept
):
    stored = np.random.default_rng(0).integers(0, 99, SHAPE).astype(dtype)
    image = nib.Nifti1Image(stored, affine_of("RAS"))
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    (tmp_path / "scan.nii").write_bytes(content)
    scan = read_scan(tmp_path / "scan.nii")
    expected = np.asarray(nib.load(tmp_path / "scan.nii").dataobj).astype(np.float32)
    np.testing.assert_array_equal(scan.volume.array[..., 0], expected)
    labels = stored.astype(np.int32)
    scan.grid.write_labels(tmp_path / "out.nii", labels)
    np.testing.assert_array_equal(
        assert_same_grid(tmp_path / "out.nii", tmp_path / "scan.nii"), labels
    )
    proxy = nib.load(tmp_path / "out.nii").dataobj
    assert (proxy.slope, proxy.inter) == (1, 0)


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2), (4, 1), (1, 3)])
def test_both_forms_and_codes_stay(tmp_path, codes):
    image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), None)
    image.set_qform(affine_of("LPS"), codes[0])
    image.set_sform(affine_of("PIR"), codes[1])
    image.header["pixdim"][0] = -1
    nib.save(image, tmp_path / "scan.nii.gz")
    scan = read_scan(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(scan.grid.affine, image.header.get_best_affine())
    scan.grid.write_labels(tmp_path / "out.nii", np.zeros(scan.grid.canonical_shape, np.uint8))
    assert_same_grid(tmp_path / "out.nii", tmp_path / "scan.nii.gz")


def test_labels_of_a_4d_file_are_3d(tmp_path):
    save(tmp_path / "scan.nii", np.zeros((*SHAPE, 1), np.int16))
    scan = read_scan(tmp_path / "scan.nii")
    assert scan.volume.array.shape == (*SHAPE, 1)
    scan.grid.write_labels(tmp_path / "out.nii", np.zeros(SHAPE, np.uint8))
    assert assert_same_grid(tmp_path / "out.nii", tmp_path / "scan.nii").shape == SHAPE


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("codes", ["RAS", "PIR", "SAL"])
def test_probabilities_are_4d_with_classes_last(tmp_path, codes, dtype):
    save(tmp_path / "scan.nii.gz", np.zeros(SHAPE, np.int16), affine_of(codes), endianness=">")
    grid = read_scan(tmp_path / "scan.nii.gz").grid
    probabilities = np.random.default_rng(0).random((*grid.canonical_shape, 3)).astype(dtype)
    grid.write_probabilities(tmp_path / "out.nii.gz", probabilities)
    written = assert_same_grid(tmp_path / "out.nii.gz", tmp_path / "scan.nii.gz")
    assert written.dtype == np.dtype(">f4")
    assert written.shape == (*SHAPE, 3)
    np.testing.assert_array_equal(
        read_scan(tmp_path / "out.nii.gz").volume.array, probabilities.astype(np.float32)
    )


def test_large_arrays_are_written_slab_by_slab(tmp_path, monkeypatch):
    monkeypatch.setattr(file_grid, "_SLAB_BYTES", 100)
    grid = FileGrid.from_affine((7, 8, 9), affine_of("IRP"))
    labels = np.random.default_rng(0).integers(0, 5, grid.canonical_shape)
    grid.write_labels(tmp_path / "out.nii.gz", labels)
    np.testing.assert_array_equal(read_scan(tmp_path / "out.nii.gz").volume.array[..., 0], labels)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("codes", ["LPS", "RAS", "ASL"])
def test_grid_of_another_format_is_written_as_nifti(tmp_path, codes, placement):
    affine = affine_of(codes, placement)
    grid = FileGrid.from_affine(SHAPE, affine)
    grid.write_labels(tmp_path / "out.nii", np.zeros(grid.canonical_shape, np.uint8))
    written = nib.load(tmp_path / "out.nii")
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    qform, code = written.get_qform(coded=True)
    assert written.header["sform_code"] == 1
    # Shears have no place in a qform.
    assert (code == 0) == (placement == "sheared")
    if code:
        np.testing.assert_allclose(qform, affine, atol=1e-5)
    np.testing.assert_allclose(
        written.header.get_zooms(), nib.affines.voxel_sizes(affine), rtol=1e-6
    )


def test_axes_too_long_for_nifti_1(tmp_path):
    grid = FileGrid.from_affine((40000, 1, 2), np.eye(4))
    grid.write_labels(tmp_path / "out.nii", np.zeros((40000, 1, 2), bool))
    assert type(nib.load(tmp_path / "out.nii")) is nib.Nifti2Image


GRID = FileGrid.from_affine(SHAPE, affine_of("PIR"))
LABELS = np.ones(GRID.canonical_shape, np.uint8)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: GRID.write_labels(p / "o.mha", LABELS), r"o.mha: must end in .nii or .nii.gz"),
        (lambda p: GRID.write_labels(p / "o.nii", LABELS[1:]), r"labels have \(3, 5, 6\), the g"),
        (lambda p: GRID.write_labels(p / "o.nii", LABELS / 2), "labels are float64, must be int"),
        (lambda p: GRID.write_labels(p / "o.nii", LABELS * -1.0), "labels are float64"),
        (lambda p: GRID.write_probabilities(p / "o.nii", LABELS * 1.0), "must be floating numb"),
        (lambda p: GRID.write_probabilities(p / "o.nii", LABELS[..., None]), "are uint8"),
    ],
)
def test_results_that_do_not_fit_are_told(tmp_path, write, message):
    with pytest.raises(VolumeError, match=message):
        write(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_full_disk_leaves_nothing_and_is_one_line(tmp_path, ending):
    grid = FileGrid.from_affine((60, 60, 60), np.eye(4))
    noise = np.random.default_rng(0).random((60, 60, 60, 2))
    path = tmp_path / f"out{ending}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"out.nii.*: cannot be written \(File too large\)$"):
            grid.write_probabilities(path, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_an_interrupted_write_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    GRID.write_labels(tmp_path / "out.nii", LABELS)
    before = (tmp_path / "out.nii").read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(file_grid, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        GRID.write_labels(tmp_path / "out.nii", LABELS * 2)
    assert os.listdir(tmp_path) == ["out.nii"]
    assert (tmp_path / "out.nii").read_bytes() == before


def test_a_killed_write_keeps_the_file_that_was_there(tmp_path):
    GRID.write_labels(tmp_path / "out.nii", LABELS)
    before = (tmp_path / "out.nii").read_bytes()
    code = (
        "import os, signal, sys, numpy as np\n"
        "from unetr_flax.imaging import FileGrid\n"
        f"grid = FileGrid.from_affine({SHAPE}, np.eye(4))\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"grid.write_labels(sys.argv[1], np.ones({SHAPE}, int))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "out.nii"], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (tmp_path / "out.nii").read_bytes() == before


def test_places_that_cannot_be_written_to_are_one_line(tmp_path):
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "file").touch()
    for name in ("no\nfolder/out.nii", "folder.nii", "file/out.nii", f"{'x' * 300}.nii"):
        with pytest.raises(OSError, match="cannot be written") as error:
            GRID.write_labels(tmp_path / name, LABELS)
        assert "\n" not in str(error.value)
        assert ".tmp" not in str(error.value)


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / f"{'x' * 248}.nii.gz"
    GRID.write_labels(path, LABELS)
    assert path.is_file()
