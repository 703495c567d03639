"""`embedding="auto"`: of the keys of several places the memory has those that are best on validation rows."""

import json

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from examples.text_module import GPT, Blocks
from lightning_resmem import (
    GridTuner,
    InputError,
    LocalMemory,
    RayMemory,
    Regression,
    ResMemCallback,
    ResMemModule,
    ResMemParams,
    memorize,
)
from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.model.candidates import candidates
from lightning_resmem.model.head import HeadTap
from lightning_resmem.model.places import HEAD, joined
from lightning_resmem.reporting.summary import memory_summary
from lightning_resmem.tuning.keys import choose_key, settle
from tests import oracle
from tests.models import CallsSelf, Data, trainer

TUNER = GridTuner(
    k=[3], sigma=[0.4], softmax_temperature=[1.0], strength=[1.0], refinements=0, noise=0, calibrate=False
)


class Narrow(CallsSelf):
    """What tells classes apart is in the first hidden layer, and hardly anything of it reaches the head."""

    def __init__(self):
        super().__init__(lr=0.0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1), nn.Tanh())
            self.head = nn.Linear(1, 4)
        self.body[0].weight.data[:, 2:] = 0  # of the columns that say nothing


def in_order(model, x):
    return candidates(model, "head", lambda: model(x))


def test_keys_of_tokens(tmp_path):
    """The head's input, or that of the last feed-forward block, as memories with either say."""
    torch.manual_seed(0)
    model, place = GPT(vocabulary=9, context=6, width=8), "blocks.1.mlp.0:input"
    train, val = (DataLoader(Blocks(torch.randint(9, (rows,)), 6), batch_size=8) for rows in (241, 121))

    def memorized(embedding):
        return memorize(trainer(tmp_path), model, train, val, tuner=TUNER, embedding=embedding).memory

    memory = memorized("auto")
    told = {key["embedding"]: key for key in json.loads(memory.provenance["keys"])}
    assert list(told) == ["head", place]
    alone = {"head": memorized(None), place: memorized(place)}
    assert not torch.equal(*(each._query_rows(memory.ids) for each in alone.values()))
    chosen = next(name for name, key in told.items() if key["chosen"])
    assert torch.equal(memory._query_rows(memory.ids), alone[chosen]._query_rows(memory.ids))
    assert memory.params == alone[chosen].params
    assert [part.tolist() for part in memory.locate(memory.ids[[0, 6, 13]])] == [[0, 1, 2], [0, 0, 1]]


def test_the_best_place_is_kept_told_saved_and_used(tmp_path):
    data, model, resmem = Data(), Narrow(), ResMemCallback(tuner=TUNER, embedding="auto")
    run = trainer(tmp_path, resmem)
    run.fit(model, datamodule=data)
    memory, name = resmem.memory, "body.2:input"
    assert in_order(model, data.train[0]) == [name]
    assert memory.provenance["embedding"] == name
    with torch.no_grad():
        wide, narrow = (model.body[:2](data.train[0]), model.body(data.train[0]))
        val_wide, val_narrow = (model.body[:2](data.val[0]), model.body(data.val[0]))
        outputs, val_outputs = model.head(narrow), model.head(val_narrow)
    assert torch.equal(memory._query_rows(memory.ids), wide)  # only the chosen keys are left
    scores = {}
    for place, keys, queries in (("head", narrow, val_narrow), (name, wide, val_wide)):
        alone = LocalMemory()
        alone.add(keys, outputs, data.train[1])
        found = TUNER.tune(alone, queries, val_outputs, data.val[1])
        p = found.params
        rows = keys, outputs, data.train[1], queries, val_outputs
        expected = oracle.predict(*rows, p.k, p.sigma, p.softmax_temperature, p.strength)
        scores[place] = np.mean(expected.resmem.argmax(axis=1) == data.val[1].numpy())
        if place == name:
            assert memory.params == p
    told = {key.embedding: key for key in resmem.tuning.keys}
    assert {place: key.score for place, key in told.items()} == pytest.approx(scores)
    assert scores[name] > scores["head"] + 0.1
    assert (told["head"].chosen, told[name].chosen) == (False, True)
    assert json.loads(memory.provenance["keys"]) == [key._asdict() for key in resmem.tuning.keys]
    assert f"keys of {name!r} (acc {scores[name]:.4f}" in resmem.tuning.summary()
    lines = [str(line) for line in memory_summary(memory.stats(), 1.0, resmem.tuning)]
    assert any(line.startswith(f"keys of {name} (kept): accuracy {scores[name]:.4f}") for line in lines)
    assert any(line.startswith(f"keys of head: accuracy {scores['head']:.4f}") for line in lines)
    (before,) = run.test(model, datamodule=data, verbose=False)
    resmem.module.save(tmp_path / "saved")
    for options in ({}, {"embedding": "auto"}):  # a loaded memory knows its place
        loaded = ResMemModule.load(tmp_path / "saved", model, **options)
        (after,) = trainer(tmp_path).test(loaded, datamodule=data, verbose=False)
        assert after["test/acc_resmem"] == before["test/acc_resmem"]


