"""What is checked of rows before a memory takes them in, and of queries before it looks for them."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.params import checked_k
from lightning_resmem.tasks import Multiclass, Task, all_finite, check_finite

# Bytes of a search result (12 a place) beyond which places that no row can fill are refused.
_PADDED_BYTES = 2**32
LARGEST_ID = torch.iinfo(torch.int64).max


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor as it is, an array or nested lists of real numbers as a tensor; raises an error for anything else."""
    tensor = value if isinstance(value, Tensor) else _made_tensor(name, value)
    if tensor.is_meta:
        raise InputError(f"{name} is a tensor on the meta device, which holds no numbers.")
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "sparse"
        way_out = {"nested": "to_padded_tensor(0.0)", "quantized": "dequantize()", "sparse": "to_dense()"}[kind]
        raise InputError(f"{name} is a {kind} tensor, expected one with all its numbers: give .{way_out}.")
    if tensor.is_complex():
        raise InputError(f"{name} has dtype {tensor.dtype}, expected real numbers: give its .real, for example.")
    return tensor


def as_compared(rows: Tensor) -> Tensor:
    """Embeddings with no more range than distances have: float64 as float32, others as they are."""
    return rows.float() if rows.dtype == torch.float64 else rows


def check_batched(name: str, tensor: Tensor, expected: str) -> None:
    """Raise an error for a single row `(D,)` in the place of a batch of them; `expected` is the shape of a batch."""
    if tensor.ndim == 1:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, expected {expected}: the batch dimension is missing. For a "
            f"single row give {name}[None]."
        )


def flat_outputs(outputs: Tensor, expected: str) -> InputError:
    """The error for one number a row `(N,)`, as regressors of scikit-learn return it."""
    return InputError(
        f"outputs has shape {tuple(outputs.shape)}, expected {expected}: for one number a row give outputs[:, None] "
        "(and task=Regression(), or Multilabel() for a logit)."
    )


def check_width(outputs: Tensor, width: int) -> None:
    """Raise an error unless outputs, or predictions made of them, are as wide as those of the memory's rows."""
    if outputs.shape[1] != width:
        raise InputError(
            f"outputs has {outputs.shape[1]} columns, the memory was filled with {width}: give those of the same head."
        )


def missing_outputs() -> InputError:
    """The error where residuals of cut base predictions are asked for without those of the queries."""
    return InputError(
        "outputs is missing: the memory keeps only the largest base probabilities of a row (sparse values), and what "
        "was cut takes the shape of the query's own prediction. Give outputs=, what the head returned for the queries, "
        'or keep outputs in full: LocalMemory(values="dense").'
    )


def check_logits(task: Task, outputs: Tensor) -> None:
    """Warn if outputs `(N, C)` of a classifier look like probabilities."""
    if not isinstance(task, Multiclass) or outputs.shape[1] < 2 or not len(outputs):
        return
    wide = outputs.detach().float()
    inside = bool((wide.min() >= 0) & (wide.max() <= 1))  # almost never so: the sums are not computed then
    if inside and bool((wide.sum(dim=1) - 1).abs().max() < 1e-3):
        warnings.warn(
            "outputs look like probabilities: all are within [0, 1], and rows sum to 1. Multiclass() takes the softmax "
            "of them: give logits, what comes before the softmax, or log-probabilities: outputs.log().",
            ResMemWarning,
            stacklevel=3,
        )


def _made_tensor(name: str, value: Any) -> Tensor:
    kind = type(value).__name__
    try:
        if value is None:
            raise TypeError("None holds no numbers")
        if not isinstance(value, np.ndarray) and hasattr(value, "__array__"):
            value = np.asarray(value)  # pandas, and others that are indexed by labels
        if isinstance(value, np.ndarray) and not (value.flags.c_contiguous and value.flags.writeable):
            value = value.copy(order="C")  # torch takes no negative strides, and warns of read-only arrays
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{name} of type {kind} cannot be made a tensor ({error}): give a tensor, a NumPy array or "
            "nested lists of numbers."
        ) from error


