"""ResMemModule: base and memory as one LightningModule."""

import copy
import dataclasses
import pickle

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import (
    EmptyMemoryError,
    InputError,
    LocalMemory,
    ResMemCallback,
    ResMemModule,
    ResMemParams,
    StaleMemoryError,
    StorageError,
    memorize,
)
from tests import oracle
from tests.models import (
    ZOO,
    CallsSelf,
    Data,
    ManyLabels,
    NoForward,
    NormAndDropout,
    Numbers,
    ReturnsDict,
    Trained,
    data_for,
    hooks_on,
    make,
    memory_for,
    same_weights,
    side_by_side,
    trainer,
    weights_of,
)


@pytest.fixture
def resmem(tmp_path):
    return combined(CallsSelf, tmp_path)


def combined(kind, root):
    return memorize(trainer(root), make(kind), data_for(kind), memory=memory_for(kind))


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_every_step_gives_the_combined_prediction(kind, tmp_path):
    resmem, data = combined(kind, tmp_path), data_for(kind)
    wanted = Trained(resmem.base).predict(data.train, data.test[0], resmem.memory.params)
    run = trainer(tmp_path)
    found = torch.cat(run.predict(resmem, datamodule=data))
    np.testing.assert_allclose(found, wanted.resmem, rtol=1e-4, atol=1e-5)
    for stage, part, call in (("val", data.val, run.validate), ("test", data.test, run.test)):
        (logged,) = call(resmem, datamodule=data, verbose=False)
        scores = Trained(resmem.base).scores(data.train, part, resmem.memory.params)
        name = resmem.memory.task.score_name
        assert side_by_side(logged) == {f"{stage}/{name}_{n}": pytest.approx(v, rel=1e-5) for n, v in scores.items()}
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(resmem.test_step(batch, 0), found[:16])  # by hand, outside a trainer
    assert torch.equal(resmem.validation_step(batch, 0), found[:16])
    assert torch.equal(resmem.predict_step(batch, 0), found[:16])
    np.testing.assert_allclose(resmem.predictions(batch).base, wanted.base[:16], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(resmem.predictions(batch).knn, wanted.knn[:16], rtol=1e-4, atol=1e-5)
    assert hooks_on(resmem) == 0


@pytest.mark.parametrize("kind", [CallsSelf, ReturnsDict])
def test_forward_returns_log_probabilities(kind, tmp_path):
    resmem, data = combined(kind, tmp_path), data_for(kind)
    wanted = Trained(resmem.base).predict(data.train, data.test[0], resmem.memory.params)
    for found in (resmem(data.test[0]), resmem(x=data.test[0])):
        torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(50))
        assert np.array_equal(found.argmax(dim=1), wanted.resmem.argmax(axis=1))
        np.testing.assert_allclose(found, oracle.log_predictions(wanted.resmem, wanted.base), atol=1e-4)
    assert not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(resmem(data.test[0]), found)


def test_no_memory_is_no_gain(resmem):
    resmem.memory.params = dataclasses.replace(resmem.memory.params, strength=0.0)
    inputs = Data().test[0]
    torch.testing.assert_close(resmem(inputs), Trained(resmem.base)(inputs)[1].log_softmax(dim=1))


def test_several_dataloaders(resmem, tmp_path):
    data = Data()
    found = trainer(tmp_path).test(resmem, [data.test_dataloader(), data.val_dataloader()], verbose=False)
    for index, part in enumerate((data.test, data.val)):
        scores = Trained(resmem.base).scores(data.train, part, resmem.memory.params)
        logged = {name: found[0][f"test/acc_{name}/dataloader_idx_{index}"] for name in scores}
        assert logged == pytest.approx(scores)


def test_save_and_load_predict_the_same_bit_for_bit(resmem, tmp_path):
    inputs = Data().test[0]
    expected = resmem(inputs)
    assert resmem.save(tmp_path / "resmem") == tmp_path / "resmem"
    loaded = ResMemModule.load(tmp_path / "resmem", base=copy.deepcopy(resmem.base))
    assert torch.equal(loaded(inputs), expected)
    again = ResMemModule.load(str(tmp_path / "resmem"), base=resmem.base)
    assert torch.equal(again(inputs), expected)
    again.memory.params = ResMemParams(k=1, sigma=1.0)
    again.save(tmp_path / "resmem")  # in place of the first
    assert ResMemModule.load(tmp_path / "resmem", base=resmem.base).memory.params.k == 1
    with pytest.raises(StorageError, match="no such directory"):
        ResMemModule.load(tmp_path / "elsewhere", base=resmem.base)


