"""What can go wrong, by kind. Every error of this package derives from `ResMemError`."""

import reprlib


class ResMemError(Exception):
    """Base class of all errors raised by lightning_resmem."""


class InputError(ResMemError, ValueError):
    """An argument or a row of data has a value that cannot be used."""


class HeadError(ResMemError, RuntimeError):
    """The head (the module whose input is the embedding and whose output is the logits) cannot be found or tapped."""


class EmptyMemoryError(ResMemError, RuntimeError):
    """A memory was asked for an answer before it held any rows."""


class StaleMemoryError(ResMemError, RuntimeError):
    """A memory was used with other weights than those it was filled with, or holds other rows than it did."""


class StorageError(ResMemError, RuntimeError):
    """A saved memory is missing, damaged, or of another format than this version reads."""


class ShardUnavailableError(ResMemError, RuntimeError):
    """A shard of a distributed memory does not answer, or there is no place for it in the cluster."""


class MemoryPassError(ResMemError, RuntimeError):
    """The pass over the training set that fills the memory could not be completed."""


class ResMemWarning(UserWarning):
    """Something works, but probably not as intended; the message says what to do."""


def first_line(error: Exception) -> str:
    """The first line of what an error says: Ray's have many."""
    return str(error).strip().partition("\n")[0]


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
