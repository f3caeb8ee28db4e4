import json

import pytest

from unetr_flax.evaluation.label_names import names_beside, read_label_names
from unetr_flax.imaging.volume import VolumeError


@pytest.mark.parametrize(
    "content",
    [
        ["background", "liver", "", "spleen"],
        {"0": "background", "3": "spleen", "1": "liver"},
        {"background": 0, "liver": 1, "spleen": 3},
        {"name": "task", "labels": {"0": "background", "1": "liver", "3": "spleen"}},
        {"labels": {"background": 0, "liver": "1", "spleen": 3}},
    ],
)
def test_the_usual_forms(tmp_path, content):
    (tmp_path / "labels.json").write_text(json.dumps(content))
    names = read_label_names(tmp_path / "labels.json")
    assert {i: name for i, name in names.items() if name} == {1: "liver", 3: "spleen"}
    assert list(names) == sorted(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("3", "must be a list"),
        ("[1, 2]", "must be a list"),
        ('{"a": 1, "b": 1}', "must be a list"),
        ('{"whole": [1, 2]}', "must be a list"),
        ('{"a": -1}', "must be a list"),
        ('{"a": true}', "must be a list"),
        ('{"x": "a"}', "must be a list"),
    ],
)
def test_other_content_is_one_line(tmp_path, text, message):
    path = tmp_path / "names.json"
    path.write_text(text)
    with pytest.raises(VolumeError, match=message) as error:
        read_label_names(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(VolumeError, match="No such file"):
        read_label_names(tmp_path / "none.json")


def test_names_beside_files_and_in_folders(tmp_path):
    (tmp_path / "a").mkdir()
    assert names_beside(tmp_path / "a", tmp_path / "scan.nii") == {}
    (tmp_path / "labels.json").write_text('["", "far"]')
    assert names_beside(tmp_path / "a", tmp_path / "scan.nii") == {1: "far"}
    (tmp_path / "a" / "labels.json").write_text('["", "near"]')
    assert names_beside(tmp_path / "a", tmp_path / "scan.nii") == {1: "near"}


def test_names_of_one_file_come_before_those_of_its_folder(tmp_path):
    (tmp_path / "labels.json").write_text('["", "all"]')
    (tmp_path / "scan.labels.json").write_text('["", "own"]')
    assert names_beside(tmp_path / "scan.nii.gz") == {1: "own"}
    assert names_beside(tmp_path / "other.nii.gz") == {1: "all"}
