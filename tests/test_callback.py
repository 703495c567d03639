"""The callback under a real Trainer, on one process."""

import random
import signal
import sys
from collections import Counter

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler
from torchmetrics import BootStrapper, ExplainedVariance, MeanSquaredError, R2Score
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassRecall,
    MultilabelAUROC,
)

from lightning_resmem import (
    EmptyMemoryError,
    GridTuner,
    HeadError,
    InputError,
    LocalMemory,
    RayMemory,
    ResMemCallback,
    ResMemParams,
    ResMemWarning,
    StaleMemoryError,
    StorageError,
)
from lightning_resmem.memory.storage import disk
from lightning_resmem.tasks import TASKS
from tests import oracle
from tests.models import (
    ZOO,
    CallsSelf,
    Data,
    DictBatches,
    LogSoftmax,
    ManyLabels,
    NormAndDropout,
    Numbers,
    Spy,
    Trained,
    data_for,
    hooks_on,
    make,
    memory_for,
    same_weights,
    trainer,
    weights_of,
)

QUICK = GridTuner(k=[5], sigma=[0.3], softmax_temperature=[1.0], strength=[1.0])
every_model = pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)


@pytest.fixture
def root(tmp_path):
    return tmp_path


# -- the main job


@every_model
def test_own_metrics_show_the_combined_prediction(kind, root):
    data, model, callback = data_for(kind), make(kind), ResMemCallback(memory_for(kind))
    train = trainer(root, callback)
    train.fit(model, datamodule=data)
    assert callback.memory.ids.tolist() == list(range(120))
    wanted = Trained(model).scores(data.train, data.test, callback.memory.params)
    assert wanted["base"] != wanted["resmem"]

    name = callback.memory.task.score_name
    (logged,) = train.test(model, datamodule=data, verbose=False)
    assert {part: logged[f"test/{name}_{part}"] for part in wanted} == pytest.approx(wanted, rel=1e-5)
    assert logged["test_score"] == pytest.approx(wanted["resmem"], rel=1e-5)

    wanted = Trained(model).scores(data.train, data.val, callback.memory.params)
    (logged,) = train.validate(model, datamodule=data, verbose=False)
    assert {part: logged[f"val/{name}_{part}"] for part in wanted} == pytest.approx(wanted, rel=1e-5)
    assert logged["val_score"] == pytest.approx(wanted["resmem"], rel=1e-5)

    outputs = torch.cat(train.predict(model, datamodule=data))
    combined = Trained(model).predict(data.train, data.test[0], callback.memory.params)
    if kind.task == "multiclass":  # log-probabilities with the argmax of F
        torch.testing.assert_close(outputs.exp().sum(dim=1), torch.ones(50))
        assert np.array_equal(outputs.argmax(dim=1), combined.resmem.argmax(axis=1))
    elif kind.task == "multilabel":
        np.testing.assert_allclose(outputs.sigmoid(), combined.resmem.clip(1e-4, 1 - 1e-4), atol=1e-5)
    else:
        np.testing.assert_allclose(outputs, combined.resmem, rtol=1e-4, atol=1e-4)
    assert hooks_on(model) == 0


def run_everything(model, data, root, *callbacks, **options):
    """What validate, test and predict show."""
    run = trainer(root, *callbacks, **options)
    scores = run.validate(model, datamodule=data, verbose=False) + run.test(model, datamodule=data, verbose=False)
    return [{name: value for name, value in found.items() if "/" not in name} for found in scores], torch.cat(
        run.predict(model, datamodule=data)
    )


def same_run(left, right):
    return left[0] == right[0] and torch.equal(left[1], right[1])


@every_model
def test_without_the_callback_the_base_is_back_bit_for_bit(kind, root):
    data, plain, model = data_for(kind), make(kind), make(kind)
    torch.manual_seed(1)
    trainer(root).fit(plain, datamodule=data)
    base = run_everything(plain, data, root)

    callback = ResMemCallback(memory_for(kind))
    train = trainer(root, callback)
    torch.manual_seed(1)
    train.fit(model, datamodule=data)
    assert same_weights(weights_of(model), weights_of(plain)), "the callback changed the training"
    combined = run_everything(model, data, root, callback)
    assert not same_run(combined, base)
    assert same_run(run_everything(model, data, root), base)
    assert same_run(run_everything(model, data, root, callback), combined)
    train.callbacks.remove(callback)
    (detached,) = train.test(model, datamodule=data, verbose=False)
    assert detached == base[0][1]


def test_validation_during_fit_shows_the_base(root):
    # The second fit starts with a filled memory.
    data, plain, model = Data(), make(CallsSelf), make(CallsSelf)
    callback = ResMemCallback(memory_for(CallsSelf))
    for _ in range(2):
        seen = []
        for each, callbacks in ((plain, []), (model, [callback])):
            torch.manual_seed(3)
            run = trainer(root, *callbacks, num_sanity_val_steps=2)
            run.fit(each, datamodule=data)
            found = {name: float(value) for name, value in run.callback_metrics.items()}
            seen.append({name: value for name, value in found.items() if not name.startswith("resmem/")})
        assert seen[0] == seen[1]
        assert set(seen[1]) == {"val_score", "val_loss"}


