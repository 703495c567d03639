"""ResMem in float64 NumPy, by the letter of the paper and without any cleverness: what the package is tested against.

Imports nothing of the package and shares no code with it. Everything is brute force, so keep the data small.
Names: `N` rows, `D` key width, `C` outputs, `B` queries, `k` neighbours.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TASKS = ("multiclass", "multilabel", "regression")


class Predictions(NamedTuple):
    """Base, kNN-only and combined prediction, each `(B, C)`."""

    base: Floats
    knn: Floats
    resmem: Floats


def neighbors(keys: ArrayLike, ids: ArrayLike | None, queries: ArrayLike, k: int) -> tuple[Floats, Ints]:
    """Distances `(B, k)` and ids `(B, k)` of the k nearest keys `(N, D)`, ascending, ties by the lowest id.

    `ids=None` stands for 0, 1, 2, ... Where `N < k`, missing places have distance inf and id -1.
    """
    keys, queries = np.asarray(keys, np.float64), np.asarray(queries, np.float64)
    ids = np.arange(len(keys)) if ids is None else np.asarray(ids, np.int64)
    distances = np.full((len(queries), k), np.inf)
    found = np.full((len(queries), k), -1, np.int64)
    for row, query in enumerate(queries):
        away = np.sqrt(((keys - query) ** 2).sum(axis=1))
        order = np.lexsort((ids, away))[:k]
        distances[row, : len(order)] = away[order]
        found[row, : len(order)] = ids[order]
    return distances, found


def weights(distances: ArrayLike, sigma: float) -> Floats:
    """`exp(-d / sigma)` `(B, k)`, each row divided by its sum; a row without any finite distance is all 0."""
    result = np.zeros_like(np.asarray(distances, np.float64))
    for row, away in enumerate(np.asarray(distances, np.float64)):
        found = np.isfinite(away)
        if found.any():
            with np.errstate(over="ignore"):  # a gap that is infinitely many sigmas wide has weight 0
                kernel = np.exp(-(away[found] - away[found].min()) / np.float64(sigma))
            result[row, found] = kernel / kernel.sum()
    return result


def softmax(logits: ArrayLike, softmax_temperature: float = 1.0) -> Floats:
    """Probabilities `(N, C)` of logits `(N, C)` divided by the temperature."""
    scaled = np.asarray(logits, np.float64) / softmax_temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def sigmoid(logits: ArrayLike, softmax_temperature: float = 1.0) -> Floats:
    """Probabilities of logits divided by the temperature, entry by entry."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64) / softmax_temperature))


def base_prediction(outputs: ArrayLike, task: str = "multiclass", softmax_temperature: float = 1.0) -> Floats:
    """What the base predicts from its outputs `(N, C)`; regression has no temperature."""
    if task == "multiclass":
        return softmax(outputs, softmax_temperature)
    if task == "multilabel":
        return sigmoid(outputs, softmax_temperature)
    assert task == "regression", task
    return np.asarray(outputs, np.float64)


def labels(targets: ArrayLike, num_outputs: int, task: str = "multiclass") -> Floats:
    """Targets as rows `(N, C)`: one-hot for multiclass, as they are otherwise."""
    if task == "multiclass":
        return np.eye(num_outputs)[np.asarray(targets, np.int64)]
    return np.asarray(targets, np.float64).reshape(-1, num_outputs)


def residuals(
    outputs: ArrayLike, targets: ArrayLike, task: str = "multiclass", softmax_temperature: float = 1.0
) -> Floats:
    """Label minus base prediction, `(N, C)`."""
    prediction = base_prediction(outputs, task, softmax_temperature)
    return labels(targets, prediction.shape[1], task) - prediction


def weighted_sum(positions: ArrayLike, weights: ArrayLike, values: ArrayLike) -> Floats:
    """`sum_j weights[b, j] * values[positions[b, j]]` `(B, C)`; position -1 adds nothing, whatever its weight."""
    values = np.asarray(values, np.float64)
    positions, weights = np.asarray(positions, np.int64), np.asarray(weights, np.float64)
    sums = np.zeros((len(positions), values.shape[1]))
    for row in range(len(positions)):
        for position, weight in zip(positions[row], weights[row], strict=True):
            if position >= 0:
                sums[row] += weight * values[position]
    return sums


def label_average(
    positions: ArrayLike, weights: ArrayLike, targets: ArrayLike, num_outputs: int, task: str = "multiclass"
) -> Floats:
    """The weighted average of the neighbours' labels `(B, C)`: the kNN-only prediction."""
    return weighted_sum(positions, weights, labels(targets, num_outputs, task))


