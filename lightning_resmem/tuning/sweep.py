"""What many settings predict on the tuning rows: one search, then arithmetic."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import TypeVar

import torch
from torch import Tensor

from lightning_resmem.functional import combine, whole_residual
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.checks import check_width
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.single_rows import fetch_neighbors
from lightning_resmem.metrics.functional import is_right
from lightning_resmem.metrics.noise import LEAST_GROUPS, Groups
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Multiclass, Regression
from lightning_resmem.tuning.multiclass import multiclass_sweep
from lightning_resmem.tuning.objectives import MetricObjective
from lightning_resmem.tuning.rows import Measured, Pooled, Rows
from lightning_resmem.tuning.sample import count_columns, sampled
from lightning_resmem.tuning.tables import LabelTable, Table, narrow_table

Gather = Callable[[Tensor], Tensor]
Number = TypeVar("Number", int, float)

# Of a row's norm, the distance to itself at most: the same row in two batches differs in the last digits.
_SAME = 1e-5
# Share of a sequence's positions from which on it is one that the memory holds, or overlaps with.
_MOST = 0.5
# Groups of rows that are left out in turn, for the error of a metric.
_JACKKNIFE_GROUPS = 20
# Settings x rows of all ranks that are compared together.
_COMPARED = 2**22


class Sweep:
    """One search with the largest k; then any setting is arithmetic on what it found.

    Args:
        memory: Filled with training rows.
        rows: Of this rank, checked.
        ks: Numbers of neighbours; those beyond the rows that can be found are cut to them.
        gather: Concatenates a tensor `(n, ...)` over all ranks.

    Attributes:
        ks: The numbers of neighbours, ascending.
        rows: Of this rank, those that settings are computed on: where these times the classes are many, a sample.
        scale: Median over the rows of the mean distance to the 10 nearest neighbours.
        num_rows: So many of them there are on all ranks.
        notes: What there is to say of them.
        counts_flips: Whether an answer is right or wrong.
        groups: Which of them go right or wrong together.
    """

    def __init__(self, memory: ResidualMemory, rows: Rows, ks: Sequence[int], gather: Gather) -> None:
        self.task = memory.task
        self._gather = gather
        most = len(memory) if rows.ids is None else len(memory) - 1
        self.ks = sorted({min(k, max(1, most)) for k in ks})
        distances, ids = self._search(memory, rows)
        near = distances[:, :10]
        near = near.where(near.isfinite(), torch.nan).nanmean(dim=1)
        scale = float(gather(near).nanmedian())
        self.scale = scale if scale > 0 else 1.0  # all distances may be 0, or no neighbour may have been found
        given, columns = self._count(rows), count_columns(memory, ids, rows.outputs.shape[1], gather)
        kept = sampled(near, columns, gather)
        if kept is not None:
            rows, distances, ids = rows.where(kept), distances[kept], ids[kept]
        self.rows, self.distances, self.num_rows = rows, distances, self._count(rows)
        self.notes = () if kept is None else (f"{self.num_rows} of {given} rows are looked at, for {columns} columns",)
        self.groups = Groups(rows.groups, gather)
        self._outputs, self._targets = rows.outputs, rows.targets
        self._norms = rows.embeddings.to(distances.device).float().norm(dim=1)
        self._values, self._positions = fetch_neighbors(memory, ids)
        check_width(rows.outputs, self._values.num_outputs)
        of_rows = rows.outputs, rows.targets, self._values, self._positions
        self._whole, self._narrow = Table(self.task, *of_rows), narrow_table(self.task, *of_rows)
        base = self.task.predict(rows.outputs)
        self._base_score = self.task.score(base, rows.targets)
        self._base_right = None if isinstance(self.task, Regression) else is_right(base, rows.targets)
        self._scores: list[Tensor] = []  # of the rows of this rank, for every setting
        self.counts_flips = self._base_right is not None
        self._order = gather(self.task.loss(base, base, rows.targets)).argsort(stable=True)
        self._all_targets = gather(rows.targets)[self._order]

    def _count(self, rows: Rows) -> int:
        return int(self._gather(torch.tensor([len(rows.targets)])).sum())

    def of_knn_lm(self) -> "Sweep":
        """The same neighbours read as kNN-LM: `strength` is the share of their labels."""
        sweep = copy(self)
        sweep._whole, sweep._narrow, sweep._scores = LabelTable(self._whole), LabelTable(self._narrow), []
        return sweep

    def known_rows(self, whole_groups: bool) -> int:
        """How many rows look like rows of the memory, over all ranks: at distance 0 of one of them, with its target.

        Args:
            whole_groups: Count only those of groups of which most are: sequences that begin alike have some.
        """
        zero = self.distances[:, :2] <= _SAME * self._norms[:, None]
        # One row is the row itself; where several are as near, rows are no more than alike.
        alone = zero[:, 0] & ~zero[:, 1:].any(dim=1)
        nearest = self._positions[:, :1]
        labels = self._values.label_sum(nearest, torch.ones_like(nearest, dtype=torch.float32)).to(self._targets.device)
        if isinstance(self.task, Multiclass):
            same = labels.argmax(dim=1) == self._targets
        else:
            same = torch.isclose(labels, self._targets.to(labels.dtype)).all(dim=1)
        known = (alone.to(same.device) & same).double().cpu()
        if not whole_groups or self.groups.place is None:
            return int(self.total(known.sum()[None]))
        of_groups, sizes = self.groups.sums(torch.stack([known, torch.ones_like(known)]))
        return int(of_groups[of_groups > _MOST * sizes].sum())

    def measure(self, settings: Sequence[ResMemParams]) -> Measured:
        """Score and loss of each setting, without gates; `k` at most the largest of `ks`."""
        sums = torch.zeros(len(settings), len(Measured._fields), dtype=torch.float64)
        kept = torch.bool if type(self.task) is Multiclass else self._base_score.dtype  # 0 and 1 need no more
        all_scores = torch.empty(len(settings), len(self._targets), dtype=kept, device=self._base_score.device)
        self._scores.append(all_scores)
        measured, places = [], []
        for indices, strengths, base, residual in self._each(settings if len(self._targets) else [], self._narrow):
            base_loss = self.task.loss(base, base, self._narrow.targets)
            scores, losses, lost = self._judge(base, residual, strengths)
            for index, of_setting in zip(indices, scores, strict=True):  # a list as an index would be sent to a GPU
                all_scores[index] = of_setting
            gains = (base_loss - losses).double()
            of_settings = [
                scores.sum(dim=1, dtype=torch.float64),
                losses.sum(dim=1, dtype=torch.float64),
                lost,
                (scores - self._base_score).double().square().sum(dim=1),
                gains.sum(dim=1),
                gains.square().sum(dim=1),
            ]
            measured.append(torch.stack(of_settings, dim=1))
            places += indices
        if places:
            sums[places] = torch.cat(measured).cpu()  # once: a GPU is waited for
        return Measured(*(self._gather(sums[None]).sum(dim=0) / self.num_rows).T)

    def squared_differences(self, indices: Tensor, reference: int) -> Tensor:
        """Mean squared difference of the rows' scores with two settings.

        Args:
            indices: Of settings, in the order in which they were measured, shape `(n,)`.
            reference: Of the setting to compare with.

        Returns:
            Shape `(n,)`, float64, on the CPU.
        """
        parts = self._score_differences(indices, reference)
        return self.total(torch.cat([part.square().sum(dim=1, dtype=torch.float64) for part in parts])) / self.num_rows

    def score_errors(self, indices: Tensor, reference: int) -> Tensor:
        """`groups.errors` of the scores' differences with two settings; arguments as for `squared_differences`."""
        if not self.groups.count:
            return torch.zeros(len(indices), dtype=torch.float64)
        return torch.cat([self.groups.errors(part) for part in self._score_differences(indices, reference)])

    def _score_differences(self, indices: Tensor, reference: int) -> Iterator[Tensor]:
        """`(n, V)` for a few settings at a time."""
        scores = torch.cat(self._scores)
        against = scores[reference].float()
        for part in indices.split(max(1, _COMPARED // self.num_rows)):
            yield torch.stack([scores[index] for index in part.tolist()]).float() - against

    def values(self, settings: Sequence[ResMemParams], objective: MetricObjective) -> Tensor:
        """The metric's value for each setting, from the rows of all ranks; shape `(S,)`, float64."""
        values = torch.zeros(len(settings), dtype=torch.float64)
        for indices, strengths, base, residual in self._each(settings, self._whole):
            base, residual = (self._gather(part)[self._order] for part in (base, residual))
            for index, strength in zip(indices, strengths, strict=True):
                prediction = self.task.probabilities(combine(base, residual, strength), base)
                values[index] = objective.value(prediction, self._all_targets)
        return torch.tensor(self.agreed(values.tolist()), dtype=torch.float64)

    def value_error(self, setting: ResMemParams, objective: MetricObjective) -> float:
        """Standard error of the metric's gain over the base: a jackknife that leaves out groups of rows."""
        pooled = self.pooled(setting)
        outputs = self._gather(self._outputs)[self._order]
        before = self.task.predict(outputs)
        before = self.task.probabilities(before, before)
        after = self.task.probabilities(combine(pooled.base, pooled.residual, setting.strength), pooled.base)
        place, count = torch.arange(self.num_rows), self.num_rows
        if pooled.groups is not None and self.groups.count >= LEAST_GROUPS:
            place, count = pooled.groups, self.groups.count
        groups = min(_JACKKNIFE_GROUPS, count)
        if groups < 2:
            return math.inf
        group = place.to(before.device) % groups
        gains = torch.tensor(
            [
                objective.value(after[group != left_out], pooled.targets[group != left_out])
                - objective.value(before[group != left_out], pooled.targets[group != left_out])
                for left_out in range(groups)
            ],
            dtype=torch.float64,
        )
        return self.agreed([float((gains - gains.mean()).square().sum() * (groups - 1) / groups) ** 0.5])[0]

    def gains(self, setting: ResMemParams) -> Tensor:
        """How much higher the score and lower the loss of the rows of this rank are, shape `(2, V)`."""
        combined, base, targets = self.both(setting)
        scores = self.task.score(combined, targets) - self._base_score
        losses = self.task.loss(base, base, targets) - self.task.loss(combined, base, targets)
        return torch.stack([scores.double(), losses.double()])

    def pooled(self, setting: ResMemParams) -> Pooled:
        """Everything that the predictions of a setting are made of."""
        ((_, _, base, residual),) = self._each([setting], self._whole)
        nearest = self.distances[:, 0].to(base.device)
        base, residual, nearest = (self._gather(part)[self._order] for part in (base, residual, nearest))
        groups = None if self.groups.place is None else self._gather(self.groups.place)[self._order.cpu()]
        return Pooled(base, residual, nearest, self._all_targets, groups)

    def predict(self, setting: ResMemParams) -> Tensor:
        """What a setting, with its gate, predicts for the rows of this rank; shape `(V, C)`."""
        return self.both(setting)[0]

    def both(self, setting: ResMemParams) -> tuple[Tensor, Tensor, Tensor]:
        """`predict`, the base predictions, and the targets of the rows."""
        ((_, _, base, residual),) = self._each([setting], self._whole)
        strength = setting.strengths(self.task, base, self.distances[:, 0].to(base.device))
        return combine(base, residual, strength), base, self._targets

    def total(self, sums: Tensor) -> Tensor:
        """Sums over the rows of this rank `(n,)`, added up over all ranks, on the CPU."""
        added: Tensor = self._gather(sums[None].cpu()).sum(dim=0)
        return added

    def agreed(self, numbers: Sequence[float]) -> list[float]:
        """Numbers that every rank computed from the same rows, of one rank: others may differ in the last digit."""
        agreed: list[float] = self._gather(torch.tensor([numbers], dtype=torch.float64))[0].tolist()
        return agreed

    def _search(self, memory: ResidualMemory, rows: Rows) -> Neighbors:
        k = self.ks[-1]
        if rows.ids is None:
            return memory.search(rows.embeddings, k)
        found = memory.search(rows.embeddings, k + 1)
        own = found.ids == rows.ids.to(found.ids.device)[:, None]
        # Stable: the others stay in order. Where a row did not find itself, its farthest neighbour goes.
        others = own.to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
        return Neighbors(found.distances.gather(1, others), found.ids.gather(1, others))

    def _each(
        self, settings: Sequence[ResMemParams], table: Table
    ) -> Iterator[tuple[list[int], list[float], Tensor, Tensor]]:
        """Settings that differ in strength alone: their indices and strengths, the base and the residual sum."""
        everything = range(len(settings))
        for temperature, at_temperature in _grouped(everything, lambda index: settings[index].softmax_temperature):
            base = table.base(temperature)
            for sigma, at_sigma in _grouped(at_temperature, lambda index: settings[index].sigma):
                by_k = sorted(_grouped(at_sigma, lambda index: settings[index].k))
                residuals = self._residuals(table, base, temperature, sigma, [k for k, _ in by_k])
                for (_, indices), residual in zip(by_k, residuals, strict=True):
                    yield indices, [settings[index].strength for index in indices], base, residual.to(base.device)

    def _residuals(
        self, table: Table, base: Tensor, softmax_temperature: float, sigma: float, ks: Sequence[int]
    ) -> Iterator[Tensor]:
        """The weighted residual sums `(V, C)` for ascending k, each from the one before and the neighbours between."""
        nearest = self.distances.amin(dim=1, keepdim=True)  # places in between may be empty
        width = max(sigma, torch.finfo(self.distances.dtype).tiny)
        weights = torch.exp((nearest - self.distances[:, : ks[-1]]) / width)
        weights = weights.where(self.distances[:, : ks[-1]].isfinite(), 0).to(self._positions.device)
        sums, tails, total, start = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0
        for k in ks:
            part = weights[:, start:k]
            added, tail = table.residual_sum(slice(start, k), part, softmax_temperature)
            # Not in place: what was yielded stays.
            sums, total = (added, part.sum(dim=1)) if start == 0 else (sums + added, total + part.sum(dim=1))
            whole = total.clamp_min(1.0)  # the nearest has weight 1
            if tail is None:
                yield sums / whole[:, None]
            else:
                tails = tails.to(tail.device) + tail
                yield whole_residual(sums / whole[:, None], tails / whole, base)
            start = k

    def _judge(self, base: Tensor, residual: Tensor, strengths: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and losses of the rows, each `(S, V)`, and the sums of what was lost, `(S,)`."""
        if type(self.task) is Multiclass:
            table = self._narrow
            right, losses = multiclass_sweep(base, residual, strengths, table.targets, table.has_rest)
            return right.float(), losses, self._lost(right)
        predictions = [combine(base, residual, strength) for strength in strengths]
        scores = torch.stack([self.task.score(prediction, self._targets) for prediction in predictions])
        losses = torch.stack([self.task.loss(prediction, base, self._targets) for prediction in predictions])
        if not self.counts_flips:
            return scores, losses, scores.new_zeros(len(strengths))
        right = torch.stack([is_right(prediction, self._targets) for prediction in predictions])
        return scores, losses, self._lost(right)

    def _lost(self, right: Tensor) -> Tensor:
        """From what is right `(S, V)`, or `(S, V, C)`: sums over the rows of the share of lost answers, `(S,)`."""
        assert self._base_right is not None
        lost = (self._base_right & ~right).flatten(2) if right.ndim > 2 else (self._base_right & ~right)[..., None]
        return lost.double().mean(dim=2).sum(dim=1)


def _grouped(indices: Sequence[int], key: Callable[[int], Number]) -> list[tuple[Number, list[int]]]:
    """Indices by key, keys in the order in which they first appear."""
    groups: dict[Number, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return list(groups.items())
