"""Score many rows with base and memory, batch by batch: for Ray Data, or any loop over arrays."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.answers import Predictions
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.model.batches import ForwardFn
from lightning_resmem.module import ResMemModule
from lightning_resmem.tasks import Multiclass, check_finite

Batch = dict[str, NDArray[Any]]


class ResMemPredictor:
    """Adds predictions to dict-of-NumPy batches: give the class to `ray.data.Dataset.map_batches`.

    Every worker makes one, from arguments that are cheap to send: a path, and a function that loads the base.

    Args:
        memory: A directory that `ResMemModule.save` wrote, or a function that returns a filled memory, such as
            `partial(LocalMemory.load, directory, mmap=True)`, with which the workers of a node share one copy.
        base: The trained model, or a function that returns it.
        inputs: Name of the column that the base reads; of several, each is given to the argument of its name.
        predictions: Which of `"base"`, `"knn"` and `"resmem"` are added, as columns of these names.
        output: `"scores"` adds rows of shape `(C,)`, float32: probabilities (`F(x)` for resmem, whose entries may lie
            below 0), or the prediction in regression. `"labels"` adds the class with the largest one, int64. For a
            base of sequences these are `(T, C)` and `(T,)`.
        device: Where base and memory go.
        forward_fn: `forward_fn(model, batch)` runs the base on a tensor, or for several columns on a dict of tensors;
            by default `model(...)`.
        asked_at: Name of the column that says when each row is asked, in the unit of the memory's times; for a memory
            whose rows have times, and for no other.

    Raises:
        InputError: If an argument is none of these, or if the memory's rows have times and `asked_at` is not given.
        StorageError: If the memory cannot be loaded.
        StaleMemoryError: If it was filled with other weights than the base has.

    Examples:
        >>> from torch import nn
        >>> from lightning_resmem import ResMemParams
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.fc(x)
        >>> def filled():
        ...     memory = LocalMemory(params=ResMemParams(k=1))
        ...     memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
        ...     return memory
        >>> predictor = ResMemPredictor(filled, Net, inputs="x", predictions=["knn"], output="labels")
        >>> predictor({"x": np.eye(2)})["knn"]
        array([0, 1])
    """

    def __init__(
        self,
        memory: str | os.PathLike[str] | Callable[[], ResidualMemory],
        base: L.LightningModule | Callable[[], L.LightningModule],
        inputs: str | Sequence[str],
        predictions: Sequence[Literal["base", "knn", "resmem"]] = ("base", "resmem"),
        output: Literal["scores", "labels"] = "scores",
        device: str | torch.device = "cpu",
        forward_fn: ForwardFn | None = None,
        asked_at: str | None = None,
    ) -> None:
        columns = [inputs] if isinstance(inputs, str) else list(inputs) if isinstance(inputs, Sequence) else []
        if not columns or not all(isinstance(column, str) and column for column in columns):
            raise InputError(f'inputs={inputs!r}: give the name of a column, such as "image", or a list of names.')
        if isinstance(predictions, str) or not predictions or not set(predictions) <= set(Predictions._fields):
            raise InputError(f"predictions={predictions!r}: give some of {', '.join(map(repr, Predictions._fields))}.")
        if output not in ("scores", "labels"):
            raise InputError(f'output={output!r} is not known: give "scores" or "labels".')
        if not callable(base):  # a LightningModule is, too
            raise InputError(f"base is a {type(base).__name__}, expected the trained model or a function for it.")
        if asked_at is not None and (not isinstance(asked_at, str) or not asked_at):
            raise InputError(f'asked_at={asked_at!r}: give the name of the column with the times, such as "hour".')
        base = base if isinstance(base, L.LightningModule) else base()
        filled = memory() if callable(memory) else LocalMemory.load(memory)
        _check_times(filled, asked_at)
        self._module = ResMemModule(base, filled, forward_fn=forward_fn).to(device)
        if output == "labels" and not isinstance(filled.task, Multiclass):
            raise InputError(f'output="labels" is for Multiclass, the memory is for {type(filled.task).__name__}.')
        self._single, self._columns = isinstance(inputs, str), columns
        self._predictions, self._labels, self._asked_at = list(predictions), output == "labels", asked_at

    def __call__(self, batch: Batch) -> Batch:
        """Score a batch.

        Args:
            batch: Columns by name, each of `B` rows. Floating point inputs are given to the base in its own precision.

        Returns:
            The batch with a column for each of `predictions`, `(B, C)` float32 or `(B,)` int64.

        Raises:
            InputError: If a column is missing, is no array of numbers, or has the name of a prediction, or if the base
                returns something that is not finite.
        """
        taken = [name for name in self._predictions if name in batch]
        if taken:
            raise InputError(f"The batch has a column {taken[0]!r} already: rename it, or leave out that prediction.")
        tensors = {column: self._tensor(batch, column) for column in self._columns}
        times = None if self._asked_at is None else torch.tensor(_numbers(batch, self._asked_at))
        with torch.inference_mode():
            found = self._module.predictions(tensors[self._columns[0]] if self._single else tensors, at=times)
        check_finite("The base's predictions", found.base)
        added: Batch = {}
        for name in self._predictions:
            scores = getattr(found, name)
            added[name] = (scores.argmax(dim=-1) if self._labels else scores.float()).cpu().numpy()
        return {**batch, **added}

    def _tensor(self, batch: Batch, column: str) -> Tensor:
        floats = next((p.dtype for p in self._module.base.parameters() if p.is_floating_point()), torch.float32)
        tensor = torch.tensor(_numbers(batch, column))  # copied: the arrays of Ray Data cannot be written to
        return tensor.to(self._module.device, floats if tensor.is_floating_point() else None)


def _numbers(batch: Batch, column: str) -> NDArray[Any]:
    if column not in batch:
        raise InputError(
            f"The batch has no column {column!r}, it has {sorted(batch)}: give the name of one that is there."
        )
    array = np.asarray(batch[column])
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"Column {column!r} is an array of {array.dtype}, expected numbers of one shape in all rows: convert "
            "it before, in a map_batches of its own."
        )
    return array


def _check_times(memory: ResidualMemory, asked_at: str | None) -> None:
    if memory.are_dated and asked_at is None:
        raise InputError(
            "The rows of this memory have times, so it must be told when each row is asked: give the name of the "
            'column with the times, asked_at="hour".'
        )
    if asked_at is not None and not memory.are_dated:
        raise InputError(f"asked_at={asked_at!r}, but the rows of this memory have no times: leave it out.")
