"""`memorize`: a memory for a model that is trained already."""

from collections import Counter

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassF1Score

from examples.series_module import Forecaster, Windows, times
from lightning_resmem import (
    GridTuner,
    InputError,
    LocalMemory,
    Regression,
    ResMemCallback,
    ResMemModule,
    ResMemParams,
    memorize,
)
from lightning_resmem.metrics.noise import Groups
from tests.models import (
    ZOO,
    CallsSelf,
    Data,
    NoForward,
    NormAndDropout,
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

QUICK = GridTuner(k=[5], sigma=[0.3], softmax_temperature=[1.0], strength=[1.0])


def scores(resmem, data, root):
    (logged,) = trainer(root).test(resmem, datamodule=data, verbose=False)
    return side_by_side(logged)


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_with_a_datamodule(kind, tmp_path):
    data, model = data_for(kind), make(kind)
    resmem = memorize(trainer(tmp_path), model, data, memory=memory_for(kind))
    assert resmem.base is model
    assert resmem.memory.ids.tolist() == list(range(120))
    wanted = Trained(model).scores(data.train, data.test, resmem.memory.params)
    assert wanted["base"] != wanted["resmem"]
    name = resmem.memory.task.score_name
    logged = scores(resmem, data, tmp_path)
    assert logged == {f"test/{name}_{part}": pytest.approx(value, rel=1e-5) for part, value in wanted.items()}


def test_same_as_the_callback(tmp_path):
    tuner = GridTuner(k=[5, 50], sigma=[0.3], softmax_temperature=[1.0, 2.0], strength=[0.5, 1.0])
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(tuner=tuner)
    run = trainer(tmp_path, callback)
    run.fit(model, datamodule=data)
    for loaders in [(data,), (data.train_dataloader(), data.val_dataloader())]:
        resmem = memorize(trainer(tmp_path), model, *loaders, tuner=tuner)
        assert resmem.memory.params == callback.memory.params
        outputs = trainer(tmp_path).predict(resmem, datamodule=data)
        expected = trainer(tmp_path).predict(callback.module, datamodule=data)
        assert torch.equal(torch.cat(outputs), torch.cat(expected))


def test_loaders(tmp_path):
    data, model = Data(), make(CallsSelf)
    resmem = memorize(trainer(tmp_path), model, data.train_dataloader(), tuner=QUICK)
    assert len(resmem.memory) == 120
    assert resmem.memory.params == QUICK.tune_leave_one_out(resmem.memory).params
    resmem = memorize(trainer(tmp_path), model, data.train_dataloader(), data.val_dataloader(), tuner=QUICK)
    assert resmem.memory.params.k == 5
    two = [data.loader(data.train), data.loader(data.val)]
    assert memorize(trainer(tmp_path), model, two).memory.ids.tolist() == list(range(160))


def test_a_validation_loader_beside_a_datamodule_is_the_one_that_counts(tmp_path):
    class Refuses(Data):
        def val_dataloader(self):
            raise AssertionError("asked for")

    data = Refuses()
    resmem = memorize(trainer(tmp_path), make(CallsSelf), data, data.loader(data.val), tuner=QUICK)
    assert resmem.memory.params.k == 5


@pytest.mark.parametrize("none", [None, []], ids=str)
def test_a_datamodule_without_validation_rows(none, tmp_path):
    class Without(Data):
        def val_dataloader(self):
            return none

    data = Without()
    resmem = memorize(trainer(tmp_path), make(CallsSelf), data, tuner=QUICK)
    assert resmem.memory.params == QUICK.tune_leave_one_out(resmem.memory).params
    if none is not None:  # which the trainer itself refuses in fit
        callback = ResMemCallback(tuner=QUICK)
        trainer(tmp_path, callback).fit(make(CallsSelf), datamodule=data)
        assert callback.tuning.leave_one_out


def test_a_memory_of_few_rows_is_not_tuned_on_its_own(tmp_path):
    data, model = Data(), make(CallsSelf)
    few = tuple(part[:49] for part in data.train)
    assert memorize(trainer(tmp_path), model, data.loader(few), tuner=QUICK).memory.params.k == 50


def test_the_datamodule_is_prepared_and_its_transfer_hooks_apply(tmp_path):
    calls = Counter()

    class Prepared(Data):
        def prepare_data(self):
            calls["prepare_data"] += 1

        def setup(self, stage):
            calls[stage] += 1
            self.train = (self.train[0] * 3, self.train[1])

        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert not self.trainer.training
            return batch[0] / 3, batch[1]

    data, model = Prepared(), make(CallsSelf)
    keys, _ = Trained(model)(data.train[0] * 3 / 3)
    resmem = memorize(trainer(tmp_path), model, data, memory=memory_for(CallsSelf))
    assert calls == {"prepare_data": 1, "fit": 1}
    assert torch.equal(resmem.memory.search(keys, 1).distances, torch.zeros(120, 1))


def test_the_models_transfer_hook_applies(tmp_path):
    class Halves(CallsSelf):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] / 2, batch[1]

    data, model = Data(), make(Halves)
    resmem = memorize(trainer(tmp_path), model, data.train_dataloader(), memory=memory_for(CallsSelf))
    halved = [(part[0] / 2, part[1]) for part in (data.train, data.test)]
    wanted = Trained(model).scores(*halved, resmem.memory.params)
    assert scores(resmem, data, tmp_path) == {f"test/acc_{n}": pytest.approx(v) for n, v in wanted.items()}


