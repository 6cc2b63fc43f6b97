"""What the tools share at their edges: options, signals, output that ends no run, and programs that
end with the tool that started them.

A tool that makes or judges runs goes through `run_tool`: a signal unwinds it like Ctrl-C, so that
it cleans up. One that only reads calls `end_on_signals` before its slow imports and `show` in the
end: a signal ends it at once.
"""

import argparse
import contextlib
import ctypes
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

SIGNALS = signal.SIGHUP, signal.SIGINT, signal.SIGTERM
GRACE = (signal.SIGINT, 20), (signal.SIGTERM, 10)  # seconds a program has to end by itself


# Options ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help says more\n")


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """For an option: reads numbers of this kind, int or float, from least to most."""

    def read(text: str) -> float:
        try:
            value = kind(text.replace("_", "?"))  # which Python alone would take
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            found = "whole number" if kind is int else "number"
            end = f"to {most}" if most < sys.maxsize else "up"
            raise argparse.ArgumentTypeError(f"{text!r} is no {found} from {least} {end}")
        return value

    return read


# Signals ------------------------------------------------------------------------------------------


def listen(handler: Callable) -> None:
    """Handle the signals that stop a process, but those it was started to ignore, as by nohup."""
    for which in SIGNALS:
        if signal.getsignal(which) != signal.SIG_IGN:
            signal.signal(which, handler)


def end_on_signals() -> None:
    """From now on Ctrl-C, SIGTERM and SIGHUP end this process at once, with one line. Call it
    before imports that take seconds."""

    def end(number: int, frame: object) -> NoReturn:
        os.write(2, b"\ninterrupted\n")
        os._exit(128 + number)

    listen(end)


def interrupt_again(lost: object) -> None:
    """In place of sys.unraisablehook: an interruption within what lets no exception through, as a
    hook around a fork, comes once more when that is over."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    else:
        sys.__unraisablehook__(lost)


def run_tool(main: Callable[[list[str]], int]) -> int:
    """main with the command line's arguments. What is printed never ends it; SIGTERM and SIGHUP do
    as Ctrl-C does."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # None: closed by whoever started this
            stream.flush()
            how = {"line_buffering": stream.line_buffering or name == "stderr"}
            raw = io.BufferedWriter(Screen(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "replace", **how))
    listen(signal.default_int_handler)
    sys.unraisablehook = interrupt_again
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted{stop}", file=sys.stderr)
        return 130


# Output -------------------------------------------------------------------------------------------


class Screen(io.FileIO):
    """A file descriptor that is quietly replaced by /dev/null when it takes no more: nobody reads
    the pipe, the terminal is gone, the disk is full."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def show(text: str) -> int:
    """Print what a tool has found; gives the exit code. Characters that the output cannot hold are
    replaced, and who has closed it wants no more."""
    try:
        sys.stdout.reconfigure(errors="replace")
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"error: the output cannot be written ({error.strerror})", file=sys.stderr)
            return 1
    return 0


# Programs -----------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """Have Linux end this process as soon as the one that started it is gone."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # other systems have none
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def call(command: list[str], **how: object) -> int:
    """The exit code of a program, in a process group of its own. It is told of an interruption, and
    nothing of the group is left behind."""

    def prepare() -> None:
        end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells have background jobs ignore it

    how |= {"stdin": subprocess.DEVNULL, "process_group": 0, "preexec_fn": prepare}
    child = subprocess.Popen(command, **how)

    def tell(number: int, seconds: float | None) -> None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(child.pid, number)
            child.wait(seconds)

    try:
        return child.wait()
    finally:
        try:
            for number, seconds in GRACE:
                tell(number, seconds)
        finally:  # also when interrupted once more
            tell(signal.SIGKILL, None)
