from pathlib import Path

import numpy as np
import pytest

from unetr_flax.evaluation.structures import painted, parse_regions

LABEL = np.array([[[0, 1], [2, 2]], [[1, 0], [0, 2]]])
REGIONS = {"whole": (1, 2), "part": (2,)}
MASKS = np.stack([LABEL > 0, LABEL == 2], axis=-1).astype(np.int32)


def test_later_regions_are_drawn_over_earlier_ones():
    for array in (LABEL, MASKS):
        np.testing.assert_array_equal(painted(Path("x"), array, REGIONS), LABEL)
    np.testing.assert_array_equal(painted(Path("x"), MASKS, None), LABEL)
    assert painted(Path("x"), LABEL, None) is LABEL


def test_regions_are_names_and_ids():
    assert parse_regions(["a=b=1,2", "part=65535"]) == {"a=b": (1, 2), "part": (65535,)}


@pytest.mark.parametrize(
    ("regions", "highest", "message"),
    [
        (["a"], 9, "--regions a: must be NAME=ID,ID,... such as WT=1,2,3"),
        (["=1"], 9, "--regions =1: must be NAME=ID"),
        (["a=1,,2"], 9, "--regions a=1,,2: must be NAME=ID"),
        (["a=９"], 9, "--regions a=９: must be NAME=ID"),  # noqa: RUF001
        (["a=1", "a=2"], 9, "--regions a=2: must have a name of its own"),
        (["a=0"], 9, "--regions a=0: ids must be 1 to 9"),
        (["a=3"], 2, "--regions a=3: ids must be 1 to 2"),
    ],
)
def test_other_regions_are_refused(regions, highest, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_regions(regions, highest)
    assert str(error.value).startswith(message)