class Unwanted(Callback):
    def __getattribute__(self, name):
        if name.startswith("on_") or name in ("setup", "teardown"):
            raise AssertionError(f"{name} was called")
        return super().__getattribute__(name)


class Fails(CallsSelf):
    def forward(self, x):
        if not self.training:
            raise ValueError("mine")
        return super().forward(x)


@pytest.mark.parametrize("kind", [NormAndDropout, NoForward, Fails], ids=lambda kind: kind.__name__)
def test_nothing_is_left_in_model_or_trainer(kind, tmp_path):
    data, model = Data(), make(kind)
    model.body[0].eval()
    modes, weights, attributes = [m.training for m in model.modules()], weights_of(model), set(vars(model))
    run = trainer(tmp_path, Unwanted(), ModelCheckpoint(), enable_checkpointing=True)
    callbacks, generator = list(run.callbacks), torch.get_rng_state()
    if kind is Fails:
        with pytest.raises(ValueError, match="mine"):
            memorize(run, model, data, tuner=QUICK)
    else:
        memorize(run, model, data, tuner=QUICK)
        assert torch.equal(torch.get_rng_state(), generator)
    assert run.callbacks == callbacks
    assert [m.training for m in model.modules()] == modes
    assert same_weights(weights_of(model), weights)
    assert hooks_on(model) == 0
    assert set(vars(model)) == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not list(tmp_path.iterdir())


def test_between_fit_and_test_of_one_trainer(tmp_path):
    data, model = Data(), make(CallsSelf)
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(model, datamodule=data)
    base = run.test(datamodule=data, verbose=False)
    memorize(run, model, data, memory=memory_for(CallsSelf))
    assert run.lightning_module is model
    assert run.test(datamodule=data, verbose=False) == base
    outputs = torch.cat(run.predict(model, datamodule=data))
    assert torch.equal(outputs, Trained(model)(data.test[0])[1])
    run.fit_loop.max_epochs = 2
    before = weights_of(model)
    run.fit(model, datamodule=data)
    assert not same_weights(before, weights_of(model)), "it trains on"


def test_twice(tmp_path):
    data, run = Data(), trainer(tmp_path)
    memory = memory_for(CallsSelf)
    for seed in (0, 1):
        model = make(CallsSelf, seed)
        resmem = memorize(run, model, data, memory=memory)
        assert len(memory) == 120, "the rows of the first model are forgotten"
        wanted = Trained(model).scores(data.train, data.test, memory.params)
        assert scores(resmem, data, tmp_path) == {f"test/acc_{n}": pytest.approx(v) for n, v in wanted.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"limit_predict_batches": 0},
        {"limit_predict_batches": 0.5},
        {"limit_train_batches": 1, "limit_val_batches": 1},
        {"fast_dev_run": True},
        {"overfit_batches": 1},
        {"enable_progress_bar": True},
        {"inference_mode": False},
        {"max_epochs": 0},
        {"logger": True},
        {"barebones": True},
    ],
    ids=str,
)
def test_all_rows_whatever_the_trainer_limits(options, tmp_path):
    data, model = Data(), make(CallsSelf)
    run = L.Trainer(accelerator="cpu", barebones=True) if "barebones" in options else trainer(tmp_path, **options)
    resmem = memorize(run, model, data, tuner=QUICK)
    assert len(resmem.memory) == 120
    assert resmem.memory.params.k == 5
    for name, value in options.items():
        if name.startswith("limit"):
            assert getattr(run, name) == value


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precision(precision, tmp_path):
    data, model = Data(), make(CallsSelf)
    resmem = memorize(trainer(tmp_path, precision=precision), model, data, memory=memory_for(CallsSelf))
    (logged,) = trainer(tmp_path, precision=precision).test(resmem, datamodule=data, verbose=False)
    wanted = Trained(model.float()).scores(data.train, data.test, resmem.memory.params)
    if precision == "64-true":
        assert side_by_side(logged) == {f"test/acc_{n}": pytest.approx(v) for n, v in wanted.items()}
    else:  # rounded keys, nearly the same
        assert logged["test/acc_resmem"] == pytest.approx(wanted["resmem"], abs=0.1)
        assert logged["test/acc_resmem"] > wanted["base"]


