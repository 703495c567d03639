"""A checkpoint knows where the memory is, and a new process reads it there."""

import dataclasses

import pytest
import torch

from lightning_resmem import (
    GridTuner,
    LocalMemory,
    ResMemCallback,
    ResMemWarning,
    StorageError,
)
from tests.models import (
    CallsSelf,
    Data,
    make,
    trainer,
)

QUICK = GridTuner(k=[5], sigma=[0.3], softmax_temperature=[1.0], strength=[1.0])


def test_a_checkpoint_finds_the_memory_again(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(tuner=QUICK)
    run = trainer(root, callback, enable_checkpointing=True)
    run.fit(model, datamodule=data)
    assert (root / "resmem" / "manifest.json").is_file()
    (expected,) = run.test(model, datamodule=data, verbose=False)
    run.save_checkpoint(root / "model.ckpt")
    outputs = torch.cat(run.predict(model, datamodule=data))

    fresh, again = make(CallsSelf, seed=5), ResMemCallback()
    run = trainer(root, again)
    (logged,) = run.test(fresh, datamodule=data, ckpt_path=root / "model.ckpt", verbose=False)
    assert logged == expected
    assert torch.equal(torch.cat(run.predict(fresh, datamodule=data)), outputs)
    again.memory.params = dataclasses.replace(again.memory.params, k=3)

    (root / "resmem").rename(root / "elsewhere")
    moved = ResMemCallback()
    with pytest.raises(StorageError) as raised:
        trainer(root, moved).test(make(CallsSelf), datamodule=data, ckpt_path=root / "model.ckpt")
    assert str(root / "resmem") in str(raised.value)
    assert "LocalMemory.load" in str(raised.value)
    found = ResMemCallback(LocalMemory.load(root / "elsewhere"))
    (logged,) = trainer(root, found).test(
        make(CallsSelf), datamodule=data, ckpt_path=root / "model.ckpt", verbose=False
    )
    assert logged == expected


def test_a_checkpoint_without_a_memory(root):
    data, model = Data(), make(CallsSelf)
    run = trainer(root)
    run.fit(model, datamodule=data)
    run.save_checkpoint(root / "plain.ckpt")
    with pytest.warns(ResMemWarning, match="no memory yet"):
        trainer(root, ResMemCallback()).test(model, datamodule=data, ckpt_path=root / "plain.ckpt", verbose=False)
