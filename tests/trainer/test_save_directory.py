"""Where a memory is saved."""

import sys
import uuid
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_resmem import (
    InputError,
    LocalMemory,
    ResMemCallback,
    ResMemParams,
    ResMemWarning,
    StorageError,
    memorize,
)
from tests.models import (
    CallsSelf,
    Data,
    make,
    memory_for,
    trainer,
)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"enable_checkpointing": True, "logger": False}, "resmem"),
        ({"enable_checkpointing": True, "logger": True}, "*_logs/version_0/resmem"),
        ({"enable_checkpointing": False, "logger": True}, None),
        ({"enable_checkpointing": True, "fast_dev_run": True}, None),
    ],
    ids=str,
)
def test_where_it_is_saved(options, where, root):
    trainer(root, ResMemCallback(memory_for(CallsSelf)), **options).fit(make(CallsSelf), datamodule=Data())
    found = [path.parent for path in root.rglob("manifest.json")]
    assert found == ([] if where is None else list(root.glob(where)))


def test_it_is_saved_beside_checkpoints_with_a_relative_path(root, monkeypatch):
    monkeypatch.chdir(root)
    run = trainer(root, ResMemCallback(memory_for(CallsSelf)), logger=CSVLogger("logs"), enable_checkpointing=True)
    run.fit(make(CallsSelf), datamodule=Data())
    where = root / "logs" / "lightning_logs" / "version_0"
    assert (where / "checkpoints").is_dir()
    assert [path.parent for path in root.rglob("manifest.json")] == [where / "resmem"]


def test_dirpath(root, monkeypatch):
    monkeypatch.chdir(root)
    callback = ResMemCallback(memory_for(CallsSelf), dirpath="here/memory")
    trainer(root, callback).fit(make(CallsSelf), datamodule=Data())
    loaded = LocalMemory.load(root / "here" / "memory")
    assert torch.equal(loaded.ids, callback.memory.ids)
    trainer(root, callback).fit(make(CallsSelf, seed=3), datamodule=Data())  # replaced, and used
    assert LocalMemory.load(root / "here" / "memory").provenance != loaded.provenance


def test_another_run_keeps_the_memory_of_the_first(root):
    for seed in (1, 2):
        trainer(root, ResMemCallback(memory_for(CallsSelf)), enable_checkpointing=True, logger=False).fit(
            make(CallsSelf, seed=seed), datamodule=Data()
        )
    first, second = (LocalMemory.load(root / name) for name in ("resmem", "resmem-v1"))
    assert first.provenance["fingerprint"] != second.provenance["fingerprint"]


class Wider(CallsSelf):
    """Another model."""


def saved_by(kind, root, seed=0):
    """The provenance of a memory that a fit has saved to a directory of its own choice."""
    callback = ResMemCallback(memory_for(CallsSelf), dirpath=root / "memory")
    trainer(root, callback).fit(make(kind, seed=seed), datamodule=Data())
    return LocalMemory.load(root / "memory").provenance


def test_the_memory_of_another_model_is_refused_before_training(root):
    before, run = saved_by(Wider, root), trainer(root, ResMemCallback(memory_for(CallsSelf), dirpath=root / "memory"))
    with pytest.raises(StorageError, match=r"memory of another model, .*Wider, and this one is .*CallsSelf: .*dirpath"):
        run.fit(make(CallsSelf), datamodule=Data())
    assert run.global_step == 0
    assert LocalMemory.load(root / "memory").provenance == before


def test_the_memory_of_another_fit_of_the_model_is_replaced_with_a_warning(root):
    before = saved_by(CallsSelf, root)
    with pytest.warns(ResMemWarning, match=f"other weights .{before['fingerprint'][:12]}.*replaced when training ends"):
        after = saved_by(CallsSelf, root, seed=1)
    assert after["fingerprint"] != before["fingerprint"]


def test_a_callbacks_own_memory_is_replaced_without_a_word(root, recwarn):
    callback = ResMemCallback(memory_for(CallsSelf), dirpath=root / "memory")
    run = trainer(root, callback)
    run.fit(make(CallsSelf), datamodule=Data())
    run.save_checkpoint(root / "model.ckpt")
    run.fit(make(CallsSelf, seed=1), datamodule=Data())
    resumed = trainer(root, ResMemCallback(memory_for(CallsSelf), dirpath=root / "memory"), max_epochs=2)
    resumed.fit(make(CallsSelf), datamodule=Data(), ckpt_path=root / "model.ckpt")
    assert not [warning for warning in recwarn if issubclass(warning.category, ResMemWarning)]


def test_a_module_replaces_the_memory_of_other_weights_only_if_told_to(root):
    modules = [memorize(trainer(root), make(CallsSelf, seed=seed), Data(), tuner=None) for seed in (1, 2)]
    first, second = modules
    first.save(root / "memory")
    first.memory.params = ResMemParams(k=3)
    first.save(root / "memory")  # its own
    with pytest.raises(StorageError, match=r"memory of other weights .*overwrite=True"):
        second.save(root / "memory")
    assert LocalMemory.load(root / "memory").provenance == first.memory.provenance
    assert LocalMemory.load(root / "memory").params.k == 3
    second.save(root / "memory", overwrite=True)
    assert LocalMemory.load(root / "memory").provenance == second.memory.provenance


def test_a_memory_that_was_filled_by_hand_belongs_to_nobody(root):
    module = memorize(trainer(root), make(CallsSelf), Data(), tuner=None)
    by_hand = LocalMemory()
    by_hand.add(torch.rand(5, 3), torch.rand(5, 2), torch.zeros(5, dtype=torch.long))
    by_hand.save(root / "memory")
    module.save(root / "memory")
    assert len(LocalMemory.load(root / "memory")) == 120


def test_dirpath_may_be_a_url(root, monkeypatch):
    monkeypatch.chdir(root)
    url = f"memory://{uuid.uuid4().hex}/memory"
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf), dirpath=url)
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    (expected,) = run.test(model, datamodule=data, verbose=False)
    assert torch.equal(LocalMemory.load(url).ids, callback.memory.ids)
    run.save_checkpoint(root / "model.ckpt")
    restored = trainer(root, ResMemCallback(memory_for(CallsSelf)))
    (logged,) = restored.test(model, datamodule=data, ckpt_path=root / "model.ckpt", verbose=False)
    assert logged == expected
    assert [path.name for path in root.iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize("versions", [["resmem"], ["resmem", "resmem-v1"]])
def test_the_root_may_be_a_url(root, monkeypatch, versions):
    monkeypatch.chdir(root)
    url = f"memory://{uuid.uuid4().hex}"
    for _ in versions:
        run = trainer(url, ResMemCallback(memory_for(CallsSelf)), enable_checkpointing=True, logger=False)
        run.fit(make(CallsSelf), datamodule=Data())
    for name in versions:
        assert len(LocalMemory.load(f"{url}/{name}")) == 120
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("dirpath", "match"),
    [
        ("s3://bucket/memory", "Install s3fs"),
        ("nonsense://bucket/memory", "Protocol not known"),
        (Path("s3://bucket/memory"), "give the URL as a string"),
        ("a\0b", "holds a NUL character"),
    ],
)
def test_what_is_no_place_is_refused_before_training(root, dirpath, match, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    model = make(CallsSelf)
    model.training_step = lambda *_: pytest.fail("it is trained")
    with pytest.raises(InputError, match=match):
        trainer(root, ResMemCallback(memory_for(CallsSelf), dirpath=dirpath)).fit(model, datamodule=Data())
    assert list(root.iterdir()) == []
