"""Micro-batches made ready in a thread of their own, while the step computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

#: Between two looks whether anybody still wants the next item.
PATIENCE_S = 0.5
#: How long ``close`` waits for the thread, which ends with the process at the latest.
CLOSE_S = 30.0


class Prefetched(Generic[T]):
    """Takes items from an iterator in a thread, at most ``depth`` ahead; gives them, and its exception, in order.

    The thread ends with the iterator, or when ``close`` is called; ``with`` calls it, whatever is raised inside.
    """

    def __init__(self, items: Iterator[T], depth: int):
        self.items = items
        self.ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._take, daemon=True, name="prefetch")
        self.thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, error = self.ready.get()
        if error is not None:
            self.ready.put((None, error))  # asked again, it says the same
            raise error
        return item  # type: ignore[return-value]

    def __enter__(self) -> Prefetched[T]:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """No more items are taken; may be called again.

        The item that is being made is waited for, but not for ever: an iterator that hangs must not keep the exception
        that ended the loop from being told.
        """
        self.closed.set()
        self.thread.join(CLOSE_S)

    def _take(self) -> None:
        try:
            for item in self.items:
                if not self._put((item, None)):
                    return
        except BaseException as error:  # the reader's, to be raised where the item is asked for
            self._put((None, error))
        else:
            self._put((None, StopIteration()))

    def _put(self, item: tuple[T | None, BaseException | None]) -> bool:
        while not self.closed.is_set():
            try:
                self.ready.put(item, timeout=PATIENCE_S)
                return True
            except queue.Full:
                continue
        return False
