"""One run in Weights & Biases: handwritten digits, a small network, its memory, and everything there is to see of it.

    python examples/wandb_run.py                          # offline: no account, no network
    python examples/wandb_run.py --mode=online            # after `wandb login`
    python examples/wandb_run.py --index=HNSW16 --values=sparse --objective=nll

Offline runs are in `outputs/wandb/`; `wandb sync` uploads them. `configs/sweep.yaml` searches over the options.
"""

import argparse
import os
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import GridTuner, LocalMemory, ResMemCallback

OUTPUTS = Path("outputs")


class Net(L.LightningModule):
    """A classifier of 8 x 8 pictures with one hidden layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loaders() -> tuple[DataLoader, DataLoader, DataLoader]:
    """The 1,797 digits as pictures: 1,000 to train on, 300 to tune on, 497 to test on."""
    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(data.images[order] / 16, dtype=torch.float32)[:, None]
    parts = zip(pictures.split([1000, 300, 497]), torch.tensor(data.target)[order].split([1000, 300, 497]), strict=True)
    train, val, test = (TensorDataset(*part) for part in parts)
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=300), DataLoader(test, 500)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Named as wandb names them: an agent starts this program with --key_dtype=float16.
    parser.add_argument("--mode", choices=["online", "offline", "disabled"], default="offline")
    parser.add_argument("--project", default="lightning-resmem")
    parser.add_argument("--index", default="auto", help='"auto", "exact", or a FAISS factory string')
    parser.add_argument("--values", choices=["auto", "dense", "sparse"], default="auto")
    parser.add_argument("--key_dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--embedding", choices=["head", "body.1"], default="head", help="head: what goes into it")
    parser.add_argument("--objective", choices=["accuracy", "nll"], default="accuracy", help="of tuning")
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10)
    return parser


def main() -> None:
    options = make_parser().parse_args()
    os.environ["WANDB_MODE"] = options.mode
    L.seed_everything(0, verbose=False)
    OUTPUTS.mkdir(exist_ok=True)
    logger = WandbLogger(project=options.project, save_dir=OUTPUTS)
    logger.log_hyperparams(vars(options))
    memory = LocalMemory(index=options.index, values=options.values, key_dtype=getattr(torch, options.key_dtype))
    resmem = ResMemCallback(
        memory,
        tuner=GridTuner(objective=options.objective),
        embedding=None if options.embedding == "head" else options.embedding,
        log_memory_artifact=True,
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[resmem],
        logger=logger,
        accelerator="cpu",
        default_root_dir=OUTPUTS,
        enable_model_summary=False,
    )
    train, val, test = loaders()
    model = Net(options.hidden)
    trainer.fit(model, train, val)
    trainer.test(model, test)
    logger.experiment.finish()
    if options.mode == "offline":
        Console().print(f"Upload it with: wandb sync {OUTPUTS}/wandb/offline-run-*-{logger.version}")


if __name__ == "__main__":
    main()
