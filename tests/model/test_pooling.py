"""Feature maps are averaged over their positions, wherever their channels are; what cannot be told is refused."""

import logging

import pytest
import torch
from torch import nn

from lightning_resmem import HeadError, LocalMemory, ResMemCallback, ResMemModule, ResMemParams, ResMemWarning
from lightning_resmem.model.head import HeadTap
from tests.models import CallsSelf, Data, hooks_on, trainer


class LastNorm(nn.LayerNorm):
    """Normalizes the first axis after the rows, as vision libraries derive it from LayerNorm."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


class Residual(nn.Module):
    """Adds what its layers make of its input."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Powers(nn.Module):
    """Channels `x`, `x^2`, ... without a layer that tells where they are."""

    def __init__(self, axis, channels=5):
        super().__init__()
        self.axis, self.channels = axis, channels

    def forward(self, x):
        return torch.cat([x**power for power in range(1, self.channels + 1)], dim=self.axis)


def swin(width):
    """Channels last: a convolution into patches, then blocks of LayerNorm and Linear."""
    block = Residual(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    return nn.Sequential(nn.Conv2d(1, width, 2, 2), Permute(0, 2, 3, 1), nn.LayerNorm(width), block)


def convnext(width):
    """Channels first, with a part of each block that has them last."""
    mixed = Permute(0, 2, 3, 1), nn.LayerNorm(width), nn.Linear(width, width), Permute(0, 3, 1, 2)
    return nn.Sequential(nn.Conv2d(1, width, 2, 2), LastNorm(width), Residual(nn.Conv2d(width, width, 3, 1, 1), *mixed))


FIRST, LAST = (2, 3), (1, 2)
MAPS = {
    "swin": (swin(5), 8, LAST),
    "swin, as wide as its channels": (swin(4), 8, None),
    "swin, from its blocks on, as wide as its channels": (nn.Sequential(Permute(0, 2, 3, 1), nn.Linear(1, 8)), 8, LAST),
    "convnext": (convnext(5), 8, FIRST),
    "convnext, as wide as its channels": (convnext(4), 8, None),
    "convolutions, as wide as their channels": (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        6,
        FIRST,
    ),
    "group norm": (nn.Sequential(Powers(1), nn.GroupNorm(1, 5)), 8, FIRST),
    "max pooling": (nn.Sequential(Powers(1), nn.MaxPool2d(2)), 8, FIRST),
    "told by the head, first": (Powers(1), 8, FIRST),
    "told by the head, last": (nn.Sequential(Permute(0, 2, 3, 1), Powers(3)), 8, LAST),
}


class Mapped(nn.Module):
    def __init__(self, maps, axes, size, mark=None):
        super().__init__()
        self.maps, self.mark, self.axes = maps, nn.Identity(), axes
        with torch.no_grad():
            width = maps(torch.zeros(2, 1, size, size)).mean(dim=axes).shape[1]
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.mark(self.maps(x)).mean(dim=self.axes))


@pytest.mark.parametrize("named", ["maps", "mark"])
@pytest.mark.parametrize(("maps", "size", "axes"), MAPS.values(), ids=MAPS)
def test_channels_are_found(maps, size, axes, named, caplog):
    model, x = Mapped(maps, axes or FIRST, size).eval(), torch.randn(6, 1, size, size)
    tap = HeadTap(model, "fc", embedding=named)
    if axes is None:
        with (
            pytest.raises(HeadError, match=rf"embedding='{named}' .* first or the last axis.*Identity\(\)"),
            tap.capture(),
        ):
            model(x)
    else:
        with tap.capture(), caplog.at_level(logging.INFO, "lightning_resmem"):
            model(x)
            found = tap.take().embedding
        torch.testing.assert_close(found, model.maps(x).mean(dim=axes).detach())
        said = f"averaged over the axes {axes[0]}, {axes[1]}."
        assert [said in message for message in caplog.messages] == [True]
        channels = "first" if axes == FIRST else "last"
        assert tap.describe() == {"head": "fc", "embedding": named, "channels": channels}
    assert hooks_on(model) == 0


def test_five_dimensions_with_the_channels_last():
    model = nn.ModuleDict({"maps": nn.Linear(2, 5), "fc": nn.Linear(5, 3)})
    model.forward = lambda x: model["fc"](model["maps"](x).mean(dim=(1, 2, 3)))
    x = torch.randn(4, 3, 2, 4, 2)
    tap = HeadTap(model, "fc", embedding="maps")
    with tap.capture():
        model.forward(x)
        torch.testing.assert_close(tap.take().embedding, model["maps"](x).mean(dim=(1, 2, 3)).detach())


