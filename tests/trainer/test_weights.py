"""Which weights a memory holds, and that the model has its own again."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
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


def test_a_checkpoint_on_a_trainer_that_averages_weights_says_which_are_loaded(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf), weights="best")
    checkpoint = best_checkpoint(root)
    run = trainer(root, callback, checkpoint, EMAWeightAveraging(decay=0.9), enable_checkpointing=True, max_epochs=3)
    run.fit(model, datamodule=data)
    path = checkpoint.best_model_path
    with pytest.raises(StaleMemoryError) as raised:
        run.test(model, datamodule=data, ckpt_path="best")
    (note,) = raised.value.__notes__
    assert "The EMAWeightAveraging of this Trainer" in note
    assert f"Trainer(callbacks=[resmem]).test(model, ckpt_path={path!r})" in note
    saved = torch.load(path, weights_only=True)
    assert same_weights(weights_of(model), saved["current_model_state"])
    # ... and the way out is one.
    (logged,) = trainer(root, callback).test(model, datamodule=data, ckpt_path=path, verbose=False)
    assert same_weights(weights_of(model), saved["state_dict"])
    wanted = Trained(model).scores(data.train, data.test, callback.memory.params)
    assert {part: logged[f"test/acc_{part}"] for part in wanted} == pytest.approx(wanted)


def test_other_weights_on_a_trainer_that_averages_are_not_put_down_to_it(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback, EMAWeightAveraging(decay=0.9))
    run.fit(model, datamodule=data)
    with pytest.raises(StaleMemoryError) as raised:
        run.test(make(CallsSelf, seed=3), datamodule=data)
    assert not hasattr(raised.value, "__notes__")


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


class Counted(CallsSelf):
    """Keeps its weights under other names in checkpoints, and a number beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs, self.loaded = 0, []

    def on_train_epoch_end(self) -> None:
        self.epochs += 1

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"net.{name}": value for name, value in checkpoint["state_dict"].items()}
        checkpoint["epochs"] = self.epochs

    def on_load_checkpoint(self, checkpoint):
        self.loaded.append(sorted(checkpoint))
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix("net."): value for name, value in state.items()}
        self.epochs = checkpoint["epochs"]


def test_weights_best_are_loaded_as_the_model_loads_them(root):
    data, model = Data(), make(Counted)
    callback, seen = ResMemCallback(memory_for(CallsSelf), weights="best"), []
    checkpoint = ModelCheckpoint(root, monitor="val_loss", mode="max")  # the worst, which is not the last
    model.on_train_end = lambda: seen.append((model.epochs, weights_of(model)))
    run = trainer(root, callback, checkpoint, enable_checkpointing=True, max_epochs=3)
    run.fit(model, datamodule=data)
    ((epochs, weights),) = seen
    assert (model.epochs, same_weights(weights_of(model), weights)) == (epochs, True) == (3, True)
    assert all("optimizer_states" in keys for keys in model.loaded), "what a hook may want is there both times"

    best = torch.load(checkpoint.best_model_path, weights_only=True)
    assert best["epochs"] < 3
    reference = make(CallsSelf)
    reference.load_state_dict({name.removeprefix("net."): value for name, value in best["state_dict"].items()})
    stored = callback.memory.fetch(callback.memory.ids)
    assert torch.equal(stored.outputs, Trained(reference)(data.train[0])[1])
    (logged,) = run.test(model, datamodule=data, ckpt_path="best", verbose=False)
    wanted = Trained(reference).scores(data.train, data.test, callback.memory.params)
    assert {part: logged[f"test/acc_{part}"] for part in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    "checkpoints",
    [
        [{"monitor": "val_loss", "mode": "max"}, {"monitor": "val_loss", "mode": "min"}],
        [{"monitor": None}, {"monitor": "val_loss", "mode": "max"}],  # the last that was saved
        [{"monitor": "val_loss", "mode": "max", "save_top_k": 2}],
        [{"monitor": "val_loss", "mode": "max", "save_top_k": -1}],
    ],
)
def test_weights_best_are_those_of_ckpt_path_best(root, checkpoints):
    class Jumps(CallsSelf):
        """Its second epoch is by far the worst, its third the best, and it ends with another one."""

        def on_validation_epoch_end(self):
            self.log("val_loss", torch.tensor([1.0, 5.0, 0.1, 2.0, 1.5][self.current_epoch]))

        def validation_step(self, batch, batch_idx):
            pass

    data, model = Data(), make(Jumps)
    saved = [ModelCheckpoint(root / str(number), **options) for number, options in enumerate(checkpoints)]
    callback = ResMemCallback(memory_for(CallsSelf), weights="best")
    run = trainer(root, callback, *saved, enable_checkpointing=True, max_epochs=5)
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, ckpt_path="best", verbose=False)  # no StaleMemoryError
    best = torch.load(saved[0].best_model_path, weights_only=True)["state_dict"]
    assert same_weights(weights_of(model), best)


@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        ([], "needs a ModelCheckpoint with a monitor among"),
        ([{"save_top_k": 0, "save_last": True}], r"\(ModelCheckpoint\), and this one keeps no best one"),
        ([{"save_top_k": 0}, {"monitor": "val_loss"}], "put one that does before it"),
    ],
)
def test_weights_best_that_no_checkpoint_will_hold_are_refused_before_training(root, checkpoints, message):
    saved = [ModelCheckpoint(root / str(number), **options) for number, options in enumerate(checkpoints)]
    run = trainer(root, ResMemCallback(weights="best"), *saved, enable_checkpointing=bool(saved))
    with pytest.raises(InputError, match=message):
        run.fit(make(CallsSelf), datamodule=Data())
    assert run.global_step == 0
