"""One line in place of a C++ stack when another process of a run has died.

JAX's distributed runtime notices that a process sends no heartbeats any more, or that process 0
cannot be reached, and then ends this process from C++ with a stack trace; no callback of Python's
is asked. So the standard error goes through a small process of its own, which outlives this one,
hands on every line, and says in one line what that stack means.

This file is run by its path, without the rest of the package.
"""

import os
import re
import signal
import subprocess
import sys
from typing import BinaryIO

# Seconds without a heartbeat after which a process counts as lost.
HEARTBEAT_SECONDS = 60
# How the runtime's last message begins, and what it says of others.
FATAL = re.compile(rb"Terminating process because the JAX distributed service detected fatal error")
UNHEALTHY = re.compile(rb"stopped sending heartbeats\):\s*((?:\d+\s+)+)")
NO_COORDINATOR = re.compile(rb"Socket closed|Connection re(?:fused|set)|failed to connect")
# What the runtime may say just before.
PRELUDE = re.compile(
    rb"preemption_sync_manager\.cc|coordination_service(?:_agent)?\.cc|^The tasks have crashed|"
    rb"^Additional GRPC error information|^:UNKNOWN:Error received from peer"
)
# A line of it with the number of a process.
NUMBER = re.compile(rb"\d+\s*")
# What a collective operation says that another process has left.
BROKEN_COLLECTIVE = re.compile("Gloo|NCCL|nccl|Connection (?:closed|reset)|heartbeat|UNAVAILABLE")


def explain_on_stderr(command: str) -> None:
    """Sends this process's standard error through a process that explains its last message.

    Args:
      command: the command that goes on with the run.
    """
    reading, writing = os.pipe()
    subprocess.Popen([sys.executable, "-I", "-S", __file__, command], stdin=reading)
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)


def is_broken_collective(error: BaseException) -> bool:
    """Returns whether an error says that processes can no longer compute together."""
    return BROKEN_COLLECTIVE.search(str(error)) is not None


def explanation(message: bytes, command: str) -> str:
    """Says in one line what the runtime's last message means.

    Args:
      message: the message, from the line that matches `FATAL`.
      command: the command that goes on with the run.
    """
    if found := UNHEALTHY.search(message):
        numbers = [int(number) for number in found[1].split()]
        plural = "es" if len(numbers) > 1 else ""
        lost = f"process{plural} {', '.join(map(str, numbers))} of the run died"
    elif NO_COORDINATOR.search(message):
        lost = "process 0 of the run died or ended"
    else:
        lost = "another process of the run died"
    return f"Stopped, as {lost}. To go on, start all processes again: {command}\n"


def relay(source: BinaryIO, target: BinaryIO, command: str) -> None:
    """Hands on lines until the runtime's last message, and explains that one.

    Lines that may lead up to it come at the end, unless it comes instead.
    """
    held = []
    for line in iter(source.readline, b""):
        if FATAL.search(line):
            message = line + source.read()
            held = [explanation(message, command).encode()]
        elif PRELUDE.search(line) or (held and NUMBER.fullmatch(line)):
            held.append(line)
        else:
            target.write(line)
            target.flush()
    target.writelines(held)
    target.flush()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    relay(sys.stdin.buffer, sys.stderr.buffer, sys.argv[1])
