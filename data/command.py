"""What the data tools have in common as programs: signals, the screen, errors in one line.

A tool calls `begin` before its other imports, so that Ctrl-C ends those in one line too, and `run`
in the end.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Screen:
    """A text stream whose failures end nothing: what a closed pipe or a terminal that hung up
    cannot take is lost, and the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}; --help lists the options\n")


def one_line(message: object) -> str:
    """The text with its line breaks replaced by spaces."""
    return " ".join(str(message).splitlines())


def report(error: Exception) -> None:
    """Say on stderr, in one line, why the tool ends."""
    if isinstance(error, OSError) and error.filename:
        error = f"{error.filename}: {error.strerror}; check the path"
    print(f"error: {one_line(error)}", file=sys.stderr)


def begin() -> None:
    """Make the screen harmless, and until `run` let a signal end the process in one line."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (None: it was closed)
        stream.reconfigure(errors="replace")  # for what its encoding lacks
        setattr(sys, name, Screen(stream))
    listen(lambda number, frame: leave(number, "before it began"))


def run(main: Callable[[], int], stopped: str) -> NoReturn:
    """Run the tool and exit with its code; `stopped` says what a signal leaves behind."""
    try:
        listen(interrupt)
        code = main()
    except KeyboardInterrupt as error:  # the tool has cleaned up on the way here
        leave(error.args[0] if error.args else signal.SIGINT, stopped)
    except MemoryError:
        print("error: out of memory; free some, or use fewer --workers", file=sys.stderr)
        code = 1
    end(code)


def listen(handler: Callable) -> None:
    """Handle the signals that stop a process, but those that its parent has it ignore (nohup)."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def interrupt(number: int, frame: object) -> NoReturn:
    """Unwind the stack as Ctrl-C does; further signals must not disturb the cleaning up."""
    listen(signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def leave(number: int, stopped: str) -> NoReturn:
    """End by a signal: one line, and the exit code a shell gives for it."""
    print(f"stopped by {SIGNALS[number]}; {stopped}", file=sys.stderr)
    end(128 + number)


def end(code: int) -> NoReturn:
    """Exit without waiting for threads that are still busy."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Let signals wait until the block has ended."""
    held = []
    before = {n: signal.getsignal(n) for n in SIGNALS}
    listen(lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


@contextmanager
def thread_pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are not waited for when the block ends by an exception."""
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
