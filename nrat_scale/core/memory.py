"""Out of memory: how torch reports it, on GPUs and on CPUs."""

import torch

from nrat_scale.core.errors import first_line

_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a GPU or the host has too little free memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def memory_message(error: BaseException) -> str:
    """The part of the error that a person needs: what could not be allocated, and how much memory there is."""
    return ". ".join(first_line(error).split(". ")[:3]).rstrip(".")
