"""How much a FAISS factory string may ask for: FAISS itself takes gigabytes for some, and crashes on others."""

import re

from lightning_resmem.errors import InputError

_MOST_CHARACTERS = 200
# What a number may be at most: links of a graph, bits of a code, bits of a multi-index, and all others (lists, widths).
_BOUNDS = (
    (re.compile(r"(?:HNSW|NSG)(\d+)"), 1024),
    (re.compile(r"IMI\d+x(\d+)"), 12),
    (re.compile(r"(?<!IMI\d)x(\d+)"), 16),
    (re.compile(r"(\d+)"), 2**22),
)


def check_bounds(factory: str) -> None:
    """Raise an error for a description that no sensible index has.

    Args:
        factory: As for `FaissIndex`.

    Raises:
        InputError: If it is too long, or a number in it is too large.

    Examples:
        >>> check_bounds("OPQ32,IVF4096_HNSW32,PQ32x8")
    """
    if len(factory) > _MOST_CHARACTERS:
        raise InputError(
            f"factory={factory[:20]!r}... has {len(factory)} characters, more than {_MOST_CHARACTERS}: FAISS crashes "
            "on such descriptions."
        )
    for pattern, most in _BOUNDS:
        for found in pattern.finditer(factory):
            if len(found[1]) > 20 or int(found[1]) > most:
                raise InputError(
                    f"factory={factory!r}: {found[0]} is more than FAISS can be given here, {most} at most."
                )
