"""What can go wrong, by kind. Every error of this package derives from `ResMemError`."""

import reprlib


class ResMemError(Exception):
    """Base class of all errors raised by lightning_resmem.

    Examples:
        >>> from lightning_resmem import ResMemError, ResMemParams
        >>> try:
        ...     ResMemParams(k=0)
        ... except ResMemError as error:
        ...     print(type(error).__name__)
        InputError
    """


class InputError(ResMemError, ValueError):
    """An argument or a row of data has a value that cannot be used.

    Examples:
        >>> from lightning_resmem import ResMemParams
        >>> ResMemParams(k=0)
        Traceback (most recent call last):
            ...
        lightning_resmem.errors.InputError: k=0...
    """


class HeadError(ResMemError, RuntimeError):
    """The head (the module whose input is the embedding and whose output is the logits) cannot be found or tapped.

    Examples:
        >>> from torch import nn
        >>> from lightning_resmem import HeadTap
        >>> HeadTap(nn.Sequential(nn.Linear(2, 2)), head="fc")
        Traceback (most recent call last):
            ...
        lightning_resmem.errors.HeadError: head='fc' is not a module of Sequential. ...
    """


class EmptyMemoryError(ResMemError, RuntimeError):
    """A memory was asked for an answer before it held any rows.

    Examples:
        >>> from lightning_resmem import ResMemCallback
        >>> ResMemCallback().module
        Traceback (most recent call last):
            ...
        lightning_resmem.errors.EmptyMemoryError: Nothing was memorized yet: ...
    """


class StaleMemoryError(ResMemError, RuntimeError):
    """A memory was used with other weights than those it was filled with, or holds other rows than it did.

    Examples:
        >>> from lightning_resmem import ResMemModule, memorize
        >>> def loaded_or_new(directory, model, trainer, dataloader):
        ...     try:
        ...         return ResMemModule.load(directory, base=model)
        ...     except StaleMemoryError:  # the model was trained on since
        ...         return memorize(trainer, model, dataloader)
    """


class StorageError(ResMemError, RuntimeError):
    """A saved memory is missing, damaged, or of another format than this version reads.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> LocalMemory.load("no such directory")
        Traceback (most recent call last):
            ...
        lightning_resmem.errors.StorageError: There is no saved memory at ...
    """


class ShardUnavailableError(ResMemError, RuntimeError):
    """A shard of a distributed memory does not answer, or there is no place for it in the cluster.

    Examples:
        >>> def answer(module, inputs):
        ...     try:
        ...         return module(inputs)
        ...     except ShardUnavailableError:  # its node is gone, and none has room: the base alone
        ...         return module.base(inputs)
    """


class MemoryPassError(ResMemError, RuntimeError):
    """The pass over the training set that fills the memory, or its rehearsal before training, could not be completed.

    Examples:
        >>> def fit(trainer, model, datamodule):
        ...     try:
        ...         trainer.fit(model, datamodule=datamodule)
        ...     except MemoryPassError as error:  # another rank failed; it says in what, before training or after it
        ...         print(error)
    """


class ResMemWarning(UserWarning):
    """Something works, but probably not as intended; the message says what to do.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", ResMemWarning)  # where nobody would read it
        ...     warnings.warn("The same rows differ.", ResMemWarning)
        Traceback (most recent call last):
            ...
        lightning_resmem.errors.ResMemWarning: The same rows differ.
    """


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
