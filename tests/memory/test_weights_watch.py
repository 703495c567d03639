"""Weights that change after they were checked: by hooks, by other callbacks, by the step itself."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_resmem import ResMemCallback, ResMemModule, StaleMemoryError
from tests.models import CallsSelf, Data, NormAndDropout, Spy, hooks_on, make, memory_for, trainer


def spoil(model):
    model.body[0].weight.data.add_(0.5)  # torch counts no change of `.data`


class Changing(CallsSelf):
    """Its weights change where a test says so."""

    when = ""

    def on_test_start(self):
        self.change("on_test_start")

    def on_test_batch_start(self, *args):
        self.change("on_test_batch_start")

    def on_test_batch_end(self, *args):
        self.change("on_test_batch_end")

    def on_predict_batch_start(self, *args):
        self.change("on_predict_batch_start")

    def on_predict_batch_end(self, *args):
        self.change("on_predict_batch_end")

    def test_step(self, batch, batch_idx):
        self.change("test_step")
        super().test_step(batch, batch_idx)
        self.change("test_step, afterwards")

    def change(self, when):
        if when == self.when:
            spoil(self)


def fitted(tmp_path, *callbacks, kind=Changing, **options):
    data, model, resmem = Data(), make(kind), ResMemCallback(memory_for(CallsSelf))
    run = trainer(tmp_path, resmem, *callbacks, **options)
    run.fit(model, datamodule=data)
    return run, model, data, resmem


@pytest.mark.parametrize(
    "when", ["on_test_start", "on_test_batch_start", "test_step", "test_step, afterwards", "on_test_batch_end"]
)
def test_a_run_whose_model_changes_itself_reports_nothing(when, tmp_path):
    run, model, data, resmem = fitted(tmp_path, logger=CSVLogger(tmp_path))
    model.when = when
    with pytest.raises(StaleMemoryError, match=r"^trainer\.test runs, since .* changed them.*memorize\(trainer, model"):
        run.test(model, datamodule=data, verbose=False)
    run.logger.finalize("failed")
    assert "test" not in "".join(file.read_text() for file in tmp_path.rglob("metrics.csv"))
    assert resmem.evaluations == ()
    assert hooks_on(model) == 0


@pytest.mark.parametrize("when", ["on_predict_batch_start", "on_predict_batch_end"])
def test_predictions_of_a_model_that_changes_itself_are_not_returned(when, tmp_path):
    run, model, data, _ = fitted(tmp_path)
    model.when = when
    with pytest.raises(StaleMemoryError, match=r"^trainer\.predict runs, since"):
        run.predict(model, datamodule=data)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("hook", ["on_test_start", "on_test_epoch_start", "on_test_batch_start", "on_test_batch_end"])
@pytest.mark.parametrize("combined", [False, True], ids=["callback", "module"])
def test_a_later_callback_that_changes_the_weights(hook, combined, tmp_path):
    run, model, data, resmem = fitted(tmp_path)
    module = resmem.module if combined else model
    run.callbacks.append(Spy(hook, lambda *_: spoil(model)))
    with pytest.raises(StaleMemoryError):
        run.test(module, datamodule=data, verbose=False)
    assert not any(name.startswith("test/acc") for name in run.callback_metrics)


@pytest.mark.parametrize("hook", ["on_predict_start", "on_predict_batch_start", "on_predict_batch_end"])
def test_a_module_whose_base_changes_returns_no_predictions(hook, tmp_path):
    run, model, data, resmem = fitted(tmp_path)
    run.callbacks.append(Spy(hook, lambda *_: spoil(model)))
    with pytest.raises(StaleMemoryError, match=r"^ResMemModule runs"):
        run.predict(resmem.module, datamodule=data)


def test_statistics_that_a_step_refreshes_are_noticed(tmp_path):
    class Adapts(NormAndDropout):
        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            self.body[1].train()
            self.body(batch[0])
            self.body[1].eval()

    run, model, data, _ = fitted(tmp_path, kind=Adapts)
    with pytest.raises(StaleMemoryError):
        run.test(model, datamodule=data, verbose=False)


def test_what_a_step_counts_does_not_matter(tmp_path):
    class Counts(CallsSelf):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            self.seen += len(batch[0])

    run, model, data, _ = fitted(tmp_path, kind=Counts)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    assert model.seen == 50
    assert "test/acc_resmem" in logged


def test_a_run_after_one_that_failed_is_right_again(tmp_path):
    run, model, data, resmem = fitted(tmp_path)
    before = run.test(model, datamodule=data, verbose=False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    module, model.when = resmem.module, "test_step"
    with pytest.raises(StaleMemoryError):
        run.test(model, datamodule=data, verbose=False)
    model.when = ""
    model.load_state_dict(weights)
    assert run.test(model, datamodule=data, verbose=False) == before
    assert isinstance(module, ResMemModule)
    (logged,) = run.test(module, datamodule=data, verbose=False)
    assert logged["test/acc_resmem"] == before[0]["test/acc_resmem"]
