import collections
import random
import subprocess
import sys

import numpy as np
import pytest

from unetr_flax.imaging import VolumeError, find_cases, read_scan
from unetr_flax.imaging.file_grid_test import TURN

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")

SHAPE = (6, 5, 4)
SPACING = (0.7, 0.8, 3.0)
STORED = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
AXIAL = np.eye(3)
CT = "1.2.840.10008.5.1.4.1.1.2"


def write_slice(path, pixels, position, turn=AXIAL, series="1.2.3", number="2", **tags):
    """Writes one slice [X, Y] as a scanner would."""
    image = sitk.GetImageFromArray(pixels.T[None])
    image.SetSpacing(SPACING)
    tags = {
        "0008|0016": CT,
        "0008|0060": "CT",
        "0008|0018": f"{series}.{path.stem.encode().hex()[:12]}.{number}".replace("f", "9"),
        "0020|000d": "1.2",
        "0020|000e": series,
        "0020|0011": number,
        "0020|0032": "\\".join(f"{mm:.8g}" for mm in position),
        "0020|0037": "\\".join(f"{cosine:.8g}" for cosine in turn[:, :2].T.ravel()),
        "0028|1052": "-1024",
        "0028|1053": "1",
    } | tags
    for tag, value in tags.items():
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path))
    writer.Execute(image)


def write_series(folder, stored=STORED, turn=AXIAL, step=None, names=None, **tags):
    """Writes an array [X, Y, Z] as a series whose file names do not tell the order."""
    folder.mkdir(parents=True, exist_ok=True)
    step = turn[:, 2] * SPACING[2] if step is None else np.asarray(step)
    for z in range(stored.shape[2]):
        name = names[z] if names else f"{(z * 7 + 3) % 11:02d}"
        write_slice(folder / f"{name}.dcm", stored[:, :, z], (-50, 20, 7) + z * step, turn, **tags)
    return folder


def refusal(folder):
    with pytest.raises(VolumeError) as error:
        read_scan(folder)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(str(folder))


