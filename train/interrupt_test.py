import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from train.interrupt import Interrupt


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number, capfd):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        wait_until(lambda: interrupt.requested)
    assert interrupt.exit_status == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1
    wait_until(lambda: "once more" in capfd.readouterr().err)


def test_other_signals_are_none_of_its_business():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: seen)
    signal.signal(signal.SIGUSR1, before)
    assert not interrupt.requested


def test_the_second_ends_the_process_even_where_no_python_runs():
    code = textwrap.dedent(
        """
        import hashlib
        from train.interrupt import Interrupt
        with Interrupt():
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes in C
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "\n"
            assert "once more" in process.stderr.readline()
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 143
        finally:
            process.kill()
