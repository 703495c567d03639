"""Arguments of a wrong type are named, with the way out, before they fail somewhere inside."""

import reprlib

from lightning_resmem.errors import InputError
from lightning_resmem.memory.base import ResidualMemory


def check_type(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise an error unless an argument is of a kind.

    Args:
        name: Of the argument.
        value: That was given.
        kind: That it has to be an instance of.
        wanted: What to give instead, for the message: "a memory, such as LocalMemory()".
    """
    if not isinstance(value, kind):
        raise wrong_type(name, value, wanted)


def wrong_type(name: str, value: object, wanted: str) -> InputError:
    """The error for an argument of a wrong type."""
    return InputError(f"{name} is a {type(value).__name__}, {reprlib.repr(value)}: give {wanted}.")


def check_memory(memory: object) -> None:
    """Raise an error unless an argument is a memory."""
    check_type("memory", memory, ResidualMemory, "a memory, such as LocalMemory()")
