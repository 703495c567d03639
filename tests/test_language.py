"""A memory of tokens: rows of sequences against loops in float64, through the callback and the module."""

import itertools
import logging
import math
import re
import warnings

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import (
    BitsPerByte,
    GridTuner,
    HeadError,
    InputError,
    LocalMemory,
    ResMemCallback,
    ResMemParams,
    ResMemWarning,
    memorize,
)
from lightning_resmem.memory.knn_lm import knn_lm_params
from lightning_resmem.metrics.noise import Groups
from lightning_resmem.reporting import loggers
from lightning_resmem.reporting.pictures import text_lookups
from lightning_resmem.reporting.summary import evaluation_summary
from lightning_resmem.reporting.wandb_report import log_flips
from tests import oracle
from tests.language import VOCABULARY, Causal, Collate, Texts, loader, rows_of, texts
from tests.models import trainer

PARAMS = ResMemParams(k=4, sigma=0.4, softmax_temperature=1.3, strength=0.8)
TRAIN, TEST = texts(23), texts(11, seed=1)


def filled(tmp_path, rows, model=None, **options):
    memory = LocalMemory(params=PARAMS)
    return memorize(trainer(tmp_path), model or Causal(), rows, memory=memory, tuner=None, **options)


def expected(model, queries, params=PARAMS):
    train = rows_of(model, TRAIN)
    settings = {"k": params.k, "sigma": params.sigma, "strength": params.strength}
    return oracle.predict(
        *(train.keys, train.outputs, train.targets, queries.keys, queries.outputs),
        **settings,
        softmax_temperature=params.softmax_temperature,
    )


def check_rows(memory, rows):
    assert memory.ids.tolist() == rows.ids
    values = memory.fetch(memory.ids)
    assert values.targets.tolist() == rows.targets.tolist()
    np.testing.assert_allclose(values.outputs, rows.outputs, atol=1e-5)
    np.testing.assert_allclose(memory._query_rows(memory.ids), rows.keys, atol=1e-5)
    sequences, positions = memory.locate(memory.ids)
    assert list(zip(sequences.tolist(), positions.tolist(), strict=True)) == rows.places


@pytest.mark.parametrize("options", [{}, {"side": "left"}, {"prompt": 3}, {"side": "left", "prompt": 1}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_rows_ids_and_targets_do_not_depend_on_padding(options, batch_size, tmp_path):
    """The first batch of `prompt=3` may hold no label at all: it is skipped."""
    model = Causal()
    memory = filled(tmp_path, loader(TRAIN, batch_size, **options), model).memory
    check_rows(memory, rows_of(model, TRAIN, prompt=options.get("prompt", 0)))


@pytest.mark.parametrize("names", [("input_ids", "attention_mask"), ("input_ids", "labels")], ids=str)
def test_batches_without_labels_or_without_a_mask(names, tmp_path):
    model = Causal()
    memory = filled(tmp_path, loader(TRAIN, 4, names=names), model).memory
    check_rows(memory, rows_of(model, TRAIN))
    assert memory.provenance["shift"] == "1"


class Plain(Causal):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask).logits


def pairs(change=lambda targets: targets):
    """Inputs and the targets of their own positions, cut to two tokens."""
    tokens = torch.tensor([text[:2] for text in TRAIN])
    following = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], dim=1)
    return TensorDataset(tokens, change(following))


def test_targets_of_the_same_positions_are_not_shifted(tmp_path):
    memory = filled(tmp_path, DataLoader(pairs(), batch_size=4), Plain()).memory
    check_rows(memory, rows_of(Causal(), [text[:2] for text in TRAIN]))
    assert memory.provenance["shift"] == "0"


def test_token_classes_keep_their_positions(tmp_path):
    """Also where some are the token itself by chance."""

    def collate(sequences):
        batch = Collate()(sequences)
        return batch | {"labels": (batch["labels"] % 3).where(batch["labels"] >= 0, -100)}

    memory = filled(tmp_path, DataLoader(Texts(TRAIN), batch_size=4, collate_fn=collate), Plain()).memory
    assert memory.fetch(memory.ids).targets.tolist() == [token % 3 for text in TRAIN for token in text]
    assert len(memory) == sum(map(len, TRAIN))


def test_a_targets_fn_is_believed(tmp_path):
    memory = filled(tmp_path, loader(TRAIN, 4), targets_fn=lambda batch: batch["labels"]).memory
    assert memory.fetch(memory.ids).targets.tolist() == [token for text in TRAIN for token in text]
    assert "shift" not in memory.provenance


