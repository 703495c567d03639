"""Bases that make their layers in `setup` or `configure_model`, inside of `memorize` and ResMemModule."""

import pytest
import torch
from torch import nn

from lightning_resmem import ResMemCallback, ResMemModule, StaleMemoryError, memorize
from tests.models import CLASSES, CallsSelf, Data, Trained, make, memory_for, same_weights, trainer, weights_of


class Classes(Data):
    """Knows the number of classes."""

    def setup(self, stage):
        self.num_classes = CLASSES


class InConfigureModel(CallsSelf):
    """Makes its layers when the trainer says so, once."""

    def __init__(self):
        super().__init__()
        self.made, self.body, self.head = False, None, None

    def configure_model(self):
        if not self.made:
            self.made = True
            self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, CLASSES)


class InSetup(CallsSelf):
    """Makes its head for the datamodule's classes, again for every run, as Lightning's own example does."""

    def __init__(self):
        super().__init__()
        self.head, self.stages = None, []

    def setup(self, stage):
        self.stages.append(stage)
        self.head = nn.Linear(5, self.trainer.datamodule.num_classes)

    def teardown(self, stage):
        self.stages.append(stage)


KINDS = pytest.mark.parametrize("kind", [InConfigureModel, InSetup], ids=lambda kind: kind.__name__)


def expected(model, data, memory):
    return Trained(model).scores(data.train, data.test, memory.params)


def acc(logged):
    return {part: logged[f"test/acc_{part}"] for part in ("base", "knn", "resmem")}


@KINDS
def test_memorize_and_test_what_was_trained(kind, tmp_path):
    data, model = Classes(), make(kind)
    trainer(tmp_path, max_epochs=2).fit(model, datamodule=data)
    weights = weights_of(model)
    resmem = memorize(trainer(tmp_path), model, data, memory=memory_for(CallsSelf))
    assert same_weights(weights_of(model), weights)
    (logged,) = trainer(tmp_path).test(resmem, datamodule=data, verbose=False)
    assert same_weights(weights_of(model), weights)
    wanted = expected(model, data, resmem.memory)
    assert wanted["base"] != wanted["resmem"]
    assert acc(logged) == pytest.approx(wanted)
    outputs = torch.cat(trainer(tmp_path).predict(resmem, datamodule=data))
    assert torch.equal(outputs, resmem.predictions(data.test).resmem)


@KINDS
def test_memorize_a_checkpoint_in_a_new_process(kind, tmp_path):
    data, model = Classes(), make(kind)
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    run.save_checkpoint(tmp_path / "model.ckpt")
    fresh = make(kind, seed=3)
    resmem = memorize(trainer(tmp_path), fresh, data, memory=memory_for(CallsSelf), ckpt_path=tmp_path / "model.ckpt")
    assert same_weights(weights_of(fresh), weights_of(model))
    stored = resmem.memory.fetch(resmem.memory.ids)
    assert torch.equal(stored.outputs, Trained(model)(data.train[0])[1])


def test_hooks_of_a_base_that_was_never_attached_are_called(tmp_path):
    data, model = Classes(), make(InSetup)
    resmem = memorize(trainer(tmp_path), model, data, memory=memory_for(CallsSelf))
    assert model.stages[:1] == ["predict"]
    model.stages.clear()
    (logged,) = trainer(tmp_path).test(resmem, datamodule=data, verbose=False)
    assert model.stages[:1] == ["test"]
    assert acc(logged) == pytest.approx(expected(model, data, resmem.memory))


def test_the_callbacks_module(tmp_path):
    data, model, callback = Classes(), make(InSetup), ResMemCallback(memory_for(CallsSelf))
    trainer(tmp_path, callback).fit(model, datamodule=data)
    (logged,) = trainer(tmp_path).test(callback.module, datamodule=data, verbose=False)
    assert acc(logged) == pytest.approx(expected(model, data, callback.memory))


def test_a_checkpoint_is_loaded_with_the_models_hook_and_strictness(tmp_path):
    class Renamed(CallsSelf):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {f"old.{name}": value for name, value in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint):
            state = {name.removeprefix("old."): value for name, value in checkpoint["state_dict"].items()}
            checkpoint["state_dict"] = state | {"unknown": torch.zeros(1)}
            self.strict_loading = False

    model, data = make(Renamed), Data()
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    run.save_checkpoint(tmp_path / "model.ckpt")
    fresh = make(Renamed, seed=3)
    memorize(trainer(tmp_path), fresh, data, memory=memory_for(CallsSelf), ckpt_path=tmp_path / "model.ckpt")
    assert same_weights(weights_of(fresh), weights_of(model))


def test_an_error_in_setup_says_what_the_base_may_miss(tmp_path):
    data, model = Classes(), make(InSetup)
    with pytest.raises(AttributeError) as raised:
        memorize(trainer(tmp_path), model, data.train_dataloader())
    assert "give the datamodule in place of loaders" in raised.value.__notes__[0]


def test_only_layers_that_are_there_keep_their_weights(tmp_path):
    """Another number of classes is another head: its weights are not those that the memory was filled with."""
    data, model = Classes(), make(InSetup)
    trainer(tmp_path).fit(model, datamodule=data)
    memory = memorize(trainer(tmp_path), model, data, memory=memory_for(CallsSelf)).memory
    more = Classes()
    more.setup = lambda stage: setattr(more, "num_classes", CLASSES + 1)
    run = trainer(tmp_path)
    with pytest.raises(StaleMemoryError):
        run.test(ResMemModule(model, memory), datamodule=more, verbose=False)
