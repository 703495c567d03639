"""What a few rows tell before all are read: whether they can be stored, are augmented, and come in an order."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.collection.samplers import WAY_OUT
from lightning_resmem.errors import InputError, ResMemWarning

_TOLERANCE = 1e-3  # of keys: two forwards on a GPU differ in the last digits


class Sample(NamedTuple):
    """A few rows, and the tensors of the batch that they came in."""

    chunk: Chunk
    inputs: list[Tensor]


def check_augmentation(sample: Sample, again: Sample, dataset: str) -> None:
    """Warn if rows of a dataset differ when they are read again: the memory would hold a random version of each."""
    if not _equal(sample.inputs, again.inputs):
        rank_zero_warn(
            f"The same rows of {dataset} differ from one reading to the next, as augmented rows do, so the memory "
            "would hold one random version of each. That can cost most of what the memory gains. Memorize the rows "
            "without augmentation: memory_dataloader=DataLoader(plain_dataset, batch_size=...), or a method "
            "memory_dataloader() of the datamodule.",
            category=ResMemWarning,
        )
    elif not _close(sample.chunk.embeddings, again.chunk.embeddings):
        rank_zero_warn(
            f"The embeddings of the same rows of {dataset} differ from one forward to the next, though their inputs "
            "are the same: the model draws random numbers in evaluation mode, too, and its keys are random then. If "
            "that is augmentation inside of the model, switch it off where model.training is False; if it depends on "
            "the rows, give others as memory_dataloader.",
            category=ResMemWarning,
        )


def check_order(samples: Sequence[Sample], again: Sequence[Sample], dataset: str) -> None:
    """Raise an error if an iterable yields other rows when it is read again: their numbers would be no ids.

    Args:
        samples: Its first batches.
        again: Its first batches, once more.
        dataset: Its name.
    """
    same = len(samples) == len(again) and all(
        _equal([one.chunk.targets], [other.chunk.targets]) for one, other in zip(samples, again, strict=True)
    )
    if not same:
        raise InputError(
            f"{dataset} is no DataLoader, and its batches are others each time it is read, so its rows have no "
            f"positions. {WAY_OUT} Or give ids_fn=lambda batch: batch[...], if a batch holds the ids of its rows."
        )
    if samples:
        check_augmentation(samples[0], again[0], dataset)


class Storable:
    """Checks that a few rows can be stored beside those that it was given first."""

    def __init__(self) -> None:
        self._first: Chunk | None = None

    def __call__(self, chunk: Chunk) -> None:
        """Raise an error if rows of one loader cannot."""
        self._first = self._first or chunk
        for name, rows, others in zip(("embeddings", "outputs"), chunk, self._first, strict=False):
            if rows.shape[1] != others.shape[1]:
                raise InputError(
                    f"The {name} of one loader's rows have width {rows.shape[1]}, those of the first loader "
                    f"{others.shape[1]}: the memory wants one model and one embedding for all rows. Give the loaders "
                    "of such rows alone."
                )


@contextmanager
def naming(dataset: str | None) -> Iterator[None]:
    """Add to an error which of several loaders it is about, and that it need not be memorized.

    Args:
        dataset: Its name; None adds nothing.
    """
    try:
        yield
    except Exception as error:
        if dataset is not None:
            error.add_note(
                f"This was {dataset}. If its rows have no labels, as in semi-supervised training, or are not to be "
                "memorized for another reason, give the others alone: ResMemCallback(memory_dataloader=...), or as the "
                "dataloader of memorize."
            )
        raise


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    dense = [(a, b) for a, b in zip(one, other, strict=False) if a.layout == b.layout == torch.strided]
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in dense
    )


def _close(one: Tensor, other: Tensor) -> bool:
    scale = float(one.abs().nan_to_num(0, 0, 0).amax()) if one.numel() else 0.0
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True
    )
