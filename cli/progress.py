"""Progress and warnings on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUIET_SECONDS = 2.0
"""Before the first line, and between two lines."""


class Progress:
    """Prints what is being done, with the time since the start; never more than a line at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._next_line = self._start + QUIET_SECONDS
        self._activity = ""
        self._timer: threading.Timer | None = None

    def __call__(self, activity: str) -> None:
        """Say what is done from now on. It is printed when a line is due and it still holds."""
        with self._lock:
            self._activity = activity
            if self._timer is None:
                delay = max(0.0, self._next_line - time.monotonic())
                self._timer = threading.Timer(delay, self._print)
                self._timer.daemon = True
                self._timer.start()

    def stop(self) -> None:
        """Print nothing any more."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()

    def _print(self) -> None:
        with self._lock:
            now = time.monotonic()
            line = f"[{now - self._start:5.1f} s] {self._activity}"
            print(line, file=sys.stderr, flush=True)
            self._next_line = now + QUIET_SECONDS
            self._timer = None


def warn(message: str) -> None:
    """Something that the user should know, and that stops nothing."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A `Progress` that is silent again after the block."""
    report = Progress()
    try:
        yield report
    finally:
        report.stop()
