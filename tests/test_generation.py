"""Text from base and memory: a Hugging Face model's `generate` and its outputs, against loops in float64."""

import copy
import functools
import os
import threading

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_resmem import (
    EmptyMemoryError,
    InputError,
    LocalMemory,
    ResMemCallback,
    ResMemModule,
    ResMemParams,
    StaleMemoryError,
    memorize,
)
from tests import oracle
from tests.language import Collate, Texts
from tests.models import hooks_on, trainer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH = 40, 16
PARAMS = ResMemParams(k=3, sigma=0.5, softmax_temperature=1.3, strength=0.9)
PROMPTS = [[3, 9, 4, 4], [7], [11, 2]]
EMBEDDINGS = [None, "model.transformer.h.1.mlp:input"]


def network():
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).eval()


class Causal(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network()

    def forward(self, **batch):
        return self.model(**batch)

    def predict_step(self, batch, batch_idx):
        return self.model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GREEDY)


def texts():
    """No two begin with the same token, so that no two rows have the same key."""
    draw = np.random.default_rng(0)
    return [[first, *draw.integers(2, VOCABULARY, size=draw.integers(3, 12))] for first in range(2, 18)]


def loader():
    return DataLoader(Texts(texts()), batch_size=8, collate_fn=Collate())


def prompts():
    return {name: entry for name, entry in Collate(side="left")(PROMPTS).items() if name != "labels"}


@pytest.fixture(scope="module", params=EMBEDDINGS, ids=["head", "mlp"])
def resmem(request, tmp_path_factory):
    torch.manual_seed(0)
    memory, model = LocalMemory(params=PARAMS), Causal()
    run = trainer(tmp_path_factory.mktemp("run"))
    return memorize(run, model, loader(), memory=memory, tuner=None, embedding=request.param)


class Naive(transformers.GPT2LMHeadModel):
    """Combines in float64 NumPy all that its forward returns, with rows that it has read text by text."""

    @classmethod
    def of(cls, resmem):
        model = copy.deepcopy(resmem.base.model).double()
        model.__class__ = cls
        model.keys_of = None
        if resmem.memory.provenance.get("embedding") is not None:
            model.transformer.h[1].ln_2.register_forward_hook(
                lambda _module, _args, out: setattr(model, "keys_of", out)
            )
        rows = [[], [], []]
        with torch.no_grad():
            for text in texts():
                ids = torch.tensor([text])
                hidden, logits = model.seen(input_ids=ids)
                for kept, new in zip(rows, (hidden[0, :-1], logits[0, :-1], ids[0, 1:]), strict=True):
                    kept.extend(new.numpy())
        model.rows = [np.array(part) for part in rows]
        return model

    def seen(self, **inputs):
        out = super().forward(**inputs, output_hidden_states=True)
        self.out = out
        return (out.hidden_states[-1] if self.keys_of is None else self.keys_of), out.logits

    @functools.wraps(transformers.GPT2LMHeadModel.forward)  # generate looks which parameters there are
    def forward(self, **inputs):
        keys, logits = self.seen(**inputs)
        asked = logits.shape[1]
        said = oracle.predict(
            *self.rows,
            keys[:, -asked:].reshape(-1, WIDTH).numpy(),
            logits.reshape(-1, VOCABULARY).numpy(),
            k=PARAMS.k,
            sigma=PARAMS.sigma,
            strength=PARAMS.strength,
            softmax_temperature=PARAMS.softmax_temperature,
        )
        combined = oracle.log_predictions(said.resmem, said.base)
        self.out.logits = torch.from_numpy(combined).reshape(logits.shape)
        return self.out


@pytest.fixture(scope="module")
def naive(resmem):
    return Naive.of(resmem)


