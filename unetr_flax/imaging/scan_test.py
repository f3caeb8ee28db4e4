import numpy as np
import pytest

from unetr_flax.imaging import VolumeError, read_scan, read_volume
from unetr_flax.imaging.file_grid_test import affine_of, save, turned

nib = pytest.importorskip("nibabel")

SHAPE = (5, 6, 4)
RNG = np.random.default_rng(0)
CHANNELS = [RNG.integers(-99, 99, SHAPE).astype(np.float32) for _ in range(3)]


def save_channels(folder, arrays=CHANNELS, affines=None):
    paths = [folder / f"case_{i:04d}.nii.gz" for i in range(len(arrays))]
    for i, (path, array) in enumerate(zip(paths, arrays, strict=True)):
        save(path, array, affines[i] if affines else affine_of("LPS"))
    return paths


def test_a_file_per_channel(tmp_path):
    paths = save_channels(tmp_path)
    scan = read_scan(paths)
    assert scan.volume.array.shape == (*SHAPE, 3)
    assert scan.volume.array.dtype == np.float32
    assert scan.volume.array.flags.c_contiguous
    for i, path in enumerate(paths):
        np.testing.assert_array_equal(
            scan.volume.array[..., i], read_scan(path).volume.array[..., 0]
        )
    np.testing.assert_array_equal(scan.grid.affine, nib.load(paths[0]).affine)
    assert scan.nan_voxels == 0


def test_channels_may_lie_on_disk_in_other_orders_of_one_grid(tmp_path):
    paths = save_channels(tmp_path)
    expected = read_scan(paths).volume
    image = nib.load(paths[1])
    transform = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("SAR")
    )
    nib.save(nib.Nifti1Image(CHANNELS[1], image.affine).as_reoriented(transform), paths[1])
    np.testing.assert_array_equal(read_scan(paths).volume.array, expected.array)


def test_rounding_near_45_degrees_turns_no_channel(tmp_path):
    affines = [turned(44.9999), turned(45.0001), turned(44.9999)]
    assert (nib.io_orientation(affines[0]) != nib.io_orientation(affines[1])).any()
    scan = read_scan(save_channels(tmp_path, affines=affines))
    on_file_axes = scan.grid.view_on_file_axes(scan.volume.array)
    np.testing.assert_array_equal(on_file_axes, np.stack(CHANNELS, -1))


def test_channels_on_other_grids_are_told_with_the_numbers(tmp_path):
    shifted = affine_of("LPS")
    shifted[:3, 3] += shifted[:3, 2] * 0.3
    paths = save_channels(tmp_path, affines=[affine_of("LPS"), shifted, shifted])
    with pytest.raises(VolumeError) as error:
        read_scan(paths)
    assert str(error.value) == (
        f"{paths[1]}: its grid is off by 0.3 voxels (1.5 mm) at a corner from {paths[0]}; the "
        "channels of a scan must agree within 0.1 voxels"
    )
    paths = save_channels(tmp_path, [CHANNELS[0], CHANNELS[1][:, 1:]])
    with pytest.raises(
        VolumeError, match=r"0001.nii.gz: grid of \(5, 5, 4\) voxels, .* has \(5, 6"
    ):
        read_scan(paths)


@pytest.mark.parametrize(("factor", "fits"), [(1.02, True), (1.05, False)])
def test_the_farthest_corner_counts(tmp_path, factor, fits):
    # A spacing that is a little off adds up over the voxels.
    other = affine_of("RAS", "straight")
    other[0, 0] *= factor
    paths = save_channels(tmp_path, CHANNELS[:2], [affine_of("RAS", "straight"), other])
    if fits:
        read_scan(paths)
    else:
        with pytest.raises(VolumeError, match=r"off by 0\.225 voxels \(0\.18 mm\) at a corner"):
            read_scan(paths)


def test_each_of_several_files_is_one_channel(tmp_path):
    paths = save_channels(tmp_path, [CHANNELS[0], np.stack(CHANNELS[:2], -1)])
    with pytest.raises(VolumeError, match=r"0001\.nii\.gz: 2 channels, must be one per file"):
        read_scan(paths)


def with_nan(array, *values):
    array = array.copy()
    array.flat[7 : 7 + len(values)] = values
    return array


def test_voxels_that_are_nan_or_infinite_are_counted(tmp_path):
    broken = with_nan(CHANNELS[0], np.nan, np.inf, -np.inf)
    paths = save_channels(tmp_path, [CHANNELS[1], broken])
    message = r"case_0001\.nii\.gz: 3 voxels are NaN or infinite, all must be finite"
    with pytest.raises(VolumeError, match=message):
        read_scan(paths)
    with pytest.raises(VolumeError, match=message):
        read_volume(paths[1])


def test_they_become_the_lowest_intensity_of_their_channel_where_allowed(tmp_path):
    arrays = [with_nan(CHANNELS[0], np.nan, np.inf), CHANNELS[1], with_nan(CHANNELS[2], -np.inf)]
    paths = save_channels(tmp_path, arrays, [affine_of("RAS")] * 3)
    scan = read_scan(paths, allow_nan=True)
    assert scan.nan_voxels == 3
    for i, array in enumerate(arrays):
        finite = np.isfinite(array)
        expected = np.where(finite, array, array[finite].min())
        np.testing.assert_array_equal(scan.volume.array[..., i], expected)
    save(tmp_path / "4d.nii", np.stack(arrays, -1), affine_of("RAS"))
    together = read_scan(tmp_path / "4d.nii", allow_nan=True)
    np.testing.assert_array_equal(together.volume.array, scan.volume.array)
    assert together.nan_voxels == 3


def test_a_channel_without_a_finite_voxel(tmp_path):
    save(tmp_path / "a.nii", np.full(SHAPE, np.nan, np.float32))
    with pytest.raises(VolumeError, match=r"a\.nii: channel 0 has no finite voxel"):
        read_scan(tmp_path / "a.nii", allow_nan=True)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no files of a scan are given"),
        ("scan.png", r"scan\.png: must end in \.nii, \.nii\.gz, \.nrrd, \.mha, \.mhd, or be the"),
        ("scan.img", r"scan\.img: .*; pairs \.hdr and \.img must be converted$"),
        ("missing.nii", r"missing\.nii: no such file"),
        ("missing", "missing: no such file"),
        (["scan.nii", "scan.png"], r"scan\.png: must end in"),
        (".", "a folder without DICOM slices"),
    ],
)
def test_what_is_no_scan_is_told(tmp_path, monkeypatch, images, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "scan.nii", CHANNELS[0])
    for name in ("scan.png", "scan.img", "scan.hdr"):
        (tmp_path / name).write_bytes(b"something else" * 99)
    with pytest.raises(VolumeError, match=message) as error:
        read_scan(images)
    assert "\n" not in str(error.value)
