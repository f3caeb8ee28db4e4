import os
import subprocess
import sys

import pytest

# So that output to a pipe waits for the end.
BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}
PROGRAM = """
import threading, time
from unetr_flax.runtime.ending import end_process
threading.Thread(target=time.sleep, args=({seconds},)).start()
print("last line")
end_process({status})
"""


@pytest.mark.parametrize(("status", "seconds"), [(130, 600), (1, 600), (0, 0.5)])
def test_a_thread_does_not_delay_the_end_after_a_failure(status, seconds):
    program = PROGRAM.format(seconds=seconds, status=status)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=BUFFERED
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "last line\n", "")


def test_a_closed_pipe_keeps_the_status():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(seconds=600, status=2)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=BUFFERED,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 2