def test_where_nothing_tells_a_warning_says_what_was_taken():
    model, x = Mapped(Powers(1), FIRST, 5), torch.randn(6, 1, 5, 5)
    tap = HeadTap(model, "fc", embedding="maps")
    with tap.capture():
        with pytest.warns(ResMemWarning, match=r"no layer tells where its channels are.*first.*nn.Identity"):
            model(x)
        torch.testing.assert_close(tap.take().embedding, model.maps(x).mean(dim=FIRST).detach())


def test_it_is_found_once_and_other_sizes_follow():
    model = Mapped(swin(4), LAST, 12)
    tap = HeadTap(model, "fc", embedding="maps")
    with tap.capture():
        for size in (12, 8):  # the second is as wide as its channels
            x = torch.randn(6, 1, size, size)
            model(x)
            torch.testing.assert_close(tap.take().embedding, model.maps(x).mean(dim=LAST).detach())
            tap.clear()


def test_tokens_are_refused_with_the_way_out():
    model = nn.Sequential(nn.Linear(8, 4), nn.Flatten(), nn.Linear(20, 3))
    tap = HeadTap(model, "2", embedding="0")
    message = (
        r"'0' returns shape \(4, 5, 4\).*choose or average in the model: pass tokens.mean\(dim=1\) through an nn.Id"
    )
    with pytest.raises(HeadError, match=message), tap.capture():
        model(torch.randn(4, 5, 8))


class Images(CallsSelf):
    """Rows as images of 2 x 2, whose maps have their channels last."""

    def __init__(self):
        super().__init__()
        maps = nn.Sequential(Permute(0, 2, 3, 1), nn.Linear(1, 6), nn.ReLU())
        self.body = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), maps, nn.Flatten(), nn.Linear(24, 5))


def test_a_memory_keeps_where_the_channels_are(tmp_path):
    torch.manual_seed(0)
    data, model = Data(), Images()
    callback = ResMemCallback(LocalMemory(params=ResMemParams(k=1, sigma=1.0)), embedding="body.1")
    run = trainer(tmp_path, callback)
    run.fit(model, datamodule=data)
    keys = model.body[1](model.body[0](data.train[0])).mean(dim=(1, 2)).detach()
    assert torch.equal(callback.memory.search(keys, 1).distances, torch.zeros(120, 1))
    assert callback.memory.provenance["channels"] == "last"
    (logged,) = run.test(model, data.loader(data.train), verbose=False)
    assert logged["test_score"] == 1  # the nearest row is the row itself
    callback.module.save(tmp_path / "resmem")
    loaded = ResMemModule.load(tmp_path / "resmem", model)
    assert torch.equal(loaded(data.train[0]).argmax(dim=1), data.train[1])


class Recurrent(nn.Module):
    """Labels each place of a series `(B, T, 2)`: channels last, until the head."""

    def __init__(self, head):
        super().__init__()
        self.rnn, self.norm, self.swap, self.mark = (
            nn.LSTM(2, 6, batch_first=True),
            nn.LayerNorm(6),
            Permute(0, 2, 1),
            nn.Identity(),
        )
        self.conv, self.head = nn.Conv1d(6, 6, 1), head

    def forward(self, x):
        mapped = self.conv(self.mark(self.swap(self.norm(self.rnn(x)[0]))))
        return self.head(mapped if isinstance(self.head, nn.Conv1d) else mapped.transpose(1, 2))


@pytest.mark.parametrize("lengths", [(5, 6), (6, 5), (8, 6)])  # 6: as long as it is wide
@pytest.mark.parametrize("head", [nn.Conv1d(6, 3, 1), nn.Linear(6, 3)], ids=["convolution", "linear"])
def test_keys_of_sequences_are_laid_out_by_what_makes_them(head, lengths):
    torch.manual_seed(0)
    model = Recurrent(head)
    for name in ("rnn", "norm", "norm:input", "conv", "conv:input", "head:input"):
        tap = HeadTap(model, "head", embedding=name)
        for length in lengths:
            x = torch.randn(4, length, 2)
            keys = model.rnn(x)[0]
            if name not in ("rnn", "norm:input"):
                keys = model.norm(keys)
            if name in ("conv", "head:input"):
                keys = model.conv(keys.transpose(1, 2)).transpose(1, 2)
            with tap.capture():
                model(x)
                torch.testing.assert_close(tap.take().embedding, keys.detach())


def test_keys_of_sequences_whose_layout_cannot_be_told():
    model = Recurrent(nn.Conv1d(6, 3, 1))
    message = (
        r"embedding='mark' returns shape \(4, 6, 6\), .* Name the layer that makes it.*not as long as it is wide, 6"
    )
    tap = HeadTap(model, "head", embedding="mark")
    with pytest.raises(HeadError, match=message), tap.capture():
        model(torch.randn(4, 6, 2))
    with tap.capture():
        for length in (5, 6):  # the way out
            x = torch.randn(4, length, 2)
            model(x)
            torch.testing.assert_close(tap.take().embedding, model.norm(model.rnn(x)[0]).detach())
