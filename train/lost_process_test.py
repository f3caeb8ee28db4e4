import io
import subprocess
import sys
import textwrap

import pytest

from train.lost_process import explanation, is_broken_collective, relay

FATAL = b"F1126 13:50:27.796098 16259 client.h:80] Terminating process because the JAX distributed "
FATAL += b"service detected fatal errors. This most likely indicates that another task died. "
PRELUDE = b"E1126 14:55:06.499193 17611 coordination_service_agent.cc:289] Polled an error\n"
PRELUDE += (
    b"E1126 14:55:06.499193 17611 coordination_service.cc:1548] Use error polling to propagate "
)
PRELUDE += (
    b"the following error: The following tasks are unhealthy:\n1\nThe tasks have crashed. Check\n"
)
STACK = b"*** Check failure stack trace: ***\n    @     0x7f0c4b172104  absl::LogMessage()\n"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        (
            b"UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n"
            b"The tasks have crashed.\n",
            "process 1 of the run died",
        ),
        (
            b"UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n3\n"
            b"The tasks have crashed.\n",
            "processes 1, 3 of the run died",
        ),
        (b'{grpc_message:"Socket closed", grpc_status:14}\n', "process 0 of the run died or ended"),
        (b"UNKNOWN\n", "another process of the run died"),
    ],
)
def test_the_runtimes_last_message_becomes_one_line(message, lost):
    source = io.BytesIO(b"a warning\n" + PRELUDE + FATAL + message + STACK)
    target = io.BytesIO()
    relay(source, target, "python -m train --resume")
    assert target.getvalue().decode() == (
        f"a warning\nStopped, as {lost}. To go on, start all processes again: "
        "python -m train --resume\n"
    )
    assert explanation(FATAL + message, "x").endswith("again: x\n")


def test_what_might_have_led_up_to_it_is_not_lost():
    target = io.BytesIO()
    relay(io.BytesIO(b"12\n" + PRELUDE + b"a warning\n"), target, "x")
    assert target.getvalue() == b"12\na warning\n" + PRELUDE


def test_what_a_process_writes_is_handed_on_even_if_it_is_killed():
    code = textwrap.dedent(
        """
        import os, sys
        from train.lost_process import explain_on_stderr
        explain_on_stderr("go on")
        print("from Python", file=sys.stderr)
        os.write(2, b"from C, without an end")
        os.kill(os.getpid(), 9)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == -9
    assert done.stderr == b"from Python\nfrom C, without an end"


def test_broken_collectives_are_told_from_other_errors():
    assert is_broken_collective(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed"))
    assert not is_broken_collective(ValueError("shapes differ"))
