"""Mostly one process; `sharding_test.py` runs several."""

import os
import socket
import subprocess
import sys

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


# Process 0 works for longer than JAX's own limits, which are much shorter here: before a meeting
# and before the end.
PROGRAM = """
import functools, sys, time
import jax, numpy as np
jax.distributed.initialize = functools.partial(
    jax.distributed.initialize, shutdown_timeout_seconds=1
)
from train import distributed
address, index = sys.argv[1], int(sys.argv[2])
distributed.connect(address, 2, index)
assert distributed.process_sum(np.array(1)) == 2
distributed.run_on_main(lambda: time.sleep(2))
if distributed.is_main():
    time.sleep(2)
distributed.disconnect()
"""


def test_processes_wait_for_one_that_works_for_long():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_cpu_collective_timeout_seconds=1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