def chosen(first, second, objective="accuracy", task=None, targets=None):
    """The place of two, whose keys these are, of 200 rows to remember and 200 to choose on."""
    targets = torch.arange(400) % 2 if targets is None else targets
    outputs = torch.zeros(400, 1 if task else 2)
    keys = torch.cat([first, second], dim=1)
    memory, tuner = LocalMemory(task), GridTuner(objective=objective, k=[3, 10], refinements=0, calibrate=False)
    memory.add(keys[:200], outputs[:200], targets[:200])
    rows = Chunk(keys[200:], outputs[200:], targets[200:], torch.arange(200), torch.zeros(200, 0))
    sides = {"head": first.shape[1], "early:input": second.shape[1]}
    result = choose_key(memory, tuner, sides, rows, lambda part: part)
    assert memory.stats()["width"] == sides[next(key.embedding for key in result.keys if key.chosen)]
    return next(key.embedding for key in result.keys if key.chosen)


@pytest.mark.parametrize("objective", ["accuracy", "nll", "f1"])
def test_the_heads_input_stays_unless_another_place_is_better_beyond_the_error(objective):
    torch.manual_seed(0)
    labels = torch.arange(400)[:, None] % 2
    good, noise = labels + 0.3 * torch.randn(400, 3), torch.randn(400, 2)
    assert chosen(noise, good, objective) == "early:input"
    assert chosen(good, noise, objective) == "head"
    assert chosen(good, good.flip(1), objective) == "head"
    assert chosen(noise, torch.randn(400, 2), objective) == "head"


def kept(remembered, labels, asked, wanted, moments=None):
    """The number of the place that is chosen, by keys `(n, 1)` of each for rows to remember and to ask with."""
    times = torch.zeros(len(labels), 2) if moments is not None else None  # all known from the start
    memory = LocalMemory()
    memory.add(torch.cat(remembered, dim=1), torch.zeros(len(labels), 2), labels, times=times)
    asked_at = torch.zeros(len(wanted), 0) if moments is None else torch.stack([moments, moments], dim=1)
    rows = Chunk(torch.cat(asked, dim=1), torch.zeros(len(wanted), 2), wanted, torch.arange(len(wanted)), asked_at)
    result = choose_key(memory, TUNER, {str(place): 1 for place in range(len(asked))}, rows, lambda part: part)
    return next(place for place, key in enumerate(result.keys) if key.chosen)


def test_of_places_with_equal_scores_the_one_with_the_lower_loss():
    labels = torch.arange(60) // 3 % 2
    nothing, own, mixed = torch.zeros(60, 1), labels[:, None].float(), torch.arange(60)[:, None] // 3 * 10.0
    labels_of_two_in_three = torch.where(torch.arange(60) % 3 == 2, 1 - labels, labels)
    own_of_two_in_three = labels_of_two_in_three[:, None].float()
    asked = [nothing, mixed, own]
    assert kept([nothing, mixed, own_of_two_in_three], labels_of_two_in_three, asked, labels) == 2
    asked = [nothing, own, mixed]
    assert kept([nothing, own_of_two_in_three, mixed], labels_of_two_in_three, asked, labels) == 1


def test_rows_of_one_time_go_right_or_wrong_together():
    labels, moments = torch.arange(200) % 2, torch.arange(200) // 20
    right, wrong = labels[:, None].float(), 1 - labels[:, None].float()
    first = torch.where(moments[:, None] < 2, wrong, right)  # in two of ten moments
    second = torch.where(moments[:, None] == 2, wrong, right)
    assert kept([right, right], labels, [first, second], labels) == 1
    assert kept([right, right], labels, [first, second], labels, moments) == 0
    for each in (torch.arange(200), torch.arange(200.0)):  # a moment of its own, but in stretches all the same
        assert kept([right, right], labels, [first, second], labels, each) == 0
        assert kept([right, right], labels, [first, right], labels, each) == 1


