"""Why a prediction changed: the neighbours behind it, and what each of them added."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.explanation.class_names import class_name
from lightning_resmem.explanation.pictures import entries
from lightning_resmem.functional import neighbor_weights
from lightning_resmem.memory.answers import Neighbors, Predictions, combined
from lightning_resmem.memory.checks import as_tensor
from lightning_resmem.memory.interface import ResidualMemory, check_memory
from lightning_resmem.memory.single_rows import fetch_neighbors, per_neighbor, row_residuals
from lightning_resmem.params import checked_k
from lightning_resmem.tasks import Multiclass, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Explanation:
    """What `explain` found, on the CPU: `B` queries, `n` neighbours each (nearest first), `C` outputs.

    `predictions.base + contributions.sum(1) + rest` is `predictions.resmem`, all of them in units of `F(x)`. Print it
    with rich, or take `rows`.

    Attributes:
        task: What a prediction is.
        predictions: Base, knn and combined, each `(B, C)`: `F(x)`, and the base at the same `softmax_temperature`.
        probabilities: What a title says of base and combination, each `(B, C)`, as the flips of an evaluation do: of
            the base as it is without a memory, and those that `F(x)` stands for, with a `combined_temperature` if there
            is one. In regression the predictions.
        neighbors: Distances and ids, `(B, n)`; id -1 where there is no neighbour.
        weights: `(B, n)`. Together with those of the neighbours not listed they sum to 1.
        labels: Targets of the neighbours: classes `(B, n)` for `Multiclass` (-1 where there is no neighbour), otherwise
            `(B, n, C)` (NaN there).
        contributions: What each neighbour adds to the base prediction, `strength * w_i * r_i`, shape `(B, n, C)`.
        rest: What all other neighbours add, shape `(B, C)`.
        targets: Of the queries, where they are known, as the task stores them.
        images: Of the queries, `(B, H, W)` or `(B, channels, H, W)`, where the batch held any.

    Examples:
        >>> from lightning_resmem import LocalMemory, ResMemParams
        >>> memory = LocalMemory(params=ResMemParams(k=2))
        >>> memory.add(torch.eye(2), outputs=torch.zeros(2, 2), targets=torch.tensor([0, 1]))
        >>> found = explain(memory, torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
        >>> [row["id"] for row in found.rows]  # None: all others
        [1, 0, None]
        >>> added = found.contributions.sum(1) + found.rest
        >>> torch.allclose(found.predictions.base + added, found.predictions.resmem)
        True
    """

    task: Task
    predictions: Predictions
    probabilities: tuple[Tensor, Tensor]
    neighbors: Neighbors
    weights: Tensor
    labels: Tensor
    contributions: Tensor
    rest: Tensor
    targets: Tensor | None = None
    images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        listed = f"{self.weights.shape[1]} neighbours listed"
        return f"Explanation(task={self.task.name!r}, {len(self)} queries, {listed}: see rows, or print it with rich)"

    @property
    def watched(self) -> dict[str, Tensor]:
        """The outputs that `rows` speak of, by name, each `(B,)`.

        `base` and `resmem`, the classes that they predict, for `Multiclass`; otherwise `output`, the one that changed
        most.
        """
        base, _, resmem = self.predictions
        if isinstance(self.task, Multiclass):
            return {"base": base.argmax(dim=1), "resmem": resmem.argmax(dim=1)}
        return {"output": (resmem - base).abs().argmax(dim=1)}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dict for each neighbour of each query, and one with `id` None for all neighbours that are not listed.

        For `Multiclass`: `query`, the classes `target` (None if unknown), `base` and `resmem`, then `id`, `distance`,
        `weight` and `label` of the neighbour, and `change_base` and `change_resmem`, what it adds to `F(x)` of these
        two classes. Otherwise: `query`, `output`, the values `target`, `base` and `resmem` of this output, `id`,
        `distance`, `weight`, `label` and `change`, all in units of `F(x)`.
        """
        return [row for query in range(len(self)) for row in self.rows_of(query)]

    def rows_of(self, query: int) -> list[dict[str, Any]]:
        """The `rows` of one query."""
        about, rows = self._about(query), []
        for place in (self.neighbors.ids[query] >= 0).nonzero()[:, 0].tolist():
            neighbor = {
                "id": int(self.neighbors.ids[query, place]),
                "distance": float(self.neighbors.distances[query, place]),
                "weight": float(self.weights[query, place]),
                "label": self._label(self.labels[query, place], query),
            }
            rows.append({**about, **neighbor, **self._changes(self.contributions[query, place], query)})
        others = {"id": None, "distance": None, "weight": float(1 - self.weights[query].sum()), "label": None}
        return [*rows, {**about, **others, **self._changes(self.rest[query], query)}]

    def tables(
        self, class_names: Sequence[str] | None = None, text: Callable[[int], str | None] | None = None
    ) -> list[Table]:
        """A rich table for each query: from the base's prediction to `F(x)`, what each neighbour adds.

        Args:
            class_names: Shown in the place of numbers, letter by letter: none of them is rich's markup.
            text: Of a row's id, shown beside the row, such as the text around a token: see `passages`.
        """
        headings = {"change_base": "F, base class", "change_resmem": "F, resmem class", "change": "F"}
        tables = []
        for query in range(len(self)):
            rows = self.rows_of(query)
            changes = [name for name in headings if name in rows[0]]
            title = Text(self.title(query, class_names), style="table.title")
            table = Table(title=title, title_justify="left")
            for column in ("id", "label", "distance", "weight", *(headings[name] for name in changes)):
                table.add_column(column, justify="left" if column in ("id", "label") else "right")
            if text is not None:
                table.add_column("text")
            base, _, combined = (self._changes(prediction[query], query) for prediction in self.predictions)
            table.add_row("base", "", "", "", *(f"{base[name]:.4f}" for name in changes))
            for row in rows:
                about = ["others", "", ""]
                if row["id"] is not None:
                    about = [str(row["id"]), class_name(row["label"], class_names), f"{row['distance']:.4g}"]
                added = [f"{row['weight']:.3f}", *(f"{row[name]:+.4f}" for name in changes)]
                words = None if text is None or row["id"] is None else text(row["id"])
                table.add_row(*map(Text, about), *added, *([] if words is None else [Text(words)]))
            table.add_section()
            table.add_row("F(x)", "", "", "", *(f"{combined[name]:.4f}" for name in changes))
            tables.append(table)
        return tables

    def __rich__(self) -> Group:
        return Group(*self.tables())

    def title(self, query: int, class_names: Sequence[str] | None = None) -> str:
        """What happened to a query, in one line: labels and their `probabilities`, or values."""
        about, watched = self._about(query), {name: int(output[query]) for name, output in self.watched.items()}
        said = {}
        for name, prediction in zip(("base", "resmem"), self.probabilities, strict=True):
            value = float(prediction[query, watched.get(name, watched.get("output", 0))])
            is_class = isinstance(self.task, Multiclass)
            said[name] = f"{class_name(about[name], class_names)} ({value:.2f})" if is_class else f"{value:.4g}"
        output = f", output {watched['output']}" if "output" in watched else ""
        target = "" if about["target"] is None else f", target {class_name(about['target'], class_names)}"
        return f"query {query}{output}: base {said['base']} → resmem {said['resmem']}{target}"

    def figure(
        self,
        images: Tensor | None = None,
        dataset: Any = None,
        class_names: Sequence[str] | None = None,
        max_queries: int = 8,
    ) -> "Figure":
        """A picture grid: each query and its neighbours.

        Args:
            images: Of the queries, `(B, H, W)` or `(B, channels, H, W)`; by default those of the batch.
            dataset: The training dataset: `dataset[id]` is a row with the neighbour's image. Without it neighbours are
                told by id and label only.
            class_names: Shown in the place of numbers.
            max_queries: The first so many queries are shown.

        Raises:
            InputError: If there are no images, or matplotlib is not installed.
        """
        try:
            from lightning_resmem.explanation.gallery import gallery
        except ModuleNotFoundError as error:
            raise InputError('figure() needs matplotlib: pip install "lightning-resmem[plots]".') from error
        images = self.images if images is None else torch.as_tensor(images)
        if images is None or images.ndim not in (3, 4) or len(images) != len(self):
            found = "no images in the batch" if images is None else f"images of shape {tuple(images.shape)}"
            raise InputError(
                f"There are {found}: give figure(images=...) of shape ({len(self)}, H, W) or "
                f"({len(self)}, channels, H, W)."
            )
        queries = range(min(checked_k(max_queries, "max_queries"), len(self)))
        titles = [self.title(query, class_names).partition(": ")[2] for query in queries]
        neighbors = [self.rows_of(query)[:-1] for query in queries]  # the last is all others
        return gallery(titles, images, neighbors, int(self.weights.shape[1]), dataset, class_names)

    def _about(self, query: int) -> dict[str, Any]:
        watched = {name: int(output[query]) for name, output in self.watched.items()}
        target = None if self.targets is None else self._label(self.targets[query], query)
        if isinstance(self.task, Multiclass):
            return {"query": query, "target": target, **watched}
        base, _, resmem = (float(prediction[query, watched["output"]]) for prediction in self.predictions)
        return {"query": query, **watched, "target": target, "base": base, "resmem": resmem}

    def _label(self, label: Tensor, query: int) -> int | float:
        """A target as `rows` show it: the class, or the value of the watched output."""
        return int(label) if label.ndim == 0 else float(label[self.watched["output"][query]])

    def _changes(self, contribution: Tensor, query: int) -> dict[str, float]:
        changes = {name: float(contribution[output[query]]) for name, output in self.watched.items()}
        return {"change" if name == "output" else f"change_{name}": change for name, change in changes.items()}


def check_no_row(batch: Any, targets: Tensor | None) -> None:
    """Raise an error if what should be a batch is a single row, as its target says."""
    if targets is None or targets.ndim:
        return
    shapes = [tuple(entry.shape) for entry in entries(batch) if isinstance(entry, Tensor) and entry.ndim]
    raise InputError(
        f"batch has one number for its target (shapes: {', '.join(map(str, shapes))}), so it is a single row and the "
        "batch dimension is missing: give next(iter(dataloader)), or for one row "
        "torch.utils.data.default_collate([dataset[0]])."
    )


def explain(
    memory: ResidualMemory, embeddings: Tensor, outputs: Tensor, top: int = 5, targets: Tensor | None = None
) -> Explanation:
    """The neighbours behind predictions, and what each of them added.

    Args:
        memory: Filled.
        embeddings: Of the queries, shape `(B, D)`.
        outputs: What the head returned for them, shape `(B, C)`.
        top: How many neighbours are listed one by one; what the others (up to `k`) add is summed up.
        targets: Of the queries, if they are known.

    Raises:
        InputError: If shapes or dtypes do not fit, or `top` is below 1.

    Examples:
        >>> from lightning_resmem import LocalMemory, ResMemParams
        >>> memory = LocalMemory(params=ResMemParams(k=2))
        >>> memory.add(torch.eye(2), outputs=torch.zeros(2, 2), targets=torch.tensor([0, 1]))
        >>> found = explain(memory, torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), top=1)
        >>> found.title(0)
        'query 0: base 0 (0.73) → resmem 1 (0.57)'
        >>> found.rows[0]["id"], found.rows[0]["label"], round(found.rows[0]["change_resmem"], 3)
        (1, 1, 0.402)
    """
    check_memory(memory)
    top = checked_k(top, "top")
    embeddings, outputs = as_tensor("embeddings", embeddings), as_tensor("outputs", outputs)
    task = memory.task
    with memory.reading():
        found, neighbors = memory.predictions_and_neighbors(embeddings, outputs)
        params, (values, positions) = memory.params, fetch_neighbors(memory, neighbors.ids[:, :top].cpu())
        probabilities = task.predict(outputs).cpu(), task.probabilities(found.resmem, found.base).cpu()
        if params.combined_temperature != 1:  # neighbours add to what it is applied to
            found = combined(
                task, replace(params, combined_temperature=1.0), outputs, neighbors, memory.sums(neighbors)
            )
    predictions = Predictions(*(part.cpu() for part in found))
    num_outputs = predictions.base.shape[1]
    if targets is not None:
        targets = task.check_targets(as_tensor("targets", targets), num_outputs).cpu()
        if len(targets) != len(embeddings):
            raise InputError(f"targets has {len(targets)} rows, embeddings has {len(embeddings)}: give one a query.")
    weights = neighbor_weights(neighbors.distances, params.sigma)[:, :top].cpu()
    neighbors = Neighbors(neighbors.distances[:, :top].cpu(), neighbors.ids[:, :top].cpu())
    residuals = row_residuals(values, positions, params.softmax_temperature, predictions.base).cpu()
    strength = params.strengths(task, predictions.base, neighbors.distances[:, 0])
    contributions = per_neighbor(strength) * weights[..., None] * residuals
    targets_of = values.targets.cpu()
    targets_of = targets_of if len(targets_of) else targets_of.new_zeros(1, *targets_of.shape[1:])
    labels = targets_of[positions.clamp_min(0).cpu()]
    labels[neighbors.ids < 0] = -1 if labels.ndim == 2 else torch.nan
    change = predictions.resmem - predictions.base
    return Explanation(
        *(task, predictions, probabilities, neighbors, weights, labels, contributions),
        rest=change - contributions.sum(1),
        targets=targets,
    )
