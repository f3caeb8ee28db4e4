import json

import pytest

from unetr_flax.evaluation.label_names import LabelNames, names_beside, read_label_names
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
    names = read_label_names(tmp_path / "labels.json").names
    assert {i: name for i, name in names.items() if name} == {1: "liver", 3: "spleen"}
    assert list(names) == sorted(names)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"background": 0, "a": 1, "Ignore": 2}, LabelNames({1: "a"}, None, 2)),
        ({"0": "background", "1": "a", "255": "ignore"}, LabelNames({1: "a"}, None, 255)),
        (
            {"background": 0, "whole": [1, 2], "part": 2, "ignore": 3},
            LabelNames({1: "whole", 2: "part"}, {"whole": (1, 2), "part": (2,)}, 3),
        ),
    ],
)
def test_regions_and_the_ignored_label_of_nnunet(tmp_path, labels, expected):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert read_label_names(tmp_path / "dataset.json") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("3", "must be a list"),
        ("[1, 2]", "must be a list"),
        ('{"a": 1, "b": 1}', "must be a list"),
        (
            '{"whole": [1, -2]}',
            r"whole: must be an id or a list of ids from 0 to 65535, not \[1, -2\]",
        ),
        ('{"whole": []}', "must be a list"),
        ('{"ignore": [1]}', r"ignore: must be one id, not \[1\]"),
        ('{"a": 1, "ignore": 1}', "ignore: has the id 1 of another label"),
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
    assert names_beside(tmp_path / "a", tmp_path / "scan.nii") == LabelNames()
    (tmp_path / "labels.json").write_text('["", "far"]')
    assert names_beside(tmp_path / "a", tmp_path / "scan.nii").names == {1: "far"}
    (tmp_path / "a" / "labels.json").write_text('["", "near"]')
    assert names_beside(tmp_path / "a", tmp_path / "scan.nii").names == {1: "near"}


def test_names_of_one_file_come_before_those_of_its_folder(tmp_path):
    (tmp_path / "labels.json").write_text('["", "all"]')
    (tmp_path / "scan.labels.json").write_text('["", "own"]')
    assert names_beside(tmp_path / "scan.nii.gz").names == {1: "own"}
    assert names_beside(tmp_path / "other.nii.gz").names == {1: "all"}
