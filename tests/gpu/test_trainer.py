"""The callback and its module under a Trainer on a GPU: every precision, ddp, torch.compile, explanations, saving."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from lightning_resmem import LocalMemory, ResMemCallback, ResMemModule, ResMemParams
from lightning_resmem.model.fingerprint import fingerprint
from tests.models import CallsSelf, Data

pytestmark = pytest.mark.gpu

ACCELERATOR = "gpu"
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]


def trainer_of(root: Path, callback: ResMemCallback, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options = {"devices": 1, "max_epochs": 2, "num_sanity_val_steps": 0} | quiet | options
    return L.Trainer(accelerator=ACCELERATOR, default_root_dir=root, callbacks=[callback], **options)


def memorizing() -> ResMemCallback:
    return ResMemCallback(LocalMemory(params=ResMemParams(k=1, sigma=0.1)))


def check_run(root: Path, model: CallsSelf, **options: Any) -> ResMemCallback:
    """Fit and test; the memory is on the GPU, and the model's own step scores what ResMem scores."""
    callback, data = memorizing(), Data()
    trainer = trainer_of(root, callback, **options)
    trainer.fit(model, data)
    assert callback.memory.device.type == trainer.strategy.root_device.type
    assert len(callback.memory) == len(data.train[0])
    [scores] = trainer.test(model, data, verbose=False)
    assert scores["test_score"] == pytest.approx(scores["test/acc_resmem"], abs=1e-6)
    assert scores["test/acc_resmem"] > scores["test/acc_base"]  # the memory is good at these data
    predicted = torch.cat(trainer.predict(model, data))
    assert predicted.argmax(dim=1).cpu().eq(data.test[1]).float().mean() == pytest.approx(
        scores["test_score"], abs=1e-6
    )
    return callback


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fit_test_explain_and_save(precision: str, tmp_path: Path) -> None:
    model, data = CallsSelf(), Data()
    callback = check_run(tmp_path, model, precision=precision)
    module = callback.module
    batch = next(iter(data.test_dataloader()))
    dtype = next(model.parameters()).dtype
    inputs = batch[0].to(dtype)
    for place in ("cuda", "cpu", None):  # None: the base alone, which the wrapper is not told of
        module.base.to("cuda") if place is None else module.to(place)
        explanation = module.explain((inputs, batch[1]), top=1)
        assert len(explanation) == len(inputs)
        assert module.device == next(model.parameters()).device
        assert all(part.device.type == "cpu" for part in explanation.predictions)
    callback.memory.to("cuda")
    module.save(tmp_path / "saved")
    loaded = ResMemModule.load(tmp_path / "saved", base=model)
    assert loaded.memory.device.type == "cpu"
    there = inputs.to(loaded.device)
    torch.testing.assert_close(loaded(there), module(there), rtol=1e-4, atol=1e-4)
    tester = trainer_of(tmp_path, memorizing(), precision=precision)
    tester.callbacks.clear()
    [scores] = tester.test(loaded, data, verbose=False)
    assert scores["test/acc_resmem"] > scores["test/acc_base"]


def test_a_module_moves_to_a_gpu_and_back() -> None:
    model, data = CallsSelf(), Data()
    inputs, targets = data.train
    memory = LocalMemory(params=ResMemParams(k=3, sigma=0.5))
    with torch.no_grad():
        keys = model.body(inputs)
        memory.add(keys, model.head(keys), targets)
    memory.provenance["fingerprint"] = fingerprint(model)
    module = ResMemModule(model, memory, head="head")
    expected = module(inputs)
    module.to("cuda")
    assert module.device.type == memory.device.type == "cuda"
    assert fingerprint(model) == memory.provenance["fingerprint"]
    torch.testing.assert_close(module(inputs.to("cuda")).cpu(), expected, rtol=0, atol=1e-4)
    module.to("cpu")
    assert torch.equal(module(inputs), expected)


def test_tuned_on_the_gpu(tmp_path: Path) -> None:
    callback, data = ResMemCallback(), Data()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(CallsSelf(), data)
    assert callback.memory.device.type == trainer.strategy.root_device.type
    assert callback.memory.params.strength > 0


def test_ddp_with_one_rank(tmp_path: Path) -> None:
    check_run(tmp_path, CallsSelf(), strategy="ddp")
    torch.distributed.destroy_process_group()


def test_compiled_parts(tmp_path: Path) -> None:
    model = CallsSelf()
    model.body = torch.compile(model.body)
    check_run(tmp_path, model)


def test_an_index_of_faiss_stays_where_it_is(tmp_path: Path) -> None:
    pytest.importorskip("faiss", exc_type=Exception)
    callback, data = ResMemCallback(LocalMemory(params=ResMemParams(k=1, sigma=0.1), index="HNSW8")), Data()
    trainer, model = trainer_of(tmp_path, callback), CallsSelf()
    trainer.fit(model, data)
    assert callback.memory.device.type == "cpu"
    [scores] = trainer.test(model, data, verbose=False)
    assert scores["test/acc_resmem"] > scores["test/acc_base"]
