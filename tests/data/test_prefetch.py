"""The prefetching thread."""

import pytest

from nrat_scale.data.prefetch import prefetched


def test_an_error_in_the_thread_reaches_the_consumer() -> None:
    """Items before it come first, then the same exception."""

    def items():  # type: ignore[no-untyped-def]
        yield 1
        yield 2
        raise ZeroDivisionError("in the thread")

    seen = []
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        seen.extend(prefetched(items()))
    assert list(prefetched(n for n in range(100))) == list(range(100))
