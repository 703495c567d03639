"""Tuning rows are cut to as many as their classes leave time for, the same ones for any number of ranks."""

import pytest
import torch

from lightning_resmem import GridTuner, LocalMemory, ResMemParams, SparseConfig
from lightning_resmem.tuning import sample
from lightning_resmem.tuning.rows import Rows
from lightning_resmem.tuning.sweep import Sweep


def rows(count: int, seed: int, classes: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, 4, generator=generator)
    return keys, torch.randn(count, classes, generator=generator), torch.randint(classes, (count,), generator=generator)


def filled(values: str | SparseConfig = "dense") -> LocalMemory:
    memory = LocalMemory(params=ResMemParams(), values=values)
    memory.add(*rows(80, 1))
    return memory


def test_ranks_keep_what_one_process_keeps() -> None:
    keys = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    keys[7] = torch.nan
    columns = sample.ENTRIES // 100
    whole = sample.sampled(keys, columns, lambda part: part)
    assert whole is not None
    assert int(whole.sum()) == 100
    parts = [
        sample.sampled(part, columns, lambda _: keys.nan_to_num(nan=torch.inf)) for part in keys.split([300, 0, 700])
    ]
    assert torch.equal(torch.cat([part for part in parts if part is not None]), whole)
    assert abs(float(keys[whole & keys.isfinite()].mean()) - float(keys.nanmean())) < 0.01
    assert sample.sampled(keys, sample.ENTRIES // 1000, lambda part: part) is None


def test_rows_with_equal_keys_are_kept_as_others_are() -> None:
    keys = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    keys[::3] = 0
    keys[1::5] = torch.nan
    kept = sample.sampled(keys, sample.ENTRIES // 1000, lambda part: part)
    assert kept is not None
    assert abs(int(kept.sum()) - 1000) < 10
    for part in (keys == 0, keys.isnan(), keys > 0):
        assert float(kept[part].float().mean()) == pytest.approx(0.1, abs=0.01)


def test_the_choice_is_that_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, (keys, outputs, targets) = filled(), rows(200, 2)
    near = memory.search(keys, 10).distances.mean(dim=1)
    monkeypatch.setattr(sample, "ENTRIES", 60 * 50)
    kept = sample.sampled(near, 50, lambda part: part)
    assert kept is not None
    tuner = GridTuner(k=(5, 10), calibrate=False)
    found = tuner.tune(memory, keys, outputs, targets)
    assert found.rows == 60
    assert "60 of 200 rows are looked at, for 50 columns" in found.summary()
    base = (outputs.argmax(dim=1) == targets)[kept].double().mean()
    assert found.base_score == pytest.approx(float(base))
    monkeypatch.undo()
    assert tuner.tune(memory, keys, outputs, targets).rows == 200


def test_columns_are_the_classes_that_neighbours_tell_of() -> None:
    memory = filled(SparseConfig(3))
    ids = torch.tensor([[0, 1, -1], [2, 3, 4]])
    values = memory.fetch(torch.arange(5))
    told = [
        {*values.classes[near].flatten().tolist(), *values.targets[near].tolist()}
        for near in (torch.tensor([0, 1]), torch.tensor([2, 3, 4]))
    ]
    assert sample.count_columns(memory, ids, 50, lambda part: part) == max(map(len, told))
    assert sample.count_columns(filled(), ids, 50, lambda part: part) == 50


def test_rows_keep_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = LocalMemory(params=ResMemParams())
    memory.add(*rows(80, 1), times=torch.arange(80)[:, None].expand(-1, 2))
    keys, outputs, targets = rows(200, 2)
    monkeypatch.setattr(sample, "ENTRIES", 60 * 50)
    view = memory.at(torch.arange(200) + 40)
    sweep = Sweep(view, Rows(keys, outputs, targets, groups=view.asked_at), (5,), lambda part: part)
    assert sweep.num_rows == len(sweep.rows.targets) == 60
    places = [int((keys == key).all(dim=1).nonzero()[0, 0]) for key in sweep.rows.embeddings]
    assert sweep.rows.groups is not None
    assert sweep.rows.groups.tolist() == [place + 40 for place in places]
