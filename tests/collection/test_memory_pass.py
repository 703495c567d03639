"""The memory pass: what is read, what is kept, and what is left behind when it fails."""

import functools
import math
import signal
from collections import Counter

import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from lightning_resmem import HeadError, InputError, LocalMemory, Multiclass, ResMemCallback, ResMemParams, memorize
from lightning_resmem.collection.loaders import plan
from lightning_resmem.collection.memory_pass import Pass
from lightning_resmem.model.batches import BatchReader
from tests.memory.test_exchange import Peak
from tests.models import CallsSelf, Data, NormAndDropout, Trained, hooks_on, make, memory_for, side_by_side, trainer


def nearest() -> LocalMemory:
    return LocalMemory(params=ResMemParams(k=1, sigma=1.0))


def holds(memory, model, inputs, targets, ids=None):
    """Whether the memory holds exactly these rows under these ids (in order, by default)."""
    ids = torch.arange(len(inputs)) if ids is None else torch.as_tensor(ids)
    found = memory.search(Trained(model)(inputs)[0], 1)
    same_rows = torch.equal(found.ids[:, 0], ids) and float(found.distances.max()) < 1e-5
    labels = memory.fetch(ids).label_sum(torch.arange(len(ids))[:, None], torch.ones(len(ids), 1))
    return len(memory) == len(inputs) and same_rows and torch.equal(labels.argmax(dim=1), targets)


class Stream(IterableDataset):
    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __iter__(self):
        return iter(zip(self.inputs, self.targets, strict=True))


class Batches(Dataset):
    """Items are batches."""

    def __init__(self, inputs, targets):
        self.parts = list(zip(inputs.split(50), targets.split(50), strict=True))

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, item):
        return self.parts[item]


