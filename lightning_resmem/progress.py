"""Progress bars for what takes long outside the trainer's own loops."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def shows_progress(trainer: L.Trainer) -> bool:
    """Whether the trainer shows progress bars."""
    bar = trainer.progress_bar_callback
    return bar is not None and bool(bar.is_enabled)  # type: ignore[attr-defined]


@contextmanager
def progress_bar(show: bool, doing: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar that goes on by one with each call of what is yielded.

    Args:
        show: Without it, nothing is shown.
        doing: "collecting training rows".
        total: How many calls there will be, if that is known.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _progress(show, columns) as progress:
        task = progress.add_task(f"ResMem: {doing}", total=total)
        yield lambda: progress.advance(task)


@contextmanager
def working(show: bool, doing: str) -> Iterator[None]:
    """The elapsed time of a step that cannot tell how far it is.

    Args:
        show: Without it, nothing is shown.
        doing: "tuning".
    """
    with _progress(show, (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())) as progress:
        task = progress.add_task(f"ResMem: {doing}", total=None)
        yield
        progress.update(task, total=1, completed=1)


def _progress(show: bool, columns: tuple[object, ...]) -> Progress:
    # A console of its own: the trainer's rich bar may still hold the live display of the shared one.
    # Quiet, because older versions of rich end the line of a bar that is disabled, too.
    console = Console(stderr=True, quiet=not show)
    return Progress(*columns, console=console, disable=not show)  # type: ignore[arg-type]
