"""The one interface of all memories."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem.errors import EmptyMemoryError, InputError, check_type
from lightning_resmem.memory import answers
from lightning_resmem.memory.answers import Neighbors, Predictions, Sums
from lightning_resmem.memory.checks import checked_batch
from lightning_resmem.memory.locks import Guarded, ReadWriteLock, exclusive
from lightning_resmem.memory.moving import Movable
from lightning_resmem.memory.storage.paths import Url
from lightning_resmem.memory.times import Dated
from lightning_resmem.memory.token_ids import Locating
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Multiclass, Task


class ResidualMemory(Movable, Dated, Guarded, Locating, ABC):
    """Keys, values and ids of the training rows, and the sum of residuals around a query.

    Where a method takes a tensor, a NumPy array or nested lists of numbers work as well.

    Args:
        task: What a residual is; `Multiclass()` by default.
        params: How the memory is read. By default they are measured when they are first needed (`k=50`, `sigma` the
            median neighbour distance over the training rows), and a callback may tune them.

    Methods that a memory implements come first: rows are added and edited (`add`, `update`, `remove`, `clear`,
    `build`), found and summed up (`search`, `sums`, `fetch`), saved and counted (`save`, `stats`, `estimate_bytes`); it
    may want to know of rows before they come (`rehearse`, `reserve`) and of the ranks (`join`, `gather`, `publish`).
    From these follow predictions (`forward`, `knn`, `predict`, ...) and how they are read (`params`, `distance_scale`).

    Attributes:
        provenance: Where the rows come from, plain strings that are saved with the memory: the `fingerprint` of the
            base's weights, and the names of `head` and `embedding`.
        tunable: Whether the params were left to be measured or tuned.
        show_progress: Whether a long `build` may show a bar.
        fillings: How often all rows were replaced by others.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> isinstance(LocalMemory(), ResidualMemory)
        True
    """

    def __init__(self, task: Task | None = None, params: ResMemParams | None = None) -> None:
        super().__init__()
        if task is not None and not isinstance(task, Task):
            raise InputError(f"task={task!r} is not a Task: give Multiclass(), Multilabel() or Regression().")
        self.task: Task = task or Multiclass()
        self.provenance: dict[str, str] = {}
        self.tunable = params is None
        self.show_progress = False
        self.fillings = 0
        self._lock = ReadWriteLock()
        self._params: ResMemParams | None = None
        if params is not None:
            self.params = params

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, those not yet built included."""

    @property
    @abstractmethod
    def ids(self) -> Tensor:
        """Ids of all rows, ascending, shape `(N,)`, int64."""

    @abstractmethod
    def add(
        self,
        embeddings: Tensor,
        outputs: Tensor,
        targets: Tensor,
        ids: Tensor | None = None,
        times: Tensor | None = None,
    ) -> None:
        """Append a chunk of rows.

        Args:
            embeddings: Keys, shape `(N, D)`.
            outputs: What the head returned for them, shape `(N, C)`.
            targets: As the task wants them, e.g. class labels `(N,)`.
            ids: Unique, at least 0, int64, shape `(N,)`; by default the numbers after the largest id so far.
            times: When each was asked for and its target known, shape `(N, 2)`, in any one unit: see `at`.

        Raises:
            InputError: If shapes or dtypes do not fit, a value is NaN or infinite, a target out of range, or an id
                is repeated.
        """

    @abstractmethod
    def build(self) -> None:
        """Finish the memory after rows were added; calling it again does nothing.

        Raises:
            EmptyMemoryError: If no rows were added.
            InputError: If an id is repeated.
        """

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> Neighbors:
        """The nearest rows.

        Args:
            queries: Shape `(B, D)`, on any device.
            k: At least 1; beyond the number of rows, missing places have id -1 and distance inf.

        Returns:
            Neighbours on the device of the queries.
        """

    @abstractmethod
    def sums(self, neighbors: Neighbors) -> Sums:
        """Weighted sums over found neighbours, for the current params.

        Args:
            neighbors: From `search`.

        Returns:
            The residual sum and the label average, on the device of the neighbours.
        """

    @abstractmethod
    def fetch(self, ids: Tensor) -> Values:
        """Stored rows.

        Args:
            ids: Shape `(n,)`, int64.

        Raises:
            InputError: If an id is not in the memory.
        """

    @abstractmethod
    def remove(self, ids: Tensor) -> None:
        """Drop rows; results are at once those of a memory that never had them.

        Args:
            ids: Shape `(n,)`, int64.

        Raises:
            InputError: If an id is not in the memory.
        """

    @abstractmethod
    def update(
        self,
        ids: Tensor,
        embeddings: Tensor | None = None,
        outputs: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """Replace parts of rows, e.g. corrected labels; what is not given stays.

        Args:
            ids: Shape `(n,)`, int64, each once.
            embeddings: Shape `(n, D)`.
            outputs: Shape `(n, C)`.
            targets: As for `add`.

        Raises:
            InputError: If an id is not in the memory, or as for `add`.
        """

    @abstractmethod
    def save(self, directory: str | os.PathLike[str]) -> Path | Url:
        """Save to a directory, or a URL that fsspec knows, in whole or not at all.

        Returns:
            The absolute path, or the URL.
        """

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Numbers about the memory: rows, bytes, width, ..."""

    @abstractmethod
    def _query_rows(self, ids: Tensor) -> Tensor:
        """The stored embeddings of rows, shape `(n, D)`."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all rows, their provenance and measured params; the configuration stays."""

    def rehearse(self, rows: int | None, width: int) -> None:
        """Find out what `build` would refuse, before there are any rows.

        Args:
            rows: `N`, None if it is not known yet.
            width: `D`.

        Raises:
            InputError: If no index can be built of such rows.
        """

    def reserve(self, rows: int) -> None:
        """Expect `rows` more rows, so that memory is allocated once."""

    @abstractmethod
    def estimate_bytes(self, rows: int, width: int, num_outputs: int) -> dict[str, int]:
        """Bytes that `N` rows of widths `D` and `C` will take in this process, by part (`keys`, `values`, `index`)."""

    def staged(self) -> "ResidualMemory":
        """A memory in this process, for rows some of which are dropped again before `take` has the others."""
        return self

    def take(self, staged: Any) -> None:
        """Take over the rows of what `staged` returned, if that is another memory."""

    def metrics(self) -> dict[str, float]:
        """Numbers to log about the state of the memory, by their names; a memory in this process has none."""
        return {}

    def join(self, group: dist.ProcessGroup) -> None:
        """Prepare for rows of all ranks of `group`, if there is something to; called on each before it adds any.

        Args:
            group: A process group on the CPU.
        """

    def publish(self) -> None:
        """Tell other processes that share the memory its params and provenance; called when they are final."""

    def gather(self, group: dist.ProcessGroup) -> None:
        """Have every rank of `group`, that of `join`, answer from the rows that all of them added.

        A memory in this process exchanges them; one that the ranks share waits until all have arrived, and builds.
        """

    @property
    def params(self) -> ResMemParams:
        """How the memory is read; assign new ones at any time. Residuals follow, no second memory pass is needed."""
        params = self._params
        if params is None:  # nobody gave or tuned any
            if not len(self):
                raise EmptyMemoryError("The memory has neither params nor rows to measure them on: add rows first.")
            with self.reading():  # whoever assigns some waits
                params = self._params = self._params or ResMemParams(sigma=self.distance_scale())
        return params

    @params.setter
    @exclusive
    def params(self, params: ResMemParams) -> None:
        if not isinstance(params, ResMemParams):
            raise InputError(f"params={params!r} is not a ResMemParams: give ResMemParams(k=..., sigma=...).")
        self._params = params

    @property
    def num_outputs(self) -> int:
        """`C`, the number of outputs of the head that filled the memory."""
        nobody = Neighbors(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64))
        return self.sums(nobody).residual.shape[1]

    def forward(self, queries: Tensor, outputs: Tensor | None = None) -> Tensor:
        """The weighted residual sum for the current params.

        Args:
            queries: Shape `(B, D)`.
            outputs: What the head returned for them, shape `(B, C)`; sparse values need it.

        Returns:
            Shape `(B, C)`, not yet multiplied by `strength`.
        """
        with self.reading():
            found = self.sums(self._nearest(queries))
            return answers.residual_sum(self.task, self.params, outputs, found)

    def knn(self, queries: Tensor) -> Tensor:
        """The weighted label average: the prediction of the neighbours alone.

        Args:
            queries: Shape `(B, D)`.

        Returns:
            Shape `(B, C)`.
        """
        with self.reading():
            return self.sums(self._nearest(queries)).labels

    def predict(self, queries: Tensor, outputs: Tensor) -> Tensor:
        """The combined prediction: `F(x)`, or, with a `combined_temperature`, `q ~ F^(1 / t)`.

        Args:
            queries: Embeddings, shape `(B, D)`.
            outputs: What the head returned for them, shape `(B, C)`.

        Returns:
            Shape `(B, C)`. For probabilities rows sum to 1, but entries of `F(x)` may lie below 0; with `base`, that of
            `predictions`, `functional.log_predictions(it, base)` is the logarithm of a proper distribution. Of `q`,
            which is one, it is the logarithm of `q` itself.
        """
        queries, outputs = checked_batch(queries, outputs)
        with self.reading():
            nearest = self._nearest(queries)
            return answers.combined_in_blocks(self.task, self.params, outputs, nearest, self.sums)

    def predictions(self, queries: Tensor, outputs: Tensor) -> Predictions:
        """Base, knn and combined prediction from one search; arguments as for `predict`."""
        return self.predictions_and_neighbors(queries, outputs)[0]

    def predictions_and_neighbors(self, queries: Tensor, outputs: Tensor) -> tuple[Predictions, Neighbors]:
        """The predictions and the neighbours that they come from, from one search; arguments as for `predictions`."""
        return self.predictions_of_finite(*checked_batch(queries, outputs))

    def predictions_of_finite(self, queries: Tensor, outputs: Tensor) -> tuple[Predictions, Neighbors]:
        """`predictions_and_neighbors` of a batch that was checked, which a GPU would be waited for to do again."""
        with self.reading():
            params, neighbors = self.params, self._nearest(queries)
            return answers.combined(self.task, params, outputs, neighbors, self.sums(neighbors)), neighbors

    def _nearest(self, queries: Tensor) -> Neighbors:
        """The neighbours that a prediction reads: no places for more of them than there are rows."""
        return self.search(queries, min(self.params.k, max(1, len(self))))

    def distance_scale(self) -> float:
        """The median over up to 512 rows of the mean distance to the 10 nearest others, a natural unit for `sigma`.

        It is 1.0 when there is no other row or all of them are equal.
        """
        with self.reading():
            sample = answers.evenly_spaced(self.ids)
            return answers.typical_distance(sample, self.at_rows(sample).search(self._query_rows(sample), k=11))

    def _forget(self) -> None:
        self.fillings += 1
        self.provenance = {}
        if self.tunable:
            self._params = None


def check_memory(memory: object) -> None:
    """Raise an error unless an argument is a memory."""
    check_type("memory", memory, ResidualMemory, "a memory, such as LocalMemory()")