LOADERS = {
    "plain": lambda rows: DataLoader(rows, batch_size=16),
    "last row alone": lambda rows: DataLoader(rows, batch_size=17),
    "shuffled": lambda rows: DataLoader(rows, batch_size=16, shuffle=True, drop_last=True),
    "batch sampler": lambda rows: DataLoader(rows, batch_sampler=BatchSampler(SequentialSampler(rows), 13, True)),
    "generator": lambda rows: DataLoader(rows, 16, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "stream": lambda rows: DataLoader(Stream(*rows.tensors), batch_size=16),
    "batches": lambda rows: DataLoader(Batches(*rows.tensors), batch_size=None),
    "list of batches": lambda rows: list(zip(rows.tensors[0].split(50), rows.tensors[1].split(50), strict=True)),
    "dict": lambda rows: {"a": DataLoader(rows, batch_size=16)},
    "workers": lambda rows: DataLoader(rows, batch_size=64, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_row_once_whatever_the_loader(kind, tmp_path):
    data, model = Data(), make(CallsSelf)
    loader = LOADERS[kind](TensorDataset(*data.train))
    if kind == "list of batches":  # a list is a list of loaders to Lightning
        loader = _Iterable(loader)
    limit = {"limit_batches": math.inf} if kind == "stream" else {}
    resmem = memorize(trainer(tmp_path), model, loader, memory=nearest(), **limit)
    assert holds(resmem.memory, model, *data.train)


class _Iterable:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_training_and_held_out_rows_after_training(tmp_path):
    data, model = Data(), make(CallsSelf)
    callback = ResMemCallback(nearest(), memory_dataloader=[data.loader(data.train), data.loader(data.val)])
    trainer(tmp_path, callback).fit(model, data.loader(data.train, shuffle=True))
    assert callback.memory.ids.tolist() == list(range(160))
    held = callback.memory.fetch(callback.memory.ids).targets
    assert held.tolist() == [*data.train[1].tolist(), *data.val[1].tolist()]


def test_two_loaders_are_one_memory(tmp_path):
    data, model = Data(), make(CallsSelf)
    loaders = {"a": data.loader(data.train, shuffle=True), "b": data.loader(data.val, batch_size=3)}
    resmem = memorize(trainer(tmp_path), model, loaders, memory=nearest())
    inputs, targets = (torch.cat(column) for column in zip(data.train, data.val, strict=True))
    keys, outputs = Trained(model)(inputs)
    assert resmem.memory.ids.tolist() == list(range(160))
    expected = nearest()
    expected.add(keys, outputs, targets)
    found = resmem.memory.predict(keys, outputs)
    torch.testing.assert_close(found, expected.predict(keys, outputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("loader", ["stream", "generator"])
def test_in_fit(loader, tmp_path):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(nearest())
    trainer(tmp_path, callback).fit(model, LOADERS[loader](TensorDataset(*data.train)))
    assert holds(callback.memory, model, *data.train)


def test_more_rows_than_one_chunk_holds(tmp_path):
    class Wide(CallsSelf):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 20000))
            self.head = nn.Linear(20000, 4)

    data, model = Data(), make(Wide)
    resmem = memorize(trainer(tmp_path), model, data.loader(data.train, batch_size=7), memory=nearest())
    assert holds(resmem.memory, model, *data.train)


def test_outputs_that_the_model_changes_in_place_are_memorized_as_the_head_gave_them(tmp_path):
    class UsesAgain(CallsSelf):
        def forward(self, x):
            hidden = self.body(x)
            outputs = self.head(hidden)
            returned = outputs.clone()
            if not self.training:
                hidden.fill_(1.0)
                outputs.mul_(7.0)
            return returned

    data, model = Data(), make(UsesAgain)
    resmem = memorize(trainer(tmp_path), model, data, memory=memory_for(CallsSelf), head="head")
    wanted = Trained(model).scores(data.train, data.test, resmem.memory.params)
    (logged,) = trainer(tmp_path).test(resmem, datamodule=data, verbose=False)
    assert side_by_side(logged) == {f"test/acc_{name}": pytest.approx(value) for name, value in wanted.items()}
    wanted = Trained(model).predict(data.train, data.test[0], resmem.memory.params)
    found = torch.cat(trainer(tmp_path).predict(resmem, datamodule=data)).numpy()
    assert found == pytest.approx(wanted.resmem, abs=1e-5)


def test_the_memory_can_be_changed_afterwards(tmp_path):
    # The trainer's loops run in inference mode, whose tensors could not.
    data, model = Data(), make(CallsSelf)
    memory = memorize(trainer(tmp_path), model, data, memory=nearest()).memory
    memory.add(torch.zeros(1, 5), torch.zeros(1, 4), torch.tensor([0]))
    memory.remove(torch.arange(100))
    memory.build()
    assert memory.ids.tolist() == list(range(100, 121))


def test_state_during_the_pass(tmp_path):
    seen = []

    class Looks(NormAndDropout):
        def forward(self, x):
            state = self.trainer.state
            seen.append((state.stage, self.training, self.body[3].training, torch.is_grad_enabled()))
            return super().forward(x)

    model, callback = make(Looks), ResMemCallback(nearest())
    run = trainer(tmp_path, callback)
    model.on_train_end = lambda: seen.append("end")
    run.fit(model, Data().train_dataloader())
    states = Counter(seen)
    assert set(states) == {
        (RunningStage.TRAINING, True, True, True),
        (RunningStage.PREDICTING, False, False, False),
        (RunningStage.PREDICTING, False, False, True),
        "end",
    }
    # Both rehearsals of the training rows look for what follows the head, before the first step, and no pass does.
    assert states[RunningStage.PREDICTING, False, False, True] == 2
    assert (RunningStage.PREDICTING, False, False, True) not in seen[
        seen.index((RunningStage.TRAINING, True, True, True)) :
    ]
    assert seen[-1] == "end"
    assert states[RunningStage.TRAINING, True, True, True] == 7


def test_the_progress_bar_says_what_it_does(tmp_path, capfd):
    data = Data()
    memorize(trainer(tmp_path, enable_progress_bar=True), make(CallsSelf), data, memory=nearest())
    assert "ResMem: collecting training rows" in capfd.readouterr().err
    memorize(trainer(tmp_path), make(CallsSelf), data, memory=nearest())
    assert "ResMem" not in capfd.readouterr().err


# -- failures


class Breaks(Dataset):
    """Fails at a row, but not while it is looked at beforehand."""

    def __init__(self, part, error):
        self.part, self.error = part, error

    def __len__(self):
        return len(self.part[0])

    def __getitem__(self, row):
        if row == 100:
            raise self.error
        return self.part[0][row], self.part[1][row]


def twice(model, batch):
    model(batch[0])
    return model(batch[0])


def not_at_all(model, batch):
    return batch[0]


def drops_rows(rows):
    return torch.utils.data.default_collate(rows[:-1] if len(rows) > 2 else rows)


def nan_in(data, *rows):
    data.train[0][list(rows)] = torch.nan
    return data.loader(data.train)


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (lambda d: DataLoader(Breaks(d.train, OSError("disk")), 16), {}, OSError, "disk"),
        (lambda d: DataLoader(Breaks(d.train, KeyboardInterrupt()), 16), {}, SystemExit, "1"),
        (lambda d: nan_in(d, 40, 77, 78), {}, InputError, "embeddings has NaN or infinite entries in rows 40, 77, 78"),
        (lambda d: nan_in(d, 118, 119), {}, InputError, "rows 118, 119"),
        (lambda d: d.loader(d.train, collate_fn=drops_rows), {}, InputError, "memory_dataloader"),
        (lambda d: d.loader(d.train), {"forward_fn": twice}, HeadError, "called 2 times in one forward"),
        (
            lambda d: d.loader(d.train),
            {"forward_fn": not_at_all, "head": "head"},
            HeadError,
            "not called in the forward",
        ),
        (
            lambda d: d.loader(d.train),
            {"targets_fn": lambda batch: batch[1][:1]},
            InputError,
            r"16 embeddings and targets of shape \(1,\)|2 embeddings and targets of shape \(1,\)",
        ),
        (
            lambda d: d.loader((d.train[0], d.train[1].where(d.train[0][:, 0] != d.train[0][50, 0], -1))),
            {},
            InputError,
            "-1 in rows 50",
        ),
        (lambda d: d.loader(d.train), {"ids_fn": lambda batch: torch.zeros(len(batch[1]))}, InputError, "ids"),
        (
            lambda d: d.loader(d.train),
            {"ids_fn": lambda batch: torch.zeros(len(batch[1]), dtype=torch.int64)},
            InputError,
            "ids are repeated: 0",
        ),
    ],
    ids=["disk", "interrupt", "nan", "last", "collate", "twice", "silent", "targets", "range", "ids", "repeated"],
)
@pytest.mark.parametrize("how", ["fit", "memorize"])
def test_failures_leave_an_empty_memory_and_the_model_as_it_was(loader, options, error, message, how, tmp_path):
    data, model, memory = Data(), make(NormAndDropout), nearest()
    memory.add(torch.zeros(1, 5), torch.zeros(1, 4), torch.tensor([0]))  # of an earlier training
    model.body[1].eval()
    modes = [module.training for module in model.modules()]
    if how == "fit":
        run = trainer(tmp_path, ResMemCallback(memory, memory_dataloader=loader(data), **options))
        start = functools.partial(run.fit, model, data.loader(Data().train))
    else:
        start = functools.partial(memorize, trainer(tmp_path), model, loader(data), memory=memory, **options)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(error, match=message):
            start()
    finally:
        signal.signal(signal.SIGINT, handler)
    # What shows in the first rows stops `fit` before it touches the memory.
    before_training = how == "fit" and (error is HeadError or "targets_fn" in options)
    assert len(memory) == (1 if before_training else 0)
    assert [module.training for module in model.modules()] == modes
    assert hooks_on(model) == 0
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_pass_needs_no_more_memory_for_more_rows(tmp_path):
    """Rows are handed on as they come; who does not keep them needs no room for them."""

    class Batches(TensorDataset):
        def __getitems__(self, positions):
            return [self[positions]]

    class Forgets(CallsSelf):
        def on_predict_start(self):
            reading = Pass(self.trainer, self, BatchReader(), Multiclass())
            loader = DataLoader(Batches(inputs, targets), batch_size=128, collate_fn=lambda batches: batches[0])
            with Peak() as peak:
                self.rows = reading.run(
                    plan(loader, lambda batch: len(batch[1])), lambda chunk: None, "collecting rows"
                )
            self.peak = peak.bytes

    inputs, targets = torch.randn(500_000, 4), torch.zeros(500_000, dtype=torch.int64)
    model = make(Forgets)
    model.body, model.head = nn.Sequential(nn.Linear(4, 64), nn.ReLU()), nn.Linear(64, 4)
    trainer(tmp_path).predict(model, DataLoader(inputs[:1]), return_predictions=False)
    assert model.rows == len(inputs)
    assert model.peak < len(inputs) * 64 * 4 / 2  # 128 MB of rows went by
