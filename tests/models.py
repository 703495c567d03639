"""Small models, written the ways users write them, and data that a memory is good at.

All of them are a `body` and a `head`, and log `{stage}_score` (accuracy, or mean squared error) and `{stage}_loss`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_resmem import LocalMemory, ResMemParams
from lightning_resmem.tasks import TASKS
from tests import oracle

WIDTH, CLASSES = 4, 4


def rows(count: int, seed: int, task: str = "multiclass") -> tuple[Tensor, Tensor]:
    """Inputs `(count, 4)` and targets: classes in a chequered plane, where neighbours know more than a line does."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(count, WIDTH, generator=generator) * 4 - 2
    cells = inputs[:, :2].floor().long() + 2
    classes = (cells[:, 0] + 2 * cells[:, 1]) % CLASSES
    if task == "multilabel":
        return inputs, F.one_hot(classes, CLASSES).float()
    if task == "regression":
        return inputs, torch.stack([classes.float(), inputs.square().sum(dim=1)], dim=1)
    return inputs, classes


def num_outputs(task: str) -> int:
    return 2 if task == "regression" else CLASSES


class AsDicts(Dataset):
    """Rows as dicts, as HF datasets yield them."""

    def __init__(self, inputs: Tensor, targets: Tensor, target_key: str = "labels") -> None:
        self.inputs, self.targets, self.target_key = inputs, targets, target_key

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"x": self.inputs[row], self.target_key: self.targets[row]}


class Data(L.LightningDataModule):
    """120 training, 40 validation and 50 test rows; `train` and so on are the tensors."""

    def __init__(self, task: str = "multiclass", as_dicts: bool = False, batch_size: int = 16) -> None:
        super().__init__()
        self.train, self.val, self.test = rows(120, 1, task), rows(40, 2, task), rows(50, 3, task)
        self.as_dicts, self.batch_size = as_dicts, batch_size

    def loader(self, part: tuple[Tensor, Tensor], **options: Any) -> DataLoader:
        dataset = AsDicts(*part) if self.as_dicts else TensorDataset(*part)
        return DataLoader(dataset, **({"batch_size": self.batch_size} | options))

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.train, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.val)

    def test_dataloader(self) -> DataLoader:
        return self.loader(self.test)

    def predict_dataloader(self) -> DataLoader:
        return self.loader(self.test)


class CallsSelf(L.LightningModule):
    """Its steps call `self(x)`."""

    task = "multiclass"

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.body = nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU())
        self.head = nn.Linear(5, num_outputs(self.task))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))

    def outputs(self, batch: Any) -> Tensor:
        return self(batch[0])

    def targets(self, batch: Any) -> Tensor:
        return batch[1]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(dim=1) == targets).float().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.outputs(batch), self.targets(batch))

    def evaluate(self, batch: Any, stage: str) -> None:
        outputs, targets = self.outputs(batch), self.targets(batch)
        size = len(targets)
        self.log(f"{stage}_score", self.score(outputs, targets), batch_size=size, on_epoch=True)
        self.log(f"{stage}_loss", self.loss(outputs, targets), batch_size=size, on_epoch=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.outputs(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class CallsParts(CallsSelf):
    """Has a forward, which its steps do not use."""

    def outputs(self, batch: Any) -> Tensor:
        return self.head(self.body(batch[0]))


class NoForward(L.LightningModule):
    """No forward at all; steps return the loss."""

    task = "multiclass"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU())
        self.head = nn.Linear(5, CLASSES)

    def step(self, batch: Any, stage: str) -> Tensor:
        x, y = batch
        logits = self.head(self.body(x))
        loss = F.cross_entropy(logits, y)
        self.log(f"{stage}_score", (logits.argmax(dim=1) == y).float().mean(), batch_size=len(y), on_epoch=True)
        self.log(f"{stage}_loss", loss, batch_size=len(y), on_epoch=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.body(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class WithMetrics(CallsSelf):
    """torchmetrics as attributes, logged as objects."""

    def __init__(self) -> None:
        super().__init__()
        self.val_score = MulticlassAccuracy(CLASSES, average="micro")
        self.test_score = MulticlassAccuracy(CLASSES, average="micro")

    def evaluate(self, batch: Any, stage: str) -> None:
        x, y = batch
        logits = self(x)
        metric = getattr(self, f"{stage}_score")
        metric(logits, y)
        self.log(f"{stage}_score", metric, on_step=False, on_epoch=True)
        self.log(f"{stage}_loss", F.cross_entropy(logits, y), batch_size=len(y), on_epoch=True)


@dataclass
class Output:
    """What HF models return."""

    logits: Tensor
    hidden: Tensor


class ReturnsDataclass(CallsSelf):
    def forward(self, x: Tensor) -> Output:
        hidden = self.body(x)
        return Output(self.head(hidden), hidden)

    def outputs(self, batch: Any) -> Tensor:
        return self(batch[0]).logits


class ReturnsDict(CallsSelf):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"hidden": hidden, "logits": self.head(hidden)}

    def outputs(self, batch: Any) -> Tensor:
        return self(batch[0])["logits"]


class LogSoftmax(CallsSelf):
    """Returns log-probabilities, trained with `nll_loss`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).log_softmax(dim=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(outputs, targets)


class DictBatches(CallsSelf):
    def outputs(self, batch: Any) -> Tensor:
        return self(batch["x"])

    def targets(self, batch: Any) -> Tensor:
        return batch["labels"]


class ManyLabels(CallsSelf):
    task = "multilabel"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs >= 0) == (targets >= 0.5)).float().mean()


class Embeds(CallsSelf):
    """`forward` returns an embedding, and the steps call the head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.body(x)

    def outputs(self, batch):
        return self.head(self(batch[0]))


class Numbers(CallsSelf):
    task = "regression"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    score = loss


class Flat(CallsSelf):
    """One number for each row, in outputs of shape `(N,)`."""

    task = "regression"

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, x):
        return super().forward(x).squeeze(1)


class NormAndDropout(CallsSelf):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3))


