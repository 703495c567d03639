"""Which of several keys that stand side by side a memory is to have: decided on validation rows."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.errors import InputError
from lightning_resmem.memory.answers import rows_at_once
from lightning_resmem.memory.following import build_near
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.metrics.noise import Groups, decisive
from lightning_resmem.model.head import HeadTap
from lightning_resmem.model.places import AUTO
from lightning_resmem.tuning.result import TriedKey, TuningResult
from lightning_resmem.tuning.sweep import Gather
from lightning_resmem.tuning.tuner import Tuner

# Means that differ by less are equal: their sums over other ranks are rounded otherwise.
_DIGITS = 9


def check_choice(embedding: str | None, memory: ResidualMemory, tunes_on_others: bool) -> None:
    """Raise an error, before any training, if there will be nothing to choose a place of the keys by.

    Args:
        embedding: As for `ResMemCallback`.
        memory: That will have them.
        tunes_on_others: Whether there are a tuner and validation rows.
    """
    if embedding != AUTO:
        return
    if not tunes_on_others:
        raise InputError(
            'embedding="auto" chooses the place of the keys on validation rows, and there are none, or no tuner (as '
            "for a memory that was given params): give both, or the name of a module."
        )
    if not isinstance(memory, LocalMemory):
        raise InputError(
            f'embedding="auto" tries the keys of several places in this process, and memory is a '
            f"{type(memory).__name__}: choose with a LocalMemory, of a sample of the rows if need be (max_rows=), and "
            "give the name that it tells."
        )


def side_by_side(of_ranks: Sequence[object]) -> dict[str, int]:
    """The widths of the keys, by the names of their places.

    Args:
        of_ranks: From `HeadTap.sides` of each rank; nothing from one without rows.

    Raises:
        InputError: If ranks have found different places.
    """
    found = [sides for sides in of_ranks if isinstance(sides, dict) and sides]
    if any(list(sides.items()) != list(found[0].items()) for sides in found):
        raise InputError(
            f'embedding="auto" has found other places on some ranks than on others, {found}: give the name of one.'
        )
    return found[0] if found else {}


def told_keys(tap: HeadTap | None) -> str:
    """For the estimate: that the keys of several places are held."""
    if tap is None or len(tap.names) < 2:
        return ""
    named = ", ".join(f"{name!r} of width {width}" for name, width in tap.sides.items())
    return f", with the keys of {len(tap.names)} places ({named}) until one is chosen on validation rows"


def told_choice(embedding: str | None, keys: Mapping[str, int]) -> str:
    """For the log: that there was nothing to choose from. What was chosen among several places, the tuner tells."""
    return (
        ', whose input is the key: embedding="auto" found no other place' if embedding == AUTO and len(keys) < 2 else ""
    )


def settle(
    memory: LocalMemory, tap: HeadTap, model: nn.Module, result: TuningResult | None, keys: Mapping[str, int]
) -> HeadTap:
    """The tap on the place that was chosen, which the memory notes; without validation rows it is the head's input.

    Args:
        memory: With the keys of the place, or without validation rows with those of all.
        tap: On all places.
        model: The model.
        result: From `choose_key`, if there were validation rows.
        keys: As for `choose_key`.
    """
    place = 0 if result is None else next(place for place, key in enumerate(result.keys) if key.chosen)
    if result is None:
        memory.keep_columns(slice(0, next(iter(keys.values()))))
    tap = tap.only(model, place)
    for name in ("embedding", "channels"):
        memory.provenance.pop(name, None)
    memory.provenance.update(tap.describe())
    return tap


def choose_key(memory: LocalMemory, tuner: Tuner, keys: Mapping[str, int], rows: Chunk, gather: Gather) -> TuningResult:
    """Tune a memory with the keys of each place, and have it keep those of one; every rank chooses the same.

    The first place stays unless another is better by more than the standard error of the difference, which the rows
    tell in pairs: in the score, or in the loss while the score is no worse; for an objective that is no mean over
    rows, in the loss. Where rows have times, or are positions of sequences, it is the error over stretches of time, or
    over sequences, if that is larger. Of several that are better, the best one is taken, and of equally good ones that
    with the lower loss.

    Args:
        memory: With rows whose keys stand side by side, not built.
        tuner: Chooses the params of each.
        keys: The widths of the keys, by the names of their places.
        rows: This rank's validation rows, with such keys.
        gather: Concatenates a tensor over all ranks.

    Returns:
        What the tuner found for the place that was chosen, with what it found for the others in `keys`.
    """
    ends = list(accumulate(keys.values()))
    columns = [slice(end - width, end) for end, width in zip(ends, keys.values(), strict=True)]
    found = [_tuned(memory.of_columns(part), tuner, part, rows, gather) for part in columns]
    scores, losses = (torch.stack([column[kind] for _, column, _ in found]) for kind in (0, 1))
    results = [result for result, _, _ in found]
    sign = 1.0 if memory.task.higher_is_better else -1.0
    by_score = results[0].objective in ("accuracy", "mse")
    times = rows.asked_at
    groups = memory.sequences_of(rows.ids) if times is None else times.double()
    of_all = Groups(None if groups is None else gather(groups.cpu()))
    place = _best(sign * scores if by_score else -losses, -losses, of_all)
    for message in found[place][2]:
        warnings.warn_explicit(message.message, message.category, message.filename, message.lineno)
    tried = tuple(
        TriedKey(name, float(score.mean()), float(loss.mean()), result.params.strength, number == place)
        for number, (name, score, loss, result) in enumerate(zip(keys, scores, losses, results, strict=True))
    )
    memory.keep_columns(columns[place])
    memory.provenance["keys"] = json.dumps([key._asdict() for key in tried])
    note = f"keys of {_told(tried[place], results[place].score_name)}"
    others = ", ".join(_told(key, results[0].score_name) for key in tried if not key.chosen)
    return replace(
        results[place], keys=tried, notes=(*results[place].notes, f"{note}, chosen on these rows before {others}")
    )


def _tuned(
    memory: LocalMemory, tuner: Tuner, columns: slice, rows: Chunk, gather: Gather
) -> tuple[TuningResult, Tensor, list[warnings.WarningMessage]]:
    """What a tuner finds, score and loss `(2, V)` of the rows of all ranks with it, and its warnings."""
    keys = rows.embeddings[:, columns].contiguous()
    build_near(memory, keys.device)
    asked = memory.at(rows.asked_at)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = tuner.tune(asked, keys, *rows[1:3], gather=gather, groups=memory.sequences_of(rows.ids))
    asked._params = result.params  # of this view alone
    task, targets = memory.task, memory.task.check_targets(rows.targets, rows.outputs.shape[1])
    measured = torch.zeros(len(targets), 2, dtype=torch.float64)
    with torch.no_grad():
        for part in torch.arange(len(targets)).split(rows_at_once(rows.outputs.shape[1])):
            base, _, resmem = asked.for_queries(part).predictions(keys[part], rows.outputs[part])
            measured[part, 0] = task.score(resmem, targets[part]).double().cpu()
            measured[part, 1] = task.loss(resmem, base, targets[part]).double().cpu()
    return result, gather(measured).T, caught


def _best(aim: Tensor, gain: Tensor, groups: Groups) -> int:
    """The place to take, by two numbers of every row, each `(places, V)` and the larger the better."""
    evident = {}
    for place in range(1, len(aim)):
        better, error = _difference(aim[place], aim[0], groups)
        less_loss, loss_error = _difference(gain[place], gain[0], groups)
        if better > error or (better >= 0 and less_loss > loss_error):
            evident[place] = better, less_loss
    return max(evident, key=lambda place: evident[place], default=0)


def _difference(one: Tensor, other: Tensor, groups: Groups) -> tuple[float, float]:
    """The mean of the rows' differences and its standard error; infinite for a single row."""
    difference = one - other
    error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else math.inf
    return round(float(difference.mean()), _DIGITS), decisive(error, float(groups.errors(difference[None])[0]))


def _told(key: TriedKey, score_name: str) -> str:
    switched_off = ", strength 0" if key.strength == 0 else ""
    return f"{key.embedding!r} ({score_name} {key.score:.4f}, loss {key.loss:.4f}{switched_off})"