@pytest.mark.parametrize(
    "turn", [AXIAL, TURN[:3, :3], TURN[[2, 0, 1], :3]], ids=["axial", "oblique", "sagittal"]
)
def test_slices_are_sorted_by_position_and_lie_where_itk_has_them(tmp_path, turn):
    turn = turn * np.linalg.det(turn)
    folder = write_series(tmp_path / "ct", turn=turn)
    scan = read_scan(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    sitk.WriteImage(image, tmp_path / "itk.nii")
    expected = read_scan(tmp_path / "itk.nii")
    np.testing.assert_array_equal(scan.volume.array, expected.volume.array)
    np.testing.assert_allclose(scan.volume.affine, expected.volume.affine, atol=1e-4)
    np.testing.assert_allclose(scan.grid.affine, expected.grid.affine, atol=1e-4)
    scan.grid.write_labels(tmp_path / "labels.nii.gz", scan.volume.array[..., 0] > 0)
    written = nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(written.dataobj, STORED > 0)
    np.testing.assert_allclose(written.affine, nib.load(tmp_path / "itk.nii").affine, atol=1e-4)
    np.testing.assert_allclose(written.get_qform(), written.get_sform(), atol=1e-4)


def test_each_slice_is_rescaled_by_its_own_numbers(tmp_path):
    folder = write_series(tmp_path / "pet", STORED[:, :, :2])
    pixels = np.abs(STORED[:, :, 2]).astype(np.int16)
    write_slice(folder / "last.dcm", pixels, (-50, 20, 13), **{"0028|1052": "0", "0028|1053": "1"})
    array = read_scan(folder).volume.array[::-1, ::-1, :, 0]
    np.testing.assert_array_equal(array[:, :, :2], STORED[:, :, :2])
    np.testing.assert_array_equal(array[:, :, 2], pixels)


def test_missing_slices_are_told_with_the_numbers(tmp_path):
    folder = write_series(tmp_path / "ct", np.repeat(STORED, 2, axis=2), names="abcdefgh")
    (folder / "c.dcm").unlink()
    assert refusal(folder) == (
        ": slices are missing or uneven, 6 mm between 10 and 16 mm (b.dcm and d.dcm); 1 of 6 gaps "
        "are not 3 mm"
    )


def test_doubled_slices_are_told_with_the_numbers(tmp_path):
    folder = write_series(tmp_path / "ct", names="abcd")
    write_slice(folder / "again.dcm", STORED[:, :, 1], (-50, 20, 10))
    assert refusal(folder) == (
        ": 1 of 5 slices are doubled, the first at 10 mm (again.dcm and b.dcm)"
    )


def test_all_slices_doubled(tmp_path):
    folder = write_series(tmp_path / "ct", step=(0, 0, 0))
    assert refusal(folder).startswith(": 3 of 4 slices are doubled, the first at 7 mm")


def test_gantry_tilt_is_told(tmp_path):
    step = 3 * np.array([0, np.sin(np.radians(12)), np.cos(np.radians(12))])
    assert refusal(write_series(tmp_path / "ct", step=step)) == (
        ": slices are shifted by a gantry tilt of 12 degrees, must be at most 0.5; resample them "
        "to a straight volume first"
    )


def test_a_slice_beside_the_others_is_told(tmp_path):
    folder = write_series(tmp_path / "ct", names="abcd")
    write_slice(folder / "c.dcm", STORED[:, :, 2], (-49, 20, 13))
    assert refusal(folder) == ": c.dcm is shifted by 1 mm against the other slices"


@pytest.mark.parametrize(
    ("pixels", "turn", "message"),
    [
        (
            STORED[:, :4, 0],
            np.eye(3),
            r"size of 1 of 5 slices is not .*\(6, 4\) in z.dcm, \(6, 5\)",
        ),
        (STORED[:, :, 0], np.diag([1, -1, -1]), r"orientation of 1 of 5 slices is not that of the"),
    ],
)
def test_slices_that_differ_are_told(tmp_path, pixels, turn, message):
    folder = write_series(tmp_path / "ct", names="abcd")
    write_slice(folder / "z.dcm", pixels, (-50, 20, 19), turn)
    with pytest.raises(VolumeError, match=message):
        read_scan(folder)


def test_one_slice_is_no_volume(tmp_path):
    folder = write_series(tmp_path / "ct", STORED[:, :, :1])
    assert refusal(folder) == ": a DICOM series of one slice, must be two or more"
    with pytest.raises(VolumeError, match="a DICOM series of one slice"):
        read_scan(folder / "03.dcm")


@pytest.mark.parametrize(
    ("value", "other", "message"),
    [
        (
            b"-50\\20\\7",
            b"-50\\2017",
            r"/00\.dcm: image position \(0020|0032\) .* must be 3 num",
        ),
        (b"-50\\20\\7", b"nan\\20\\7", "/00.dcm: image position .* must be 3 numbers"),
        (b"1\\0\\0\\0\\1\\0", b"1\\0\\0\\0\\1x0", "/00.dcm: image orientation .* must be 6 n"),
        (b"1\\0\\0\\0\\1\\0", b"1\\0\\0\\1\\0\\0", "/00.dcm: .* must be two directions at ri"),
        (b".8\\.7", b".8x.7", "/00.dcm: pixel spacing .* must be 2 numbers"),
    ],
)
def test_tags_that_are_needed(tmp_path, value, other, message):
    folder = write_series(tmp_path / "ct", names=["00", "01", "02", "03"])
    data = (folder / "00.dcm").read_bytes()
    assert value in data
    (folder / "00.dcm").write_bytes(data.replace(value, other))
    with pytest.raises(VolumeError, match=message):
        read_scan(folder)


def test_damaged_slices_are_told_and_others_are_passed_over(tmp_path):
    folder = write_series(tmp_path / "ct", names="abcd")
    (folder / "notes.txt").write_text("not a slice")
    (folder / ".DS_Store").write_text("hidden")
    # An index of the medium, as it comes with every disc.
    data = (folder / "a.dcm").read_bytes()
    (folder / "DICOMDIR").write_bytes(data.replace(CT.encode(), b"1.2.840.10008.1.3.10\0\0\0\0\0"))
    assert read_scan(folder).volume.array.shape == (*SHAPE, 1)
    (folder / "b.dcm").write_bytes(data[:500])
    assert refusal(folder) == "/b.dcm: not a readable DICOM file (Cannot read requested file)"


@pytest.mark.parametrize("at", [132, 148, 155])
def test_the_file_meta_information_is_checked(tmp_path, at):
    folder = write_series(tmp_path / "ct", names="abcd")
    data = bytearray((folder / "b.dcm").read_bytes())
    # Another group than the second; an unknown kind of element; an element of 256 MiB.
    data[at] = 0x10
    (folder / "b.dcm").write_bytes(data)
    assert refusal(folder) == "/b.dcm: not a readable DICOM file (damaged file meta information)"


def test_mutated_slices_are_read_or_refused(tmp_path):
    folder = write_series(tmp_path / "ct", names="abcd")
    good = (folder / "b.dcm").read_bytes()
    rng = random.Random(0)
    said = collections.Counter()
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(128, len(data) - 4)
            data[at : at + 4] = rng.choice((rng.randbytes(4), b"\xff\xff\xff\x7f"))
        end = len(data) if rng.random() < 0.8 else rng.randrange(len(data))
        (folder / "b.dcm").write_bytes(data[:end])
        try:
            scan = read_scan(folder)
        except VolumeError as error:
            message = str(error)
            said[message.startswith(str(folder)) and "\n" not in message] += 1
        else:
            assert scan.volume.array.shape == (*SHAPE, 1)
            said["read"] += 1
    assert set(said) == {True, "read"}
    assert min(said.values()) > 20


def test_colors_and_several_frames_are_refused(tmp_path):
    colors = sitk.GetImageFromArray(np.zeros((1, 5, 6, 3), np.uint8), isVector=True)
    (tmp_path / "colors").mkdir()
    sitk.WriteImage(colors, tmp_path / "colors" / "a.dcm")
    assert "must be one real number each" in refusal(tmp_path / "colors")
    frames = sitk.GetImageFromArray(np.zeros((3, 5, 6), np.uint8))
    (tmp_path / "frames").mkdir()
    sitk.WriteImage(frames, tmp_path / "frames" / "a.dcm")
    assert refusal(tmp_path / "frames") == "/a.dcm: 3 frames in one file, must be one slice"


def test_series_of_a_folder_are_cases_of_their_own(tmp_path):
    folder = tmp_path / "study"
    write_series(folder, STORED, names=["a1", "b1", "c1", "d1"], series="1.2.3", number="4")
    write_series(folder, -STORED, names=["a2", "b2", "c2", "d2"], series="1.2.4", number="5")
    assert refusal(folder) == ": 2 DICOM series (of 4, 4 slices), must be one"
    with pytest.raises(VolumeError, match=r"2 DICOM series \(of 1, 1 slices\), must be one"):
        read_scan([folder / "a1.dcm", folder / "a2.dcm"])
    first, second = find_cases(tmp_path, 1)
    assert (first.name, second.name) == ("study/series_004", "study/series_005")
    np.testing.assert_array_equal(
        read_scan(first.images).volume.array, -read_scan(second.images).volume.array
    )
    write_series(folder, STORED, names=["a3", "b3", "c3", "d3"], series="1.2.5", number="5")
    names = [case.name for case in find_cases(tmp_path, 1)]
    assert names[0] == "study/series_004"
    assert len(set(names)) == 3
    assert all(len(name) == len("study/series_005_01234567") for name in names[1:])


def test_pictures_beside_a_series_are_passed_over(tmp_path):
    folder = write_series(tmp_path / "ct")
    # As a console saves the doses of a scan.
    colors = sitk.GetImageFromArray(np.zeros((1, 5, 6, 3), np.uint8), isVector=True)
    colors.SetMetaData("0020|000e", "1.2.9")
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(folder / "doses.dcm"))
    writer.Execute(colors)
    write_slice(folder / "localizer.dcm", STORED[:, :, 0], (0, 0, 0), series="1.2.8")
    (case,) = find_cases(tmp_path, 1)
    assert case.name == "ct"
    assert len(case.images) == SHAPE[2]
    for images in (case.images, folder):
        np.testing.assert_array_equal(read_scan(images).volume.array[::-1, ::-1, :, 0], STORED)


