"""One self-contained HTML page about a saved memory: what it holds, its rows' neighbours, and likely label errors."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from lightning_resmem.errors import InputError, StorageError
from lightning_resmem.memory.answers import evenly_spaced
from lightning_resmem.memory.capacity import size
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.storage import disk
from lightning_resmem.memory.storage.saved import read_saved
from lightning_resmem.params import checked_k
from lightning_resmem.reporting.charts import Chart, bar_chart, histogram
from lightning_resmem.reporting.samples import Read, Searched, read_rows, search_rows
from lightning_resmem.tasks import Multiclass, Multilabel

# Lines of the tables.
_SAMPLES, _SUSPECTS = 10, 20
# Classes that get a bar each.
_BARS = 50


def write_report(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    rows: int = 1000,
    k: int = 5,
    verify: bool = True,
    text: Callable[[int], str | None] | None = None,
) -> Path:
    """Write an HTML page about a saved memory; it needs no other file and no network.

    Args:
        directory: As given to `save`.
        output: The HTML file; what is there is replaced.
        rows: How many rows, drawn at random, are searched for their neighbours and looked at for label errors.
        k: How many neighbours of a row are shown.
        verify: Whether the files' checksums are compared with the manifest, which reads all of them.
        text: Of a row's id, shown beside the row, such as the text around a token: see `passages`.

    Returns:
        The absolute path of the page.

    Raises:
        InputError: If `rows` or `k` is below 1.
        StorageError: If the memory is missing, damaged or of another format version, or the page cannot be written.
    """
    rows, k = checked_k(rows, "rows"), checked_k(k)
    target = disk.as_path(output)
    if isinstance(target, disk.Url):
        raise InputError(f"output={os.fspath(output)!r} is a URL: give a file of this machine.")
    with read_saved(directory, mmap=True) as saved:
        if verify:
            saved.verify()
        try:
            memory, path = LocalMemory.of_saved(saved), disk.as_path(directory)
            page = render(memory, path, saved.files.nbytes, rows, k, verify, text)
        except (IndexError, RuntimeError, ValueError):
            saved.verify()  # names what is damaged
            raise
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise StorageError(f"The report cannot be written to {target}: {error}. Name another file.") from error
    return target


def render(
    memory: LocalMemory,
    path: Path | disk.Url,
    on_disk: int,
    rows: int,
    k: int,
    verified: bool,
    text: Callable[[int], str | None] | None = None,
) -> str:
    """The HTML page about a memory that was loaded from `path`; see `write_report`."""
    read = read_rows(memory)
    searched = search_rows(memory, rows, k) if len(memory) > 1 else None
    environment = Environment(
        loader=PackageLoader("lightning_resmem.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        name=path.name,
        path=str(path),
        summary=_summary(memory, on_disk, verified),
        notes=_notes(memory, read, searched),
        charts=_charts(memory, read, searched),
        read_rows=len(read.targets),
        searched_rows=0 if searched is None else len(searched.ids),
        all_rows=len(memory),
        samples=[] if searched is None else _samples(memory, searched, k),
        suspects=[] if searched is None else _suspects(memory, searched),
        k=k,
        text=(lambda _: None) if text is None else text,
    )


def _summary(memory: LocalMemory, on_disk: int, verified: bool) -> dict[str, dict[str, str]]:
    """The numbers at the top, by group."""
    stats, provenance = memory.stats(), memory.provenance
    recall = stats.get("recall")
    return {
        "Memory": {
            "Rows": f"{stats['rows']:,}",
            "Key width": f"{stats['width']:,}",
            "Outputs": f"{stats['outputs']:,}",
            "Task": memory.task.name,
            "Size on disk": size(on_disk),
            "Files": "checksums match" if verified else "not checked",
        },
        "Read with": {
            **{name: _param(value) for name, value in asdict(memory.params).items()},
            "chosen by": "measuring or tuning" if memory.tunable else "the user",
        },
        "Kept as": {
            "Index": str(stats["index"]),
            "Recall": "exact" if recall is None else f"{recall:.3f}",
            "Values": str(stats["values"]),
            "Keys": str(stats["key_dtype"]),
        },
        "Comes from": {
            "Head": provenance.get("head", "not known"),
            "Embedding": provenance.get("embedding", "the head's input"),
            "Fingerprint": provenance.get("fingerprint", "not known")[:16],
        },
    }


def _notes(memory: LocalMemory, read: Read, searched: Searched | None) -> list[str]:
    """What a person should know before anything else, as sentences."""
    notes = []
    if memory.params.strength == 0:
        notes.append("The memory is switched off: its strength is 0, so predictions are the base model's.")
    if isinstance(memory.task, Multiclass):
        right = float((read.base.argmax(dim=1) == read.targets).float().mean())
        words = f"The base predicts the label of {right:.1%} of the rows"
        if searched is not None:
            labels = memory.fetch(searched.ids).targets
            agree = float((searched.knn.argmax(dim=1) == labels.to(searched.knn.device)).float().mean())
            words += f"; the other rows, at the memory's k and sigma, do for {agree:.1%}"
        notes.append(f"{words}.")
    if not isinstance(memory.task, Multiclass | Multilabel):
        notes.append(f"The mean squared error of the base on the rows is {read.losses.mean():.4g}.")
    elif read.errors.mean() < 0.02:
        notes.append(
            f"Residuals are small, {read.errors.mean():.3f} on average: the base fits its training labels, so this "
            "memory has little to add. A memory of rows that were held out of training has more."
        )
    if searched is not None and (same := float((searched.neighbors.distances[:, 0] == 0).float().mean())):
        notes.append(f"{same:.1%} of the rows have the same key as another row.")
    if "fingerprint" not in memory.provenance:
        notes.append("It is not known which weights the memory was filled with, so a mismatch cannot be noticed.")
    return notes


def _charts(memory: LocalMemory, read: Read, searched: Searched | None) -> list[Chart]:
    charts = [_label_chart(memory, read)]
    if searched is not None:
        nearest = searched.neighbors.distances[:, 0].double().numpy()
        nearest = nearest[np.isfinite(nearest)]
        charts.append(histogram("Distance to the nearest other row", nearest, "Euclidean distance", "rows"))
    charts.append(histogram("Size of the residuals", read.errors, "largest entry of a residual", "rows"))
    charts.append(histogram("Norm of the keys", read.norms, "Euclidean norm", "rows"))
    return charts


def _label_chart(memory: LocalMemory, read: Read) -> Chart:
    num_outputs = read.base.shape[1]
    if isinstance(memory.task, Multiclass):
        counts = torch.bincount(read.targets, minlength=num_outputs).tolist()
    elif isinstance(memory.task, Multilabel):
        counts = (read.targets >= 0.5).sum(dim=0).tolist()
    else:
        first = read.targets[:, 0].double().numpy()
        return histogram("Targets" if num_outputs == 1 else "Targets of output 0", first, "value", "rows")
    if num_outputs > _BARS:
        return histogram("Rows of a class", np.array(counts, np.float64), "rows", "classes")
    return bar_chart("Labels", counts, "class", "rows")


def _samples(memory: LocalMemory, searched: Searched, k: int) -> list[dict[str, Any]]:
    """A few rows and their neighbours, as words."""
    samples = []
    for row in evenly_spaced(torch.arange(len(searched.ids)), _SAMPLES).tolist():
        distances, ids = (column[row, :k] for column in searched.neighbors)
        distances, ids = distances[ids >= 0], ids[ids >= 0]
        label, *others = [_label(memory, id) for id in (searched.ids[row], *ids)]
        neighbors = [
            {"id": int(id), "distance": f"{distance:.4g}", "label": other, "agrees": other == label}
            for id, distance, other in zip(ids, distances.tolist(), others, strict=True)
        ]
        samples.append({"id": int(searched.ids[row]), "label": label, "neighbors": neighbors})
    return samples


def _suspects(memory: LocalMemory, searched: Searched) -> list[dict[str, Any]]:
    """The rows whose labels disagree most with those of their neighbours."""
    worst = searched.scores.argsort(descending=True, stable=True)[:_SUSPECTS]
    worst = worst[searched.scores[worst] > 0]
    values = memory.fetch(searched.ids[worst])
    base = memory.task.predict(values.outputs.float())
    return [
        {
            "id": int(searched.ids[row]),
            "label": _words(memory, values.targets[place]),
            "neighbors": _prediction(memory, searched.averages[row]),
            "base": _prediction(memory, base[place]),
            "score": f"{float(searched.scores[row]):.3f}",
        }
        for place, row in enumerate(worst.tolist())
    ]


def _label(memory: LocalMemory, id: Tensor) -> str:
    return _words(memory, memory.fetch(id.reshape(1)).targets[0])


def _words(memory: LocalMemory, target: Tensor) -> str:
    """A target, briefly."""
    if isinstance(memory.task, Multiclass):
        return str(int(target))
    if isinstance(memory.task, Multilabel):
        return _some([str(i) for i in (target >= 0.5).nonzero()[:, 0].tolist()]) or "none"
    return _some([f"{value:.4g}" for value in target.tolist()])


def _prediction(memory: LocalMemory, prediction: Tensor) -> str:
    if isinstance(memory.task, Multiclass):
        return f"{int(prediction.argmax())} ({float(prediction.max()):.2f})"
    return _words(memory, prediction)


def _param(value: float | dict[str, float] | None) -> str:
    if isinstance(value, dict):  # a gate
        return ", ".join(f"{name} {number:.3g}" for name, number in value.items())
    return "none" if value is None else f"{value:.4g}"


def _some(words: Sequence[str], most: int = 4) -> str:
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")