def test_ids_of_sequences_from_the_batch(tmp_path):
    batch = Collate()(TRAIN[:5]) | {"key": torch.tensor([103, 101, 100, 102, 2**43 - 1])}
    memory = filled(tmp_path, [batch], ids_fn=lambda batch: batch["key"]).memory
    assert memory.locate(memory.ids).sequences.unique().tolist() == [100, 101, 102, 103, 2**43 - 1]
    with pytest.raises(InputError, match=r"ids_fn returned ids of shape \(5, \d\) for a batch of 5 sequences"):
        filled(tmp_path, [batch], ids_fn=lambda batch: batch["labels"])
    with pytest.raises(InputError, match=r"have ids from -1 to 3, .* give an ids_fn"):
        filled(tmp_path, [batch], ids_fn=lambda batch: torch.arange(-1, 4))


def test_callback_and_module_against_the_oracle(tmp_path, caplog, monkeypatch):
    """Tuned by the loss of validation tokens; the steps see log-probabilities, tokens are counted, not batches."""
    model, tuner = Causal(lr=0.1), GridTuner(k=[4], refinements=0)
    lengths = np.arange(1, VOCABULARY + 1)
    callback = ResMemCallback(tuner=tuner, metrics={"bits": BitsPerByte(lengths)})
    run = trainer(tmp_path, callback)
    with caplog.at_level(logging.INFO):
        run.fit(model, loader(TRAIN, 4, side="left"), loader(TEST, 3))
    assert callback.tuning.objective == "nll"
    assert callback.tuning.rows == sum(len(text) - 1 for text in TEST)
    check_rows(callback.memory, rows_of(model, TRAIN))
    told = "\n".join(record.message for record in caplog.records)
    assert "the output at position t belongs to the label at t + 1" in told
    tables = Tables()
    monkeypatch.setattr(loggers, "_has_matplotlib", lambda: False)
    run.loggers = [tables]
    left, total = (
        sum(len(text) - 1 for text in TRAIN),
        sum(len(part) * max(map(len, part)) for part in (TRAIN[start : start + 4] for start in range(0, 23, 4))),
    )
    assert f"{left} of {total} positions of sequences are training rows" in told

    callback.memory.params = PARAMS
    queries = rows_of(model, TEST)
    wanted = expected(model, queries)
    nll = -np.log(oracle_probabilities(wanted))[range(len(queries.targets)), queries.targets]
    model.decode = lambda code, targets: code  # a model may call anything so
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResMemWarning)
        run.validate(model, loader(TEST, 3), verbose=False)
    assert "text" not in tables.rows["val/flipped_rows"][0]
    (logged,) = run.test(model, datamodule=Tokens(), verbose=False)
    found = callback.evaluation
    assert found.rows == len(queries.targets)
    for name in ("base", "knn", "resmem"):
        right = getattr(wanted, name).argmax(axis=1) == queries.targets
        assert found.scores[f"acc_{name}"] == pytest.approx(right.mean())
    assert found.scores["nll_resmem"] == pytest.approx(nll.mean(), abs=1e-5)
    assert found.scores["perplexity_resmem"] == pytest.approx(np.exp(nll.mean()), abs=1e-4)
    assert found.scores["bits_resmem"] == pytest.approx(
        nll.sum() / math.log(2) / lengths[queries.targets].sum(), abs=1e-5
    )
    of_sequences = Groups(torch.tensor([sequence for sequence, _ in queries.places]))
    for seen, params in ((found, PARAMS), (callback.tuning, callback.tuning.params)):
        said = expected(model, queries, params)
        gains = torch.from_numpy(
            (said.resmem.argmax(axis=1) == queries.targets) * 1.0 - (said.base.argmax(axis=1) == queries.targets)
        )
        error = max(float(gains.std()) / len(gains) ** 0.5, float(of_sequences.errors(gains[None])))
        assert seen.gain_error == pytest.approx(error, rel=1e-6)
    assert found.gain_in("perplexity") == found.scores["perplexity_base"] - found.scores["perplexity_resmem"]
    assert logged["test/perplexity_base"] == pytest.approx(math.exp(logged["test/nll_base"]), rel=1e-5)
    places = dict(zip(queries.places, zip(queries.targets, wanted.base, wanted.resmem, strict=True), strict=True))
    assert found.flips
    for flip in found.flips:
        target, base, resmem = places[flip.position, flip.token]
        assert (flip.target, flip.base, flip.resmem) == (target, base.argmax(), resmem.argmax())
    check_flips(tables.rows["test/flipped_rows"], found.flips)
    check_flips_without_text(tables, found, callback.memory)
    peer = knn_lm_params(callback.memory)
    assert peer == callback.tuning.knn_lm
    train = rows_of(model, TRAIN)
    settings = {"k": peer.k, "sigma": peer.sigma, "softmax_temperature": peer.softmax_temperature, "strength": 1.0}
    parts = oracle.predict(train.keys, train.outputs, train.targets, queries.keys, queries.outputs, **settings)
    mixed = (1 - peer.strength) * parts.base + peer.strength * parts.knn
    assert found.scores["acc_knn_lm"] == pytest.approx((mixed.argmax(axis=1) == queries.targets).mean())
    nll = -np.log(mixed[range(len(queries.targets)), queries.targets])
    assert found.scores["nll_knn_lm"] == pytest.approx(nll.mean(), abs=1e-5)
    assert {name for name in found.shown if name.endswith("_knn_lm")} >= {"acc_knn_lm", "nll_knn_lm"}
    assert "ece_knn_lm" not in found.shown
    table, *_ = evaluation_summary(found, callback.memory.stats())
    assert [column.header for column in table.columns] == ["", "base", "knn", "knn_lm", "resmem", "gain"]

    combined = callback.module
    trainer(tmp_path).test(combined, loader(TEST, 5, side="left"), verbose=False)
    assert combined.evaluations[0].scores == pytest.approx(found.scores, abs=1e-5, nan_ok=True)
    whole = loader(TEST, len(TEST))
    (batch,) = whole
    kept = batch["labels"][:, 1:] != -100
    shape = (*batch["input_ids"].shape, VOCABULARY)
    for routed in (run.predict(model, whole)[0], combined(batch["input_ids"], batch["attention_mask"]).logits):
        assert routed.shape == shape
        np.testing.assert_allclose(routed[:, :-1][kept].exp(), oracle_probabilities(wanted), atol=1e-5)
    predictions = combined.predictions(batch)
    for name in ("base", "knn", "resmem"):
        np.testing.assert_allclose(getattr(predictions, name)[:, :-1][kept], getattr(wanted, name), atol=1e-5)
    assert math.isfinite(logged["loss"])
    assert len(combined.explain(batch, top=2)) == shape[0] * shape[1]


