"""The examples with text run, in this process and at a small size."""

import ast
import math
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::lightning_resmem.ResMemWarning")]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs an example in this process."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda name, *arguments: import_module(name).main(arguments)
    torch.set_num_threads(threads)


def test_language_model(main, capsys):
    text = (ROOT / "LICENSE").read_text()
    small = ("--epochs", "1", "--width", "16", "--tokens", "1300", "--write", "9")
    main("language_model", "--text", str(ROOT / "LICENSE"), "--vocabulary", "300", *small)
    printed = capsys.readouterr().out
    for name in ("base", "knn", "knn_lm", "resmem"):
        nll, perplexity = map(float, re.search(rf"^ +{name} +([\d.]+) .* ([\d.]+) +[\d.]+ *$", printed, re.M).groups())
        assert perplexity == pytest.approx(math.exp(nll), rel=0.01)
    _, behind = printed.split("Behind its next token:")
    passages = re.findall(r"^(['\"].*) -> (['\"].*) \(distance [\d.]+\)$", behind, re.M)
    assert len(passages) == 3
    for passage, following in passages:
        assert ast.literal_eval(passage) + ast.literal_eval(following) in text


@pytest.mark.usefixtures("main")
@pytest.mark.parametrize("vocabulary", [256, 300])
def test_tokens_are_the_text(vocabulary):
    codec = import_module("text_module").codec
    text = "naïve cats, and naïve dogs " * 9
    encode, decode = codec(text, vocabulary)
    assert decode(encode(text)) == text
    assert max(encode(text)) < vocabulary
    assert len(encode(text)) <= len(text.encode()) / (1 if vocabulary == 256 else 2)


def test_docstrings_are_the_text_by_default(main, tmp_path):
    from language_model import default_text

    text = default_text(3000).read_text()
    assert len(text) >= 3000
    assert torch.__doc__.strip()[:40] in text


def test_hf_causal_lm(main, tmp_path, capsys):
    small = ("--tokens", "1280", "--context", "16", "--epochs", "1")
    (tmp_path / "text.txt").write_text(" the cat sat on " * 80)  # a period is a block
    main("hf_causal_lm", "--text", "text.txt", *small)
    printed = capsys.readouterr().out
    scores = dict(re.findall(r"test/(nll_\w+)\W+([\d.]+)", printed))
    assert set(scores) == {"nll_base", "nll_knn_lm", "nll_resmem"}
    assert float(scores["nll_resmem"]) < 0.5 * float(scores["nll_base"])
    assert "\n the cat sat on" in printed


def test_hf_text_classification(main, capsys):
    main("hf_text_classification", "--texts", "15", "--epochs", "1")
    printed = capsys.readouterr().out
    assert "test/acc_resmem" in printed
    _, behind = printed.split("Behind the answer to")
    assert len(re.findall(r"^(lightning\.pytorch|numpy|torch|torchmetrics): ", behind, re.M)) == 3


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny encoder of bytes with random weights, as Hugging Face saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"[PAD]": 0} | {byte: number for number, byte in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path / "encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=257, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_text_encoder(main, encoder, capsys):
    main("text_encoder", "--encoder", str(encoder), "--texts", "14", "--labels", "2", "4", "--seeds", "2")
    numbers = r"([\d.]+) ± [\d.]+ │ ([\d.]+) ± [\d.]+ │ ([\d.]+) ± [\d.]+ │ (-?[\d.]+) ± [\d.]+"
    found = re.findall(rf"│ (\d) +│ {numbers}", re.sub(" +", " ", capsys.readouterr().out))
    assert [int(row[0]) for row in found] == [2, 4]
    for base, knn, resmem, gain in (map(float, row[1:]) for row in found):
        assert max(base, knn, resmem) <= 100
        assert resmem - base == pytest.approx(gain, abs=0.11)
    for options, said in (["--encoder", "nowhere"], "no config.json"), (["--labels", "7"], "two times as many"):
        with pytest.raises(SystemExit):
            main("text_encoder", "--encoder", str(encoder), "--texts", "14", *options)
        assert said in capsys.readouterr().err


@pytest.mark.usefixtures("main")
def test_texts_are_encoded_as_if_each_were_alone(encoder):
    encode = import_module("text_encoder").encode
    texts = ["the longest of them all", "a", "longer than a", "b"]
    alone = torch.cat([encode(encoder, [text], tokens=16) for text in texts])
    torch.testing.assert_close(encode(encoder, texts, tokens=16), alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone[1], alone[3])
    assert torch.equal(encode(encoder, [texts[0]], tokens=2), encode(encoder, [texts[0][:2]], tokens=16))
