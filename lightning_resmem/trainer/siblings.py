"""Several callbacks on one trainer: which of them cannot stand beside each other."""

from collections.abc import Sequence
from typing import NamedTuple

from lightning_resmem.errors import InputError


class Sibling(NamedTuple):
    """A callback, by the name of its class and its own, and whether it replaces the head's output."""

    kind: str
    name: str
    route: bool


def check_siblings(siblings: Sequence[Sibling]) -> None:
    """Raise an error if two callbacks of one trainer do the same, or have the same name."""
    if sum(sibling.route for sibling in siblings) > 1:
        raise InputError(
            f"{len(siblings)} ResMemCallbacks would each replace the head's output. Keep one of them, and give the "
            'others name="..." and route=False: they fill memories and log scores of their own under that name.'
        )
    for index, sibling in enumerate(siblings):
        twin = next((other for other in siblings[:index] if other.name == sibling.name), None)
        if twin is not None:
            raise InputError(
                f"A {twin.kind} and a {sibling.kind} on this Trainer both have name={sibling.name!r}, under which "
                "each would save its memory and log its scores. Give one of them another name: "
                'ResMemCallback(name="...").'
            )
