"""Classes by their names."""

from collections.abc import Sequence

from lightning_resmem.errors import InputError


def class_name(value: float | None, class_names: Sequence[str] | None) -> str:
    """A class, by its name if there are names, or a number; nothing for None."""
    if not isinstance(value, int):
        return "" if value is None else f"{value:.4g}"
    if class_names is None:
        return str(value)
    if value >= len(class_names):
        raise InputError(
            f"class_names has {len(class_names)} names, and there is a class {value}: give a name for each."
        )
    return str(class_names[value])
