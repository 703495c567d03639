"""What the settings of a sweep are computed on: base predictions and residual sums of the tuning rows."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_resmem.functional import probabilities
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.memory.values.sparse import SparseValues
from lightning_resmem.tasks import Multiclass, Task

# Entries of temporary tables: rows x classes, or rows x neighbours x probabilities that are kept of each.
_ENTRIES = 2**22
# Of the classes that no neighbour tells anything about, so many of the most probable ones have columns of their own.
_OTHERS = 8


class Table:
    """A column for each output.

    Args:
        task: Of the memory.
        outputs: Of the tuning rows, shape `(V, C)`.
        targets: Of the tuning rows, as the task stores them.
        values: Of their neighbours.
        positions: Of the neighbours among the values, shape `(V, k)`; -1 is missing.

    Attributes:
        targets: Of the rows; classes are columns.
        has_rest: Whether the last column is that of all classes without one of their own.
    """

    has_rest = False

    def __init__(self, task: Task, outputs: Tensor, targets: Tensor, values: Values, positions: Tensor) -> None:
        self._task, self._outputs, self.targets = task, outputs, targets
        self._values, self._positions = values, positions

    def base(self, softmax_temperature: float) -> Tensor:
        """Base predictions, shape `(V, columns)`."""
        return self._task.predict(self._outputs, softmax_temperature)

    def residual_sum(self, places: slice, weights: Tensor, softmax_temperature: float) -> tuple[Tensor, Tensor | None]:
        """As `Values.residual_sum`, over some of the neighbours of each row, with weights `(V, n)`."""
        return self._values.residual_sum(self._positions[:, places], weights, softmax_temperature)

    def label_sum(self, places: slice, weights: Tensor) -> Tensor:
        """As `Values.label_sum`, over some of the neighbours of each row, with weights `(V, n)`."""
        return self._values.label_sum(self._positions[:, places], weights)


class NarrowTable(Table):
    """A column for each class that a row's neighbours tell something about, and one for all others together.

    Where base predictions are cut, a setting changes all other classes by the same factor. So accuracy and loss follow
    from at most `k (m + 1) + 9` columns and the rest, however many classes there are. Only if the rest holds a class
    that is more probable than the combined prediction's own is the loss a little too high: the most probable ones have
    columns, too.

    Args:
        outputs: As for `Table`.
        targets: As for `Table`.
        values: As for `Table`.
        positions: As for `Table`.
    """

    has_rest = True

    def __init__(self, outputs: Tensor, targets: Tensor, values: SparseValues, positions: Tensor) -> None:
        super().__init__(values.task, outputs, targets, values, positions)
        self._probabilities: tuple[float, Tensor, Tensor] | None = None  # of the neighbours, at a temperature
        self._cut, (queries, k), m = values, positions.shape, values.classes.shape[1]
        self._blocks = torch.arange(queries).split(max(1, _ENTRIES // max(outputs.shape[1], k * (m + 1))))
        columns: list[Tensor] = []
        places = []
        for rows in self._blocks:
            near = positions[rows]  # a missing one has weight 0: it may be taken for any row
            told = torch.cat([values.classes[near].long().flatten(1), values.targets[near]], dim=1).to(outputs.device)
            told = torch.cat([told, targets[rows, None]], dim=1)
            seen = torch.zeros(len(rows), outputs.shape[1], dtype=torch.bool, device=outputs.device)
            seen.scatter_(1, told, True)
            others = outputs[rows].masked_fill(seen, -torch.inf).topk(min(_OTHERS, outputs.shape[1]), dim=1).indices
            seen.scatter_(1, others, True)
            columns += seen.nonzero()[:, 1].split(seen.sum(dim=1).tolist())
            places.append((seen.cumsum(dim=1) - 1).gather(1, told))
        self._columns = pad_sequence(columns, batch_first=True, padding_value=-1)
        kept, labels, target = torch.cat(places).split([k * m, k, 1], dim=1)
        self._kept, self._labels = kept.reshape(queries, k, m).to(positions.device), labels.to(positions.device)
        self.targets = target[:, 0]

    def base(self, softmax_temperature: float) -> Tensor:
        own = torch.cat(
            [
                probabilities(self._outputs[rows], softmax_temperature).gather(1, self._columns[rows].clamp_min(0))
                for rows in self._blocks
            ]
        ).masked_fill_(self._columns < 0, 0)
        return torch.cat([own, (1 - own.sum(dim=1, keepdim=True)).clamp_min_(0)], dim=1)

    def residual_sum(self, places: slice, weights: Tensor, softmax_temperature: float) -> tuple[Tensor, Tensor]:
        if self._probabilities is None or self._probabilities[0] != softmax_temperature:
            self._probabilities = softmax_temperature, *self._cut.probabilities(softmax_temperature)
        _, kept, tails = self._probabilities
        sums = weights.new_zeros(len(weights), self._columns.shape[1] + 1)
        near = self._positions[:, places]
        for rows in self._blocks:
            share = weights[rows]
            sums[rows] = (
                sums[rows]
                .scatter_add_(
                    1, self._kept[rows, places].flatten(1), -(share[:, :, None] * kept[near[rows]]).flatten(1)
                )
                .scatter_add_(1, self._labels[rows, places], share)
            )
        return sums, (weights * tails[near]).sum(dim=1)

    def label_sum(self, places: slice, weights: Tensor) -> Tensor:
        sums = weights.new_zeros(len(weights), self._columns.shape[1] + 1)
        return sums.scatter_add_(1, self._labels[:, places], weights)


class LabelTable(Table):
    """What kNN-LM is tuned on: the query's own base prediction stands for those of all neighbours.

    Args:
        table: Of the same rows.
    """

    def __init__(self, table: Table) -> None:
        self._table, self.targets, self.has_rest = table, table.targets, table.has_rest

    def base(self, softmax_temperature: float) -> Tensor:
        return self._table.base(softmax_temperature)

    def residual_sum(self, places: slice, weights: Tensor, softmax_temperature: float) -> tuple[Tensor, Tensor]:
        return self._table.label_sum(places, weights), weights.sum(dim=1)


def narrow_table(task: Task, outputs: Tensor, targets: Tensor, values: Values, positions: Tensor) -> Table:
    """The table with the fewest columns that accuracy and loss follow from; arguments as for `Table`."""
    if type(task) is Multiclass and isinstance(values, SparseValues) and values.is_cut and len(outputs):
        return NarrowTable(outputs, targets, values, positions)
    return Table(task, outputs, targets, values, positions)
