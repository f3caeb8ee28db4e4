import json

import pytest

from unetr_flax.imaging.presets import PRESETS, find_preprocessing


@pytest.mark.parametrize(("name", "classes"), [("btcv", 14), ("spleen", 2), ("hippocampus", 3)])
def test_presets_are_found_by_name_and_have_all_classes(name, classes):
    preprocessing = find_preprocessing(name)
    assert preprocessing == PRESETS[name]
    assert len(set(preprocessing.labels)) == classes


def test_json_is_read_alone_and_within_a_config(tmp_path):
    path = tmp_path / "ct.json"
    for values in (PRESETS["spleen"].to_dict(), {"preprocessing": PRESETS["spleen"].to_dict()}):
        path.write_text(json.dumps(values))
        assert find_preprocessing(str(path)) == PRESETS["spleen"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be an object with the fields"),
        ('{"preprocessing": null}', "None: must be an object"),
        ('{"modalities": ["CT"]}', "missing fields"),
        ("[" * 100_000, "recursion"),
        ("\xff", "codec can't decode"),
    ],
)
def test_what_is_no_preprocessing_is_one_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        find_preprocessing(str(path))
    assert str(error.value).startswith(f"{path}: preprocessing: ")
    assert "\n" not in str(error.value)


def test_names_of_neither_are_told_the_presets(tmp_path):
    for name in ("lung", str(tmp_path), "", "a\0b"):
        with pytest.raises(ValueError, match="must be one of btcv, spleen, hippocampus, or a JSON"):
            find_preprocessing(name)
