"""What the tools share towards the terminal: output that ends no run, signals that end one like
Ctrl-C, and programs that end with the tool that started them."""

import contextlib
import ctypes
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable

GRACE = (signal.SIGINT, 20), (signal.SIGTERM, 10)  # seconds a program has to end by itself


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
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted{stop}", file=sys.stderr)
        return 130


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