def test_options_reach_the_pass(tmp_path):
    data, model = Data(), make(CallsSelf)
    triples = DataLoader(TensorDataset(*data.train, torch.arange(1000, 1120)), batch_size=16)
    seen = []

    def forward_fn(module, batch):
        seen.append(len(batch[0]))
        return module(batch[0])

    resmem = memorize(
        trainer(tmp_path),
        model,
        triples,
        memory=LocalMemory(params=ResMemParams(k=1, sigma=1.0)),
        head="head",
        embedding="body.0",
        targets_fn=lambda batch: batch[1],
        forward_fn=forward_fn,
        ids_fn=lambda batch: batch[2],
    )
    assert sum(seen) >= 120
    assert resmem.memory.ids.tolist() == list(range(1000, 1120))
    hidden = model.body[0](data.train[0]).detach()
    assert torch.equal(resmem.memory.search(hidden, 1).distances, torch.zeros(120, 1))
    combined = resmem.predict_step(next(iter(triples)), 0)
    assert torch.equal(combined.argmax(dim=1), data.train[1][:16]), "k=1 memorizes the training rows"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, CallsSelf, Data), {}, "trainer is a NoneType"),
        ((L.Trainer, lambda: torch.nn.Linear(1, 1), Data), {}, "model is a Linear"),
        ((L.Trainer, CallsSelf, Data), {"tuner": 3}, "tuner=3"),
        ((L.Trainer, CallsSelf, list), {}, "no loader"),
    ],
    ids=["trainer", "model", "tuner", "loader"],
)
def test_arguments_are_checked(arguments, options, message, tmp_path):
    run, model, data = arguments
    run = run if run is None else trainer(tmp_path)
    with pytest.raises(InputError, match=message):
        memorize(run, model(), data(), **options)


def test_an_objective_that_does_not_fit_is_refused_before_the_pass(tmp_path):
    model, batches = make(CallsSelf), []
    forward = model.forward
    model.forward = lambda x: batches.append(len(x)) or forward(x)
    tuner = GridTuner(objective=MulticlassF1Score(7))
    with pytest.raises(InputError, match=r"objective=MulticlassF1Score\(\) does not take .* \(2, 4\)"):
        memorize(trainer(tmp_path), model, Data(), tuner=tuner)
    assert set(batches) == {2}


def test_a_balanced_sampler_has_balanced_accuracy_reported(tmp_path):
    """Of classes that are not far from uniform themselves: one in nine is rare."""
    data = Data()
    weights = torch.where(data.train[1] == 0, 9.0, 1.0)
    balanced = data.loader(data.train, sampler=WeightedRandomSampler(weights, len(weights)))
    callback, model = ResMemCallback(tuner=QUICK), make(CallsSelf)
    trainer(tmp_path, callback).fit(model, balanced, data.val_dataloader())
    assert callback.tuning.balanced.uneven
    assert ", balanced accuracy " in callback.tuning.summary()
    assert callback.memory.params == callback.tuning.params
    trainer(tmp_path, callback).fit(model, datamodule=data)
    assert not callback.tuning.balanced.uneven


class Predicting(Forecaster):
    def predict_step(self, batch, batch_idx):
        return self(batch["x"])


def test_rows_with_times_are_recalled_when_they_were_known(tmp_path):
    """Training windows of all times, test windows in their midst: as a memory for each test window would answer."""
    series = torch.arange(180.0) % 24 / 24 + 0.1 * torch.randn(180)
    rows, test = Windows(series, 6, 3), Windows(series[80:110], 6, 3, start=80)
    params = ResMemParams(k=4, sigma=0.5)
    callback = ResMemCallback(LocalMemory(Regression(), params, "exact"), times_fn=times)
    model, runs = Predicting(6, 3, hidden=8), trainer(tmp_path, callback)
    runs.fit(model, DataLoader(rows, batch_size=64), DataLoader(test))
    routed = torch.cat(runs.predict(model, DataLoader(test, batch_size=8)))
    by_module = torch.cat([callback.module.predictions(batch).resmem for batch in DataLoader(test, batch_size=8)])
    expected = []
    with torch.no_grad():
        keys, outputs = model.body(rows.x), model(rows.x)
        for query, now in zip(test.x, test.asked_at.tolist(), strict=True):
            known = rows.asked_at + 3 <= now
            alone = LocalMemory(Regression(), params)
            alone.add(keys[known], outputs[known], rows.y[known])
            expected.append(alone.predict(model.body(query[None]), model(query[None])))
    torch.testing.assert_close(by_module, torch.cat(expected))
    torch.testing.assert_close(routed, torch.cat(expected))
    gains = (model(test.x).detach() - test.y).square().mean(dim=1) - (by_module - test.y).square().mean(dim=1)
    error = max(gains.std().item() / len(gains) ** 0.5, Groups(test.asked_at.double()).errors(gains[None]).item())
    runs.validate(model, DataLoader(test, batch_size=8), verbose=False)
    trainer(tmp_path).validate(callback.module, DataLoader(test, batch_size=3), verbose=False)
    for seen in (callback.evaluation, *callback.module.evaluations):
        assert seen.gain_error == pytest.approx(error, rel=1e-4)
    with pytest.raises(InputError, match="times_fn"):
        ResMemModule(model, callback.memory).predictions(next(iter(DataLoader(test))))
    again = LocalMemory(Regression())
    memorize(trainer(tmp_path), model, DataLoader(rows, batch_size=64), DataLoader(test), times_fn=times, memory=again)
    assert again.at(0).search(keys[:1], 1).ids.item() == -1
