"""Threads that work ahead of the training step: one computes batches, others fetch remote shards."""

import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from nrat_scale.data.shards import ShardSet, ShardUnusable
from nrat_scale.remote.transfer import Cancelled

T = TypeVar("T")
_PREFETCHED = 4  # batches
_FETCHES = 4  # concurrent, per remote source


class ShardPrefetcher:
    """Fetches remote shards into the cache, in the order in which `want` names them."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._wanted: list[int] = []
        self._queue: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_FETCHES)]
        for thread in self._threads:
            thread.start()

    def want(self, numbers: list[int]) -> None:
        """Fetch these shards; earlier ones that are no longer wanted are dropped from the queue."""
        new = [number for number in numbers if number not in self._wanted]
        self._wanted = numbers
        # Processes of a node share one cache; each starts at a different shard.
        turn = int(os.environ.get("LOCAL_RANK", "0")) % max(1, len(new))
        with self._changed:
            queued = [number for number in self._queue if number in numbers]
            self._queue = deque([*queued, *new[turn:], *new[:turn]])
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel transfers at their next chunk, resumably, and wait for the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                number = self._queue.popleft()
            try:
                self._shards.fetch(number, stopped=lambda: self._closed)
            except (Cancelled, ShardUnusable):
                continue  # `unusable` keeps the error; reading a sample of the shard raises it


def prefetched(items: Generator[T, None, None]) -> Iterator[T]:
    """The items of a generator, computed a few ahead in a thread that ends with this generator."""
    waiting: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(_PREFETCHED)
    closed = threading.Event()

    def work() -> None:
        try:
            while room.acquire() and not closed.is_set():
                waiting.put((next(items), None))
        except BaseException as error:  # re-raised by the consumer
            waiting.put((None, error))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        closed.set()
        room.release()
        thread.join()
