"""What one validate or test run showed: scores, flips, calibration, neighbourhoods."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_resmem.errors import ResMemError
from lightning_resmem.metrics.bins import Neighborhoods, ReliabilityBins
from lightning_resmem.metrics.noise import plus_minus
from lightning_resmem.metrics.reported import LESS_IS_BETTER


@dataclass(frozen=True)
class Flip:
    """A row that the memory turned right or wrong.

    Attributes:
        position: The row's position in the dataset of its dataloader; None where the order of the rows is not known.
        target: Its label.
        base: The base's label.
        resmem: The combined prediction's label; it or `base` is the target.
        base_confidence: The base's probability of its label, as it is without a memory.
        resmem_confidence: The probability of its label that the combined prediction stands for: that of the log-
            probabilities which the model's own loss is given. `explain` has it in its titles, too.
        neighbor_ids: Ids of the nearest rows of the memory, at most 5, nearest first.
        neighbor_distances: Their distances.
        output: In multilabel tasks, the output whose label flipped; labels are then 0 or 1.
        token: Of sequences, whose positions are the rows: which one of the sequence at `position`, counted from the
            first that is no padding.

    Examples:
        >>> flip = Flip(7, 1, 0, 1, base_confidence=0.6, resmem_confidence=0.8, neighbor_ids=(), neighbor_distances=())
        >>> flip.is_positive
        True
    """

    position: int | None
    target: int
    base: int
    resmem: int
    base_confidence: float
    resmem_confidence: float
    neighbor_ids: tuple[int, ...]
    neighbor_distances: tuple[float, ...]
    output: int | None = None
    token: int | None = None

    @property
    def is_positive(self) -> bool:
        """Whether the memory turned the row right."""
        return self.resmem == self.target


@dataclass(frozen=True)
class Evaluation:
    """What a validate or test run showed on one dataloader, over all ranks; the same on every rank.

    Attributes:
        prefix: Of the scores' names: `"val"`, `"test"`, or `"test/NAME"` for a callback with a name of its own.
        suffix: Of the scores' names: `"/dataloader_idx_N"` where the run had several dataloaders, else empty.
        rows: Rows counted, without padding.
        scores: By short name: `"acc_base"`, `"nll_resmem"`, `"positive_flip_rate"`, ... and those of the user's own
            metrics. `ResMemMetrics` lists them.
        shown: Short names of the scores that the run logs by itself, to be seen at a glance.
        gain: How much better resmem is than the base, in accuracy or in mean squared error: as all gains, above 0 if it
            is better and below 0 if it is worse.
        gain_error: Standard error of the gain: of the rows' differences, or, if that is larger, of those of sequences
            whose positions the rows are, or of ten stretches of time where rows have times; NaN for one or two of
            these, which do not tell.
        flips: Rows that the memory turned right or wrong, by position: at most 100 of either kind. Empty in regression.
        reliability: Confidence against accuracy, for `"base"`, `"knn"` and `"resmem"`. Empty in regression.
        neighborhoods: Scores by the distance to the nearest neighbour, in tenths of the rows.
        less_is_better: Names of scores, without `_base` and so on, of which less is better. Your own metrics are among
            them if they are `higher_is_better = False`.
        left_out: Rows beside those counted whose embedding, output or target is NaN or infinite: the base alone
            answered them, and they are not scored.
        ignored: Rows beside those counted whose label the model's loss ignores, such as -100, and of sequences padding:
            they are not scored.

    Examples:
        >>> import torch
        >>> from lightning_resmem.metrics.bins import neighborhoods
        >>> found = Evaluation(
        ...     prefix="test",
        ...     suffix="",
        ...     rows=100,
        ...     scores={"nll_base": 0.6, "nll_resmem": 0.5},
        ...     shown=("nll_resmem",),
        ...     gain=0.02,
        ...     gain_error=0.01,
        ...     flips=(),
        ...     reliability={},
        ...     neighborhoods=neighborhoods(torch.rand(100), torch.rand(100, 3)),
        ... )
        >>> round(found.gain_in("nll"), 3)  # a lower loss is a gain
        0.1
        >>> found.shown_scores()
        {'test/nll_resmem': 0.5}
    """

    prefix: str
    suffix: str
    rows: int
    scores: dict[str, float]
    shown: tuple[str, ...]
    gain: float
    gain_error: float
    flips: tuple[Flip, ...]
    reliability: dict[str, ReliabilityBins]
    neighborhoods: Neighborhoods
    less_is_better: tuple[str, ...] = LESS_IS_BETTER
    left_out: int = 0
    ignored: int = 0

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self.scores[name]:.4f}" for name in self.shown)
        return (
            f"Evaluation({self.prefix + self.suffix!r}, rows={self.rows}, {shown}, gain={self.gain:+.4f} "
            f"{plus_minus(self.gain_error)}; {len(self.scores)} scores, {len(self.flips)} flips)"
        )

    def gain_in(self, name: str) -> float:
        """How much better resmem is than the base in a score: above 0 if it is better, whatever the score.

        Args:
            name: Of the score, without `_base` and so on: `"nll"`.
        """
        base, resmem = (self.scores[f"{name}_{prediction}"] for prediction in ("base", "resmem"))
        return base - resmem if name in self.less_is_better else resmem - base

    def named_scores(self) -> dict[str, float]:
        """All scores under their full names, such as `test/acc_base`."""
        return {f"{self.prefix}/{name}{self.suffix}": value for name, value in self.scores.items()}

    def shown_scores(self) -> dict[str, float]:
        """Those that the run logs by itself, under their full names."""
        return {f"{self.prefix}/{name}{self.suffix}": self.scores[name] for name in self.shown}


def first_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """What the last run showed on its first dataloader.

    Raises:
        ResMemError: If it showed nothing.
    """
    if not evaluations:
        raise ResMemError(
            "Nothing was evaluated with the memory yet: evaluation is there after trainer.test(...) or "
            "trainer.validate(...), once trainer.fit has filled the memory (evaluations is empty before). Runs of a "
            "ResMemModule are in its own evaluations."
        )
    return evaluations[0]