ZOO: list[type[L.LightningModule]] = [
    CallsSelf,
    CallsParts,
    NoForward,
    WithMetrics,
    ReturnsDataclass,
    ReturnsDict,
    LogSoftmax,
    DictBatches,
    ManyLabels,
    Numbers,
    NormAndDropout,
]


def data_for(model: type[L.LightningModule] | L.LightningModule) -> Data:
    kind = model if isinstance(model, type) else type(model)
    return Data(kind.task, as_dicts=kind is DictBatches)


def make(kind: type[L.LightningModule], seed: int = 0) -> L.LightningModule:
    torch.manual_seed(seed)
    return kind()


def memory_for(kind: type[L.LightningModule]) -> LocalMemory:
    """Given params, so that nothing is tuned and the memory changes many predictions."""
    return LocalMemory(TASKS[kind.task](), ResMemParams(k=5, sigma=0.2))


def trainer(root: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU that writes nothing of its own."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
    }
    return L.Trainer(callbacks=list(callbacks), **(quiet | options))


class Trained:
    """A model's embeddings and outputs, computed beside the package, for the oracle."""

    def __init__(self, model: L.LightningModule) -> None:
        self.model, self.task = model, model.task

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            keys = self.model.body(inputs)
            outputs = self.model.head(keys)
        self.model.train(training)
        return keys, outputs

    def predict(
        self, train: tuple[Tensor, Tensor], inputs: Tensor, params: ResMemParams, ids: Sequence[int] | None = None
    ) -> oracle.Predictions:
        """The oracle's three predictions for `inputs`, with all rows of `train` memorized, or those in `ids`."""
        kept = slice(None) if ids is None else list(ids)
        return oracle.predict(
            *self(train[0][kept]),
            train[1][kept],
            *self(inputs),
            k=params.k,
            sigma=params.sigma,
            softmax_temperature=params.softmax_temperature,
            strength=params.strength,
            combined_temperature=params.combined_temperature,
            task=self.task,
        )

    def scores(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        params: ResMemParams,
        ids: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Scores of the oracle's predictions: `{"base": ..., "knn": ..., "resmem": ...}`."""
        found = self.predict(train, test[0], params, ids)._asdict()
        return {name: score(prediction, test[1].numpy(), self.task) for name, prediction in found.items()}


def score(prediction: Any, targets: Any, task: str) -> float:
    if task == "multiclass":
        return float((prediction.argmax(axis=1) == targets).mean())
    if task == "multilabel":
        return float(((prediction >= 0.5) == (targets >= 0.5)).mean())
    return float(((prediction - targets) ** 2).mean())


def side_by_side(logged: Mapping[str, float]) -> dict[str, float]:
    """The scores of base, knn and resmem among what a run logged."""
    found = re.compile(r"(\w+/)+(acc|mse)_(base|knn|resmem)(/\w+)?")
    return {name: value for name, value in logged.items() if found.fullmatch(name)}


def hooks_on(model: nn.Module) -> int:
    """Number of forward hooks on all modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Spy(Callback):
    """Calls a function in one hook: `Spy("on_train_end", lambda trainer, module: ...)`."""

    def __init__(self, hook: str, call: Callable[..., Any]) -> None:
        setattr(self, hook, lambda trainer, module, *args, **kwargs: call(trainer, module))