def words(tokens):
    return "".join("_abcdefg"[token] for token in tokens)


class Tokens(L.LightningDataModule):
    decode = staticmethod(words)

    def test_dataloader(self):
        return loader(TEST, 3)


class Tables(WandbLogger):
    """Keeps tables, and has no run."""

    name, version, save_dir = "tables", "0", "unused"

    def __init__(self):
        self.rows = {}

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.rows[key] = [dict(zip(columns, row, strict=True)) for row in data]

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass

    def save(self):
        pass

    def finalize(self, status):
        pass


def check_flips(rows, flips):
    """A table's rows show the text around each flip, and around its neighbours."""
    assert len(rows) == len(flips)
    for row in rows:
        text, position = TEST[row["position"]], row["token"]
        assert row["text"] == f"{words(text[: position + 1])}▸{words(text[position + 1 : position + 5])}"
        assert row["text"].partition("▸")[2][0] == words([row["target"]])
        neighbor = re.fullmatch(r"([a-g]+)▸([a-g]+): (\d) \(#(\d+), distance .*\)", row["neighbor_1"])
        sequence, place = divmod(int(neighbor[4]), 2**20)
        assert neighbor[1] == words(TRAIN[sequence][: place + 1])
        assert neighbor[2][0] == words([int(neighbor[3])])


def check_flips_without_text(tables, evaluation, memory):
    """The table goes on in words where the text ends: three passages are decoded, in two calls each."""
    calls = itertools.count()
    looks = text_lookups(lambda tokens: words(tokens) if next(calls) < 6 else tokens, loader(TEST, 3), loader(TRAIN, 4))
    with pytest.warns(ResMemWarning, match="flipped tokens are shown without text: InputError: decode returned a list"):
        log_flips(tables, "some", evaluation, memory, *looks, 0)
    with_text, without = tables.rows["test/flipped_rows"], tables.rows["some"]
    assert [row["text"] for row in without] == [with_text[0]["text"], *[None] * (len(with_text) - 1)]
    for full, row in zip(with_text, without, strict=True):
        assert full["neighbor_1"].partition(": ")[2] == row["neighbor_1"]


