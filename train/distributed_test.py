"""One process; `sharding_test.py` runs several."""

import numpy as np
import pytest

from train import distributed


def test_one_process_is_the_main_one_and_the_whole_sum():
    assert distributed.is_main()
    assert distributed.any_process(True)
    assert not distributed.any_process(False)
    np.testing.assert_array_equal(distributed.process_sum(np.arange(3)), [0, 1, 2])
    assert distributed.process_min(3 << 40) == 3 << 40


def test_an_action_that_fails_on_the_main_process_fails():
    done = []
    distributed.run_on_main(lambda: done.append(1))
    assert done == [1]

    def fail():
        raise KeyError("reason")

    with pytest.raises(KeyError, match="reason"):
        distributed.run_on_main(fail)
