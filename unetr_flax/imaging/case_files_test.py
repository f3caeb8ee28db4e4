import os

import pytest

from unetr_flax.imaging import VolumeError, find_cases


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder, channels=1):
    """Returns the names of cases with those of their files."""
    return {
        case.name: [path.relative_to(folder).as_posix() for path in case.images]
        for case in find_cases(folder, channels)
    }


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("scan.nii.gz", "scan"),
        ("a.b.NII", "a.b"),
        ("x_0000.nrrd", "x_0000"),
        ("slice.dcm", "slice"),
        ("volume.mha", "volume"),
    ],
)
def test_a_file_is_one_case(tmp_path, file, name):
    (tmp_path / file).touch()
    (case,) = find_cases(tmp_path / file, 1)
    assert (case.name, case.images) == (name, (tmp_path / file,))


def test_folders_are_searched_with_all_below(tmp_path):
    touch(tmp_path, "b.nii", "a.nii.gz", "c/a.nii.gz", "c/d/e.mha", "c/d/e.raw", "B.NRRD", "x.mhd")
    touch(tmp_path, "notes.txt", ".hidden.nii", "._a.nii.gz", ".git/y.nii", "c/labels.json")
    assert found(tmp_path) == {
        "B": ["B.NRRD"],
        "a": ["a.nii.gz"],
        "b": ["b.nii"],
        "c/a": ["c/a.nii.gz"],
        "c/d/e": ["c/d/e.mha"],
        "x": ["x.mhd"],
    }
    assert list(found(tmp_path)) == sorted(found(tmp_path))


def test_a_folder_of_results_is_not_searched(tmp_path):
    touch(tmp_path, "a.nii.gz", "out/a.nii.gz")
    (case,) = find_cases(tmp_path, 1, except_below=tmp_path / "out")
    assert case.images == (tmp_path / "a.nii.gz",)
    assert len(find_cases(tmp_path / "out", 1, except_below=tmp_path / "out")) == 1


def test_what_is_not_there(tmp_path):
    with pytest.raises(VolumeError, match=r"none\.nii: no such file or folder"):
        find_cases(tmp_path / "none.nii", 1)


@pytest.mark.parametrize("channels", [1, 2])
def test_files_per_channel(tmp_path, channels):
    numbers = range(channels)
    touch(tmp_path, *(f"{case}_{i:04d}.nii.gz" for case in ("p_1", "q/p_1", "r") for i in numbers))
    assert found(tmp_path, channels) == {
        name: [f"{name}_{i:04d}.nii.gz" for i in numbers] for name in ("p_1", "q/p_1", "r")
    }


def test_numbers_of_no_channel_are_part_of_plain_names(tmp_path):
    touch(tmp_path, "patient_0001.nii", "patient_0002.nii", "x_000.nii", "deep/y_0000.nii")
    assert list(found(tmp_path)) == ["deep/y", "patient_0001", "patient_0002", "x_000"]


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        (["a_0000.nii", "a_0001.nii", "b_0000.nii"], 2, "/b: channel _0001 is missing, must be _0"),
        (["a_0000.nii"], 4, "/a: channel _0001, _0002, _0003 is missing, must be _0000 to _0003"),
        (["a_0000.nii", "b_0001.nii"], 2, "/a: channel _0001 is missing"),
        (["a_0001.nii"], 2, "/a: channel _0000 is missing"),
        (["a_0000.nii", "a_0001.nii"], 1, "/a: 1 channels are wanted, there is also a_0001.nii"),
        (["a_0000.nii", "a_0000.nii.gz"], 1, "a_0000.nii.gz and .*a_0000.nii: the same channel tw"),
        (["a.nii", "a.nii.gz"], 1, "two cases with the name a$"),
        (["c/a.nii", "c/a.mha"], 1, "c/a.mha and .*c/a.nii: two cases with the name c/a$"),
        (["a.txt", "b/c.hdr"], 1, r"no scans in .*; looked for DICOM slices and names that end in"),
    ],
)
def test_cases_that_are_not_whole_or_not_distinct(tmp_path, names, channels, message):
    touch(tmp_path, *names)
    with pytest.raises(VolumeError, match=message) as error:
        find_cases(tmp_path, channels)
    assert "\n" not in str(error.value)


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "data/a.nii", "data/sub/b.nii", "elsewhere/c.nii")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/sub/up").symlink_to("..")
    (tmp_path / "data/self").symlink_to("self")
    (tmp_path / "data/broken").symlink_to("nowhere")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    assert list(found(tmp_path / "data")) == ["a", "link/c", "sub/b"]
    # A loop or a broken link with the name of a scan is a case that reading will refuse.
    (tmp_path / "data/self.nii").symlink_to("self.nii")
    assert "self" in found(tmp_path / "data")


def test_pipes_are_not_waited_for(tmp_path):
    touch(tmp_path, "a.nii")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.nii")
    assert found(tmp_path) == {"a": ["a.nii"], "pipe": ["pipe.nii"]}


def test_folders_with_the_name_of_a_file(tmp_path):
    touch(tmp_path, "folder.nii.gz/a.nii")
    assert found(tmp_path) == {"folder.nii.gz/a": ["folder.nii.gz/a.nii"]}


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    touch(tmp_path, "a.nii", "locked/b.nii")
    listdir = os.listdir

    def refuse(folder):
        if os.path.basename(folder) == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(VolumeError, match=r"locked: cannot be read \(Permission denied\)$"):
        find_cases(tmp_path, 1)


def test_names_with_line_breaks_stay_one_line(tmp_path):
    touch(tmp_path, "two\nlines.nii", "two\nlines.mha", "chan\nnel_0000.nii")
    with pytest.raises(VolumeError, match=r"two cases with the name two\\nlines$"):
        find_cases(tmp_path, 1)
    (tmp_path / "two\nlines.nii").unlink()
    assert sorted(found(tmp_path)) == ["chan\nnel", "two\nlines"]
