"""Many items, some at a time."""

from collections.abc import Iterator

BATCH = 64
"""Images at once, where nothing asks for another number."""


def batches(count: int, size: int = BATCH, *, even: bool = False) -> Iterator[slice]:
    """Yield slices that part `count` items, in their order, into batches of `size`, of which the last may be smaller.

    Even batches are as many, and differ by one item at most. What a network makes of an image may differ in the last
    bits with the size of its batch.
    """
    parts = -(-count // size)
    for part in range(parts):
        if even:
            yield slice(_even_start(part, count, parts), _even_start(part + 1, count, parts))
        else:
            yield slice(part * size, min((part + 1) * size, count))


def _even_start(part: int, count: int, parts: int) -> int:
    """Return where a part starts when the first parts take one item more, as those of `numpy.array_split` do."""
    return part * (count // parts) + min(part, count % parts)
