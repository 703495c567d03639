"""Evaluation mode is put on and taken off by the modules' own `train`, and nothing of it is left."""

import pytest
import torch
from torch import nn

from lightning_resmem import ResMemCallback, ResMemModule, StaleMemoryError, memorize
from lightning_resmem.model.fingerprint import buffer_sums, fingerprint
from lightning_resmem.model.modes import evaluating, evaluation_mode
from tests.models import CallsSelf, Data, Trained, hooks_on, make, memory_for, same_weights, trainer, weights_of


class Adapted(nn.Linear):
    """A linear layer with a low-rank adapter, which evaluation merges into its weights, as adapter libraries do it."""

    def __init__(self, width, outputs):
        super().__init__(width, outputs)
        self.down, self.up = nn.Parameter(torch.randn(1, width) / 3), nn.Parameter(torch.randn(outputs, 1) / 3)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.merged = not mode
            self.weight.data += (1 if self.merged else -1) * (self.up.data @ self.down.data)
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class WithAdapter(CallsSelf):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Adapted(4, 5), nn.ReLU())

    def on_validation_model_train(self):
        self.train()  # without it, the trainer restores flags alone


class Noisy(CallsSelf):
    """Noise is switched on and off by `train`, and by nothing else."""

    noise = 0.5

    def train(self, mode=True):
        self.noise = 0.5 if mode else 0.0
        return super().train(mode)

    def forward(self, x):
        hidden = self.body(x)
        return self.head(hidden + self.noise * torch.randn_like(hidden))


class Frozen(CallsSelf):
    """A part stays in evaluation mode, as one freezes a backbone."""

    def train(self, mode=True):
        super().train(mode)
        self.body.eval()
        return self


class Counts(CallsSelf):
    """Counts the rows it has evaluated, and keeps their range, as observers do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("largest", torch.tensor(0.0))

    def forward(self, x):
        if not self.training:
            self.seen += len(x)
            self.largest.copy_(torch.maximum(self.largest, x.abs().max() + self.seen))
        return super().forward(x)


@pytest.mark.parametrize("seed", range(5))
def test_the_modules_own_train_is_called_and_weights_are_put_back_to_the_bit(seed):
    model, x = make(WithAdapter, seed).train(), torch.randn(20, 4)
    before, expected = weights_of(model), model(x)
    for _ in range(3):
        with evaluation_mode(model):
            assert model.body[0].merged
            assert not any(module.training for module in model.modules())
            torch.testing.assert_close(model(x), expected)
        assert not model.body[0].merged
        assert all(module.training for module in model.modules())
        assert same_weights(weights_of(model), before)


def test_the_example_needs_it():
    """Merging and taking out again is not exact: some weights differ in their last bit."""
    changed = []
    for seed in range(5):
        model = make(WithAdapter, seed).train()
        before = weights_of(model)
        model.eval()
        model.train()
        changed.append(not same_weights(weights_of(model), before))
    assert any(changed)


def test_flags_alone_are_left_as_they_were_found():
    """As after a validation in fit: merged, with the flags of training."""
    model = make(WithAdapter).train()
    model.eval()
    for module in model.modules():
        module.training = True
    before = weights_of(model)
    with evaluating(model):
        assert same_weights(weights_of(model), before)
    assert model.body[0].merged
    assert all(module.training for module in model.modules())
    assert same_weights(weights_of(model), before)


def test_modules_in_modes_of_their_own_are_restored_by_their_own_train():
    model = make(WithAdapter).train()
    model.body[0].eval()
    assert model.body[0].merged
    with evaluating(model):
        assert not model.training
    assert model.training
    assert not model.body[0].training
    assert model.body[0].merged
    frozen = make(Frozen).train()
    with evaluating(frozen):
        pass
    assert [module.training for module in frozen.modules()] == [True, False, False, False, True]


def test_a_failure_restores_as_well():
    model = make(Noisy).train()
    with pytest.raises(ValueError, match="stop"), evaluation_mode(model):
        raise ValueError("stop" if model.noise == 0 else "noisy")
    assert model.noise == 0.5


class Unhealed(WithAdapter):
    """Without the hook that such a model needs in a trainer."""

    def on_validation_model_train(self):
        for module in self.modules():
            module.training = True


@pytest.mark.parametrize("kind", [WithAdapter, Noisy, Frozen])
def test_fit_is_the_same_with_and_without_us(kind, tmp_path):
    found = []
    for callbacks in ([], [ResMemCallback(memory_for(kind))]):
        model = make(kind)
        torch.manual_seed(1)
        trainer(tmp_path, *callbacks, max_epochs=2, limit_val_batches=0).fit(model, datamodule=Data())
        found.append(weights_of(model))
    assert same_weights(*found)


@pytest.mark.parametrize("kind", [WithAdapter, Unhealed, Noisy])
def test_pass_fingerprint_and_answers_are_those_of_evaluation(kind, tmp_path):
    data, model = Data(), make(kind)
    callback = ResMemCallback(memory_for(kind))
    run = trainer(tmp_path, callback)
    run.fit(model, datamodule=data)
    model.eval()
    keys = model.body(data.train[0]).detach()
    torch.testing.assert_close(callback.memory.search(keys, 1).distances, torch.zeros(120, 1), rtol=0, atol=1e-5)
    wanted = Trained(model).predict(data.train, data.test[0], callback.memory.params)
    answers = []
    for mode in (True, False, True):
        answers.append(callback.module.train(mode).predictions(data.test).resmem)
        assert all(module.training == mode for module in model.modules())
    for answer in answers:
        torch.testing.assert_close(answer, torch.as_tensor(wanted.resmem, dtype=answer.dtype), rtol=1e-4, atol=1e-5)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == logged["test/acc_resmem"]
    assert hooks_on(model) == 0


def test_the_mode_does_not_count_in_the_fingerprint():
    model = make(WithAdapter).train()
    before = fingerprint(model)
    assert fingerprint(model.eval()) == before
    assert fingerprint(make(WithAdapter).train()) == before
    model.body[0].up.data += 1
    assert fingerprint(model) != before


def test_state_that_evaluation_changes_does_not_make_a_memory_stale(tmp_path):
    data, model = Data(), make(Counts)
    callback = ResMemCallback(memory_for(Counts))
    run = trainer(tmp_path, callback)
    run.fit(model, datamodule=data)
    assert callback.memory.provenance["ignored"] == '["largest", "seen"]'
    seen = int(model.seen)
    for _ in range(2):
        (logged,) = run.test(model, datamodule=data, verbose=False)
    assert int(model.seen) == seen + 100
    callback.module.save(tmp_path / "resmem")
    model(data.test[0])
    loaded = ResMemModule.load(tmp_path / "resmem", model)
    (again,) = trainer(tmp_path).test(loaded, datamodule=data, verbose=False)
    assert again["test/acc_resmem"] == logged["test/acc_resmem"]
    loaded.save(tmp_path / "again")
    assert ResMemModule.load(tmp_path / "again", model).memory.provenance["ignored"] == '["largest", "seen"]'
    model.head.bias.data += 1
    with pytest.raises(StaleMemoryError, match=r"Different are head\.bias"):
        run.test(model, datamodule=data, verbose=False)


def test_only_what_the_pass_changed_is_ignored(tmp_path):
    model = make(Counts)
    assert sorted(buffer_sums(model)) == ["largest", "seen"]
    resmem = memorize(trainer(tmp_path), make(CallsSelf), Data(), memory=memory_for(CallsSelf))
    assert "ignored" not in resmem.memory.provenance