def test_a_rank_that_has_met_no_row_keeps_the_same_columns(tmp_path):
    model, memory = Narrow(), LocalMemory(params=ResMemParams(k=1))
    memory.add(torch.randn(8, 17), torch.zeros(8, 4), torch.arange(8) % 4)
    tap = HeadTap(model, "head", joined([HEAD, "body.2:input"]))
    assert tap.widths == ()
    tap = settle(memory, tap, model, None, {HEAD: 1, "body.2:input": 16})
    assert memory.stats()["width"] == 1
    assert tap.embedding is None


def test_less_error_is_better_in_regression():
    torch.manual_seed(0)
    x = torch.rand(400, 1)
    assert chosen(torch.rand(400, 2), x, task=Regression(), targets=4 * x) == "early:input"
    assert chosen(x, torch.rand(400, 2), task=Regression(), targets=4 * x) == "head"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": LocalMemory(params=ResMemParams(k=1))}, "chooses the place of the keys on validation rows"),
        ({"tuner": None}, "chooses the place of the keys on validation rows"),
        ({"memory": RayMemory(), "tuner": TUNER}, "memory is a RayMemory"),
    ],
)
def test_refused_before_training(options, said, tmp_path):
    data = Data()
    run = trainer(tmp_path, ResMemCallback(embedding="auto", **options))
    with pytest.raises(InputError, match=f'embedding="auto".*{said}'):
        run.fit(Narrow(), datamodule=data)
    assert run.global_step == 0
    if "memory" not in options:
        with pytest.raises(InputError, match=said):
            memorize(trainer(tmp_path), Narrow(), data.train_dataloader(), embedding="auto")


def test_a_model_with_no_other_place(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        memory = memorize(trainer(tmp_path), CallsSelf(), Data(), tuner=TUNER, embedding="auto").memory
    assert "head 'head', whose input is the key: embedding=\"auto\" found no other place" in caplog.text
    assert "embedding" not in memory.provenance
    assert memory.stats()["width"] == 5


def test_a_module_without_a_choice(tmp_path):
    memory = LocalMemory()
    memory.add(torch.eye(1), torch.zeros(1, 4), torch.tensor([0]))
    with pytest.raises(InputError, match="for memorize and ResMemCallback"):
        ResMemModule(Narrow(), memory, embedding="auto")


# -- which places there are


class Net(L.LightningModule):
    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.head(self.body(x).flatten(1) if x.ndim == 4 else self.body(x))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.two(torch.relu(self.one(x))))


def dense(*layers):
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


def test_what_the_last_blocks_are_given():
    convolutional = nn.Sequential(nn.Conv2d(1, 3, 3), *(Block(3) for _ in range(4)), nn.AdaptiveAvgPool2d(1))
    assert in_order(Net(convolutional, nn.Linear(3, 2)), torch.randn(2, 1, 8, 8)) == [
        f"body.{place}:input" for place in (2, 3, 4)
    ]
    normed = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6), nn.BatchNorm1d(6))
    assert in_order(Net(normed, nn.Linear(6, 2)).eval(), torch.randn(2, 4)) == ["body.3:input"]
    wide = dense(nn.Linear(4, 3000), nn.Linear(3000, 6), nn.Linear(6, 6))
    assert in_order(Net(wide, nn.Linear(6, 2)), torch.randn(2, 4)) == ["body.4:input"]
    shared = nn.Linear(4, 4)
    assert in_order(Net(dense(nn.Linear(4, 4), shared, shared), nn.Linear(4, 2)), torch.randn(2, 4)) == []


def test_of_tokens_the_input_of_the_last_feed_forward_block():
    layer = nn.TransformerEncoderLayer(6, 2, 24, batch_first=True)
    model = Net(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 3))
    assert in_order(model.train(), torch.randn(2, 5, 6)) == ["body.layers.1.linear1:input"]


def test_what_is_done_to_the_rows_of_one_place_leaves_the_others() -> None:
    memory = LocalMemory(params=ResMemParams(k=1, sigma=1.0))
    memory.add(torch.eye(4), torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    narrow = memory.of_columns(slice(0, 3))
    narrow._rows.to(torch.device("meta"))
    assert {tensor.device.type for tensor in memory._rows.tensors().values()} == {"cpu"}