def test_a_series_that_is_no_volume_spoils_no_other(tmp_path):
    folder = write_series(tmp_path / "study", number="4")
    write_series(folder, -STORED, names="wxyz", step=(0, 0, 0), series="1.2.9", number="5")
    good, bad = find_cases(tmp_path, 1)
    np.testing.assert_array_equal(read_scan(good.images).volume.array[::-1, ::-1, :, 0], STORED)
    with pytest.raises(VolumeError, match="3 of 4 slices are doubled"):
        read_scan(bad.images)


def test_cases_of_series_have_the_names_of_their_folders(tmp_path):
    write_series(tmp_path / "b" / "ct", series="1.2.3")
    write_series(tmp_path / "a", series="1.2.4")
    (tmp_path / "b" / "ct" / "report.txt").write_text("none")
    cases = find_cases(tmp_path, 1)
    assert [case.name for case in cases] == ["a", "b/ct"]
    for case in cases:
        np.testing.assert_array_equal(read_scan(case.images).volume.array[::-1, ::-1, :, 0], STORED)
    assert [case.name for case in find_cases(tmp_path / "a", 1)] == ["a"]
    # A bad slice spoils its own case alone.
    slice_ = tmp_path / "a" / "03.dcm"
    slice_.write_bytes(slice_.read_bytes()[:300])
    bad, good = find_cases(tmp_path, 1)
    assert (bad.name, good.name) == ("a", "b/ct")
    with pytest.raises(VolumeError, match=r"03\.dcm: not a readable DICOM file"):
        read_scan(bad.images)


def test_without_simpleitk_the_extra_is_named(tmp_path):
    write_series(tmp_path / "ct")
    code = (
        "import sys; sys.modules['SimpleITK'] = None\n"
        "from unetr_flax.imaging import VolumeError, read_scan\n"
        f"try: read_scan({str(tmp_path / 'ct')!r})\n"
        "except VolumeError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout == "DICOM files need SimpleITK: pip install 'unetr-flax[dicom]'\n"