def predict(
    keys: ArrayLike,
    outputs: ArrayLike,
    targets: ArrayLike,
    queries: ArrayLike,
    query_outputs: ArrayLike,
    k: int,
    sigma: float,
    softmax_temperature: float = 1.0,
    strength: float = 1.0,
    task: str = "multiclass",
    ids: ArrayLike | None = None,
    combined_temperature: float = 1.0,
) -> Predictions:
    """All three predictions for queries `(B, D)` with outputs `(B, C)`, from rows that may come in any order.

    `keys` `(N, D)`, `outputs` `(N, C)`, `targets` and `ids` `(N,)` are the rows of the memory.
    """
    order = np.arange(len(np.asarray(keys))) if ids is None else np.argsort(np.asarray(ids, np.int64))
    keys, outputs, targets = np.asarray(keys)[order], np.asarray(outputs)[order], np.asarray(targets)[order]
    distances, positions = neighbors(keys, None, queries, k)
    weight = weights(distances, sigma)
    base = base_prediction(query_outputs, task, softmax_temperature)
    residual = weighted_sum(positions, weight, residuals(outputs, targets, task, softmax_temperature))
    combined = base + strength * residual
    if combined_temperature != 1 and task == "multiclass":
        combined = above_floor(softmax(log_predictions(combined, base), combined_temperature), base)
    if combined_temperature != 1 and task == "multilabel":
        clamped = combined.clip(1e-4, 1 - 1e-4)
        combined = (1 / (1 + ((1 - clamped) / clamped) ** (1 / combined_temperature))).clip(1e-4, 1 - 1e-4)
    return Predictions(base=base, knn=label_average(positions, weight, targets, base.shape[1], task), resmem=combined)


def above_floor(probabilities: Floats, base: Floats) -> Floats:
    """`max(s q, 0.1 min(p, max s q))`, with the factor `s` of each row for which it sums to 1."""
    raised = []
    for q, p in zip(probabilities, base, strict=True):
        low, high = 0.0, 1.0
        for _ in range(60):
            s = (low + high) / 2
            row = np.maximum(s * q, 0.1 * np.minimum(p, s * q.max()))
            low, high = (s, high) if row.sum() < 1 else (low, s)
        raised.append(row)
    return np.stack(raised)


def cut(outputs: ArrayLike, top_m: int, softmax_temperature: float = 1.0) -> tuple[Floats, Floats]:
    """Of each row's base probabilities the `top_m` largest, the others 0 `(N, C)`, and the mass of the others `(N,)`.

    Only the logarithms of the largest at temperature 1 are known, and the mass of the others, as if that were even.
    """
    probabilities = softmax(outputs)
    kept, tails = np.zeros_like(probabilities), np.zeros(len(probabilities))
    for row, entries in enumerate(probabilities):
        largest = np.argsort(-entries, kind="stable")[:top_m]
        others = len(entries) - len(largest)
        raised = entries[largest] ** (1 / softmax_temperature)
        rest = 1 - entries[largest].sum()
        tail = others * (rest / others) ** (1 / softmax_temperature) if others else 0.0
        kept[row, largest] = raised / (raised.sum() + tail)
        tails[row] = tail / (raised.sum() + tail)
    return kept, tails


def predict_with_cut_outputs(
    keys: ArrayLike,
    outputs: ArrayLike,
    targets: ArrayLike,
    queries: ArrayLike,
    query_outputs: ArrayLike,
    k: int,
    sigma: float,
    top_m: int,
    softmax_temperature: float = 1.0,
    strength: float = 1.0,
) -> Floats:
    """`F = p + s (A - sum_i w_i top_i - (sum_i w_i tail_i) p)`, shape `(B, C)`."""
    distances, positions = neighbors(keys, None, queries, k)
    weight = weights(distances, sigma)
    base = softmax(query_outputs, softmax_temperature)
    kept, tails = cut(outputs, top_m, softmax_temperature)
    averages = label_average(positions, weight, targets, base.shape[1])
    tail = weighted_sum(positions, weight, tails[:, None])
    return base + strength * (averages - weighted_sum(positions, weight, kept) - tail * base)


def log_predictions(combined: ArrayLike, base: ArrayLike, floor: float = 0.1) -> Floats:
    """`log` of `max(F, floor * min(p, max_c F))`, renormalised: shape `(B, C)`."""
    combined, base = np.asarray(combined, np.float64), np.asarray(base, np.float64)
    raised = np.maximum(combined, floor * np.minimum(base, combined.max(axis=1, keepdims=True)))
    with np.errstate(divide="ignore"):
        return np.log(raised) - np.log(raised.sum(axis=1, keepdims=True))
