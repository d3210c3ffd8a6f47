"""Many readers or one writer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Readers share, a writer is alone, and a waiting writer goes before new readers.

    Reading inside reading or writing, and writing inside writing, are allowed; writing inside reading is not.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._waiting_writers = 0
        self._writer: int | None = None
        self._depth = 0
        self._mine = threading.local()

    def __reduce__(self) -> tuple[type[ReadWriteLock], tuple[()]]:
        """A copy of what a lock guards gets a free lock of its own."""
        return ReadWriteLock, ()

    @contextmanager
    def read(self) -> Iterator[None]:
        me = threading.get_ident()
        depth = getattr(self._mine, "reads", 0)
        if self._writer == me or depth:
            # A nested reader must not queue behind a writer that waits for the outer one.
            yield
            return
        with self._condition:
            while self._writer is not None or self._waiting_writers:
                self._condition.wait()
            self._readers += 1
        self._mine.reads = 1
        try:
            yield
        finally:
            self._mine.reads = 0
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        me = threading.get_ident()
        if getattr(self._mine, "reads", 0):
            raise RuntimeError("a thread that reads the store cannot write to it at the same time")
        with self._condition:
            if self._writer != me:
                self._waiting_writers += 1
                while self._writer is not None or self._readers:
                    self._condition.wait()
                self._waiting_writers -= 1
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if self._depth == 0:
                    self._writer = None
                    self._condition.notify_all()
