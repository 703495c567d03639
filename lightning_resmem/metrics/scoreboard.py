"""Scores a stage's batches, and makes its `Evaluation`: padding, several dataloaders, ranks without rows."""

import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.collection.samplers import num_unpadded_rows, row_positions
from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.knn_lm import knn_lm_params
from lightning_resmem.memory.token_ids import STRIDE, of_sequences, token_ids
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.metrics.bins import Neighborhoods, ReliabilityBins
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.metrics.flips import FirstFlips, first_flips
from lightning_resmem.metrics.found import Found
from lightning_resmem.metrics.reported import UserMetrics
from lightning_resmem.metrics.side_by_side import ResMemMetrics
from lightning_resmem.metrics.tokens import PERPLEXITY, perplexities
from lightning_resmem.model.ignored import IGNORE_INDEX
from lightning_resmem.model.sequences import RowTargets
from lightning_resmem.tasks import Regression

# Entries of a prediction that wait to be counted together: an update has a price of its own (on a GPU, most of it is to
# wait for what was asked before), and so has a large tensor.
_WAITING_ENTRIES, _WAITING_ENTRIES_GPU = 2**18, 2**22


class Scoreboard:
    """Scores of base, knn and resmem over the rows of a stage, for each dataloader, summed over all ranks.

    Batches are kept until there are enough of them to be counted together.

    Args:
        memory: Whose predictions are scored.
        prefix: Of the metrics' names: `"test"` gives `test/acc_base`, `test/acc_knn` and `test/acc_resmem`.
        loaders: The stage's dataloaders.
        device: Where the ranks can add up the sums.
        metrics: The user's own metrics; see `ResMemMetrics`.
        ignored: Labels that the model's loss ignores: such rows are not scored.
    """

    def __init__(
        self,
        memory: ResidualMemory,
        prefix: str,
        loaders: Sequence[Any],
        device: torch.device | str = "cpu",
        metrics: UserMetrics | None = None,
        ignored: Collection[int] = (IGNORE_INDEX,),
    ) -> None:
        # MPS has no float64; its tensors are near the CPU's.
        device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        # Made beforehand, so that a rank without rows takes part in the sum over ranks.
        self._parts = [_Part(memory, loader, device, metrics, ignored) for loader in loaders]
        self._prefix = prefix

    def update(self, answer: Answer, targets: Tensor, dataloader_idx: int = 0, asked_at: Tensor | None = None) -> None:
        """Count a batch, without the rows that only pad it.

        Args:
            answer: To the rows of the batch.
            targets: Of the same rows, as the task wants them.
            dataloader_idx: Which dataloader they come from.
            asked_at: When each of them was asked for, shape `(B,)`, if they have times.

        Raises:
            InputError: If the targets do not fit; perhaps only when more batches have come, or in `evaluate`.
        """
        self._parts[dataloader_idx].update(answer, targets, asked_at)

    def update_tokens(self, found: Found, read: RowTargets, dataloader_idx: int = 0) -> None:
        """Count a batch of sequences, without those that only pad it.

        Args:
            found: The neighbours of its positions.
            read: Its targets, and which positions are rows.
            dataloader_idx: As for `update`, and errors, too.
        """
        self._parts[dataloader_idx].update_tokens(found, read)

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
        self,
        memory: ResidualMemory,
        loader: Any,
        device: torch.device,
        metrics: UserMetrics | None,
        ignored: Collection[int],
    ) -> None:
        self._memory, self._device, self._ignored = memory, device, ignored
        task, with_knn_lm = memory.task, knn_lm_params(memory) is not None
        self._metrics = ResMemMetrics(task, memory.num_outputs, metrics, with_knn_lm).to(device)
        self._task, self._flips = task, FirstFlips(task)
        self._positions, self._rows_left = row_positions(loader), num_unpadded_rows(loader)
        # Sequences are numbered as in the dataset, or else so that no two ranks have the same one.
        order = self._positions
        self._first, self._step = _rank_and_size() if order is None else (order.start, order.step)
        self._waiting: list[tuple[Answer, Tensor, Tensor, Tensor]] = []
        self._num_waiting = self._num_read = self._num_left_out = self._num_ignored = 0

    def update(self, answer: Answer, targets: Tensor, asked_at: Tensor | None) -> None:
        rows = self._unpadded(len(targets))
        numbers = torch.arange(self._num_read, self._num_read + rows, device=self._device)
        groups = numbers.new_empty(rows, 0)
        if asked_at is not None and asked_at.ndim:  # not one time for all
            groups = asked_at[:rows, None]
        self._wait(answer.with_knn_lm(self._memory).head(rows), targets[:rows], numbers, groups)
        self._num_read += rows

    def update_tokens(self, found: Found, read: RowTargets) -> None:
        targets, kept, positions = read
        assert kept is not None
        assert positions is not None
        rows = self._unpadded(len(targets))
        self._num_ignored += int((~kept[:rows]).sum())
        kept = torch.cat([kept[:rows], torch.zeros_like(kept[rows:])]).flatten()
        sequences = torch.arange(self._num_read, self._num_read + len(targets), device=positions.device)
        numbers, targets = token_ids(sequences, positions).flatten(), targets.flatten(0, 1)
        groups = (self._first + self._step * sequences).repeat_interleave(positions.shape[1])
        self._flips.stride = STRIDE
        for place, answer in found.answers(self._memory, kept):
            here = kept[place].nonzero()[:, 0]  # once: a GPU is waited for
            answer = answer.with_knn_lm(self._memory).head(len(answer.outputs))
            self._wait(answer, targets[place][here], numbers[place][here], groups[place][here, None])
        self._num_read += rows

    def _unpadded(self, rows: int) -> int:
        """How many of so many more rows do not only pad."""
        if self._rows_left is None:
            return rows
        rows = min(rows, self._rows_left)
        self._rows_left -= rows
        return rows

    def _wait(self, answer: Answer, targets: Tensor, numbers: Tensor, groups: Tensor) -> None:
        """Have rows with these numbers `(n,)` and groups `(n, 1)`, or none `(n, 0)`, counted."""
        if not len(targets):
            return
        if self._waiting and targets.shape[1:] != self._waiting[0][1].shape[1:]:
            raise InputError(
                f"The targets of a batch have shape {tuple(targets.shape)}, those of the batch before "
                f"{tuple(self._waiting[-1][1].shape)}."
            )
        self._waiting.append((answer, targets, numbers, groups))
        self._num_waiting += answer.predictions.base.numel()
        # The first batch at once: if something does not fit, it shows in the first step.
        most = _WAITING_ENTRIES if self._device.type == "cpu" else _WAITING_ENTRIES_GPU
        if not self._num_read or self._num_waiting >= most:
            self.count()

    def count(self) -> None:
        if not self._waiting:
            return
        answers, *columns = zip(*self._waiting, strict=True)
        self._waiting, self._num_waiting = [], 0
        answer = Answer.cat(answers).to(self._device)
        target, numbers, groups = (torch.cat(column).to(self._device) for column in columns)
        usable = answer.is_combined
        if target.is_floating_point():
            usable = usable & torch.isfinite(target.reshape(len(target), -1)).all(dim=1)
        ignored = self._task.ignored(target, answer.outputs.shape[1], self._ignored)
        ignored = torch.zeros_like(usable) if ignored is None else ignored & usable
        left_out, num_ignored = torch.stack([(~usable).sum(), ignored.sum()]).tolist()  # one look at both
        self._num_left_out += left_out
        self._num_ignored += num_ignored
        if left_out or num_ignored:
            usable = usable & ~ignored
            answer, target, numbers, groups = answer.rows(usable), target[usable], numbers[usable], groups[usable]
        target = self._task.check_targets(target, answer.predictions.base.shape[1])
        nearest = answer.neighbors.distances[:, 0].contiguous()
        of_rows = groups[:, 0] if groups.shape[1] else None
        self._metrics.update(answer.predictions, target, nearest, answer.outputs, answer.knn_lm, of_rows)
        self._flips.add(answer, target, self._positions, numbers)

    def evaluate(self, ranks: Ranks, prefix: str, suffix: str) -> Evaluation:
        metrics = self._metrics
        scores = _numbers(metrics.compute(), ranks)
        of_tokens = perplexities(scores) if of_sequences(self._memory.provenance) else {}
        reliability = {} if isinstance(self._task, Regression) else metrics.predictions
        return Evaluation(
            prefix=prefix,
            suffix=suffix,
            rows=int(metrics.scores.compute()["rows"]),
            scores=scores | of_tokens,
            shown=(*filter(metrics.is_shown, scores), *(name for name in of_tokens if not name.endswith("_knn"))),
            gain=scores["gain"],
            gain_error=scores["gain_error"],
            flips=first_flips(ranks.gather_objects(self._flips.found)),
            reliability={name: ReliabilityBins(*_on_cpu(of.reliability.compute())) for name, of in reliability.items()},
            neighborhoods=Neighborhoods(*_on_cpu(metrics.neighborhoods.compute())),
            less_is_better=tuple(sorted(metrics.less_is_better | ({PERPLEXITY} if of_tokens else set()))),
            left_out=_sum(self._num_left_out, ranks),
            ignored=_sum(self._num_ignored, ranks),
        )


def _sum(count: int, ranks: Ranks) -> int:
    return sum(of_rank for of_rank in ranks.gather_objects(count) if isinstance(of_rank, int))


def _on_cpu(parts: Iterable[Tensor]) -> Iterable[Tensor]:
    return (part.cpu() for part in parts)


def _numbers(scores: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """The scores that are numbers; of users' metrics that are something else, the warning names the first."""
    numbers = {name: float(value) for name, value in scores.items() if torch.as_tensor(value).numel() == 1}
    others = [name for name in scores if name not in numbers]
    if others and ranks.rank == 0:
        warnings.warn(
            f"ResMem reports numbers, so {', '.join(others)} is left out: give a metric that computes a number, for "
            "instance with an average.",
            ResMemWarning,
            stacklevel=2,
        )
    return numbers


def _rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
