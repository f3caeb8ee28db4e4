"""Handling of Ctrl-C and SIGTERM: the first stops training at the next step, the second now.

A job controller that takes a machine away sends SIGTERM, and starts a run again that ends with
status 143.
"""

import os
import signal
import socket
import sys
import threading
from typing import Any, NoReturn, Self

import jax
from jax._src import distributed as jax_distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Under this key the processes of a run tell each other which signal one of them has received.
KEY = "unetr_flax/train/signal"
# Seconds between two looks for the key.
PAUSE = 0.5


class Stopped(KeyboardInterrupt):
    """A signal that came while there was nothing to save; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def exit_status(number: int) -> int:
    """Returns the status that shells report for a process that a signal has ended: 130 or 143."""
    return 128 + number


def raise_on_signals() -> None:
    """Makes both signals raise `Stopped` in the main thread."""

    def stop(number: int, _: object) -> NoReturn:
        raise Stopped(number)

    for number in SIGNALS:
        signal.signal(number, stop)


class Interrupt:
    """A context in which the first signal sets `requested` and the second ends the process.

    A signal to one of several processes of a run is a request to all of them, within a second.

    Python runs signal handlers between bytecodes only, and a compilation is one bytecode that takes
    a minute. So a thread waits for the signals, woken by the interpreter's C handler. The context
    must be entered in the main thread.
    """

    def __init__(self):
        self._requested = threading.Event()
        self._number = signal.SIGTERM

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self._requested.is_set()

    @property
    def exit_status(self) -> int:
        """The status with which a process ends that the signal has stopped."""
        return exit_status(self._number)

    def __enter__(self) -> Self:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._fd = signal.set_wakeup_fd(self._sender.fileno())
        self._handlers = {s: signal.signal(s, lambda *_: None) for s in SIGNALS}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._left = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        if jax.process_count() > 1:
            self._listener.start()
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd)
        self._sender.close()
        self._thread.join()
        self._receiver.close()
        # A thread that is still in a call of the client would abort the end of the process.
        self._left.set()
        if self._listener.ident is not None:
            self._listener.join()

    def _watch(self) -> None:
        seen = 0
        while received := self._receiver.recv(64):
            for number in filter(SIGNALS.__contains__, received):
                seen += 1
                if seen > 1:
                    os._exit(exit_status(number))
                self._request(number)
                print("\nStopping after this step; once more to stop at once.", file=sys.stderr)
                if jax.process_count() > 1:
                    _client().key_value_set(KEY, str(number), allow_overwrite=True)

    def _listen(self) -> None:
        """Looks for a signal that another process has received."""
        while not self._left.wait(PAUSE) and not self.requested:
            try:
                self._request(int(_client().key_value_try_get(KEY)))
            except Exception:
                # Nobody has received one, or another process has died, which is told elsewhere.
                continue

    def _request(self, number: int) -> None:
        if not self.requested:
            self._number = number
            self._requested.set()


def _client() -> Any:
    return jax_distributed.global_state.client
