"""Scores a stage's batches, and makes its `Evaluation`: padding, several dataloaders, ranks without rows."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.collection.samplers import num_unpadded_rows, row_positions
from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.memory.answers import Neighbors, Predictions
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.metrics.evaluation import Evaluation, Flip
from lightning_resmem.metrics.functional import Neighborhoods, ReliabilityBins, is_right
from lightning_resmem.metrics.side_by_side import ResMemMetrics, UserMetrics
from lightning_resmem.tasks import Regression, Task

# Entries of a prediction that wait to be counted together: an update has a price of its own, and so has a large tensor.
_WAITING_ENTRIES = 2**18
_MOST_FLIPS = 100  # of either kind
_FLIP_NEIGHBORS = 5


class Answer(NamedTuple):
    """What the memory said to a call of the head.

    Attributes:
        outputs: What the head returned, shape `(B, C)`.
        predictions: Each of shape `(B, C)`.
        neighbors: At least the nearest, shapes `(B, k)`.
    """

    outputs: Tensor
    predictions: Predictions
    neighbors: Neighbors

    @classmethod
    def cat(cls, answers: Sequence["Answer"]) -> "Answer":
        """The rows of several answers, one after the other."""
        if len(answers) == 1:
            return answers[0]
        outputs, predictions, neighbors = zip(*answers, strict=True)
        return cls(
            torch.cat(outputs),
            Predictions(*map(torch.cat, zip(*predictions, strict=True))),
            Neighbors(*map(torch.cat, zip(*neighbors, strict=True))),
        )

    def head(self, rows: int) -> "Answer":
        """The first rows, with as many neighbours as a flip shows."""
        near = min(_FLIP_NEIGHBORS, self.neighbors.ids.shape[1])
        return Answer(
            self.outputs[:rows],
            Predictions(*(prediction[:rows] for prediction in self.predictions)),
            # A copy, as a view would keep all neighbours.
            Neighbors(*(part[:rows, :near].clone() for part in self.neighbors)),
        )

    def to(self, device: torch.device) -> "Answer":
        return Answer(
            self.outputs.to(device),
            Predictions(*(prediction.to(device) for prediction in self.predictions)),
            Neighbors(*(part.to(device) for part in self.neighbors)),
        )


class Scoreboard:
    """Scores of base, knn and resmem over the rows of a stage, for each dataloader, summed over all ranks.

    Batches are kept until there are enough of them to be counted together.

    Args:
        memory: Whose predictions are scored.
        prefix: Of the metrics' names: `"test"` gives `test/acc_base`, `test/acc_knn` and `test/acc_resmem`.
        loaders: The stage's dataloaders.
        device: Where the ranks can add up the sums.
        metrics: The user's own metrics; see `ResMemMetrics`.
    """

    def __init__(
        self,
        memory: ResidualMemory,
        prefix: str,
        loaders: Sequence[Any],
        device: torch.device | str = "cpu",
        metrics: UserMetrics | None = None,
    ) -> None:
        # MPS has no float64; its tensors are near the CPU's.
        device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        # Made beforehand, so that a rank without rows takes part in the sum over ranks.
        self._parts = [_Part(memory.task, memory.num_outputs, loader, device, metrics) for loader in loaders]
        self._prefix = prefix

    def update(self, answer: Answer, targets: Tensor, dataloader_idx: int = 0) -> None:
        """Count a batch, without the rows that only pad it.

        Args:
            answer: To the rows of the batch.
            targets: Of the same rows, as the task wants them.
            dataloader_idx: Which dataloader they come from.

        Raises:
            InputError: If the targets do not fit; perhaps only when more batches have come, or in `evaluate`.
        """
        self._parts[dataloader_idx].update(answer, targets)

    def finish(self) -> None:
        """Count what is waiting.

        Raises:
            InputError: If targets do not fit.
        """
        for part in self._parts:
            part.count()

    def evaluate(self, ranks: Ranks) -> tuple[Evaluation, ...]:
        """What was seen on each dataloader, over all ranks: every rank has to ask, after `finish`."""
        several = len(self._parts) > 1
        suffixes = [f"/dataloader_idx_{index}" if several else "" for index in range(len(self._parts))]
        return tuple(
            part.evaluate(ranks, self._prefix, suffix) for part, suffix in zip(self._parts, suffixes, strict=True)
        )


class _Part:
    """The rows of one dataloader."""

    def __init__(
        self, task: Task, num_outputs: int, loader: Any, device: torch.device, metrics: UserMetrics | None
    ) -> None:
        self._task, self._device = task, device
        self._metrics = ResMemMetrics(task, num_outputs, metrics).to(device)
        self._flips = _Flips(task)
        self._positions, self._rows_left = row_positions(loader), num_unpadded_rows(loader)
        self._waiting: list[tuple[Answer, Tensor]] = []
        self._num_waiting = self._num_counted = 0

    def update(self, answer: Answer, targets: Tensor) -> None:
        rows = len(targets) if self._rows_left is None else min(len(targets), self._rows_left)
        if self._rows_left is not None:
            self._rows_left -= rows
        if not rows:
            return
        if self._waiting and targets.shape[1:] != self._waiting[0][1].shape[1:]:
            raise InputError(
                f"The targets of a batch have shape {tuple(targets.shape)}, those of the batch before "
                f"{tuple(self._waiting[-1][1].shape)}."
            )
        self._waiting.append((answer.head(rows), targets[:rows]))
        self._num_waiting += answer.predictions.base[:rows].numel()
        # The first batch at once: if something does not fit, it shows in the first step.
        if not self._num_counted or self._num_waiting >= _WAITING_ENTRIES:
            self.count()

    def count(self) -> None:
        if not self._waiting:
            return
        answers, targets = zip(*self._waiting, strict=True)
        self._waiting, self._num_waiting = [], 0
        answer, target = Answer.cat(answers).to(self._device), torch.cat(targets).to(self._device)
        target = self._task.check_targets(target, answer.predictions.base.shape[1])
        self._metrics.update(answer.predictions, target, answer.neighbors.distances[:, 0].contiguous(), answer.outputs)
        self._flips.add(answer, target, self._positions, self._num_counted)
        self._num_counted += len(target)

    def evaluate(self, ranks: Ranks, prefix: str, suffix: str) -> Evaluation:
        metrics = self._metrics
        scores = _numbers(metrics.compute())
        reliability = {} if isinstance(self._task, Regression) else metrics.predictions
        return Evaluation(
            prefix=prefix,
            suffix=suffix,
            rows=int(metrics.scores.compute()["rows"]),
            scores=scores,
            shown=tuple(filter(metrics.is_shown, scores)),
            gain=scores["gain"],
            gain_error=scores["gain_error"],
            flips=_merged(ranks.gather_objects(self._flips.found)),
            reliability={name: ReliabilityBins(*_on_cpu(of.reliability.compute())) for name, of in reliability.items()},
            neighborhoods=Neighborhoods(*_on_cpu(metrics.neighborhoods.compute())),
        )


class _Flips:
    """The first rows of this rank that the memory turned right, and the first that it turned wrong."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.found: tuple[list[Flip], list[Flip]] = [], []

    def add(self, answer: Answer, targets: Tensor, positions: range | None, start: int) -> None:
        """Look at rows, of which the first is number `start` of those that this rank reads."""
        if isinstance(self._task, Regression) or all(len(flips) >= _MOST_FLIPS for flips in self.found):
            return
        base, _, resmem = answer.predictions
        before, after = is_right(base, targets), is_right(resmem, targets)
        for flips, flipped in zip(self.found, (after & ~before, before & ~after), strict=True):
            places = flipped.nonzero()[: _MOST_FLIPS - len(flips)]
            rows, outputs = places[:, 0], places[:, 1:]  # (n,), and (n, 1) in multilabel tasks, else (n, 0)
            columns = [
                *_labels(base[rows], self._task.predict(answer.outputs[rows]), outputs),
                *_labels(resmem[rows], self._task.probabilities(resmem[rows], base[rows]), outputs),
                targets[rows].gather(1, outputs)[:, 0].round().long() if outputs.shape[1] else targets[rows],
                answer.neighbors.ids[rows],
                answer.neighbors.distances[rows],
            ]
            for row, output, *values in zip(*(c.tolist() for c in (rows + start, outputs, *columns)), strict=True):
                label, confidence, new_label, new_confidence, target, ids, distances = values
                flips.append(
                    Flip(
                        position=None if positions is None else positions[row],
                        target=target,
                        base=label,
                        resmem=new_label,
                        base_confidence=confidence,
                        resmem_confidence=new_confidence,
                        neighbor_ids=tuple(ids),
                        neighbor_distances=tuple(distances),
                        output=output[0] if output else None,
                    )
                )