def test_options_survive_save_and_load(tmp_path):
    data, model = Data(), make(CallsSelf)
    resmem = memorize(trainer(tmp_path), model, data, memory=memory_for(CallsSelf), embedding="body.0")
    resmem.save(tmp_path / "resmem")
    loaded = ResMemModule.load(tmp_path / "resmem", model, targets_fn=lambda batch: batch[2])
    assert torch.equal(loaded(data.test[0]), resmem(data.test[0]))
    inputs, targets = data.test
    loader = DataLoader(TensorDataset(inputs, targets * 0, targets), batch_size=data.batch_size)
    with pytest.raises(InputError, match="forward_fn"):
        trainer(tmp_path).test(loaded, loader, verbose=False)
    loaded = ResMemModule.load(
        tmp_path / "resmem", model, targets_fn=lambda batch: batch[2], forward_fn=lambda m, batch: m(batch[0])
    )
    (found,) = trainer(tmp_path).test(loaded, loader, verbose=False)
    (expected,) = trainer(tmp_path).test(resmem, datamodule=data, verbose=False)
    assert found == expected


def test_other_weights_are_refused_and_left_alone(resmem, tmp_path):
    resmem.save(tmp_path / "resmem")
    other = make(CallsSelf, seed=1)
    before = weights_of(other)
    with pytest.raises(StaleMemoryError, match=r"memorize\(trainer, model, dataloader\)"):
        ResMemModule.load(tmp_path / "resmem", base=other)
    with pytest.raises(StaleMemoryError):
        ResMemModule(other, resmem.memory)
    assert same_weights(weights_of(other), before)
    assert hooks_on(other) == 0
    with torch.no_grad():
        resmem.base.head.bias += 1e-6
    with pytest.raises(StaleMemoryError, match="ResMemModule runs"):
        trainer(tmp_path).test(resmem, datamodule=Data())


def test_weights_that_torch_has_not_seen_changing_are_refused(resmem, tmp_path):
    resmem(Data().test[0])  # checked once
    resmem.base.head.bias.data += 1e-3  # is not counted as a change
    run = trainer(tmp_path)
    for use in (run.test, run.validate, run.predict):
        with pytest.raises(StaleMemoryError):
            use(resmem, datamodule=Data())
    with pytest.raises(StaleMemoryError):
        resmem.save(tmp_path / "resmem")


def test_the_base_may_be_in_training_mode(tmp_path):
    resmem, data = combined(NormAndDropout, tmp_path), Data()
    expected = resmem(data.test[0])
    resmem.train()
    resmem.base.body[1].eval()
    modes, weights = [m.training for m in resmem.modules()], weights_of(resmem)
    assert torch.equal(resmem(data.test[0]), expected)
    trainer(tmp_path).test(resmem, datamodule=data, verbose=False)
    assert [m.training for m in resmem.modules()] == modes
    assert same_weights(weights_of(resmem), weights)


def test_a_failing_base_is_left_as_it_was(resmem):
    resmem.train()
    with pytest.raises(RuntimeError):
        resmem(torch.zeros(3, 99))
    assert all(module.training for module in resmem.modules())
    assert hooks_on(resmem) == 0
    assert resmem(torch.zeros(3, 4)).shape == (3, 4)


