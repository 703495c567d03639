"""What users call is what `public_names.txt` lists: the public names, and how each of them is called.

A deliberate change is written down with `python -m tests.test_public_names > tests/public_names.txt`.
"""

import difflib
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning_resmem

LIST = Path(__file__).parent / "public_names.txt"


def public_names() -> list[str]:
    """A line for each public name and each public method: `ResMemParams.__init__(k: int = 50, ...)`."""
    lines = []
    for name in sorted(lightning_resmem.__all__):
        found = getattr(lightning_resmem, name)
        lines.append(f"class {name}" if inspect.isclass(found) else f"{name}{signature(found)}")
        if inspect.isclass(found):
            lines += [f"    {member}" for member in members(found)]
    return lines


def members(cls: type) -> Iterator[str]:
    """How an object is made, then its methods and properties; those of other libraries' classes are theirs."""
    if not issubclass(cls, (BaseException, Warning)):
        yield f"__init__{signature(cls)}"
    for name in sorted(name for name in dir(cls) if not name.startswith("_")):
        found = inspect.getattr_static(cls, name)
        owner = next(each for each in cls.__mro__ if name in vars(each))
        if not owner.__module__.startswith("lightning_resmem"):
            continue
        if isinstance(found, (property, cached_property)):
            getter = found.fget if isinstance(found, property) else found.func
            yield f"{name}: {signature(getter).rpartition(' -> ')[2]}"
        elif isinstance(found, (classmethod, staticmethod)):
            yield f"{type(found).__name__} {name}{signature(getattr(cls, name))}"
        elif inspect.isfunction(found):
            yield f"{name}{signature(found)}"


def signature(function: Any) -> str:
    """As it is written, whichever modules the types are from, and however they are quoted."""
    text = re.sub(r"<function .*? at 0x\w+>", "<function>", str(inspect.signature(function)))
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)


def test_public_names_and_signatures_are_those_of_the_list() -> None:
    listed, found = LIST.read_text(encoding="utf-8").splitlines(), public_names()
    changes = list(difflib.unified_diff(listed, found, "public_names.txt", "lightning_resmem", lineterm="", n=0))
    assert changes == [], "\n".join([*changes, "If that is meant: " + __doc__.strip().splitlines()[-1]])


def test_each_public_name_has_an_example() -> None:
    documented = {name: inspect.getdoc(getattr(lightning_resmem, name)) or "" for name in lightning_resmem.__all__}
    assert [name for name, text in documented.items() if "    >>> " not in text] == []


if __name__ == "__main__":
    print("\n".join(public_names()))
