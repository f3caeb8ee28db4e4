import json
import re

import numpy as np
import pytest

from unetr_flax import Preprocessing
from unetr_flax.imaging.intensity import Percentiles, Window, ZScore
from unetr_flax.imaging.volume import Volume

pytest.importorskip("scipy")

SHAPE = (9, 7, 6)
FULL = Preprocessing(
    modalities=("CT", "T1", "PET"),
    intensity=(Window(-1000, 400), Percentiles(1, 99), ZScore()),
    labels=("background", "liver"),
    spacing=(1.5, 1.5, 3),
    crop_foreground=True,
)


def volume(channels=3, spacing=(1.0, 2.0, 3.0)):
    array = np.random.default_rng(0).gamma(3.0, 60.0, (*SHAPE, channels)).astype(np.float32)
    return Volume(array, np.diag([*spacing, 1.0]))


def test_defaults_of_modalities():
    preprocessing = Preprocessing.from_modalities(["ct ", "T1"], labels=["background"])
    assert preprocessing == Preprocessing(
        ("ct ", "T1"), (Window(-175, 250), Percentiles(0.5, 99.5)), ("background",)
    )
    assert preprocessing.orientation == "RAS"
    assert preprocessing.spacing is None
    assert not preprocessing.crop_foreground


def test_each_channel_is_normalized_by_its_rule():
    scan = volume()
    image, grid = Preprocessing(FULL.modalities, FULL.intensity).apply(scan)
    assert image.shape == (*SHAPE, 3)
    assert image.dtype == np.float32
    for i, rule in enumerate(FULL.intensity):
        np.testing.assert_array_equal(image[..., i], rule.normalize(scan.array[..., i]))
    assert grid.shape == grid.scan_shape == grid.box_size == SHAPE
    assert grid.spacing == (1.0, 2.0, 3.0)


def test_scan_is_resampled_after_it_is_normalized():
    scan = volume(1)
    preprocessing = Preprocessing(("MRI",), (ZScore(),), spacing=(0.5, 4.0, 3.0))
    image, grid = preprocessing.apply(scan)
    assert image.shape == (*grid.shape, 1) == (18, 4, 6, 1)
    assert grid.spacing == (0.5, 4.0, 3.0)
    np.testing.assert_array_equal(image, grid.sample_image(preprocessing.normalize(scan)))
    assert grid.restore_logits(image).shape == scan.array.shape


def test_foreground_is_cropped_before_the_scan_is_resampled():
    scan = volume(1)
    # Air lies below the window, so its noise is no foreground.
    scan.array[:] = -500 - scan.array
    scan.array[2:8, 1:5, 3] = 100
    preprocessing = Preprocessing.from_modalities(
        ["CT"], spacing=(2.0, 1.0, 3.0), crop_foreground=True
    )
    image, grid = preprocessing.apply(scan)
    assert (grid.box_start, grid.box_size) == ((2, 1, 3), (6, 4, 1))
    assert grid.shape == (3, 8, 1)
    np.testing.assert_allclose(image, 275 / 425)
    labels = grid.restore_labels(np.ones(grid.shape, int))
    np.testing.assert_array_equal(labels, scan.array[..., 0] == 100)


def test_a_scan_with_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"^image: 2 channels, must be 3 \(CT, T1, PET\)$"):
        FULL.apply(volume(2))


@pytest.mark.parametrize("preprocessing", [FULL, Preprocessing.from_modalities(["MRI"])])
def test_json_and_back(preprocessing):
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


def test_dict_is_the_format_of_files():
    assert FULL.to_dict() == {
        "modalities": ["CT", "T1", "PET"],
        "intensity": [
            {"rule": "window", "low": -1000.0, "high": 400.0},
            {"rule": "percentiles", "low": 1.0, "high": 99.0},
            {"rule": "zscore"},
        ],
        "labels": ["background", "liver"],
        "orientation": "RAS",
        "spacing": [1.5, 1.5, 3.0],
        "crop_foreground": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": "CT"}, "modalities='CT': must be a list of names"),
        ({"modalities": ["CT", 1, "PET"]}, "modalities=['CT', 1, 'PET']: must be a list of names"),
        ({"modalities": []}, "modalities=(): must name at least one channel"),
        ({"labels": None}, "labels=None: must be a list of names"),
        (
            {"labels": ["background", "lesion", "lesion"]},
            "labels=('background', 'lesion', 'lesion'): must differ, 'lesion' is repeated",
        ),
        ({"intensity": "window"}, "intensity='window': must be a list of intensity rules"),
        ({"intensity": [{"rule": "zscore"}]}, "intensity=(ZScore(),): must be 3 rules, one for"),
        ({"intensity": [{"rule": "hat"}] * 3}, "intensity[0]: rule='hat': must be one of 'window'"),
        ({"orientation": "LPS"}, "orientation='LPS': must be 'RAS'"),
        ({"orientation": None}, "orientation=None: must be 'RAS'"),
        ({"spacing": 1.5}, "spacing=1.5: must be None or 3 numbers above 0"),
        ({"spacing": [1, 2]}, "spacing=[1, 2]: must be None or 3 numbers above 0"),
        ({"spacing": [1, 2, 0]}, "spacing=[1, 2, 0]: must be"),
        ({"spacing": [1, 2, float("nan")]}, "spacing=[1, 2, nan]: must be"),
        ({"spacing": ["1", "2", "3"]}, "spacing=['1', '2', '3']: must be"),
        ({"crop_foreground": 1}, "crop_foreground=1: must be True or False"),
        ({"color": "red"}, "unknown fields ['color']: must be ['modalities', 'intensity', "),
    ],
)
def test_bad_fields_of_a_file_are_named(change, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        Preprocessing.from_dict({**FULL.to_dict(), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FULL.to_dict())
def test_every_field_must_be_there(name):
    values = FULL.to_dict()
    del values[name]
    with pytest.raises(ValueError, match=rf"^missing fields \['{name}'\]: must be \['modalities'"):
        Preprocessing.from_dict(values)


@pytest.mark.parametrize("values", [None, [], "CT"])
def test_something_else_than_an_object_is_refused(values):
    with pytest.raises(ValueError, match="must be an object with the fields"):
        Preprocessing.from_dict(values)


def test_a_rule_must_be_one():
    with pytest.raises(ValueError, match=r"^intensity=\('window',\): must be a list of intensity"):
        Preprocessing(("CT",), ("window",))


def test_a_grid_that_no_memory_holds_is_refused():
    preprocessing = Preprocessing.from_modalities(["CT"], spacing=(1.5, 1.5, 2.0))
    volume = Volume(np.zeros((9, 8, 7, 1), np.float32), np.diag([9000.0, 9000.0, 9000.0, 1.0]))
    with pytest.raises(ValueError, match=r"9 x 8 x 7 voxels of 9000 .* 54000 x 48000 x 31500 of"):
        preprocessing.apply(volume)
