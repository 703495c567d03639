"""ResMem under Ray Train: Lightning ranks that Ray starts, on one machine or on a cluster.

    python examples/ray_train.py                             # two workers on CPUs, under a minute
    python examples/ray_train.py --workers 4 --gpus --shards 4

Ray Train starts the ranks; `RayDDPStrategy` is Lightning's DDP among them. For ResMem nothing changes: the callback
memorizes after `fit`, every training row once, into shards that Ray runs beside the workers. The script joins the Ray
cluster that RAY_ADDRESS names, or starts Ray on this machine.
"""

import argparse
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import ray
import ray.train
from digits import MLP, split
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader

from lightning_resmem import RayMemory, ResMemCallback


def make_trainer(resmem: ResMemCallback, epochs: int, gpus: bool, **options: Any) -> L.Trainer:
    """An ordinary Trainer; the options say how its ranks come about."""
    return L.Trainer(
        max_epochs=epochs,
        callbacks=[resmem],
        accelerator="gpu" if gpus else "cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(trainer: L.Trainer) -> dict[str, float]:
    """Train and test on digits, as without Ray."""
    L.seed_everything(0, verbose=False)
    train, val, test = split(seed=0)
    model = MLP(hidden=16)
    trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True), DataLoader(val, batch_size=64))
    (scores,) = trainer.test(model, DataLoader(test, batch_size=64), verbose=False)
    return scores


def work(config: dict[str, Any]) -> None:
    """What each worker runs: the same with Ray's strategy, and the results handed to Ray Train."""
    resmem = ResMemCallback(memory=RayMemory(num_shards=config.pop("shards")))
    strategy, environment = RayDDPStrategy(), RayLightningEnvironment()
    trainer = make_trainer(resmem, **config, devices="auto", strategy=strategy, plugins=[environment])
    scores = fit(prepare_trainer(trainer))
    with tempfile.TemporaryDirectory() as directory:
        trainer.save_checkpoint(Path(directory) / "base.ckpt")
        checkpoint = None
        if trainer.is_global_zero:
            resmem.module.save(Path(directory) / "resmem")
            checkpoint = Checkpoint.from_directory(directory)  # copied to the storage path
        ray.train.report({**scores, "rows": len(resmem.memory), "ranks": trainer.world_size}, checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--shards", type=int, default=2, help="actors with the memory (default: 2)")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each rank")
    parser.add_argument("--epochs", type=int, default=10, help="training epochs (default: 10)")
    parser.add_argument("--directory", type=Path, default=Path("outputs/ray_train"), help="seen by all nodes")
    arguments = parser.parse_args()

    # A cluster has CPUs of its own; on one machine the workers and shards share what there is.
    cpus = None if "RAY_ADDRESS" in os.environ else max(os.cpu_count() or 1, arguments.workers + arguments.shards)
    ray.init(os.environ.get("RAY_ADDRESS", "local"), num_cpus=cpus, logging_level=logging.WARNING, log_to_driver=False)
    result = TorchTrainer(
        work,
        train_loop_config={"epochs": arguments.epochs, "gpus": arguments.gpus, "shards": arguments.shards},
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpus),
        run_config=RunConfig(storage_path=str(arguments.directory.absolute())),
    ).fit()
    scores = result.metrics
    print(
        f"{scores['ranks']} ranks memorized {scores['rows']} rows; weights and memory are in {result.checkpoint.path}"
    )
    for name in ("base", "knn", "resmem"):
        print(f"{name}: test accuracy {scores[f'test/acc_{name}']:.4f}")


if __name__ == "__main__":
    main()
