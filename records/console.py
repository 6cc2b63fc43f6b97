"""What the tools share at their edges: options, signals and an output that may fail."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help says more\n")


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """For an option: reads numbers of this kind, int or float, from least to most."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            found = "whole number" if kind is int else "number"
            end = f"to {most}" if most < sys.maxsize else "up"
            raise argparse.ArgumentTypeError(f"{text!r} is no {found} from {least} {end}")
        return value

    return read


def end_on_signals() -> None:
    """From now on Ctrl-C, SIGTERM and SIGHUP end this process at once, with one line. Call it
    before imports that take seconds."""

    def end(number: int, frame: object) -> NoReturn:
        os.write(2, b"\ninterrupted\n")
        os._exit(128 + number)

    for which in signal.SIGHUP, signal.SIGINT, signal.SIGTERM:
        if signal.getsignal(which) != signal.SIG_IGN:  # as nohup has it
            signal.signal(which, end)


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
