"""Standard output and errors that never end a run: closed, full, gone, or of an encoding that lacks letters."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO


class Lasting:
    """A stream of text whose write and flush never fail.

    Letters that its encoding lacks are written as escapes. Once the reader of the pipe or the terminal has gone, or
    the disk is full, what comes is dropped, for child processes and libraries as well.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._or_drop(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._or_drop(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._or_drop(self._stream.flush)

    def _or_drop(self, call: Callable, *values: str) -> None:
        try:
            call(*values)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting() -> Iterator[None]:
    """Context in which whatever is printed is taken."""
    # A file opened by this process must not get the number of a closed stream, and what a library writes there.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None: it was closed when Python started
    sys.stderr = sys.stderr or open(os.devnull, "w")
    with redirect_stdout(Lasting(sys.stdout)), redirect_stderr(Lasting(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
