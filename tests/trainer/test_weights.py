"""Which weights a memory holds, and that the model has its own again."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)

from lightning_resmem import (
    InputError,
    ResMemCallback,
    StaleMemoryError,
)
from tests.models import (
    CallsSelf,
    Data,
    Spy,
    Trained,
    hooks_on,
    make,
    memory_for,
    same_weights,
    trainer,
    weights_of,
)


def best_checkpoint(root, mode="min"):
    return ModelCheckpoint(root / mode, monitor="val_loss", mode=mode)


def test_weights_best(root):
    # The worst epoch as the "best", so that it is not the last one.
    class Partly(CallsSelf):
        """Its checkpoints hold hyperparameters that are no plain tensors, and not all of the weights."""

        def __init__(self, where=Path("somewhere")):
            super().__init__()
            self.save_hyperparameters()
            self.frozen = torch.nn.Linear(2, 2)
            self.strict_loading = False

        def state_dict(self):
            return {name: value for name, value in super().state_dict().items() if "frozen" not in name}

    data, model = Data(), make(Partly)
    seen = []
    callback = ResMemCallback(memory_for(CallsSelf), weights="best")
    checkpoint = best_checkpoint(root, "max")
    model.on_train_end = lambda: seen.append(weights_of(model))
    run = trainer(
        root,
        Spy("on_train_end", lambda _, module: seen.append(weights_of(module))),
        callback,
        checkpoint,
        enable_checkpointing=True,
        max_epochs=3,
    )
    run.fit(model, datamodule=data)
    before, after = seen
    assert same_weights(before, after)
    assert same_weights(weights_of(model), before)
    best = torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]
    assert not same_weights(best, before)

    with pytest.raises(StaleMemoryError):
        run.test(model, datamodule=data)
    (logged,) = run.test(datamodule=data, ckpt_path="best", weights_only=False, verbose=False)
    assert same_weights(weights_of(model), best)
    wanted = Trained(model).scores(data.train, data.test, callback.memory.params)
    assert {part: logged[f"test/acc_{part}"] for part in wanted} == pytest.approx(wanted)
    assert len(callback.module.memory) == 120


def test_weights_last_with_another_epochs_checkpoint(root):
    data, model = Data(), make(CallsSelf)
    callback = ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback, best_checkpoint(root, "max"), enable_checkpointing=True, max_epochs=3)
    run.fit(model, datamodule=data)
    with pytest.raises(StaleMemoryError, match=r'weights="best".*memorize\(trainer, model, dataloader\)'):
        run.test(model, datamodule=data, ckpt_path="best")
    assert hooks_on(model) == 0


def test_weights_best_in_a_fast_dev_run(root):
    callback = ResMemCallback(memory_for(CallsSelf), weights="best")
    run = trainer(root, callback, best_checkpoint(root), enable_checkpointing=True, fast_dev_run=True)
    run.fit(make(CallsSelf), datamodule=Data())
    assert len(callback.memory) == 16


def test_a_checkpoint_that_saves_no_best_is_refused_before_training(root):
    checkpoint, steps = ModelCheckpoint(root, monitor="val_loss", save_top_k=0), []
    run = trainer(root, ResMemCallback(weights="best"), checkpoint, enable_checkpointing=True)
    model = make(CallsSelf)
    model.on_train_batch_start = lambda *_: steps.append(1)
    with pytest.raises(InputError, match="save_top_k=0 saves none"):
        run.fit(model, datamodule=Data())
    assert not steps
