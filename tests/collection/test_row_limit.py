"""Which rows a memory keeps of more than it may hold."""

import logging
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_resmem import GridTuner, InputError, LocalMemory, Regression, ResMemCallback, ResMemParams, memorize
from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.collection.row_limit import Kept, RowLimit
from tests.language import Causal, loader, texts
from tests.models import CallsSelf, Data, make, trainer

ROWS, CLASSES = 400, 3
PARAMS = ResMemParams(k=4, sigma=0.4)


def split_mix(number: int) -> int:
    """Of a number below 2**64, with Python's integers; as int64."""
    mask = 2**64 - 1
    mixed = (number + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    mixed ^= mixed >> 31
    return mixed - 2**64 if mixed >= 2**63 else mixed


def rows() -> Chunk:
    """Ids in no order, up to those of tokens far into a dataset."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(ROWS, generator=generator) * (2**63 // ROWS)
    outputs = torch.randn(ROWS, CLASSES, generator=generator)
    embeddings = torch.randn(ROWS, 2, generator=generator)
    return Chunk(embeddings, outputs, torch.arange(ROWS) % CLASSES, ids, torch.empty(ROWS, 0))


def kept(root, limit: RowLimit, chunk: Chunk, batch: int, memory: LocalMemory | None = None) -> LocalMemory:
    memory = LocalMemory(params=PARAMS) if memory is None else memory
    keeper = Kept(limit, memory)
    for start in range(0, len(chunk.ids), batch):
        keeper.add(Chunk(*(column[start : start + batch] for column in chunk)))
        assert len(memory) <= limit.max_rows + limit.max_rows // 8 + batch
    keeper.finish(Ranks(trainer(root)))
    return memory


@pytest.mark.parametrize("batch", [1, 7, ROWS])
def test_a_uniform_sample_is_that_of_the_hashes(batch, tmp_path):
    chunk = rows()
    memory = kept(tmp_path, RowLimit(50), chunk, batch)
    assert memory.ids.tolist() == sorted(sorted(chunk.ids.tolist(), key=split_mix)[:50])
    by_id = {int(id): row for row, id in enumerate(chunk.ids)}
    order = [by_id[id] for id in memory.ids.tolist()]
    assert torch.equal(memory._query_rows(memory.ids), chunk.embeddings[order])
    assert torch.equal(memory.fetch(memory.ids).targets, chunk.targets[order])
    assert memory.stats() | {"max_rows": 50, "keep": "uniform", "rows_seen": ROWS} == memory.stats()


@pytest.mark.parametrize("batch", [7, ROWS])
def test_rows_that_the_base_has_most_wrong(batch, tmp_path):
    """Up to what bfloat16 tells apart."""
    chunk = rows()
    memory = kept(tmp_path, RowLimit(60, "residual"), chunk, batch)
    logits = chunk.outputs.double().numpy()
    truth = np.exp(logits)[range(ROWS), chunk.targets] / np.exp(logits).sum(axis=1)
    is_kept = torch.isin(chunk.ids, memory.ids).numpy()
    assert is_kept.sum() == 60
    assert truth[is_kept].max() < truth[~is_kept].min() + 0.01


def test_the_largest_errors_of_a_regression(tmp_path):
    """Whatever the units."""
    errors = torch.arange(1, 101.0) * 1e6
    chunk = Chunk(torch.randn(100, 2), torch.zeros(100, 1), errors[:, None], torch.arange(100), torch.empty(100, 0))
    memory = kept(tmp_path, RowLimit(10, "residual"), chunk, 9, LocalMemory(Regression(), PARAMS))
    assert memory.ids.tolist() == list(range(90, 100))


def test_fewer_rows_than_may_be_kept(tmp_path):
    assert kept(tmp_path, RowLimit(1000), rows(), 64).ids.tolist() == sorted(rows().ids.tolist())


@pytest.mark.parametrize("given", [0, -1, True, 2.5, "10"])
def test_numbers_that_are_none(given):
    for refuse in (lambda: ResMemCallback(max_rows=given), lambda: RowLimit(given)):
        with pytest.raises(InputError, match=re.escape(f"max_rows={given!r}: give a whole number of rows of at least")):
            refuse()


def test_other_ways_to_choose_are_refused(tmp_path):
    with pytest.raises(InputError, match="keep='best' is not known"):
        ResMemCallback(max_rows=3, keep="best")
    with pytest.raises(InputError, match="keep='residual' chooses max_rows rows: give max_rows"):
        memorize(trainer(tmp_path), make(CallsSelf), Data(), keep="residual")
    data = Data()
    callback = ResMemCallback(max_rows=60, keep="residual")
    with pytest.raises(InputError, match=r'keep="residual" keeps .* give validation rows'):
        trainer(tmp_path, callback, limit_val_batches=0).fit(make(CallsSelf), data.train_dataloader())


def test_the_callback_and_memorize_keep_the_same_rows(tmp_path, caplog):
    """The rows of plain batches, in any order and number."""
    data, model = Data(), make(CallsSelf)
    callback = ResMemCallback(max_rows=70, tuner=GridTuner(k=[5], refinements=0))
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, callback).fit(model, datamodule=data)
    assert "memorized 70 of 120 training rows, chosen by keep='uniform' (" in caplog.text
    assert "memorizing 70 training rows takes about" in caplog.text
    wanted = sorted(sorted(range(120), key=split_mix)[:70])
    assert callback.memory.ids.tolist() == wanted
    batches = DataLoader(TensorDataset(*data.train), batch_size=50)
    found = memorize(trainer(tmp_path), model, batches, max_rows=70, tuner=None).memory
    assert found.ids.tolist() == wanted
    assert found.provenance["max_rows"] == "70"


def test_tokens_and_streams(tmp_path):
    """A sample of positions, not of sequences."""

    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(*Data().train, strict=True)

    memories = [
        memorize(trainer(tmp_path), Causal(), loader(texts(23), size), max_rows=20, tuner=None).memory
        for size in (2, 9)
    ]
    assert len(memories[0]) == 20
    assert torch.equal(memories[0].ids, memories[1].ids)
    assert len(memories[0].locate(memories[0].ids).sequences.unique()) > 10

    of_stream = memorize(
        trainer(tmp_path), make(CallsSelf), DataLoader(Stream(), 16), max_rows=30, limit_batches=7, tuner=None
    ).memory
    assert of_stream.ids.tolist() == sorted(sorted(range(112), key=split_mix)[:30])


def test_repeated_ids_are_refused(tmp_path):
    for modulus, limit in ((399, 300), (390, 100), (200, 100)):
        chunk = rows()
        chunk = chunk._replace(ids=torch.arange(ROWS) % modulus)
        with pytest.raises(InputError, match="ids are repeated"):
            kept(tmp_path, RowLimit(limit, "residual"), chunk, ROWS).build()


def test_rows_that_the_base_has_most_wrong_are_not_tuned_on(tmp_path, recwarn):
    memory = kept(tmp_path, RowLimit(100, "residual"), rows(), 50)
    with pytest.raises(InputError, match=r'keep="residual".*tune it on validation rows'):
        GridTuner().tune_leave_one_out(memory)
    assert RowLimit(5).may_tune()
    assert not RowLimit(5, "residual").may_tune()
    assert "The memory is not tuned" in str(recwarn[-1].message)
