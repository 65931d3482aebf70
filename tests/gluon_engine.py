"""Whose turn it is in the simulator of Gluon kernels: partitions as threads that run one at a time, and copies on their way.

A seed decides. Every partition and every copy has a priority, the first that can go on goes, and now and then a priority
changes: some seeds starve a partition, some a copy.
"""

import itertools
import linecache
import random
import sys
import threading
from collections import deque
from pathlib import Path

import torch

HERE = ("gluon_engine.py", "gluon_values.py", "gluon_simulator.py")


class Fault(AssertionError):
    """The kernel did what it may not do."""


class Abandoned(BaseException):
    """Ends the other threads after a fault."""


class Task:
    """A partition: what it waits for, and what it has in flight."""

    def __init__(self, name, priority):
        self.name, self.priority, self.turn = name, priority, threading.Semaphore(0)
        self.ready, self.waits, self.done = None, "", False
        self.products, self.stores, self.unfenced = deque(), deque(), []


class Copy:
    """A copy on its way."""

    ready = None

    def __init__(self, go, priority):
        self.go, self.priority = go, priority


class Engine:
    """Whose turn it is. One thread runs at a time; it hands over at every pause."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.change = self.random.choice([0.0, 0.05, 0.3])
        self.tasks, self.copies, self.local = [], [], threading.local()
        self.fault, self.over = None, threading.Event()

    @property
    def task(self):
        return self.local.task

    def spawn(self, name, body):
        task = Task(name, self.random.random())
        self.tasks.append(task)

        def run():
            self.local.task = task
            torch.set_grad_enabled(False)  # of this thread
            try:
                task.turn.acquire()
                if self.fault is not None:
                    return
                body()
                if task.products or task.stores:
                    what = "products" if task.products else "stores that still read shared memory"
                    raise Fault(f"{name} ends with {what} in flight")
                task.done = True
                self.hand_over(task)
            except Abandoned:
                pass
            except BaseException as error:
                self.fail(error)

        threading.Thread(target=run, daemon=True).start()
        return task

    def run(self, body):
        """The body as a partition of its own, and all that it starts, to the end."""
        self.spawn("the kernel", body).turn.release()
        self.over.wait()
        if self.fault is not None:
            raise self.fault

    def fail(self, error):
        self.fault = self.fault or error
        for task in self.tasks:
            task.turn.release()
        self.over.set()

    def copy(self, go):
        self.copies.append(Copy(go, self.random.random()))

    def pause(self, ready=None, waits=""):
        """Let others go first, and come back when ready() holds."""
        self.task.ready, self.task.waits = ready, waits and f"{waits} at {line()}"
        self.hand_over(self.task)

    def hand_over(self, me):
        while True:
            able = [x for x in itertools.chain(self.tasks, self.copies) if self.able(x)]
            if not able:
                if all(task.done for task in self.tasks):
                    return self.over.set()
                waiting = "; ".join(f"{task.name} waits for {task.waits}" for task in self.tasks if not task.done)
                raise Fault(f"nobody can go on: {waiting}")
            chosen = max(able, key=lambda x: x.priority)
            if self.random.random() < self.change:
                chosen.priority = self.random.random()
            if isinstance(chosen, Copy):
                self.copies.remove(chosen)
                chosen.go()
            elif chosen is me:
                return None
            else:
                chosen.turn.release()
                if not me.done:
                    me.turn.acquire()
                    if self.fault is not None:
                        raise Abandoned
                return None

    @staticmethod
    def able(x):
        return not (isinstance(x, Task) and x.done) and (x.ready is None or x.ready())


def line():
    """The kernel's line that is being run."""
    frame = sys._getframe()
    while Path(frame.f_code.co_filename).name in HERE:
        frame = frame.f_back
    at = frame.f_code.co_filename, frame.f_lineno
    return f"{frame.f_code.co_name}:{at[1]}: {linecache.getline(*at).strip()}"