GREEDY = {"max_new_tokens": 5, "do_sample": False}
WAYS = {
    "greedy": GREEDY,
    "without a cache": {**GREEDY, "use_cache": False},
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampling": {"max_new_tokens": 5, "do_sample": True, "temperature": 0.8, "top_k": 12},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_generate_is_that_of_a_model_that_combines_naively(options, resmem, naive):
    model = resmem.base.model
    scored = {"output_scores": True, "return_dict_in_generate": True, **options}
    torch.manual_seed(1)
    wanted = naive.generate(**prompts(), **scored)
    torch.manual_seed(1)
    with resmem.combined():
        found = model.generate(**prompts(), **scored)
    assert torch.equal(found.sequences, wanted.sequences)
    scores, expected = (torch.stack(one.scores).double() for one in (found, wanted))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    torch.manual_seed(1)
    assert not torch.equal(model.generate(**prompts(), **options), found.sequences)  # the base again, and another


def test_a_loop_token_by_token_without_padding_or_a_cache(resmem, naive):
    model = resmem.base.model
    with resmem.combined():
        found = model.generate(**prompts(), **GREEDY)
    for row, prompt in zip(found.tolist(), PROMPTS, strict=True):
        by_hand, wanted = list(prompt), list(prompt)
        with torch.no_grad():
            for _ in range(GREEDY["max_new_tokens"]):
                wanted.append(int(naive(input_ids=torch.tensor([wanted])).logits[0, -1].argmax()))
                with resmem.combined():
                    by_hand.append(int(model(input_ids=torch.tensor([by_hand])).logits[0, -1].argmax()))
        assert by_hand == wanted
        generated = row[4:]
        ended = generated.index(1) + 1 if 1 in generated else len(generated)
        assert generated[:ended] == wanted[len(prompt) :][:ended]


def test_only_the_positions_that_are_asked_for_are_searched(resmem, monkeypatch):
    searched = []
    search = LocalMemory.predictions_of_finite
    monkeypatch.setattr(
        LocalMemory,
        "predictions_of_finite",
        lambda memory, embeddings, outputs: searched.append(len(embeddings)) or search(memory, embeddings, outputs),
    )
    with resmem.combined():
        resmem.base.model.generate(**prompts(), **GREEDY)
    assert searched == [len(PROMPTS)] * GREEDY["max_new_tokens"]


def test_the_module_returns_what_the_model_returns(resmem, naive):
    batch = Collate()(texts()[:3])
    found, base = resmem(**batch), resmem.base(**batch)
    assert type(found) is type(base)
    assert list(found) == list(base)
    with torch.no_grad():
        wanted = naive(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    kept = batch["attention_mask"] > 0
    torch.testing.assert_close(found.logits[kept].double(), wanted[kept], atol=1e-4, rtol=0)
    assert found["logits"] is found.logits
    loss = torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(found.loss.double(), loss, atol=1e-4, rtol=0)
    assert abs(found.loss - base.loss) > 0.01
    plain = resmem(**batch, return_dict=False)  # a tuple has no names
    torch.testing.assert_close(plain, found.logits)


def test_through_the_callback(resmem, tmp_path):
    callback = ResMemCallback(resmem.memory)
    run = trainer(tmp_path, callback)
    with resmem.combined():
        wanted = resmem.base.model.generate(**prompts(), **GREEDY)
    data = DataLoader(Texts(PROMPTS), batch_size=3, collate_fn=Collate(side="left"))
    (routed,) = run.predict(resmem.base, data)
    assert torch.equal(routed, wanted)
    with callback.module.combined():
        assert torch.equal(resmem.base.model.generate(**prompts(), **GREEDY), wanted)


# -- the context


def logits(resmem):
    with torch.no_grad():
        return resmem.base.model(torch.tensor([PROMPTS[0]])).logits


def test_the_model_is_left_as_it_was(resmem):
    base = logits(resmem)
    resmem.base.model.transformer.h[0].train()
    with resmem.combined():
        assert not torch.allclose(logits(resmem), base)
        assert not resmem.base.model.transformer.h[0].training
    with pytest.raises(IndexError), resmem.combined():
        resmem.base.model(torch.tensor([[VOCABULARY]]))
    assert resmem.base.model.transformer.h[0].training
    assert hooks_on(resmem.base) == 0
    resmem.base.eval()
    assert torch.equal(logits(resmem), base)
    assert torch.is_grad_enabled()


def test_contexts_in_one_another_combine_once(resmem):
    with resmem.combined():
        once = logits(resmem)
        with resmem.combined():
            assert torch.equal(logits(resmem), once)
        assert torch.equal(logits(resmem), once)
        assert torch.equal(resmem(input_ids=torch.tensor([PROMPTS[0]])).logits, once)
        other = ResMemModule(resmem.base, copy.deepcopy(resmem.memory))
        other.memory.params = ResMemParams(k=1, sigma=1.0, strength=0.1)
        with other.combined():
            inner = logits(resmem)
    with other.combined():
        assert torch.equal(logits(resmem), inner)
    assert not torch.allclose(inner, once)


def test_other_threads_have_the_base(resmem):
    base, seen = logits(resmem), []
    with resmem.combined():
        thread = threading.Thread(target=lambda: seen.append(logits(resmem)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], base)


def test_a_head_that_is_not_known_a_memory_without_rows_and_other_weights(tmp_path):
    model = Causal()
    with pytest.raises(EmptyMemoryError):
        ResMemModule(model, LocalMemory(params=PARAMS), head="model.lm_head")
    with pytest.raises(EmptyMemoryError, match=r"after trainer.fit"):
        ResMemCallback().module.combined()
    memory = LocalMemory(params=PARAMS)
    memory.add(torch.randn(9, WIDTH), torch.randn(9, VOCABULARY), torch.arange(9))
    module = ResMemModule(model, memory)
    with pytest.raises(InputError, match=r"head is not known yet: give .*head=\"model.lm_head\""), module.combined():
        pass
    module(input_ids=torch.tensor([PROMPTS[0]]))  # finds it
    with module.combined():
        assert torch.isfinite(logits(module)).all()
    memory.clear()
    with pytest.raises((EmptyMemoryError, StaleMemoryError)), module.combined():
        logits(module)
