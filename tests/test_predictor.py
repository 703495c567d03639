"""ResMemPredictor gives a module's own predictions, row by row, however Ray Data cuts the rows into batches."""

import gc
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from lightning_resmem import (
    InputError,
    LocalMemory,
    RayMemory,
    Regression,
    ResMemModule,
    ResMemParams,
    ResMemPredictor,
    StaleMemoryError,
    StorageError,
)
from tests.conftest import Digits


class Net(L.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Sequential(nn.Linear(64, 16), nn.ReLU()), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Pair(Net):
    """Reads two columns by name."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(torch.cat([left, right], dim=1))


def filled(base: Net, digits: Digits) -> LocalMemory:
    memory = LocalMemory(params=ResMemParams(k=7, sigma=0.5))
    with torch.no_grad():
        embeddings = base.body(digits.train.inputs)
        memory.add(embeddings, base.head(embeddings), digits.train.targets)
    return memory


@pytest.fixture
def saved(digits: Digits, tmp_path: Path) -> Path:
    base = Net()
    return ResMemModule(base, filled(base, digits), head="head").save(tmp_path / "resmem")


def batch_of(digits: Digits) -> dict[str, np.ndarray]:
    return {"row": np.arange(300), "pixels": digits.test.inputs.numpy()}


def test_adds_the_modules_predictions(saved: Path, digits: Digits) -> None:
    batch = batch_of(digits)
    expected = ResMemModule.load(saved, base=Net()).predictions(digits.test.inputs)
    found = ResMemPredictor(saved, Net, inputs="pixels", predictions=["base", "knn", "resmem"])(batch)
    assert list(found) == ["row", "pixels", "base", "knn", "resmem"]
    assert found["pixels"] is batch["pixels"]
    for name, scores in expected._asdict().items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], scores.detach().numpy())


def running() -> str:
    """The commands of all processes that this one has started."""
    commands = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ends, or has ended
            commands += child.cmdline()
    return " ".join(commands)


@pytest.mark.slow
def test_ray_data(saved: Path, digits: Digits, ray_address: str) -> None:
    import ray

    rows = [{"row": row, "pixels": pixels} for row, pixels in enumerate(digits.test.inputs.numpy())]
    scored = ray.data.from_items(rows, override_num_blocks=3).map_batches(
        ResMemPredictor,
        fn_constructor_kwargs={"memory": saved, "base": Net, "inputs": "pixels"},
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = sorted(scored.take_all(), key=lambda row: row["row"])
    assert [row["row"] for row in found] == list(range(300))
    expected = ResMemModule.load(saved, base=Net()).predictions(digits.test.inputs)
    for name in ("base", "resmem"):
        # Batches of other sizes round differently, in the last bits.
        scores = np.stack([row[name] for row in found])
        np.testing.assert_allclose(scores, getattr(expected, name).detach().numpy(), atol=1e-6)
    # Ray Data ends its actors when nothing refers to them, and takes its time.
    del scored
    gc.collect()
    deadline = time.monotonic() + 60
    while "ray::MapWorker" in running():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_labels(saved: Path, digits: Digits) -> None:
    scores = ResMemPredictor(saved, Net(), inputs="pixels")(batch_of(digits))
    labels = ResMemPredictor(saved, Net(), inputs="pixels", output="labels")(batch_of(digits))
    assert "knn" not in labels
    for name in ("base", "resmem"):
        assert labels[name].dtype == np.int64
        np.testing.assert_array_equal(labels[name], scores[name].argmax(axis=1))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_small_batches(saved: Path, digits: Digits, rows: int) -> None:
    batch = {name: column[:rows] for name, column in batch_of(digits).items()}
    assert ResMemPredictor(saved, Net, inputs="pixels")(batch)["resmem"].shape == (rows, 10)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_floats_are_given_in_the_models_precision(saved: Path, digits: Digits, dtype: Any) -> None:
    rounded = digits.test.inputs.numpy().astype(dtype)  # multiples of 1/16: exact
    predictor = ResMemPredictor(saved, Net, inputs="pixels")
    found, expected = predictor({"pixels": rounded}), predictor(batch_of(digits))
    np.testing.assert_array_equal(found["resmem"], expected["resmem"])


def test_arrays_that_cannot_be_written_to(saved: Path, digits: Digits, recwarn: pytest.WarningsRecorder) -> None:
    batch = {"pixels": digits.test.inputs.numpy().copy()}
    batch["pixels"].flags.writeable = False
    ResMemPredictor(saved, Net, inputs="pixels")(batch)
    assert not [warning for warning in recwarn if "writ" in str(warning.message)]


def test_several_columns_by_name(digits: Digits, saved: Path) -> None:
    left, right = (half.numpy() for half in digits.test.inputs.split(32, dim=1))
    predictor = ResMemPredictor(saved, Pair, inputs=["right", "left"])
    expected = ResMemPredictor(saved, Net, inputs="pixels")(batch_of(digits))
    np.testing.assert_array_equal(predictor({"left": left, "right": right})["resmem"], expected["resmem"])


def test_forward_fn_runs_the_base(saved: Path, digits: Digits) -> None:
    predictor = ResMemPredictor(saved, Net, inputs="pixels", forward_fn=lambda model, batch: model(batch / 16))
    found = predictor({"pixels": (digits.test.inputs.numpy() * 16).astype(np.uint8)})
    expected = ResMemPredictor(saved, Net, inputs="pixels")(batch_of(digits))
    np.testing.assert_array_equal(found["resmem"], expected["resmem"])


def test_memory_from_a_function(saved: Path, digits: Digits) -> None:
    predictor = ResMemPredictor(partial(LocalMemory.load, saved, mmap=True), Net, inputs="pixels")
    expected = ResMemPredictor(saved, Net, inputs="pixels")(batch_of(digits))
    np.testing.assert_array_equal(predictor(batch_of(digits))["resmem"], expected["resmem"])


@pytest.mark.slow
def test_memory_that_all_workers_ask(saved: Path, digits: Digits, ray_address: str) -> None:
    pool = RayMemory.load(saved, num_shards=1, name="predictor")
    try:
        predictor = ResMemPredictor(partial(RayMemory.connect, "predictor"), Net, inputs="pixels")
        found = predictor(batch_of(digits))["resmem"]
    finally:
        pool.shutdown()
    expected = ResMemPredictor(saved, Net, inputs="pixels")(batch_of(digits))
    np.testing.assert_allclose(found, expected["resmem"], atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": np.zeros((2, 64))}, r"no column 'pixels', it has \['image'\]"),
        ({"pixels": np.array([np.zeros(3), np.zeros(4)], dtype=object)}, "'pixels' is an array of object"),
        ({"pixels": np.array(["a"])}, "'pixels' is an array of <U1"),
        ({"pixels": np.full((2, 64), np.nan, dtype=np.float32)}, "NaN or infinite entries in rows 0, 1"),
        ({"pixels": np.zeros((2, 64)), "resmem": np.zeros(2)}, "a column 'resmem' already"),
    ],
)
def test_batches_that_cannot_be_scored(saved: Path, batch: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ResMemPredictor(saved, Net, inputs="pixels")(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": []}, r"inputs=\[\]"),
        ({"inputs": ["x", 1]}, "inputs="),
        ({"inputs": ""}, "inputs=''"),
        ({"inputs": None}, "inputs=None"),
        ({"base": "net.ckpt"}, "base is a str"),
        ({"memory": 5}, "5"),
        ({"predictions": []}, r"predictions=\[\]"),
        ({"predictions": "base"}, "predictions='base'"),
        ({"predictions": ["logits"]}, "predictions="),
        ({"output": "logits"}, "output='logits'"),
    ],
)
def test_arguments_are_checked(saved: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ResMemPredictor(**({"memory": saved, "base": Net, "inputs": "pixels"} | options))


def test_no_labels_in_regression() -> None:
    memory = LocalMemory(task=Regression(), params=ResMemParams(k=1))
    memory.add(torch.zeros(3, 16), torch.zeros(3, 10), torch.zeros(3, 10))
    with pytest.raises(InputError, match="is for Multiclass, the memory is for Regression"):
        ResMemPredictor(lambda: memory, Net, inputs="pixels", output="labels")


def test_other_weights_and_no_memory_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(StaleMemoryError):
        ResMemPredictor(saved, partial(Net, seed=1), inputs="pixels")
    with pytest.raises(StorageError):
        ResMemPredictor(tmp_path / "nothing", Net, inputs="pixels")


class Letters(L.LightningModule):
    """A label for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_labels_of_positions(tmp_path: Path) -> None:
    base, memory = Letters(), LocalMemory(params=ResMemParams(k=2, sigma=0.5))
    memory.add(torch.randn(20, 4), torch.randn(20, 5), torch.randint(5, (20,)))
    saved = ResMemModule(base, memory, head="head").save(tmp_path / "letters")
    tokens = {"tokens": np.arange(14).reshape(2, 7) % 7}
    scores = ResMemPredictor(saved, base, inputs="tokens")(tokens)["resmem"]
    labels = ResMemPredictor(saved, base, inputs="tokens", output="labels")(tokens)["resmem"]
    assert labels.shape == (2, 7)
    np.testing.assert_array_equal(labels, scores.argmax(axis=-1))


def dated() -> LocalMemory:
    """Three rows that are alike in everything but their labels, known from the moments 1, 2 and 3 on."""
    memory = LocalMemory(params=ResMemParams(k=3, sigma=0.5))
    memory.add(torch.ones(3, 16), torch.zeros(3, 10), torch.arange(3), times=torch.tensor([[0, 1], [1, 2], [2, 3]]))
    return memory


def test_a_query_recalls_what_was_known_when_it_was_asked(digits: Digits) -> None:
    base = Net()
    memory = dated()
    moments = np.array([0, 1, 2, 3], dtype=np.int32)
    moments.flags.writeable = False  # as those of Ray Data are
    batch = {"pixels": digits.test.inputs[:4].numpy(), "hour": moments}
    found = ResMemPredictor(lambda: memory, base, inputs="pixels", predictions=["base", "knn"], asked_at="hour")(batch)
    assert found["hour"] is moments
    wanted = [[1 / (row + 1) if label <= row else 0 for label in range(10)] for row in range(3)]
    np.testing.assert_allclose(found["knn"][1:], wanted, atol=1e-6)
    np.testing.assert_allclose(found["knn"][0], found["base"][0], atol=1e-6)  # nothing was known
    module = ResMemModule(base, memory, head="head")
    assert torch.equal(module.predictions(digits.test.inputs[:4], at=moments).knn, torch.tensor(found["knn"]))
    explained = module.explain(digits.test.inputs[:4], at=moments)
    assert explained.neighbors.ids[1].tolist()[:2] == [0, -1]
    with pytest.raises(InputError, match="column 'hour'"):
        ResMemPredictor(lambda: memory, base, inputs="pixels", asked_at="hour")({"pixels": batch["pixels"]})


def test_no_ids_are_fetched_to_tell_whether_rows_have_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LocalMemory, "ids")  # of a memory in shards they are millions from all of them
    ResMemPredictor(dated, Net, inputs="pixels", asked_at="hour")


def test_times_are_given_where_the_memory_has_them(saved: Path) -> None:
    memory = dated()
    with pytest.raises(InputError, match='give the name of the column with the times, asked_at="hour"'):
        ResMemPredictor(lambda: memory, Net, inputs="pixels")
    with pytest.raises(InputError, match="asked_at='hour', but the rows of this memory have no times"):
        ResMemPredictor(saved, Net, inputs="pixels", asked_at="hour")
    with pytest.raises(InputError, match="asked_at=3"):
        ResMemPredictor(lambda: memory, Net, inputs="pixels", asked_at=3)  # type: ignore[arg-type]