def as_ids(ids: Any, name: str = "ids") -> Tensor:
    """Ids as int64 `(n,)`; raises an error for other shapes and for what are not whole numbers."""
    tensor = as_tensor(name, ids)
    if tensor.ndim == 1 and not len(tensor):
        return tensor.to(torch.int64)  # an empty list has no dtype of its own
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        hint = " For a mask over the rows give memory.ids[mask]." if tensor.dtype == torch.bool else ""
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected (n,) and int64.{hint}"
        )
    whole = tensor.detach().to(torch.int64)
    if tensor.dtype == torch.uint64 and bool((whole < 0).any()):
        raise InputError(f"{name} holds numbers above {LARGEST_ID}, which int64 has no room for.")
    return whole


def default_ids(first: int, count: int) -> Tensor:
    """`first, first + 1, ...`, shape `(count,)`; raises an error where there are not so many."""
    if first + count > LARGEST_ID + 1:
        raise InputError(
            f"ids are not given, and behind the largest so far, {first - 1}, there are no {count} more: give ids=."
        )
    return torch.arange(count) + first if count else torch.empty(0, dtype=torch.int64)


def narrowed(name: str, rows: Tensor, dtype: torch.dtype | None, ids: Tensor | None = None) -> Tensor:
    """Rows in the dtype that they are stored as (None: as they are); raises an error for numbers it cannot hold."""
    stored = rows if dtype is None else rows.to(dtype)
    if stored.is_floating_point() and torch.finfo(stored.dtype).max < torch.finfo(rows.dtype).max:
        check_finite(f"{name} (as {stored.dtype}, at most {torch.finfo(stored.dtype).max:.5g})", stored, ids)
    return stored


def check_shapes(embeddings: Tensor, outputs: Tensor, targets: Tensor, shape: tuple[int, int] | None) -> None:
    """Raise an error unless rows have one length and the widths `(D, C)` of the memory's rows, if it has any."""
    if outputs.ndim == 1 and embeddings.ndim == 2 and len(outputs) == len(embeddings):
        raise flat_outputs(outputs, "(N, C)")
    for name, tensor, expected in (("embeddings", embeddings, "(N, D)"), ("outputs", outputs, "(N, C)")):
        check_batched(name, tensor, expected)
        if tensor.ndim != 2 or not tensor.shape[1]:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}.")
        if not tensor.is_floating_point():
            raise InputError(f"{name} has dtype {tensor.dtype}, expected a floating-point one.")
    if not len(embeddings) == len(outputs) == (len(targets) if targets.ndim else -1):
        raise InputError(
            f"embeddings, outputs and targets have shapes {tuple(embeddings.shape)}, {tuple(outputs.shape)} and "
            f"{tuple(targets.shape)}: the number of rows must be the same."
        )
    widths = (embeddings.shape[1], outputs.shape[1])
    if shape is not None and widths != shape:
        raise InputError(
            f"embeddings and outputs have widths {widths[0]} and {widths[1]}, the memory holds rows of widths "
            f"{shape[0]} and {shape[1]}. Use one model and one embedding for all rows of a memory."
        )


def checked_ids(ids: Any, count: int) -> Tensor:
    """The ids of `count` rows on the CPU, int64; raises an error unless they are different and at least 0."""
    checked = as_ids(ids).cpu()
    if len(checked) != count:
        raise InputError(f"ids has shape {tuple(checked.shape)}, expected ({count},): one for every row.")
    if count and int(checked.min()) < 0:
        raise InputError(f"ids holds {int(checked.min())}: ids are at least 0 (-1 marks a missing neighbour).")
    check_different(checked if bool((checked[1:] > checked[:-1]).all()) else checked.sort().values)
    return checked