def test_the_state_dict_is_the_bases(resmem, tmp_path):
    assert {f"base.{name}" for name in resmem.base.state_dict()} == set(resmem.state_dict())
    torch.save(resmem.state_dict(), tmp_path / "weights.pt")
    resmem.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert len(list(resmem.parameters())) == len(list(resmem.base.parameters()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_clones(clone, tmp_path):
    class_ = HalvesTransfer
    resmem, data = memorize(trainer(tmp_path), make(class_), Data(), memory=memory_for(class_)), Data()
    inputs = data.test[0]
    resmem(inputs)
    other = clone(resmem)
    assert torch.equal(other(inputs), resmem(inputs))
    assert other.base is not resmem.base
    assert hooks_on(other) == 0
    with torch.no_grad():
        other.base.body[0].weight.zero_()  # its own base
    with pytest.raises(StaleMemoryError, match="another model"):
        other(inputs)
    assert torch.isfinite(resmem(inputs)).all()
    assert other.on_after_batch_transfer.__self__ is other.base


class HalvesTransfer(CallsSelf):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] / 2, batch[1]


def test_the_bases_transfer_hooks_are_used(tmp_path):
    data, model = Data(), make(HalvesTransfer)
    resmem = ResMemModule(model, by_hand(model, data.train[0] / 2, data.train[1]))
    halved = [(part[0] / 2, part[1]) for part in (data.train, data.test)]
    wanted = Trained(model).scores(*halved, resmem.memory.params)
    (logged,) = trainer(tmp_path).test(resmem, datamodule=data, verbose=False)
    assert side_by_side(logged) == {f"test/acc_{n}": pytest.approx(v) for n, v in wanted.items()}


def by_hand(model, inputs, targets):
    memory = memory_for(CallsSelf)
    memory.add(*Trained(model)(inputs), targets)
    return memory


@pytest.mark.parametrize("kind", [CallsSelf, NoForward])
def test_a_memory_filled_by_hand_finds_the_head(kind, tmp_path):
    data, model = Data(), make(kind)
    resmem = ResMemModule(model, by_hand(model, *data.train))
    wanted = Trained(model).predict(data.train, data.test[0], resmem.memory.params)
    found = torch.cat(trainer(tmp_path).predict(resmem, datamodule=data))
    np.testing.assert_allclose(found, wanted.resmem, atol=1e-5)
    resmem.save(tmp_path / "resmem")
    loaded = ResMemModule.load(tmp_path / "resmem", base=model)
    assert loaded.memory.provenance["head"] == "head"
    resmem.memory.add(torch.zeros(1, 5), torch.zeros(1, 4), torch.tensor([0]))  # rows made in inference mode
    resmem.memory.build()
    assert len(resmem.memory) == 121


def test_an_empty_memory():
    with pytest.raises(EmptyMemoryError):
        ResMemModule(make(CallsSelf), LocalMemory())


def test_arguments_are_checked(resmem):
    with pytest.raises(InputError, match="base is a Linear"):
        ResMemModule(nn.Linear(1, 1), resmem.memory)
    with pytest.raises(InputError, match="memory is a dict"):
        ResMemModule(resmem.base, {})


def test_it_can_be_made_double(resmem):
    inputs = Data().test[0]
    expected = resmem(inputs)
    resmem.double()
    found = resmem(inputs.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_trainers_precision_does_not_round_the_memory(precision, tmp_path):
    data, model = Data(), make(CallsSelf)
    if precision != "64-true":
        model.to(torch.bfloat16 if precision == "bf16-true" else torch.float16).float()  # weights that survive it
    resmem = memorize(trainer(tmp_path), model, data, memory=memory_for(CallsSelf))
    keys = Trained(model)(data.train[0])[0]
    run = trainer(tmp_path, precision=precision)
    run.predict(resmem, datamodule=data)
    assert torch.equal(resmem.memory.search(keys, 1).distances, torch.zeros(120, 1))
    (logged,) = run.test(resmem, datamodule=data, verbose=False)
    wanted = Trained(model.float()).scores(data.train, data.test, resmem.memory.params)
    assert logged["test/acc_resmem"] == pytest.approx(wanted["resmem"], abs=0.1)


def test_beside_the_callback_it_combines_once(tmp_path):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(tmp_path, callback)
    run.fit(model, datamodule=data)
    wanted = Trained(model).scores(data.train, data.test, callback.memory.params)
    assert callback.module.base is model
    (logged,) = run.test(callback.module, datamodule=data, verbose=False)
    assert side_by_side(logged) == {f"test/acc_{n}": pytest.approx(v) for n, v in wanted.items()}
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == pytest.approx(wanted["resmem"])


def test_without_any_trainer(resmem):
    inputs, targets = Data().test
    loader = DataLoader(list(zip(inputs, targets, strict=True)), batch_size=25)
    found = torch.cat([resmem(batch) for batch, _ in loader])
    assert found.shape == (50, 4)
    wanted = Trained(resmem.base).predict(Data().train, inputs, resmem.memory.params)
    assert np.array_equal(found.argmax(dim=1), wanted.resmem.argmax(axis=1))


def test_a_base_that_was_trained_further_is_noticed_everywhere(tmp_path):
    data, model = Data(), make(CallsSelf)
    resmem = memorize(trainer(tmp_path), model, data, memory=memory_for(CallsSelf))
    before = resmem(data.test[0])
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(StaleMemoryError, match="memorize"):
        resmem(data.test[0])
    with pytest.raises(StaleMemoryError):
        trainer(tmp_path).predict(resmem, datamodule=data)
    with pytest.raises(StaleMemoryError):  # saved, it would look as if it belonged to the new weights
        resmem.save(tmp_path / "memory")
    assert not (tmp_path / "memory").exists()
    model.load_state_dict(weights)
    assert torch.equal(resmem(data.test[0]), before)


# -- bases without a forward, and what cannot be saved


class OnlyTrains(NoForward):
    """Steps for training alone."""

    predict_step = L.LightningModule.predict_step
    validation_step = L.LightningModule.validation_step
    test_step = L.LightningModule.test_step


def test_a_forward_fn_is_asked_for_when_a_memory_is_loaded(tmp_path):
    def runs(model, batch):
        return model.head(model.body(batch[0]))

    data, model = Data(), make(OnlyTrains)
    resmem = memorize(trainer(tmp_path), model, data, memory=memory_for(OnlyTrains), forward_fn=runs)
    resmem.save(tmp_path / "resmem")
    with pytest.raises(InputError, match=r"filled with a forward_fn \(.*runs\).*give it again.*forward_fn=\.\.\."):
        ResMemModule.load(tmp_path / "resmem", model)
    loaded = ResMemModule.load(tmp_path / "resmem", model, forward_fn=runs)
    assert torch.equal(loaded.predict_step(data.test, 0), resmem.predict_step(data.test, 0))


def test_a_base_without_a_forward_takes_batches(tmp_path):
    data, resmem = Data(), combined(NoForward, tmp_path)
    wanted = Trained(resmem.base).predict(data.train, data.test[0], resmem.memory.params)
    assert np.array_equal(resmem(data.test).argmax(dim=1), wanted.resmem.argmax(axis=1))
    with pytest.raises(InputError, match=r"NoForward has no forward, so ResMemModule takes a batch .*got 2 arguments"):
        resmem(*data.test)
    with pytest.raises(InputError, match="NoForward has no forward, so ResMemModule takes a batch"):
        resmem(data.test[0])


def test_a_list_of_rows_is_a_batch(resmem):
    dataset = TensorDataset(*Data().test)
    for count in (1, 2, 5):
        rows = [dataset[place] for place in range(count)]
        assert torch.equal(resmem.predictions(rows).resmem, resmem.predictions(dataset[:count]).resmem)
        assert resmem.explain(rows).rows == resmem.explain(dataset[:count]).rows


@pytest.mark.parametrize("kind", [ManyLabels, Numbers])
def test_a_list_of_rows_with_several_targets_is_a_batch(kind, tmp_path):
    resmem, dataset = combined(kind, tmp_path), TensorDataset(*data_for(kind).test)
    assert resmem.explain([dataset[0], dataset[1]]).rows == resmem.explain(dataset[:2]).rows


# -- compiled and exported


@pytest.fixture
def _compiled_graphs_are_forgotten():
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiled_graphs_are_forgotten")
def test_torch_compile(resmem, tmp_path):
    data = Data()
    expected = resmem(data.test[0])
    compiled = torch.compile(resmem, backend="eager")
    for count in (3, 50):
        torch.testing.assert_close(compiled(data.test[0][:count]), expected[:count])
    (logged,) = trainer(tmp_path).test(compiled, datamodule=data, verbose=False)
    scores = Trained(resmem.base).scores(data.train, data.test, resmem.memory.params)
    assert side_by_side(logged) == {f"test/acc_{n}": pytest.approx(v) for n, v in scores.items()}
    inside = torch.compile(nn.Sequential(nn.Identity(), resmem), backend="eager")
    torch.testing.assert_close(inside(data.test[0]), expected)


@pytest.mark.usefixtures("_compiled_graphs_are_forgotten")
def test_torch_export_is_refused_in_a_sentence(resmem):
    with pytest.raises(InputError, match=r"ResMemModule cannot be exported: .* Export the base, and combine"):
        torch.export.export(resmem, (Data().test[0],))
    with pytest.raises(Exception, match="a memory is searched, which no graph can hold: compile or export the base"):
        torch.export.export(resmem, (Data().test[0],), strict=True)
