"""Rows that are NaN or infinite, or whose label the loss ignores: out of the memory and of tuning, and counted."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import GridTuner, InputError, LocalMemory, Regression, ResMemCallback, ResMemWarning, memorize
from lightning_resmem.reporting.summary import evaluation_summary
from tests.models import CallsSelf, Numbers, Spy, make, memory_for, rows, trainer


def loader(inputs, targets, *bad):
    """A loader of which these rows are NaN."""
    inputs = inputs.clone()
    inputs[list(bad)] = torch.nan
    return DataLoader(TensorDataset(inputs, targets), batch_size=16)


def warned_by(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, ResMemWarning) and "left out" in str(w.message)]


def test_a_few_of_the_training_and_validation_rows(tmp_path):
    train, val, model = rows(300, 1), rows(200, 2), make(CallsSelf)
    clean = memorize(trainer(tmp_path), model, loader(*train), loader(*val)).memory
    kept = [row for row in range(300) if row not in (0, 1, 299)]
    found = []
    warned = warned_by(
        lambda: found.append(memorize(trainer(tmp_path), model, loader(*train, 0, 1, 299), loader(*val, 7)).memory)
    )
    assert [text.split(". Look")[0] for text in warned] == [
        "ResMem: 3 of 300 training rows are left out: embeddings has NaN or infinite entries in rows 0, 1, 299 of "
        "TensorDataset",
        "ResMem: 1 of 200 validation rows are left out: embeddings has NaN or infinite entries in rows 7 of "
        "TensorDataset",
    ]
    (memory,) = found
    assert memory.ids.tolist() == kept
    clean.remove(torch.tensor([0, 1, 299]))
    queries, outputs = torch.rand(9, 5), torch.randn(9, 4)
    memory.params = clean.params
    torch.testing.assert_close(memory.predict(queries, outputs), clean.predict(queries, outputs))


def test_too_many_validation_rows_are_an_error_that_says_which(tmp_path):
    with pytest.raises(InputError, match=r"3 of 40 validation rows cannot be used.*in rows 4, 9, 30 of TensorDataset"):
        memorize(trainer(tmp_path), make(CallsSelf), loader(*rows(120, 1)), loader(*rows(40, 2), 4, 9, 30))


def test_positions_are_those_in_each_data_set(tmp_path):
    loaders = [loader(*rows(150, 1), 20), loader(*rows(150, 2), 40)]
    (warned,) = warned_by(lambda: memorize(trainer(tmp_path), make(CallsSelf), loaders, memory=memory_for(CallsSelf)))
    assert "in rows 20 of TensorDataset (loader 1 of 2)" in warned
    assert "in rows 40 of TensorDataset (loader 2 of 2)" in warned


def test_targets_of_a_regression(tmp_path):
    inputs, targets = rows(200, 1, "regression")
    targets[3, 1] = torch.inf
    memory, model = LocalMemory(Regression()), make(Numbers)
    (warned,) = warned_by(lambda: memorize(trainer(tmp_path), model, loader(inputs, targets), memory=memory))
    assert "targets has NaN or infinite entries in rows 3 of TensorDataset" in warned
    assert len(memory) == 199


def filled(root, model):
    callback = ResMemCallback(memory_for(CallsSelf))
    trainer(root, callback, limit_val_batches=0).fit(model, loader(*rows(300, 1)))
    return callback


def test_the_base_answers_them_in_test_and_predict(tmp_path):
    model, (inputs, targets) = make(CallsSelf), rows(50, 3)
    callback = filled(tmp_path, model)
    run = trainer(tmp_path, callback)
    clean = torch.cat(run.predict(model, loader(inputs, targets)))
    answered = torch.cat(run.predict(model, loader(inputs, targets, 3, 40)))
    others = [row for row in range(50) if row not in (3, 40)]
    assert torch.equal(answered[others], clean[others])
    assert answered[[3, 40]].isnan().all()  # as the base's own

    run.test(model, loader(inputs[others], targets[others]), verbose=False)
    expected = callback.evaluation
    run.test(model, loader(inputs, targets, 3, 40), verbose=False)
    found = callback.evaluation
    assert (found.rows, found.left_out) == (48, 2)
    assert (expected.rows, expected.left_out) == (48, 0)
    assert found.scores == pytest.approx(expected.scores, nan_ok=True)
    assert [flip.position for flip in found.flips] == [others[flip.position] for flip in expected.flips]
    assert any(flip.position > 3 for flip in found.flips)
    lines = [str(line) for line in evaluation_summary(found, callback.memory.stats())]
    assert "2 rows with NaN or infinite values: answered by the base alone, not scored" in lines

    combined = callback.module
    logits = combined(inputs.index_fill(0, torch.tensor([3, 40]), torch.nan))
    assert torch.equal(logits[others], combined(inputs)[others])
    predicted = torch.cat(trainer(tmp_path).predict(combined, loader(inputs, targets, 3, 40)))
    assert predicted[others].isfinite().all()
    trainer(tmp_path).test(combined, loader(inputs, targets, 3, 40), verbose=False)
    assert (combined.evaluations[0].rows, combined.evaluations[0].left_out) == (48, 2)


def test_what_the_base_says_of_an_embedding_that_is_infinite(tmp_path):
    """A head that can do with it answers as without a memory."""

    class Clamped(nn.Linear):
        def forward(self, x):
            return super().forward(x.clamp(-10, 10))

    class Net(CallsSelf):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Identity(), Clamped(4, 4)

    model, (inputs, targets) = make(Net), rows(40, 3)
    callback = filled(tmp_path, model)
    inputs[5] = torch.inf
    answered = torch.cat(trainer(tmp_path, callback).predict(model, loader(inputs, targets)))
    alone = torch.cat(trainer(tmp_path).predict(model, loader(inputs, targets)))
    assert torch.equal(answered[5], alone[5])
    assert not torch.equal(answered[4], alone[4])


def test_a_batch_of_nothing_else(tmp_path):
    model, (inputs, targets) = make(CallsSelf), rows(48, 3)
    callback = filled(tmp_path, model)
    run = trainer(tmp_path, callback)
    run.test(model, loader(inputs, targets, *range(16)), verbose=False)
    assert (callback.evaluation.rows, callback.evaluation.left_out) == (32, 16)


def test_the_first_rows_may_be_bad(tmp_path):
    """They are what is tried before training, which has not diverged for that."""
    callback = ResMemCallback(memory_for(CallsSelf))
    model = make(CallsSelf)
    model.loss = lambda outputs, targets: nn.functional.cross_entropy(outputs.nan_to_num(), targets)
    model.on_before_optimizer_step = lambda _: [p.grad.nan_to_num_() for p in model.parameters()]
    warned = warned_by(lambda: trainer(tmp_path, callback, limit_val_batches=0).fit(model, loader(*rows(300, 1), 0, 1)))
    assert len(warned) == 1
    assert callback.memory.ids.tolist() == list(range(2, 300))


class Ignores(CallsSelf):
    """Its loss, a module, ignores a label of its own."""

    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(ignore_index=255)

    def loss(self, outputs, targets):
        return self.criterion(outputs, targets)


def relabelled(data, label, *bad):
    """A loader of which these rows have this label."""
    inputs, targets = data
    targets = targets.clone()
    targets[list(bad)] = label
    return DataLoader(TensorDataset(inputs, targets), batch_size=16)


@pytest.mark.parametrize(("kind", "label"), [(CallsSelf, -100), (Ignores, 255)])
def test_rows_whose_label_the_loss_ignores(kind, label, tmp_path):
    """Also the first ones, and more of them than may be NaN."""
    train, val, test = rows(100, 1), rows(40, 2), rows(50, 3)
    ignored = (0, 1, *range(60, 80), 99)
    kept = [row for row in range(100) if row not in ignored]
    model, callback = make(kind), ResMemCallback(tuner=GridTuner(k=[5], refinements=0))
    run = trainer(tmp_path, callback)
    warned = warned_by(lambda: run.fit(model, relabelled(train, label, *ignored), relabelled(val, label, 7)))
    assert warned == [
        "ResMem: 23 of 100 training rows are left out, as the loss ignores their label: "
        "rows 0, 1, 60, 61, 62 and 18 more of TensorDataset.",
        "ResMem: 1 of 40 validation rows are left out, as the loss ignores their label: rows 7 of TensorDataset.",
    ]
    assert callback.memory.ids.tolist() == kept
    assert callback.tuning.rows == 39

    others = [row for row in range(50) if row not in (3, 40)]
    run.test(model, DataLoader(TensorDataset(test[0][others], test[1][others]), batch_size=16), verbose=False)
    expected = callback.evaluation
    run.test(model, relabelled(test, label, 3, 40), verbose=False)
    found = callback.evaluation
    assert (found.rows, found.ignored, found.left_out) == (48, 2, 0)
    assert found.scores == pytest.approx(expected.scores, nan_ok=True)
    lines = [str(line) for line in evaluation_summary(found, callback.memory.stats())]
    assert "2 rows whose label the loss ignores: not scored" in lines
    combined = callback.module
    trainer(tmp_path).test(combined, relabelled(test, label, 3, 40), verbose=False)
    assert (combined.evaluations[0].rows, combined.evaluations[0].ignored) == (48, 2)


@pytest.mark.parametrize("label", [-1, 4, 255])
def test_other_labels_that_are_no_class_are_refused_by_dataset_and_position(label, tmp_path):
    loaders = [DataLoader(TensorDataset(*rows(60, 1)), batch_size=16), relabelled(rows(60, 2), label, 40, 41)]
    said = rf"In TensorDataset \(loader 2 of 2\): targets holds {label} in rows 40, 41, outside \[0, 4\)"
    with pytest.raises(InputError, match=rf"{said}.*ignore_index={label}\)"):
        memorize(trainer(tmp_path), make(CallsSelf), loaders, memory=memory_for(CallsSelf))
    with pytest.raises(
        InputError, match=rf"In the validation rows of TensorDataset: targets holds {label} in rows 9, "
    ):
        memorize(
            trainer(tmp_path),
            make(CallsSelf),
            DataLoader(TensorDataset(*rows(60, 1))),
            relabelled(rows(60, 2), label, 9),
        )
    hints = r"give targets_fn=lambda batch: .*\(The head that was found is 'head': if another .* head=\.\)"
    with pytest.raises(InputError, match=rf"in rows 1, .*{hints}"):
        memorize(trainer(tmp_path), make(CallsSelf), relabelled(rows(60, 2), label, 1))


def test_labels_that_are_no_class_in_the_first_step(tmp_path):
    """Beyond the rows that are read before training."""

    class Masks(CallsSelf):
        def loss(self, outputs, targets):
            return nn.functional.cross_entropy(outputs, targets, ignore_index=-1)

    steps = []
    spy = Spy("on_train_batch_end", lambda *_: steps.append(1))
    with pytest.raises(InputError, match=r"first training step: targets holds -1 in rows 10, 15, .*ignore_index=-1"):
        trainer(tmp_path, spy, ResMemCallback(memory_for(Masks))).fit(make(Masks), relabelled(rows(60, 1), -1, 10, 15))
    assert not steps
    labelled = DataLoader(TensorDataset(*rows(60, 1)), batch_size=16)  # others are memorized
    callback = ResMemCallback(memory_for(Masks), memory_dataloader=labelled)
    trainer(tmp_path, callback).fit(make(Masks), relabelled(rows(60, 1), -1, 10, 15))
    assert len(callback.memory) == 60


def test_a_label_that_is_a_class_is_memorized(tmp_path):
    """Another of the model's losses may ignore it."""
    model = make(Ignores)
    model.criterion.ignore_index = 0
    inputs, targets = rows(60, 1)
    memory = memorize(trainer(tmp_path), model, loader(inputs, targets), memory=memory_for(Ignores)).memory
    assert len(memory) == 60
