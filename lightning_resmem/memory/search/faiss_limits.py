"""What FAISS would end the process of, or fail at after hours of training: told from a description alone."""

import re

from lightning_resmem.errors import InputError

# What an index may be described as.
FACTORIES = 'a FAISS factory string such as "HNSW32" or "IVF1024,Flat"'
# What FAISS may be given to read: longer descriptions and other numbers end the process, or take all its memory.
_LONGEST_FACTORY = 200
_LARGEST_NUMBER = 2**24
_LINKS, _NSG_LINKS = (2, 1024), (8, 1024)  # of a node
_NSG_ROWS = 114  # that are too few: NSG looks at so many candidates
_MOST_BITS = 16  # of an entry of a codebook, such as 12 in PQ8x12
_MOST_MULTI_BITS = 12  # of each half of a multi-index, whose lists are the pairs of them
_WIDEST = 2**14  # that a transform, whose matrix is square, makes of keys
# Kinds of codebooks, and numbers of which the last is that of bits.
_CODEBOOKS = re.compile(r"(OPQ|P?LSQ|PRQ|PQ|RQ|IMI)\d+((?:x\d+)*)")


def check_bounds(factory: str) -> None:
    """Raise an error for a description that FAISS must not see."""
    if len(factory) > _LONGEST_FACTORY:
        raise InputError(
            f"factory={factory[:20]!r}... has {len(factory)} characters, at most {_LONGEST_FACTORY} are read: give "
            f"{FACTORIES}."
        )
    if "ZnLattice" in factory:
        raise InputError(f"factory={factory!r}: ZnLattice ends the process for many a number. Give {FACTORIES}.")
    bounds = (
        (r"HNSW(\d+)", *_LINKS),
        (r"NSG(\d+)", *_NSG_LINKS),
        (r"(?:PQ|RQ|LSQ)[\dx]*x(\d+)", 1, _MOST_BITS),
        (r"IMI\d+x(\d+)", 1, _MOST_MULTI_BITS),
        (r"(?:PCA[WR]*|RR|ITQ|Pad|OPQ\d+_)(\d+)", 1, _WIDEST),
        (r"(\d+)", 1, _LARGEST_NUMBER),
    )
    for pattern, least, most in bounds:
        for found in re.finditer(pattern, factory):
            digits = found[1].lstrip("0") or "0"
            if len(digits) > len(str(most)) or not least <= int(digits) <= most:
                raise InputError(
                    f"factory={factory!r}: the last number of {found[0]!r} has to lie between {least} and {most}."
                )


def check_size(factory: str, rows: int | None, width: int) -> None:
    """Raise an error for an index that cannot be built of `N` rows, None if that is not known yet, of width `D`."""
    if "IDMap" in factory:
        raise InputError(f"index={factory!r} keeps ids of its own, as the memory does itself: leave out IDMap.")
    reduced = re.search(r"(?:PCA[WR]*|ITQ)(\d+)", factory)
    if reduced and int(reduced[1]) > min(width, width if rows is None else rows):
        there = "keys have" if rows is None else f"there are {rows} rows of"
        raise InputError(
            f"index={factory!r} reduces keys to width {reduced[1]}, and {there} width {width}: give a smaller number."
        )
    if rows is not None:
        check_nsg(factory, rows)
    entries = max((_entries(*found.groups()) for found in _CODEBOOKS.finditer(factory)), default=0)
    if rows is not None and rows < entries:
        raise InputError(
            f"index={factory!r} cannot be trained on {rows} keys: a codebook has {entries} entries, and takes "
            'as many. Use fewer bits, such as PQ8x4, or index="exact".'
        )


def check_nsg(factory: str, rows: int) -> None:
    """Raise an error for so few rows that building NSG ends the process."""
    if "NSG" in factory and rows <= _NSG_ROWS:
        raise InputError(
            f'index={factory!r} takes more than {_NSG_ROWS} rows, and there are only {rows}: use "HNSW32", or '
            'index="exact".'
        )


def _entries(kind: str, numbers: str) -> int:
    """How many rows a codebook takes to train, as many as it has entries: `kind` and `numbers` of `_CODEBOOKS`."""
    if kind.endswith("LSQ"):
        return 0
    bits = numbers.rpartition("x")[2]
    return 2 ** int(bits) if bits and kind != "OPQ" else 256
