"""What a trainer's loggers are told. One that fails is warned about: a memory is never lost for a logger."""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_resmem.errors import ResMemWarning

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

_TAKE_FIGURES = (TensorBoardLogger, WandbLogger, MLFlowLogger)


@contextmanager
def warn_only(what: str) -> Iterator[None]:
    """Turn any error of a block into a `ResMemWarning`.

    Args:
        what: What is missing then: "CSVLogger did not take the scores".
    """
    try:
        yield
    except Exception as error:  # whatever a disk, a network or a user's logger can raise
        rank_zero_warn(
            f"ResMem: {what}: {type(error).__name__}: {error}. The model and its memory are not affected.",
            category=ResMemWarning,
        )


def each_logger(
    trainer: L.Trainer, what: str, tell: Callable[[Any], object], kind: type | tuple[type, ...] = object
) -> None:
    """Tell a trainer's loggers something, on global rank zero; those that fail are warned about.

    Args:
        trainer: Whose loggers.
        what: What they are told, for the warning: "the scores".
        tell: Called with each of them.
        kind: Only those of this class (or these classes) are told.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, kind):
            with warn_only(f"{type(logger).__name__} did not take {what}"):
                tell(logger)
                logger.save()


def log_metrics(trainer: L.Trainer, what: str, metrics: dict[str, float]) -> None:
    """Give all loggers some numbers, in hooks in which `self.log` is not allowed."""
    if metrics:
        each_logger(trainer, what, lambda logger: logger.log_metrics(metrics, trainer.global_step))


def log_hyperparameters(trainer: L.Trainer, name: str, values: dict[str, Any], metrics: dict[str, float]) -> None:
    """Give all loggers the hyperparameters of a memory, and numbers about it.

    Args:
        trainer: Whose loggers.
        name: That the hyperparameters stand under; `{name}_memory` where the user has a hyperparameter of that name.
        values: By name.
        metrics: The numbers, by full name.
    """

    def tell(logger: Logger) -> None:
        params = {_free_name(name, _known_hyperparameters(logger), values.keys()): values}
        if isinstance(logger, TensorBoardLogger):
            # With the numbers: on its own it would log its hp_metric of -1 over that of the user.
            logger.log_hyperparams(params, metrics, trainer.global_step)
        else:
            logger.log_metrics(metrics, trainer.global_step)
            logger.log_hyperparams(params)

    each_logger(trainer, "the memory's hyperparameters", tell)


def _known_hyperparameters(logger: Logger) -> Mapping[str, Any]:
    """What a logger's run was given so far, the user's own among it; nothing where that cannot be read."""
    known: Any = {}
    if isinstance(logger, WandbLogger):
        known = logger.experiment.config
    elif isinstance(logger, CSVLogger):
        known = logger.experiment.hparams
    elif isinstance(logger, TensorBoardLogger):
        known = logger.hparams
    return dict(known)


def _free_name(name: str, taken: Mapping[str, Any], ours: Iterable[str]) -> str:
    """A name that the user does not use; what has all of `ours` is that of an earlier fit, to be replaced.

    Examples:
        >>> _free_name("resmem", {"resmem": "on"}, ["k"]), _free_name("resmem", {"resmem": {"k": 3}}, ["k"])
        ('resmem_memory', 'resmem')
    """
    while name in taken and not (isinstance(taken[name], Mapping) and set(ours) <= set(taken[name])):
        name += "_memory"
    return name


def log_figures(trainer: L.Trainer, figures: Mapping[str, Callable[[Any], "Figure | None"]]) -> None:
    """Draw figures and give them to the loggers that take any; nothing is drawn if there are none.

    Args:
        trainer: Whose loggers.
        figures: By name, such as `"test/flips"`: what draws them, given the module `plots`; None is left out.
    """
    if not trainer.is_global_zero or not any(isinstance(logger, _TAKE_FIGURES) for logger in trainer.loggers):
        return
    if not _has_matplotlib():
        return
    from lightning_resmem.reporting import plots

    for name, draw in figures.items():
        with warn_only(f"the plot {name} was not drawn"):
            figure = draw(plots)
            if figure is not None:
                _log_figure(trainer, name, figure, plots.pixels(figure))


def _log_figure(trainer: L.Trainer, name: str, figure: "Figure", image: "npt.NDArray[np.uint8]") -> None:
    step = trainer.global_step

    def tell(logger: Logger) -> None:
        if isinstance(logger, TensorBoardLogger):
            # Not add_figure, which would draw it once more, through pyplot.
            logger.experiment.add_image(name, image, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [image], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{name}-{step}.png")

    each_logger(trainer, f"the plot {name}", tell, _TAKE_FIGURES)


@functools.cache  # to be told of once
def _has_matplotlib() -> bool:
    """Whether there can be plots; says once how to get them if not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        rank_zero_info('ResMem: no plots without matplotlib: pip install "lightning-resmem[plots]".')
    return found
