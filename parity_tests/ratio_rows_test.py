import math

import pytest

from parity_tests.ratio_rows import RatioRow


@pytest.mark.parametrize(
    ("ours", "theirs", "ok"),
    [
        (0.11, 0.1, True),
        (0.12, 0.1, False),
        (0.0, 0.0, True),
        (0.1, 0.0, False),
        (math.nan, 0.1, False),
        (0.1, math.nan, False),
        # As PyTorch's kernel gradients in bfloat16 on tiny grids.
        (0.1, 1e35, False),
    ],
)
def test_an_error_may_be_a_little_larger_than_a_sound_one(ours, theirs, ok):
    assert RatioRow("half precision", "logits", "bfloat16", ours, theirs, 1.1 + 1e-9).ok is ok