def test_tuned_by_default(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback()
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    assert callback.tuning.rows == 40
    assert callback.tuning.params == callback.memory.params
    (logged,) = run.validate(model, datamodule=data, verbose=False)
    assert logged["val/acc_resmem"] == pytest.approx(callback.tuning.score)
    assert logged["val/acc_base"] == pytest.approx(callback.tuning.base_score)
    assert logged["val/acc_resmem"] > logged["val/acc_base"]
    wanted = Trained(model).scores(data.train, data.test, callback.memory.params)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert {part: logged[f"test/acc_{part}"] for part in wanted} == pytest.approx(wanted)


def test_several_test_dataloaders(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    found = run.test(model, [data.test_dataloader(), data.val_dataloader()], verbose=False)
    for index, part in enumerate((data.test, data.val)):
        wanted = Trained(model).scores(data.train, part, callback.memory.params)
        logged = {name: found[0][f"test/acc_{name}/dataloader_idx_{index}"] for name in wanted}
        assert logged == pytest.approx(wanted)
        assert found[index][f"test_score/dataloader_idx_{index}"] == pytest.approx(wanted["resmem"])


def test_a_step_that_takes_the_labels_out_of_its_batch(root):
    class Pops(DictBatches):
        def evaluate(self, batch, stage):
            labels = batch.pop("labels")
            self.log(f"{stage}_score", self.score(self(batch["x"]), labels), batch_size=len(labels))

    data, model, callback = Data(as_dicts=True), make(Pops), ResMemCallback(memory_for(Pops))
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    with pytest.warns(ResMemWarning, match=r"left out of this run.*targets_fn"):
        (logged,) = run.test(model, datamodule=data, verbose=False)
    wanted = Trained(model).scores(data.train, data.test, callback.memory.params)
    assert logged == {"test_score": pytest.approx(wanted["resmem"])}


def test_unlabelled_rows_can_be_predicted(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    loader = DataLoader(TensorDataset(data.test[0]), batch_size=16)
    outputs = torch.cat(run.predict(model, loader))
    combined = Trained(model).predict(data.train, data.test[0], callback.memory.params).resmem
    assert np.array_equal(outputs.argmax(dim=1), combined.argmax(axis=1))


def test_a_step_that_does_not_run_the_model_is_an_error(root):
    class Lazy(CallsSelf):
        def test_step(self, batch, batch_idx):
            return None

    data, model = Data(), make(Lazy)
    run = trainer(root, ResMemCallback(memory_for(Lazy)))
    run.fit(model, datamodule=data)
    with pytest.raises(HeadError, match="'head' was not called"):
        run.test(model, datamodule=data)
    assert hooks_on(model) == 0


# -- nothing is left behind


class Stumbles(CallsSelf):
    error: BaseException | None = None

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        if self.error is not None and batch_idx == 1:
            raise self.error


def raise_(error):
    raise error


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["test_step", "before", "after"])
def test_no_hook_stays_after_an_exception(error, where, root):
    data, model, callback = Data(), make(Stumbles), ResMemCallback(memory_for(CallsSelf))
    trainer(root, callback).fit(model, datamodule=data)
    base = trainer(root).test(model, datamodule=data, verbose=False)
    spy = Spy("on_test_batch_end", lambda *_: raise_(error))
    if where == "test_step":
        model.error = error
    callbacks = {"test_step": [callback], "before": [spy, callback], "after": [callback, spy]}[where]
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ValueError):
            trainer(root, *callbacks).test(model, datamodule=data, verbose=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert hooks_on(model) == 0
    assert torch._dynamo.eval_frame._stance.stance == "default"
    model.error = None
    assert trainer(root).test(model, datamodule=data, verbose=False) == base
    (logged,) = trainer(root, callback).test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == pytest.approx(logged["test/acc_resmem"])


def test_the_wrong_weights_are_refused_and_leave_no_hook(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    with torch.no_grad():
        model.body[0].weight[0, 0] += 1e-6
    before = weights_of(model)
    for call in (run.test, run.validate, run.predict):
        with pytest.raises(StaleMemoryError, match=rf"^trainer\.{call.__name__} runs .*memorize\(trainer, model"):
            call(model, datamodule=data)
    with pytest.raises(StaleMemoryError):
        _ = callback.module
    assert hooks_on(model) == 0
    assert same_weights(weights_of(model), before)


# -- the memory pass


class Counted(Dataset):
    """Counts how often each row is read, and adds noise to it while it is augmented."""

    def __init__(self, part, augment=False):
        self.part, self.augment, self.reads = part, augment, Counter()

    def __len__(self):
        return len(self.part[0])

    def __getitem__(self, row):
        self.reads[row] += 1
        x = self.part[0][row]
        return (x + torch.randn(x.shape) if self.augment else x), self.part[1][row]


EVEN = list(range(0, 120, 2))


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({}, range(120)),
        ({"shuffle": True, "drop_last": True}, range(120)),
        ({"sampler": SubsetRandomSampler(EVEN)}, EVEN),
        ({"sampler": WeightedRandomSampler([1.0] * 120, 30)}, range(120)),
        ({"batch_size": 1000}, range(120)),
    ],
    ids=["plain", "shuffled", "subset", "weighted", "one batch"],
)
def test_one_pass_reads_each_training_row_once(options, ids, augment, root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    dataset, reads, filled = Counted(data.train, augment), [], []
    loader = DataLoader(dataset, **({"batch_size": 16} | options))
    run = trainer(
        root,
        Spy("on_train_end", lambda *_: reads.append(dataset.reads.copy())),
        callback,
        max_epochs=2,
    )
    add = callback.memory.add
    callback.memory.add = lambda *chunk: filled.append(chunk[3]) or add(*chunk)
    run.fit(model, loader, data.val_dataloader())
    # One pass for two epochs: every row once, after a look at the first two to know how much memory it will take.
    assert dataset.reads - reads[0] == Counter(ids) + Counter(list(ids)[:2])
    assert torch.cat(filled).tolist() == list(ids)
    assert callback.memory.ids.tolist() == list(ids)
    if not augment:
        wanted = Trained(model).scores(data.train, data.test, callback.memory.params, ids)
        (logged,) = run.test(model, datamodule=data, verbose=False)
        assert {part: logged[f"test/acc_{part}"] for part in wanted} == pytest.approx(wanted)


def test_memory_dataloader_replaces_the_training_rows(root):
    data, model = Data(), make(CallsSelf)
    callback = ResMemCallback(memory_for(CallsSelf), memory_dataloader=data.loader(data.train))
    noisy = DataLoader(Counted(data.train, augment=True), batch_size=16, shuffle=True)
    # What limits training does not limit the rows that were given for the memory.
    run = trainer(root, callback, limit_train_batches=2)
    run.fit(model, noisy)
    wanted = Trained(model).scores(data.train, data.test, callback.memory.params)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert {part: logged[f"test/acc_{part}"] for part in wanted} == pytest.approx(wanted)


def test_modes_and_stage_are_as_they_were(root):
    class Frozen(NormAndDropout):
        def on_train_epoch_start(self):
            self.body[1].eval()

    seen = []

    def look(run, model):
        stage = (run.state.stage, run.training, run.state.fn, torch.is_grad_enabled())
        seen.append((stage, [m.training for m in model.modules()], weights_of(model), torch.get_rng_state()))

    data, model = Data(), make(Frozen)
    run = trainer(root, Spy("on_train_end", look), ResMemCallback(memory_for(CallsSelf)))
    run.fit(model, datamodule=data)
    # `LightningModule.on_train_end` runs after all callbacks.
    model = make(Frozen)
    model.on_train_end = lambda: look(run, model)
    run = trainer(root, Spy("on_train_end", look), ResMemCallback(memory_for(CallsSelf)))
    seen.clear()
    run.fit(model, datamodule=data)
    before, after = seen
    assert before[0] == after[0] == (RunningStage.TRAINING, True, "fit", True)
    assert before[1] == after[1]
    assert set(before[1]) == {True, False}, "BatchNorm is frozen, dropout is not"
    assert same_weights(before[2], after[2]), "a buffer changed in the pass"
    assert torch.equal(before[3], after[3]), "the pass drew random numbers"
    assert hooks_on(model) == 0


@pytest.mark.parametrize("rounds", ["one trainer", "two trainers"])
def test_fit_twice_trains_as_without_the_callback(rounds, root):
    data, plain, model = Data(), make(NormAndDropout), make(NormAndDropout)
    callback = ResMemCallback(memory_for(CallsSelf))
    states = []
    for each, callbacks in ((plain, []), (model, [callback])):
        torch.manual_seed(7)
        run = trainer(root, *callbacks)
        # Random numbers are drawn by the rows, too.
        run.fit(each, DataLoader(Counted(data.train, augment=True), batch_size=16, shuffle=True), data.val_dataloader())
        if rounds == "two trainers":
            run = trainer(root, *callbacks)
        else:
            run.fit_loop.max_epochs = 3
        run.fit(each, DataLoader(Counted(data.train, augment=True), batch_size=16, shuffle=True), data.val_dataloader())
        states.append((weights_of(each), torch.get_rng_state(), random.getstate()))
    assert same_weights(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]
    (logged,) = trainer(root, callback).test(model, datamodule=data, verbose=False)  # and not a stale memory
    assert logged["test_score"] == logged["test/acc_resmem"]


def test_transfer_hooks_are_asked_as_in_evaluation(root):
    class Augments(Data):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] + torch.randn_like(batch[0]) if self.trainer.training else batch[0] / 4), batch[1]

    data, model, callback = Augments(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    train, test = ((part[0] / 2, part[1]) for part in (data.train, data.test))
    wanted = Trained(model).scores(train, test, callback.memory.params)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert {part: logged[f"test/acc_{part}"] for part in wanted} == pytest.approx(wanted)


# -- the trainer's settings


@pytest.mark.parametrize(
    ("options", "ids", "tuned"),
    [
        ({"fast_dev_run": True}, range(16), 16),
        ({"fast_dev_run": 2}, range(32), 32),
        ({"limit_train_batches": 3}, range(48), 40),
        ({"limit_train_batches": 0.5}, range(48), 40),
        ({"limit_train_batches": 1}, range(16), 40),
        ({"limit_train_batches": 1.0}, range(120), 40),
        ({"overfit_batches": 2}, range(32), 32),
        ({"limit_val_batches": 0}, range(120), 120),  # rows of the memory, each left out of it
        ({"limit_val_batches": 1}, range(120), 16),
        ({"limit_val_batches": 0.7}, range(120), 32),
        ({"num_sanity_val_steps": 1}, range(120), 40),
        ({"max_steps": 2}, range(120), 40),
        ({"enable_progress_bar": True}, range(120), 40),
        ({"accumulate_grad_batches": 2, "val_check_interval": 0.5}, range(120), 40),
        ({"barebones": True}, range(120), 40),
        ({"inference_mode": False}, range(120), 40),
        ({"use_distributed_sampler": False}, range(120), 40),
    ],
    ids=str,
)
def test_trainer_options(options, ids, tuned, root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(tuner=QUICK)
    if "barebones" in options:
        run = L.Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=[callback], default_root_dir=root)
    else:
        run = trainer(root, callback, **options)
    run.fit(model, datamodule=data)
    if "overfit_batches" in options:
        # The trainer itself overfits and validates on the first rows, in their order.
        assert len(run.train_dataloader) == 7
    assert callback.memory.ids.tolist() == list(ids)
    assert callback.tuning.rows == tuned
    assert not list(root.iterdir()), "something was saved"
    (logged,) = trainer(root, callback).test(model, datamodule=data, verbose=False)
    wanted = Trained(model).scores(data.train, data.test, callback.memory.params, ids)
    assert {part: logged[f"test/acc_{part}"] for part in wanted} == pytest.approx(wanted)
    run.test(model, datamodule=data, verbose=False)


def test_no_validation_loader(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(tuner=QUICK)
    run = trainer(root, callback)
    run.fit(model, data.train_dataloader())
    assert callback.tuning == QUICK.tune_leave_one_out(callback.memory)
    assert callback.memory.params == callback.tuning.params
    assert len(callback.memory) == 120
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == logged["test/acc_resmem"]


def test_rich_progress_bar(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(tuner=QUICK)
    run = trainer(root, RichProgressBar(), callback, enable_progress_bar=True)
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    assert len(callback.memory) == 120


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("kind", [CallsSelf, LogSoftmax])
def test_precision(precision, kind, root):
    data, model, callback = Data(), make(kind), ResMemCallback(memory_for(kind))
    run = trainer(root, callback, precision=precision)
    run.fit(model, datamodule=data)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == pytest.approx(logged["test/acc_resmem"])
    assert len(callback.memory) == 120

    # What the head sees under this precision, from the trainer itself; the arithmetic after it is in float32.
    seen = []
    hook = model.head.register_forward_hook(lambda _, args, out: seen.append((args[0].double(), out.double())))
    run.callbacks.remove(callback)
    for part in (data.train, data.test):
        run.predict(model, data.loader(part))
    hook.remove()
    keys, outputs = (torch.cat(column).numpy() for column in zip(*seen, strict=True))
    wanted = oracle.predict(
        keys[:120], outputs[:120], data.train[1], keys[120:], outputs[120:], k=5, sigma=0.2, task=kind.task
    )
    assert logged["test/acc_resmem"] == pytest.approx((wanted.resmem.argmax(axis=1) == data.test[1].numpy()).mean())
    assert logged["test/acc_knn"] == pytest.approx((wanted.knn.argmax(axis=1) == data.test[1].numpy()).mean())
    # Predictions, not only whether they are right.
    run.callbacks.append(callback)
    found = torch.cat(run.predict(model, datamodule=data)).double()
    expected = oracle.log_predictions(wanted.resmem, wanted.base)
    exact = precision == "64-true"
    np.testing.assert_allclose(found, expected, atol=1e-5 if exact else 1e-3 if kind is CallsSelf else 0.1)


# -- no training, no memory


def test_no_training_batches(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback()
    run = trainer(root, callback, limit_train_batches=0)
    with pytest.warns(ResMemWarning, match=r"no training took place.*memorize\(trainer, model, dataloader\)"):
        run.fit(model, datamodule=data)
    with pytest.raises(EmptyMemoryError, match=r"after trainer\.fit"):
        _ = callback.module


def test_test_before_fit_warns_and_shows_the_base(root):
    data, model = Data(), make(CallsSelf)
    base = trainer(root).test(model, datamodule=data, verbose=False)
    with pytest.warns(ResMemWarning, match=r"no memory yet.*trainer\.fit"):
        assert trainer(root, ResMemCallback()).test(model, datamodule=data, verbose=False) == base


def test_resuming_a_finished_training_keeps_the_memory(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    run.save_checkpoint(root / "last.ckpt")
    before = callback.memory.ids
    again = trainer(root, callback)
    again.fit(model, datamodule=data, ckpt_path=root / "last.ckpt", weights_only=False)
    assert torch.equal(callback.memory.ids, before)
    (logged,) = again.test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == logged["test/acc_resmem"]
    with pytest.warns(ResMemWarning, match="no training took place"):
        trainer(root, ResMemCallback(tuner=QUICK)).fit(
            make(CallsSelf), datamodule=data, ckpt_path=root / "last.ckpt", weights_only=False
        )


def test_predict_only_with_a_loaded_memory(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf), dirpath=root / "memory")
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    expected = run_everything(model, data, root, callback)
    loaded = ResMemCallback(LocalMemory.load(root / "memory"))
    assert same_run(run_everything(model, data, root, loaded), expected)
    resmem = loaded.module
    assert torch.equal(torch.cat(trainer(root).predict(resmem, datamodule=data)).argmax(1), expected[1].argmax(1))


def test_a_memory_filled_by_hand_needs_the_head(root):
    data, model = Data(), make(CallsSelf)
    keys, outputs = Trained(model)(data.train[0])
    hidden = model.body[0](data.train[0]).detach()

    def by_hand(embeddings):
        memory = memory_for(CallsSelf)
        memory.add(embeddings, outputs, data.train[1])
        return memory

    with pytest.raises(InputError, match=r'head="head"'):
        trainer(root, ResMemCallback(by_hand(keys))).test(model, datamodule=data)
    wanted = Trained(model).scores(data.train, data.test, memory_for(CallsSelf).params)
    memory = by_hand(keys)
    (logged,) = trainer(root, ResMemCallback(memory, head="head")).test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == pytest.approx(wanted["resmem"])
    memory.add(keys[:1], outputs[:1], data.train[1][:1])  # it was built in inference mode, and still grows
    memory.build()
    assert len(memory) == 121

    wanted = oracle.predict(
        hidden, outputs, data.train[1], model.body[0](data.test[0]).detach(), Trained(model)(data.test[0])[1], 5, 0.2
    )
    callback = ResMemCallback(by_hand(hidden), head="head", embedding="body.0")
    (logged,) = trainer(root, callback).test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == pytest.approx((wanted.resmem.argmax(1) == data.test[1].numpy()).mean())


# -- which weights


@pytest.mark.parametrize(
    "averaging",
    [
        lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: WeightAveraging(),
    ],
    ids=["swa", "ema", "average"],
)
def test_averaged_weights_are_memorized(averaging, root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback, averaging(), max_epochs=3)
    raw = []
    run.callbacks.insert(0, Spy("on_train_end", lambda _, module: raw.append(weights_of(module))))
    run.fit(model, datamodule=data)
    assert not same_weights(raw[0], weights_of(model)), "nothing was swapped"
    wanted = Trained(model).scores(data.train, data.test, callback.memory.params)
    (logged,) = trainer(root, callback).test(model, datamodule=data, verbose=False)
    assert {part: logged[f"test/acc_{part}"] for part in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    "stop",
    [
        lambda: EarlyStopping("val_loss", stopping_threshold=1e9),
        lambda: Timer(duration={"milliseconds": 50}),
    ],
    ids=["early stopping", "timer"],
)
def test_training_that_stops_early_is_memorized(stop, root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback, stop(), max_epochs=100_000)  # hours, if nothing stopped it
    run.fit(model, datamodule=data)
    assert 0 < run.global_step < 100_000
    assert len(callback.memory) == 120
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert logged["test/acc_resmem"] == pytest.approx(
        Trained(model).scores(data.train, data.test, callback.memory.params)["resmem"]
    )


# -- several callbacks


def test_several_callbacks(root):
    data, model = Data(), make(CallsSelf)
    wide = LocalMemory(params=ResMemParams(k=100, sigma=1.0))
    routed, looking = ResMemCallback(memory_for(CallsSelf)), ResMemCallback(wide, name="wide", route=False)
    for callbacks in ([routed, looking], [looking, routed]):
        run = trainer(root, *callbacks)
        run.fit(model, datamodule=data)
        (logged,) = run.test(model, datamodule=data, verbose=False)
        near = Trained(model).scores(data.train, data.test, routed.memory.params)
        far = Trained(model).scores(data.train, data.test, wide.params)
        assert near["resmem"] != far["resmem"]
        assert {part: logged[f"test/acc_{part}"] for part in near} == pytest.approx(near)
        assert {part: logged[f"test/wide/acc_{part}"] for part in far} == pytest.approx(far)
        assert logged["test_score"] == pytest.approx(near["resmem"])
        assert hooks_on(model) == 0
        assert torch._dynamo.eval_frame._stance.stance == "default"


def test_two_that_route_are_refused(root):
    run = trainer(root, ResMemCallback(), ResMemCallback(name="other"))
    with pytest.raises(InputError, match="route=False"):
        run.fit(make(CallsSelf), datamodule=Data())
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(root, ResMemCallback(), ResMemCallback(route=False))


class Mine(ResMemCallback):
    """Another class, so that the Trainer takes one with the same name beside it."""


def test_two_callbacks_of_one_name_are_refused_before_training(root):
    run = trainer(root, ResMemCallback(), Mine(route=False))
    with pytest.raises(InputError, match=r"A ResMemCallback and a Mine .* both have name='resmem'.*name=\"\.\.\.\""):
        run.fit(make(CallsSelf), datamodule=Data())
    assert run.global_step == 0
    run = trainer(root, ResMemCallback(name="a"))
    run.callbacks.append(ResMemCallback(name="a", route=False))
    with pytest.raises(InputError, match="name='a'"):
        run.test(make(CallsSelf), datamodule=Data())
    trainer(root, ResMemCallback(tuner=None), Mine(tuner=None, route=False, name="mine")).fit(make(CallsSelf), Data())


def test_state_keys_and_default_directories_differ_by_name(root):
    first = ResMemCallback(memory_for(CallsSelf))
    second = ResMemCallback(memory_for(CallsSelf), name="second", route=False)
    run = trainer(root, first, second, enable_checkpointing=True)
    run.fit(make(CallsSelf), datamodule=Data())
    assert (root / "second" / "manifest.json").is_file()
    run.save_checkpoint(root / "model.ckpt")
    state = torch.load(root / "model.ckpt", weights_only=True)["callbacks"]
    assert state[first.state_key] == {"directory": str(root / "resmem")}
    assert state[second.state_key] == {"directory": str(root / "second")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": 3}, "memory is a int"),
        ({"tuner": "grid"}, "tuner='grid'"),
        ({"weights": "worst"}, "weights='worst'"),
        ({"name": ""}, "name=''"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": ".."}, r"name='\.\.'"),
        ({"targets_fn": 1}, "targets_fn=1"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        ResMemCallback(**arguments)


# -- what would fail after training fails before it


class Counting(CallsSelf):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


class CountingNaN(Counting):
    def forward(self, x):
        return self.head(self.body(x) * torch.nan)


class Own(Sampler):
    def __iter__(self):
        return iter([5, 6, 7])

    def __len__(self):
        return 3


def with_targets(change):
    data = Data()
    data.train = (data.train[0], change(data.train[1]))
    return data


def with_loader(make_loader):
    data = Data()
    data.train_dataloader = lambda: make_loader(data)
    return data


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (CountingNaN, Data, {}, InputError, "NaN"),
        (Counting, lambda: with_targets(lambda y: y + 4), {}, InputError, r"outside \[0, 4\)"),
        (Counting, lambda: with_targets(lambda y: y.float()), {}, InputError, "float32.*task=Regression"),
        (Counting, Data, {"head": "fc"}, HeadError, "head='fc' is not a module"),
        (Counting, Data, {"head": "body.1", "embedding": "nope"}, HeadError, "embedding='nope'"),
        (Counting, lambda: Data(as_dicts=True), {"targets_fn": lambda batch: batch["z"]}, InputError, "targets_fn.*z"),
        (
            Counting,
            lambda: with_loader(lambda d: DataLoader(TensorDataset(*d.train, d.train[1]), batch_size=4)),
            {},
            InputError,
            "forward_fn=lambda model, batch",
        ),
        (
            Counting,
            lambda: with_loader(lambda d: DataLoader(TensorDataset(*d.train), batch_size=4, sampler=Own())),
            {},
            InputError,
            "Own draws 3.*memory_dataloader",
        ),
    ],
    ids=["nan", "range", "float", "head", "embedding", "targets_fn", "triples", "sampler"],
)
def test_fails_before_the_first_step(model, data, options, error, message, root):
    model = model()
    before = weights_of(model)
    with pytest.raises(error, match=message):
        trainer(root, ResMemCallback(**options)).fit(model, datamodule=data())
    assert model.steps == 0
    assert hooks_on(model) == 0
    assert all(module.training for module in model.modules())
    assert same_weights(weights_of(model), before)


def test_weights_best_without_a_checkpoint_fails_before_training(root):
    model = Counting()
    run = trainer(root, ResMemCallback(weights="best"), enable_checkpointing=False)
    with pytest.raises(InputError, match="ModelCheckpoint with a monitor"):
        run.fit(model, datamodule=Data())
    assert model.steps == 0


def test_a_failure_in_the_pass_names_the_rows_and_leaves_the_model(root):
    data, model, seen = Data(), make(NormAndDropout), []
    data.train[0][[70, 75]] = 99
    model.forward = lambda x: model.head(model.body(x.where(x != 99, 0 if model.training else torch.nan)))
    callback = ResMemCallback(tuner=QUICK)
    run = trainer(root, callback)

    class Look(Callback):
        def on_exception(self, trainer, module, exception):
            seen.extend([trainer.state.stage, module.training])

    run.callbacks.append(Look())
    with pytest.raises(InputError, match="rows 70, 75"):
        run.fit(model, datamodule=data)
    assert seen == [RunningStage.TRAINING, True]
    assert len(callback.memory) == 0
    assert hooks_on(model) == 0
    assert all(module.training for module in model.modules())
    assert torch.isfinite(model.head.weight).all()
    with pytest.warns(ResMemWarning, match="no memory yet"):
        trainer(root, callback).test(model, datamodule=data, verbose=False)


class AsWideAsItsHead(CallsSelf):
    """Its outputs cannot be told from its hidden layer's if both are NaN."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 4)


@pytest.mark.parametrize("kind", [CallsSelf, AsWideAsItsHead, LogSoftmax, Numbers], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("head", [None, "head"])
def test_a_training_that_diverged_is_blamed_for_it(kind, head, root):
    model, callback = make(kind), ResMemCallback(LocalMemory(TASKS[kind.task]()), head=head)
    model.lr = 1e30
    with pytest.raises(
        InputError, match=r"NaN or infinite in all of the 2 rows.* diverged: lower the learning"
    ) as caught:
        trainer(root, callback, limit_val_batches=0).fit(model, datamodule=data_for(kind))
    assert "nothing was memorized" in " ".join(caught.value.__notes__)
    assert not model.head.weight.isfinite().all()
    assert len(callback.memory) == 0
    assert hooks_on(model) == 0


def test_lr_find_goes_along(root):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    run = trainer(root, callback)
    Tuner(run).lr_find(model, datamodule=data, num_training=5)
    run.fit(model, datamodule=data)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == logged["test/acc_resmem"]


# -- told before training


def steps_before(error, callback, root, match, kind=CallsSelf):
    """Fit, expecting an error, and return how many training steps there were."""
    model, steps = make(kind), []
    step = model.training_step
    model.training_step = lambda *args: steps.append(1) or step(*args)
    with pytest.raises(error, match=match):
        trainer(root, callback).fit(model, datamodule=data_for(kind))
    return len(steps)


def test_a_directory_that_cannot_be_saved_to_is_refused_before_training(root):
    (root / "file").write_text("not a directory")
    (root / "mine").mkdir()
    (root / "mine" / "thesis.tex").write_text("years of work")
    for dirpath, match in (("mine", "not a saved memory"), ("file", "not a saved memory"), ("file/x", "not a dir")):
        callback = ResMemCallback(memory_for(CallsSelf), dirpath=root / dirpath)
        assert steps_before(StorageError, callback, root, match) == 0
    assert (root / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "dirpath",
    ["/proc/memory", "/proc/some/where", f"{{root}}/{'n' * 300}", f"{{root}}/{'n' * 300}/memory"],
    ids=["proc", "in proc", "long", "in long"],
)
def test_what_only_the_system_refuses_to_make_is_refused_before_training(root, dirpath):
    callback = ResMemCallback(memory_for(CallsSelf), dirpath=dirpath.format(root=root))
    assert steps_before(StorageError, callback, root, "Name another directory") == 0
    assert list(root.iterdir()) == []


def test_looking_whether_a_directory_can_be_made_leaves_nothing(root):
    disk.try_target(root / "some" / "where" / "memory")
    assert list(root.iterdir()) == []


def test_a_head_that_is_not_the_last_layer_is_refused_before_training(root):
    assert (
        steps_before(
            HeadError, ResMemCallback(head="body"), root, "head='body' makes outputs of width 5 .* head='head'"
        )
        == 0
    )


def test_a_function_that_fails_for_the_first_row_alone_does_so_before_training(root):
    first = Data().train[0][0]

    def targets_fn(batch):
        if batch[0].eq(first).all(dim=1).any():
            raise KeyError("no label")
        return batch[1]

    callback = ResMemCallback(memory_for(CallsSelf), targets_fn=targets_fn)
    assert steps_before(InputError, callback, root, "targets_fn failed .*KeyError: 'no label'") == 0


@pytest.mark.parametrize("loader", ["x", 3, torch.zeros(3)])
def test_what_is_no_loader_is_refused_before_training(root, loader):
    assert steps_before(InputError, ResMemCallback(memory_dataloader=loader), root, "is not a loader of batches") == 0


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("IVF121,Flat", "'IVF121,Flat' has 121 lists, .* only 120 rows"),
        ("PQ7", "'PQ7' cannot be built for keys of width"),
        ("PQ5", "'PQ5' cannot be trained on 120 keys"),
        ("IVF4,PQ5", "'IVF4,PQ5' cannot be trained on 120 keys"),
        ("IDMap,Flat", "'IDMap,Flat' keeps ids of its own"),
        ("IDMap2,HNSW8", "'IDMap2,HNSW8' keeps ids of its own"),
    ],
)
@pytest.mark.parametrize("kind", [LocalMemory, RayMemory])
def test_an_index_that_cannot_be_built_is_refused_before_training(root, kind, index, match):
    assert steps_before(InputError, ResMemCallback(kind(index=index)), root, match) == 0


def test_an_address_where_no_cluster_answers_is_refused_before_training(root):
    callback = ResMemCallback(RayMemory(address="127.0.0.1:1"))
    assert steps_before(InputError, callback, root, "address='127.0.0.1:1': no Ray cluster can be joined there") == 0


def test_rows_that_a_limit_leaves_out_train_no_index(root):
    callback = ResMemCallback(LocalMemory(index="IVF40,Flat"))
    with pytest.raises(InputError, match="only 32 rows"):
        trainer(root, callback, limit_train_batches=2).fit(make(CallsSelf), datamodule=Data())


def test_without_faiss_an_index_of_its_kind_is_refused_before_training(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    callback = ResMemCallback(LocalMemory(index="HNSW8"))
    assert steps_before(InputError, callback, root, r"lightning-resmem\[cpu\]") == 0


def test_a_dataset_is_no_loader(root):
    data = torch.utils.data.TensorDataset(torch.zeros(3, 4))
    assert steps_before(InputError, ResMemCallback(memory_dataloader=data), root, "DataLoader") == 0


@pytest.mark.parametrize(
    "bad", [{"name": -1}, {"name": ""}, {"route": "x"}, {"route": None}, {"dirpath": -1}, {"dirpath": ""}]
)
def test_bad_arguments_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        ResMemCallback(**bad)


CLASS_METRICS = [MeanSquaredError, lambda: MulticlassF1Score(7), BinaryAUROC, lambda: MulticlassRecall(4, average=None)]


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        *((CallsSelf, metric) for metric in CLASS_METRICS),
        (ManyLabels, lambda: MultilabelAUROC(7)),
        (ManyLabels, lambda: MultilabelAUROC(4, average=None)),
        (Numbers, lambda: R2Score(multioutput="raw_values")),
        (Numbers, lambda: MulticlassF1Score(2)),
    ],
)
def test_an_objective_that_does_not_fit_is_refused_before_training(root, kind, objective):
    callback = ResMemCallback(LocalMemory(TASKS[kind.task]()), tuner=GridTuner(objective=objective()))
    assert steps_before(InputError, callback, root, "objective=.*(does not take pred|needs one number)", kind) == 0


@pytest.mark.parametrize(
    ("kind", "metric"),
    [*((CallsSelf, metric) for metric in CLASS_METRICS[:2]), (ManyLabels, lambda: MultilabelAUROC(7))],
)
def test_own_metrics_that_do_not_fit_are_refused_before_training(root, kind, metric):
    callback = ResMemCallback(memory_for(kind), metrics={"mine": metric()})
    assert steps_before((ValueError, RuntimeError), callback, root, ".", kind) == 0


@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        (CallsSelf, lambda: MulticlassAUROC(4)),
        (CallsSelf, lambda: WantsEveryClass(4)),
        (ManyLabels, lambda: MultilabelAUROC(4)),
        (Numbers, lambda: R2Score()),
        (Numbers, lambda: ExplainedVariance()),
    ],
)
@pytest.mark.filterwarnings("ignore:ResMem tuning", "error:No (positive|negative) samples")
def test_metrics_that_want_more_than_two_rows_are_let_through(root, kind, metric):
    own = LocalMemory(TASKS[kind.task]())
    callback = ResMemCallback(own, tuner=GridTuner(k=[5], sigma=[0.3], objective=metric()), metrics={"mine": metric()})
    run, model, data = trainer(root, callback), make(kind), data_for(kind)
    run.fit(model, datamodule=data)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert callback.tuning.objective == type(metric()).__name__
    assert np.isfinite(logged["test/mine_resmem"])


class WantsEveryClass(MulticlassAccuracy):
    def compute(self):
        if not (self.tp + self.fn).all():
            raise ValueError("a class has no rows")
        return super().compute()


def test_metrics_that_draw_random_numbers_leave_the_training_as_it_was(root):
    data, plain, model = Data(), make(NormAndDropout), make(NormAndDropout)
    own = BootStrapper(MulticlassAccuracy(4), num_bootstraps=2)
    for module, callbacks in ((plain, []), (model, [ResMemCallback(memory_for(CallsSelf), metrics={"mine": own})])):
        torch.manual_seed(1)
        trainer(root, *callbacks).fit(module, datamodule=data)
    assert same_weights(weights_of(plain), weights_of(model))


@pytest.mark.parametrize(
    ("kind", "name"), [(CallsSelf, "acc"), (CallsSelf, "nll"), (ManyLabels, "exact"), (Numbers, "r2")]
)
def test_names_of_own_metrics_that_are_taken_are_refused(kind, name):
    with pytest.raises(InputError, match=f"metrics has the name '{name}'"):
        ResMemCallback(memory_for(kind), metrics={name: MulticlassAccuracy(4)})
    ResMemCallback(memory_for(kind), metrics={f"my_{name}": MulticlassAccuracy(4)})


def test_an_error_in_the_pass_says_what_is_left(root):
    class Breaks(CallsSelf):
        def forward(self, x):
            if not self.training and len(x) > 2:  # not in the rehearsal
                raise ValueError("broken")
            return super().forward(x)

    with pytest.raises(ValueError, match="broken") as caught:
        trainer(root, ResMemCallback(memory_for(CallsSelf)), limit_val_batches=0).fit(make(Breaks), datamodule=Data())
    notes = " ".join(caught.value.__notes__)
    assert "memorize(trainer, model, dataloader)" in notes
    assert "forward_fn" in notes
