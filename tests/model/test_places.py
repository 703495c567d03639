"""A key is what goes into a module, or what comes out of it."""

import re

import pytest
import torch
from torch import nn

from lightning_resmem import HeadError, LocalMemory, ResMemModule, ResMemParams, memorize
from lightning_resmem.model.head import HeadTap
from lightning_resmem.model.places import Place
from tests.models import CallsSelf, Data, hooks_on, trainer


@pytest.mark.parametrize(
    ("name", "module", "side"),
    [
        ("net.mlp", "net.mlp", "output"),
        ("net.mlp:output", "net.mlp", "output"),
        ("net.mlp:input", "net.mlp", "input"),
        ("a:b", "a:b", "output"),
        ("a:input:output", "a:input", "output"),
    ],
)
def test_names_are_read(name, module, side):
    place = Place.parse(name)
    assert place == (module, side)
    assert Place.parse(str(place)) == place or "input:output" in name


class Block(nn.Module):
    """The states are given as `call` says, and changed in place afterwards."""

    def __init__(self, call, returned=lambda h: h):
        super().__init__()
        self.call, self.returned = call, returned
        self.inner = Inner()

    def forward(self, states):
        out = self.call(self.inner, states, torch.zeros(len(states), 1, 1, 1))
        states.zero_()
        return self.returned(out)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, hidden_states, attention_mask=None):
        if isinstance(hidden_states, tuple):
            hidden_states, attention_mask = hidden_states
        return self.up(hidden_states), attention_mask


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.first, self.block, self.fc = nn.Linear(3, 4), block, nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.block(self.first(x))[0])


CALLS = {
    "positional": lambda inner, h, mask: inner(h, mask),
    "by keyword": lambda inner, h, mask: inner(hidden_states=h),
    "a mask first": lambda inner, h, mask: inner(attention_mask=mask, hidden_states=h),
    "a tuple": lambda inner, h, mask: inner((h, mask)),
}


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)], ids=["rows", "tokens"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_input_or_the_output_of_a_module(call, shape):
    model, x = Net(Block(call)), torch.randn(shape)
    with torch.no_grad():
        states = model.first(x)
        out = model.block.inner.up(states)
        for name, expected in {"block.inner:input": states, "block.inner:output": out, "block.inner": out}.items():
            tap = HeadTap(model, "fc", embedding=name)
            with tap.capture():
                output = model(x)
                captured = tap.take()
            assert torch.equal(captured.embedding, expected)
            assert torch.equal(captured.output, output)
            assert tap.describe() == {"head": "fc", "embedding": name}
            assert hooks_on(model) == 0


class Texts(nn.Module):
    def forward(self, words):
        return torch.ones(len(words), 3)


@pytest.mark.parametrize("words", [["a", "b"], torch.tensor([1, 2])], ids=["texts", "numbers of tokens"])
def test_an_input_that_is_no_tensor_of_floats(words):
    model = nn.Sequential(Texts(), nn.Linear(3, 2))
    tap = HeadTap(model, "1", embedding="0:input")
    with pytest.raises(HeadError, match="embedding='0:input' is given no tensor of floats, expected "), tap.capture():
        model(words)


@pytest.mark.parametrize("name", ["0", "0:input"])
def test_a_module_that_is_called_several_times(name):
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, shared, nn.Linear(3, 2))
    tap = HeadTap(model, "2", embedding=name)
    message = f"embedding='{name}' was called 2 times before the head was.* called once"
    with tap.capture(), pytest.raises(HeadError, match=message):
        model(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("block.iner:input", r"embedding='block.iner' is not a module of Net. Did you mean 'block.inner'\? "),
        ("block.inner:in", r"embedding='block.inner:in': the key is 'block.inner:input' or 'block.inner:output', and"),
        (":input", r"embedding='' is not a module of Net"),
        (7, "embedding=7 is not a module of Net"),
    ],
)
def test_names_that_are_no_place(name, said):
    with pytest.raises(HeadError, match=said):
        HeadTap(Net(Block(CALLS["positional"])), "fc", embedding=name)


# -- a head that is asked for some positions alone, as in generation


class Sliced(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.cut, self.body, self.norm, self.fc = cut, nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.cut(self.norm(self.body(x))))


CUTS = {
    "last": (lambda h: h[:, -1:], slice(-1, None)),
    "all but the last": (lambda h: h[:, :-1], slice(None, -1)),
    "in the middle": (lambda h: h[:, 2:4, :], slice(2, 4)),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("cut", "kept"), CUTS.values(), ids=CUTS)
def test_keys_are_those_of_the_positions_that_the_head_is_asked_for(cut, kept, size):
    model, x = Sliced(cut), torch.randn(size, 6, 3)
    tap = HeadTap(model, "fc", embedding="norm:input")
    with torch.no_grad(), tap.capture():
        model(x)
        assert torch.equal(tap.take().embedding, model.body(x)[:, kept])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("cut", [lambda h: h[:, torch.tensor([0, 4])], lambda h: h[:, -2:] + 0], ids=["index", "copy"])
def test_positions_that_cannot_be_told_are_refused(cut, size):
    model = Sliced(cut)
    message = re.escape(f"embedding 'norm:input' has shape ({size}, 6, 4), and the head 'fc' was asked for 2 of the 6")
    tap = HeadTap(model, "fc", embedding="norm:input")
    with torch.no_grad(), tap.capture(), pytest.raises(HeadError, match=message):
        model(torch.randn(size, 6, 3))


# -- in a memory


def test_a_memory_by_the_input_of_a_module(tmp_path):
    torch.manual_seed(0)
    data, model = Data(), CallsSelf()
    data.setup("fit")
    memory = LocalMemory(params=ResMemParams(k=1, sigma=1.0))
    name = "body.1:input"  # before the activation
    resmem = memorize(trainer(tmp_path), model, data, memory=memory, tuner=None, embedding=name)
    assert memory.provenance["embedding"] == name
    keys = model.body[0](data.train[0]).detach()
    assert torch.equal(memory.search(keys, 1).distances, torch.zeros(len(keys), 1))
    resmem.save(tmp_path / "resmem")
    loaded = ResMemModule.load(tmp_path / "resmem", model)
    assert torch.equal(loaded(data.train[0]).argmax(dim=1), data.train[1])
