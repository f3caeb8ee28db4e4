"""Handling of Ctrl-C and SIGTERM: the first stops training at the next step, the second now."""

import os
import signal
import socket
import sys
import threading
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Shells report this status for a process that Ctrl-C has ended.
EXIT_STATUS = 128 + signal.SIGINT


class Interrupt:
    """A context in which the first signal sets `requested` and the second ends the process.

    Python runs signal handlers between bytecodes only, and a compilation is one bytecode that takes
    a minute. So a thread waits for the signals, woken by the interpreter's C handler. The context
    must be entered in the main thread.
    """

    def __init__(self):
        self._requested = threading.Event()

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self._requested.is_set()

    def __enter__(self) -> Self:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._fd = signal.set_wakeup_fd(self._sender.fileno())
        self._handlers = {s: signal.signal(s, lambda *_: None) for s in SIGNALS}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd)
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    def _watch(self) -> None:
        while received := self._receiver.recv(64):
            for _ in filter(SIGNALS.__contains__, received):
                if self.requested:
                    os._exit(EXIT_STATUS)
                self._requested.set()
                print("\nStopping after this step; once more to stop at once.", file=sys.stderr)
