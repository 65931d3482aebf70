"""Work in processes of their own: a JSON value in on a line, a JSON value out, as many at once as are asked for."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

MOST = 8  # processes: each may hold a gigabyte


class Ended(NamedTuple):
    """In an answer's place: the process ended before it gave one."""

    last: str  # the last line that it wrote to stderr


class Process(NamedTuple):
    """A running `python -m module`, and its stderr."""

    popen: subprocess.Popen[str]
    errors: IO[str]


def count(device: str) -> int:
    """How many processes may work side by side: one on a GPU, of which there is one, and otherwise one per CPU core."""
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


def answers(module: str, todo: Iterable[Any], workers: int = 1, until: float = float("inf")) -> Iterator[tuple[int, Any]]:
    """(index, answer) of every value as `python -m module` answers it, in the order in which they are ready.

    Args:
        module: answers each line of its stdin by a line on its stdout, both JSON, and ends with its input.
        workers: how many such processes; each goes on to the next value as soon as it has answered.
        until: of time.monotonic; what nobody has begun by then has no answer. The first is always begun.

    The answer is `Ended` where a process that was begun for the value ended before it gave one. A process that ends over a
    later value may have been spoilt by an earlier one (a GPU's context is, by a fault), so another is asked again.
    """
    values = list(todo)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(values)):
        waiting.put(index)
    done: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
    running: list[Process] = []
    stopped = threading.Event()

    def work() -> None:
        process: Process | None = None
        try:
            while not stopped.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                if index and time.monotonic() > until:
                    return
                answer = None
                while answer is None and not stopped.is_set():
                    fresh = process is None
                    if process is None:
                        process = _start(module)
                        running.append(process)
                    answer = _ask(process, values[index])
                    if answer is None:
                        last = _end(process)
                        process = None
                        if fresh:
                            answer = Ended(last)
                done.put((index, answer))
        finally:
            if process is not None:
                _end(process)
            done.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(values)))]
    for thread in threads:
        thread.start()
    left = len(threads)
    try:
        while left:
            found = done.get()
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        stopped.set()
        for process in running:
            if left:
                process.popen.kill()
        for thread in threads:
            thread.join()


def _start(module: str) -> Process:
    errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (_end closes it)
    command, pipe = [sys.executable, "-m", module], subprocess.PIPE
    return Process(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True), errors)


def _ask(process: Process, value: Any) -> Any:
    """What the process answers, None where it has ended."""
    stdin, stdout = _pipes(process)
    try:
        stdin.write(json.dumps(value) + "\n")
        stdin.flush()
    except OSError:
        return None
    for line in stdout:
        if line.startswith(("[", "{")):  # anything else was printed by what it calls
            return json.loads(line)
    return None


def _end(process: Process) -> str:
    """Have a process end, and return the last line that it wrote to stderr."""
    stdin, stdout = _pipes(process)
    with contextlib.suppress(OSError):
        stdin.close()
    stdout.close()
    process.popen.wait()
    with process.errors as errors:
        errors.seek(0)
        lines = errors.read().splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _pipes(process: Process) -> tuple[IO[str], IO[str]]:
    assert process.popen.stdin is not None
    assert process.popen.stdout is not None
    return process.popen.stdin, process.popen.stdout
