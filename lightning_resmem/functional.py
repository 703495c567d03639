"""The maths of ResMem as pure functions on tensors.

Shapes: `B` queries, `N` rows in the memory, `k` neighbours, `C` classes. Half-precision input is computed in float32,
float32 stays float32 and float64 stays float64. All formulas are those of https://arxiv.org/abs/2302.01576.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "argmax", "ascending", "combine", "log_predictions", "negative_log_likelihood", "neighbor_weights",
    "probabilities", "proper_probabilities", "residuals", "tempered", "weighted_labels", "weighted_residual",
    "whole_residual",
]  # fmt: skip

# Share of the base's probability that a class keeps at least: see `log_predictions`.
FLOOR = 0.1
# Times that a prediction is raised to the floor; after three of them no entry is below it, as a rule.
_ROUNDS = 5
# Bytes that a weighted sum over half-precision values may gather at once.
_GATHER_BYTES = 64 * 2**20


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that sums accumulate in: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def argmax(rows: Tensor) -> Tensor:
    """`rows.argmax(dim=-1)`, shape `(..., C)` to `(...)`; on CPUs NumPy is up to fifteen times faster at it.

    Examples:
        >>> argmax(torch.tensor([[0.2, 0.8], [0.6, 0.4]]))
        tensor([1, 0])
    """
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        return torch.as_tensor(rows.detach().numpy().argmax(axis=-1))
    return rows.argmax(dim=-1)


def ascending(distances: Tensor) -> tuple[Tensor, Tensor]:
    """`distances.sort(dim=1, stable=True)`; on CPUs several times faster.

    Args:
        distances: Shape `(B, n)`, at least 0, none NaN.

    Returns:
        Sorted distances and the columns they come from, both `(B, n)`.

    Examples:
        >>> ascending(torch.tensor([[2.0, 0.5, 2.0]]))
        (tensor([[0.5000, 2.0000, 2.0000]]), tensor([[1, 0, 2]]))
    """
    if distances.device.type != "cpu" or distances.dtype != torch.float32:
        values, columns = distances.sort(dim=1, stable=True)
        return values, columns
    # Bits of numbers that are not negative have their order, a column behind them makes all different; NumPy is fast.
    bits = distances.detach().contiguous().numpy().view(np.int32)
    keys = (bits.astype(np.int64) << 32) | np.arange(bits.shape[1])
    keys.sort(axis=1)
    return torch.from_numpy((keys >> 32).astype(np.int32).view(np.float32)), torch.from_numpy(keys & 0xFFFFFFFF)


def probabilities(outputs: Tensor, softmax_temperature: float = 1.0) -> Tensor:
    """The base probabilities `softmax(f(x) / T)`.

    The largest logit of a row is subtracted before the division, so that neither huge logits nor a `T` towards 0 can
    overflow: the limit is all probability on the largest logit (shared among equal ones).

    Args:
        outputs: Logits `f(x)`, shape `(N, C)`.
        softmax_temperature: `T`, above 0.

    Returns:
        Probabilities, shape `(N, C)`; every row sums to 1.

    Examples:
        >>> probabilities(torch.tensor([[0.0, 3.0]]), softmax_temperature=1.5)
        tensor([[0.1192, 0.8808]])
    """
    outputs = _wide(outputs)
    if softmax_temperature == 1:
        return torch.softmax(outputs, dim=-1)
    below = outputs - outputs.amax(dim=-1, keepdim=True)
    # A T below the dtype's smallest normal number would become 0 and turn 0 / T into NaN.
    return torch.softmax(below / max(softmax_temperature, torch.finfo(below.dtype).tiny), dim=-1)


def residuals(outputs: Tensor, targets: Tensor, softmax_temperature: float = 1.0) -> Tensor:
    """What the base model still gets wrong: `onehot(y) - softmax(f(x) / T)`.

    Args:
        outputs: Logits `f(x)`, shape `(N, C)`.
        targets: Class labels in `[0, C)`, int64, shape `(N,)`.
        softmax_temperature: `T`, what the logits are divided by.

    Returns:
        Residuals, shape `(N, C)`; every row sums to 0.

    Examples:
        >>> residuals(torch.zeros(1, 2), torch.tensor([1]))
        tensor([[-0.5000,  0.5000]])
    """
    residual = probabilities(outputs, softmax_temperature).neg_()
    return residual.scatter_add_(1, targets[:, None], residual.new_ones(targets.shape[0], 1))


def neighbor_weights(distances: Tensor, sigma: float) -> Tensor:
    """Kernel weights `exp(-d / sigma)`, normalised over the neighbours of each query.

    The smallest distance of a row is subtracted first, so that `sigma` may go towards 0: the limit, all weight on the
    nearest neighbour (shared among equally near ones), is reached without dividing 0 by 0.

    Args:
        distances: Euclidean distances, shape `(B, k)`; `inf` marks a missing neighbour.
        sigma: Kernel width, a distance above 0.

    Returns:
        Weights, shape `(B, k)`: 0 for missing neighbours, each row sums to 1, or to 0 if it has no neighbour at all.

    Examples:
        >>> neighbor_weights(torch.tensor([[0.0, 1.0, float("inf")]]), sigma=1.0)
        tensor([[0.7311, 0.2689, 0.0000]])
    """
    distances = _wide(distances)
    found = torch.isfinite(distances)
    if distances.shape[-1] == 0:
        return distances.clone()
    nearest = distances.amin(dim=-1, keepdim=True)
    gaps, tiny = nearest - distances, torch.finfo(distances.dtype).tiny
    if sigma < tiny:
        # Below the smallest normal number it could become 0, and turn 0 / sigma into NaN: both are widened.
        gaps, sigma = gaps * 2.0**64, max(sigma * 2.0**64, tiny)
    weights = torch.exp(gaps / sigma).where(found, 0)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)  # the nearest has weight 1, so a sum >= 1


def weighted_residual(positions: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """The sum `sum_j weights[b, j] * values[positions[b, j]]`, never building the `(B, k, C)` array.

    `torch.nn.functional.embedding_bag` does the sum in one pass over the rows. It returns the dtype of its table, so
    half-precision tables are summed over blocks of queries in float32 instead.

    Args:
        positions: Rows of `values`, int64, shape `(B, k)`; -1 marks a missing neighbour.
        weights: Shape `(B, k)`; weights of missing neighbours are not read.
        values: Table, shape `(N, C)`.

    Returns:
        Sums, shape `(B, C)`, float32 (float64 for a float64 table).

    Examples:
        >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> weighted_residual(torch.tensor([[1, 0, -1]]), torch.tensor([[0.75, 0.25, 0.0]]), table)
        tensor([[0.2500, 0.7500]])
    """
    if positions.numel() == 0 or values.shape[0] == 0:
        return _wide(values.new_zeros(positions.shape[0], values.shape[1]))
    missing = positions < 0
    if positions.device.type != "cpu" or missing.any():  # to ask a GPU takes longer than to fill
        positions, weights = positions.masked_fill(missing, 0), weights.masked_fill(missing, 0)
    if values.dtype in (torch.float32, torch.float64):
        return torch.nn.functional.embedding_bag(
            positions, values, per_sample_weights=weights.to(values.dtype), mode="sum"
        )
    queries, k = positions.shape
    block = max(1, _GATHER_BYTES // (4 * k * values.shape[1]))
    # Not a matrix product: under autocast or with TF32 that would be rounded to half precision after all.
    sums = [
        values[positions[i : i + block]].float().mul_(weights[i : i + block, :, None].float()).sum(dim=1)
        for i in range(0, queries, block)
    ]
    return torch.cat(sums)


def weighted_labels(positions: Tensor, weights: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """The weighted label average `sum_j weights[b, j] * onehot(targets[positions[b, j]])`: the kNN-only prediction.

    Args:
        positions: Rows of the memory, int64, shape `(B, k)`; -1 marks a missing neighbour.
        weights: Shape `(B, k)`.
        targets: Class labels of the rows, int64, shape `(N,)`.
        num_classes: `C`.

    Returns:
        Shape `(B, C)`, in the dtype of the weights.

    Examples:
        >>> weighted_labels(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]), torch.tensor([2, 0]), 3)
        tensor([[0.2500, 0.0000, 0.7500]])
    """
    weights = _wide(weights)
    sums = weights.new_zeros(positions.shape[0], num_classes)
    if positions.numel() == 0 or targets.shape[0] == 0:
        return sums
    weights = weights.masked_fill(positions < 0, 0)
    return sums.scatter_add_(1, targets[positions.clamp_min(0)], weights)


def whole_residual(known: Tensor, tail: Tensor | None, base: Tensor) -> Tensor:
    """The residual sum where the base predictions of neighbours were cut to their largest entries.

    What was cut of the neighbours is taken to have the shape of the query's own base prediction:
    `A - sum_i w_i top_i - (sum_i w_i tail_i) p(x)`, with `A` the neighbours' labels, `top_i` what was kept and `tail_i`
    the mass of what was cut. It is off by at most `sum_i w_i tail_i` in total variation.

    Args:
        known: `A - sum_i w_i top_i`, shape `(..., C)`.
        tail: `sum_i w_i tail_i`, shape `(...)`; None where nothing was cut.
        base: `p(x)`, broadcasts to `(..., C)`.

    Returns:
        Shape `(..., C)`; `known` itself where nothing was cut.

    Examples:
        >>> whole_residual(torch.tensor([[0.4, -0.1]]), torch.tensor([0.3]), torch.tensor([[0.5, 0.5]]))
        tensor([[ 0.2500, -0.2500]])
    """
    if tail is None:
        return known
    return torch.addcmul(known, tail[..., None].to(known.dtype), base.to(known.device, known.dtype), value=-1)


def combine(base: Tensor, residual: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """The ResMem prediction `F(x) = p(x) + strength * residual(x)`.

    Args:
        base: Base prediction, shape `(B, C)`.
        residual: Weighted residual, shape `(B, C)`.
        strength: Factor of the residual; 1 is the paper, 0 the base model. One number, or a tensor that broadcasts
            to `(B, C)`.

    Returns:
        Shape `(B, C)`. For probabilities every row sums to 1, but entries may lie below 0 or above 1.

    Examples:
        >>> combine(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.2, -0.2]]))
        tensor([[0.7000, 0.3000]])
    """
    if isinstance(strength, Tensor):
        return _wide(base) + strength * residual
    return torch.add(_wide(base), residual, alpha=strength)


def log_predictions(combined: Tensor, base: Tensor, floor: float = FLOOR) -> Tensor:
    """Log-probabilities of a proper distribution that has the argmax of `F`, exactly.

    `F` may have zero or negative entries, so it has no logarithm of its own. Every entry is raised to at least
    `floor * min(p, max_c F)`, a fraction of what the base model gave it, and the row is renormalised.

    Args:
        combined: `F(x)`, shape `(B, C)`, rows summing to 1.
        base: Base probabilities `p(x)`, shape `(B, C)`.
        floor: Fraction of the base probability that remains at least, in `(0, 1)`.

    Returns:
        Finite log-probabilities, shape `(B, C)`; `argmax` is that of `combined`.

    Examples:
        >>> log_predictions(torch.tensor([[1.25, -0.25]]), torch.tensor([[0.75, 0.25]])).exp()
        tensor([[0.9804, 0.0196]])
    """
    raised = _raised(combined, base, floor)
    winner = argmax(combined)[..., None]
    logs = raised.log() - raised.sum(dim=-1, keepdim=True).log()
    # Two entries one rounding step apart can have the same logarithm, and argmax would then take the first of them.
    highest = logs.gather(-1, winner)
    logs = logs.minimum(torch.nextafter(highest, highest.new_full((), -torch.inf)))
    return logs.scatter_(-1, winner, highest)


def proper_probabilities(combined: Tensor, base: Tensor, floor: float = FLOOR) -> Tensor:
    """`log_predictions(combined, base).exp()`, several times cheaper.

    Args:
        combined: `F(x)`, shape `(B, C)`.
        base: Base probabilities, shape `(B, C)`.
        floor: As for `log_predictions`.

    Returns:
        Probabilities, shape `(B, C)`; every row sums to 1, and `argmax` is that of `combined`, exactly.

    Examples:
        >>> proper_probabilities(torch.tensor([[1.25, -0.25]]), torch.tensor([[0.75, 0.25]]))
        tensor([[0.9804, 0.0196]])
    """
    raised = _raised(combined, base, floor)
    return _with_winner(raised.div_(raised.sum(dim=-1, keepdim=True)), argmax(combined))


def tempered(combined: Tensor, base: Tensor, temperature: float) -> Tensor:
    """The combined prediction, made more or less sure: `q ~ F^(1 / temperature)`, of `log_predictions`.

    It is raised to the floor of `log_predictions`, too: so `log_predictions(q, base)` is the logarithm of `q`.

    Args:
        combined: `F(x)`, shape `(B, C)`.
        base: Base probabilities, shape `(B, C)`.
        temperature: Above 0; above 1 is less sure.

    Returns:
        Probabilities, shape `(B, C)`; every row sums to 1, and `argmax` is that of `combined`, exactly.

    Examples:
        >>> tempered(torch.tensor([[0.8, 0.2]]), torch.tensor([[0.5, 0.5]]), temperature=2.0)
        tensor([[0.6667, 0.3333]])
    """
    powers = probabilities(log_predictions(combined, base), temperature)
    for _ in range(_ROUNDS):  # what is raised takes from the others, of which a few may then be too low
        least = FLOOR * torch.minimum(base, powers.amax(dim=-1, keepdim=True))
        low = powers <= least
        others, raised = powers.masked_fill(low, 0), least.masked_fill(~low, 0)
        powers = raised + others * ((1 - raised.sum(dim=-1, keepdim=True)) / others.sum(dim=-1, keepdim=True))
    return _with_winner(powers, argmax(combined))


def negative_log_likelihood(combined: Tensor, base: Tensor, targets: Tensor, floor: float = FLOOR) -> Tensor:
    """`-log_predictions(combined, base)` of the target class alone, several times cheaper.

    Args:
        combined: `F(x)`, shape `(B, C)`.
        base: Base probabilities, shape `(B, C)`.
        targets: Class labels, int64, shape `(B,)`.
        floor: As for `log_predictions`.

    Returns:
        Nats, shape `(B,)`.

    Examples:
        >>> negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor([0.6931])
    """
    raised = _raised(combined, base, floor)
    return raised.sum(dim=-1).log() - raised.gather(-1, targets[:, None])[:, 0].log()


def _with_winner(probabilities: Tensor, winner: Tensor) -> Tensor:
    """Probabilities `(B, C)` whose argmax is `winner` `(B,)`, where it was as large as any; changed in place."""
    # Two entries one rounding step apart can become the same, and argmax would then take the first of them.
    highest = probabilities.gather(-1, winner[..., None])
    return probabilities.scatter_(-1, winner[..., None], torch.nextafter(highest, torch.ones_like(highest)))


def _raised(combined: Tensor, base: Tensor, floor: float) -> Tensor:
    """`max(F, floor * min(p, max_c F))`, positive, not yet normalised."""
    combined, base = _wide(combined), _wide(base)
    top = combined.amax(dim=-1, keepdim=True)
    return torch.maximum(combined, floor * torch.minimum(base, top)).clamp_min(torch.finfo(combined.dtype).tiny)
