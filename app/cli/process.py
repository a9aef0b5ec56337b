"""How the program begins and ends: standard streams that may be missing or fail, and signals.

Streams. Any of the three may be closed, full, without a reader or in an encoding that lacks a
character. None of that ends a command: what a stream refuses is dropped, and a character that it
cannot encode is escaped. A missing descriptor is opened on the null device, or the next file that
is opened would get its number, and whatever a library prints would end up in a user's video.

Signals. Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, so that every command removes its
unfinished files. The exit code is 128 plus the number of the first.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

BROKEN_PIPE = 141  # exit code of a program whose reader left, as a shell reports SIGPIPE
_ENDINGS = {  # signal: what the last line says
    getattr(signal, name): word
    for name, word in (
        ("SIGINT", "interrupted"),
        ("SIGTERM", "terminated"),
        ("SIGHUP", "terminal closed"),
        ("SIGBREAK", "interrupted"),  # Ctrl-Break on Windows
    )
    if hasattr(signal, name)
}
_received: list[int] = []  # signals that interrupted the command


@contextmanager
def guard() -> Iterator[None]:
    """Run a command in the block: streams that fail do not matter, and signals end it in a line.

    Raises:
        SystemExit: A signal ended the block.
    """
    _received.clear()

    def interrupt(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        raise KeyboardInterrupt

    with _tolerant_streams(), handle_signals(interrupt), _repeated_interrupts():
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            if not (interrupted() or isinstance(error, KeyboardInterrupt)):
                raise
            number = _received[0] if _received else signal.SIGINT
            word = _ENDINGS[signal.Signals(number)]
            print(f"{word}: no unfinished file has its final name", file=sys.stderr)
            raise SystemExit(128 + number) from None


def interrupted() -> bool:
    """Tell whether a signal interrupted the command: what a library makes of it is no error."""
    return bool(_received)


@contextmanager
def _repeated_interrupts() -> Iterator[None]:
    """Repeat an interrupt that came in a callback which drops exceptions, as imports have many."""
    before = sys.unraisablehook

    def repeat(dropped: Any) -> None:
        if not (_received and issubclass(dropped.exc_type, KeyboardInterrupt)):
            return before(dropped)
        import _thread
        import threading

        # later, as it would be dropped once more while this function runs
        timer = threading.Timer(0.02, _thread.interrupt_main, _received[-1:])
        timer.daemon = True
        return timer.start()

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def handle_signals(handler: Any) -> Iterator[dict[int, Any]]:
    """Handle the signals that end a process inside the block, except those that are ignored.

    Ctrl-C is ignored by a shell's background jobs, SIGHUP under `nohup`; they stay so.

    Args:
        handler: Called with a signal's number and the current frame, in the main thread.

    Yields:
        The handlers before, by signal; they come back after the block.
    """
    before: dict[int, Any] = {}
    try:
        with suppress(ValueError):  # not the main thread: signals are the program's around it
            for number in _ENDINGS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, handler)
        yield before
    finally:
        for number, older in before.items():
            signal.signal(number, older)


def output_error() -> OSError | None:
    """Return why a part of what was printed has not arrived on standard output, or None."""
    output = _output_of(sys.stdout)
    if output is None:
        return None
    sys.stdout.flush()
    return output.error


def forgive_output() -> None:
    """Forget that standard output failed: what was printed is not the result."""
    if (output := _output_of(sys.stdout)) is not None:
        sys.stdout.flush()
        output.forgiven = True


class _Output(io.RawIOBase):
    """Passes bytes on to a standard stream, and drops them once it has failed.

    Attributes:
        failure: The first error; a stream that is missing has failed from the beginning.
        forgiven: Whether the failure does not matter.
    """

    def __init__(self, raw: io.RawIOBase | None) -> None:
        self._raw, self.forgiven = raw, False
        self.failure = None if raw else OSError(errno.EBADF, "it is closed")

    @property
    def error(self) -> OSError | None:
        return None if self.forgiven else self.failure

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw is not None and self._raw.isatty()

    def fileno(self) -> int:
        if self._raw is None:
            raise io.UnsupportedOperation("the stream is closed")
        return self._raw.fileno()

    def write(self, data: Any) -> int:
        while self._raw is not None and self.failure is None:
            try:
                count = self._raw.write(data)
            except OSError as error:
                self.failure = error
            else:
                if count is not None:
                    return count
                self._wait()
        return len(data)

    def _wait(self) -> None:
        """Wait until a non-blocking stream, as some parents hand down, takes more."""
        import select

        select.select((), (self.fileno(),), ())


@contextmanager
def _tolerant_streams() -> Iterator[None]:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number
    stdin, stdout, stderr = sys.stdin, sys.stdout, sys.stderr
    if stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout, sys.stderr = _tolerant(stdout), _tolerant(stderr)
    try:
        yield
    finally:
        for stream in sys.stdout, sys.stderr:
            if _output_of(stream) is not None:
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = stdin, stdout, stderr


def _tolerant(stream: Any) -> Any:
    """Wrap a standard stream, or None for a missing one; streams without a descriptor stay."""
    if stream is not None and not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = None if stream is None else getattr(stream.buffer, "raw", stream.buffer)
    if stream is not None:
        with suppress(OSError):
            stream.flush()
        if not isinstance(raw, io.RawIOBase) or isinstance(raw, _Output):
            stream.reconfigure(errors="backslashreplace")
            return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(raw)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


def _output_of(stream: Any) -> _Output | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Output) else None
