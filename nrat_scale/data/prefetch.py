"""Prepare batches in one background thread, pinned where there is a GPU."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nrat_scale.data.batches import Batch, T

_PREFETCHED = 4  # batches


def pin(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Page-locked batches where there is a GPU."""
    return (batch.pinned() for batch in batches) if torch.cuda.is_available() else batches


# ---- one thread ahead -----------------------------------------------------------------------------------------------


@dataclass
class _Raised:
    error: BaseException


_END: Any = object()


def prefetched(items: Callable[[], Iterator[T]], depth: int = _PREFETCHED) -> Iterator[T]:
    """What `items()` yields, computed up to `depth` items ahead in one thread, which ends with this generator."""
    waiting: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Any) -> bool:
        while not closed.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        iterator = items()
        try:
            for item in iterator:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:  # whatever it is, it belongs to whoever waits for the item
            put(_Raised(error))
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        closed.set()
        thread.join()