def oracle_probabilities(predictions):
    return np.exp(oracle.log_predictions(predictions.resmem, predictions.base))


def test_a_batch_without_any_label_is_skipped_and_counted(tmp_path, caplog):
    batches = list(loader(TRAIN[:12], 4))
    batches[1]["labels"].fill_(-100)
    with caplog.at_level(logging.INFO):
        memory = filled(tmp_path, batches).memory
    assert memory.locate(memory.ids).sequences.unique().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert "; 1 batches have none" in caplog.text
    with pytest.raises(InputError, match="yielded no rows to memorize"):
        filled(tmp_path, batches[1:2])


def test_nan_in_one_token(tmp_path):
    def spoil(_module, _args, states):
        if len(states) == 3:  # the last batch
            states[1, 4] = torch.nan

    model = Causal()
    model.tokens.register_forward_hook(spoil)
    batches = list(loader([[1, 2, 3, 4, 5, 6]] * 40, 37))
    with pytest.warns(UserWarning, match=r"embeddings has NaN or infinite entries in sequence 38, position 4 of the "):
        memory = filled(tmp_path, batches, model).memory
    assert len(memory) == 40 * 5 - 1


def test_labels_that_are_no_token(tmp_path):
    data = pairs(lambda targets: targets.masked_fill(torch.arange(23)[:, None] == 20, 77))
    with pytest.raises(
        InputError, match=r"In sequence 20 of TensorDataset, whose positions.*holds 77 in rows 0, 1, ou"
    ):
        filled(tmp_path, DataLoader(data, batch_size=4), Plain())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda targets: targets[:, :1],
            r"outputs of shape \(2, 2, 7\) for targets of shape \(2, 1\): a sequence has on",
        ),
        (lambda targets: targets[:, 0], r"for targets of shape \(2,\): a sequence has one target .* with head="),
    ],
)
def test_lengths_that_differ_are_refused(change, said, tmp_path):
    with pytest.raises(InputError, match=said):
        filled(tmp_path, DataLoader(pairs(change), batch_size=4), Plain())


class Turned(Plain):
    """Its head reads `(T, B, D)`."""

    def forward(self, input_ids):
        logits = self.lm_head(torch.tanh(self.tokens(input_ids).cumsum(dim=1)).transpose(0, 1))
        return logits.transpose(0, 1) if self.back else logits


@pytest.mark.parametrize("back", [True, False])
def test_positions_first_are_refused(back, tmp_path):
    model = Turned()
    model.back = back
    data = [Collate(names=("input_ids", "labels"))(TRAIN)]
    with pytest.raises((HeadError, InputError), match=r"first two axes (are )?swapped"):
        filled(tmp_path, data, model)


def test_loaders_with_positions_first_are_refused(tmp_path):
    tokens = DataLoader(
        pairs(), batch_size=4, collate_fn=lambda rows: [torch.stack(x, dim=1) for x in zip(*rows, strict=True)]
    )
    with pytest.raises(InputError, match=r"positions.* first, \(T, B\)"):
        filled(tmp_path, tokens, Plain())


def test_a_head_that_is_called_twice_is_refused(tmp_path):
    class Twice(Plain):
        def forward(self, input_ids):
            self.lm_head(self.tokens(input_ids))
            return super().forward(input_ids)

    with pytest.raises(HeadError, match=r"'lm_head' was called 2 times in one forward"):
        filled(tmp_path, DataLoader(pairs(), batch_size=4), Twice(), head="lm_head")


def test_labels_that_are_the_inputs_in_some_batches_alone_are_refused(tmp_path):
    batches = [Collate()(TRAIN[:4]), Collate()(TRAIN[4:8])]
    batches[1]["labels"][0, 0] = 6 if batches[1]["labels"][0, 0] != 6 else 5
    with pytest.raises(InputError, match=r"labels of a batch are not its inputs, as .* give a targets_fn"):
        filled(tmp_path, batches)


def test_locate_is_for_sequences():
    memory = LocalMemory()
    memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="locate is for a memory that a pass over sequences has filled"):
        memory.locate(memory.ids)
