"""Whether a Trainer's work runs in this process: spawn and fork leave nothing of it here."""

import gc

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher


def runs_elsewhere(trainer: L.Trainer) -> bool:
    """Whether the trainer starts processes that end with each fit or run, and take along what they changed."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def trainer_of(callback: Callback) -> L.Trainer | None:
    """The trainer of a callback whose hooks ran in other processes only: spawn and fork call none in this one."""
    # `isinstance` would also ask proxies for the class they stand for, and some of them warn.
    trainers = (o for o in gc.get_objects() if issubclass(type(o), L.Trainer))
    return next((t for t in trainers if callback in t.callbacks), None)