def _labels(predictions: Tensor, probabilities: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The label of each row (or of one output of it, outputs `(n, 1)`), and its probability."""
    if outputs.shape[1]:
        chosen = predictions.gather(1, outputs)[:, 0] >= 0.5
        yes = probabilities.gather(1, outputs)[:, 0]
        return chosen.long(), torch.where(chosen, yes, 1 - yes)
    labels = predictions.argmax(dim=1)
    return labels, probabilities.gather(1, labels[:, None])[:, 0]


def _merged(ranks: Sequence[Any]) -> tuple[Flip, ...]:
    """The first flips of either kind over all ranks, by position."""
    kinds = (chain.from_iterable(kind) for kind in zip(*ranks, strict=True))
    first = (sorted(kind, key=_position)[:_MOST_FLIPS] for kind in kinds)
    return tuple(sorted(chain.from_iterable(first), key=_position))


def _position(flip: Flip) -> int:
    return -1 if flip.position is None else flip.position


def _on_cpu(parts: Iterable[Tensor]) -> Iterable[Tensor]:
    return (part.cpu() for part in parts)


def _numbers(scores: dict[str, Tensor]) -> dict[str, float]:
    """The scores that are numbers; of users' metrics that are something else, the warning names the first."""
    numbers = {name: float(value) for name, value in scores.items() if torch.as_tensor(value).numel() == 1}
    others = [name for name in scores if name not in numbers]
    if others:
        rank_zero_warn(
            f"ResMem reports numbers, so {', '.join(others)} is left out: give a metric that computes a number, for "
            "instance with an average.",
            category=ResMemWarning,
        )
    return numbers