def checked_rows(
    task: Task,
    embeddings: Any,
    outputs: Any,
    targets: Any,
    ids: Any,
    shape: tuple[int, int] | None,
    next_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New rows as `ResidualMemory.add` takes them, as tensors without gradients; raises an error for what does not fit.

    Args:
        task: Checks the targets.
        embeddings: Shape `(N, D)`.
        outputs: Shape `(N, C)`.
        targets: As the task wants them.
        ids: Shape `(N,)`, or None for `next_id, next_id + 1, ...`.
        shape: `(D, C)` of the rows that the memory holds, if any.
        next_id: The first of the ids by default.
    """
    embeddings, outputs = as_tensor("embeddings", embeddings), as_tensor("outputs", outputs)
    targets = as_tensor("targets", targets)
    check_shapes(embeddings, outputs, targets, shape)
    count = len(embeddings)
    ids = checked_ids(default_ids(next_id, count) if ids is None else ids, count)
    check_finite("embeddings", as_compared(embeddings.detach()), ids)
    check_finite("outputs", outputs.detach(), ids)
    check_logits(task, outputs)
    return embeddings.detach(), outputs.detach(), task.check_targets(targets.detach(), outputs.shape[1], ids), ids


def checked_changes(
    task: Task, ids: Any, embeddings: Any, outputs: Any, targets: Any, shape: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Changed parts of rows as `ResidualMemory.update` takes them; raises an error for what does not fit.

    Args:
        task: Checks the targets.
        ids: Shape `(n,)`, each once.
        embeddings: Shape `(n, D)`, or None.
        outputs: Shape `(n, C)`, or None.
        targets: As the task wants them, or None.
        shape: `(D, C)` of the rows.

    Returns:
        The ids, and what is given of the others, by name.
    """
    ids = as_ids(ids)
    ids = checked_ids(ids, len(ids))
    given = {"embeddings": embeddings, "outputs": outputs, "targets": targets}
    changes = {name: as_tensor(name, rows).detach() for name, rows in given.items() if rows is not None}
    checked = {
        "embeddings": torch.empty(len(ids), shape[0]),
        "outputs": torch.empty(len(ids), shape[1]),
        "targets": torch.empty(len(ids)),
    }
    check_shapes(**{**checked, **changes}, shape=shape)
    for name in changes.keys() & {"embeddings", "outputs"}:
        check_finite(name, as_compared(changes[name]) if name == "embeddings" else changes[name], ids)
    if "targets" in changes:
        changes["targets"] = task.check_targets(changes["targets"], shape[1], ids)
    return ids, changes


def checked_search(queries: Any, width: int, k: int, rows: int) -> tuple[Tensor, int]:
    """Queries and `k` as `ResidualMemory.search` takes them; raises an error that names the argument.

    Whether the queries are finite is for the search to check, which on a GPU knows it without waiting for it once more.

    Args:
        queries: Shape `(B, D)`.
        width: `D`.
        k: How many neighbours.
        rows: `N`.
    """
    k = checked_k(k)
    queries = as_tensor("queries", queries)
    check_batched("queries", queries, f"(B, {width})")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise InputError(
            f"queries has shape {tuple(queries.shape)}, expected (B, {width}): the memory's keys have width "
            f"{width}. Query with the same embedding that filled the memory."
        )
    if k > rows and len(queries) * k * 12 > _PADDED_BYTES:
        raise InputError(
            f"k={k} for {len(queries)} queries takes {len(queries) * k * 12 / 2**30:.1f} GiB, but the memory has "
            f"only {rows} rows: ask for at most so many neighbours."
        )
    return queries, k


def checked_batch(queries: Any, outputs: Any) -> tuple[Tensor, Tensor]:
    """Queries `(B, D)` and the head's outputs `(B, C)` for them as tensors; raises an error for what does not fit."""
    queries, outputs = matching_batch(queries, outputs)
    if not all_finite(as_compared(queries), outputs):
        check_finite("outputs", outputs)
        check_finite("queries", as_compared(queries))
    return queries, outputs


def matching_batch(queries: Any, outputs: Any) -> tuple[Tensor, Tensor]:
    """`checked_batch` of rows that need not be finite."""
    queries, outputs = as_tensor("queries", queries), as_tensor("outputs", outputs)
    check_batched("queries", queries, "(B, D)")
    if outputs.ndim == 1 and outputs.shape == queries.shape[:1]:
        raise flat_outputs(outputs, "(B, C)")
    if outputs.ndim != 2 or outputs.shape[:1] != queries.shape[:1]:
        raise InputError(
            f"outputs has shape {tuple(outputs.shape)} for queries of shape {tuple(queries.shape)}: "
            "give one row of head outputs for every query."
        )
    return queries, outputs


def check_different(ordered: Tensor) -> None:
    """Raise an error that lists the ids that are repeated in `ordered` `(n,)`, ascending."""
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again):
        raise repeated(again.unique())


def repeated(ids: Tensor) -> InputError:
    """The error for repeated ids `(n,)`."""
    listed = ", ".join(str(int(i)) for i in ids[:5])
    return InputError(
        f"ids are repeated: {listed}{' and more' if len(ids) > 5 else ''}. Every row of a memory has its own id: the "
        "position in the training dataset."
    )
