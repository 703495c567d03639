"""Base, neighbours alone and ResMem on features of CIFAR networks, with plain and whitened keys, and their picture.

    python examples/benchmarks/cifar_features.py --data FOLDER

FOLDER has files `NAME_features.npz` with `{train,val,test}_{embeddings,logits,labels}` of one trained network each, as
a few lines of NumPy write them. `GridTuner()` as it is tunes on the validation rows; all test rows are looked at once.
Standard errors are those of the test rows, in pairs for the gains.
"""

import argparse
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from _harness import report
from real_data import Rows, best_knn, tuned
from torch import Tensor, nn

METRICS = ("euclidean", "within_class")
PICTURE = Path(__file__).parents[2] / "docs" / "pages" / "assets" / "cifar.png"


def rows_of(file: Path) -> list[Rows]:
    """Training, validation and test rows."""
    with np.load(file) as data:
        columns = [
            [torch.from_numpy(data[f"{part}_{name}"]) for name in ("embeddings", "logits", "labels")]
            for part in ("train", "val", "test")
        ]
    return [Rows(keys.float(), outputs.float(), labels.long()) for keys, outputs, labels in columns]


def name_of(file: Path) -> str:
    """`cifar100_resnet8_features.npz` is "CIFAR-100, ResNet-8"."""
    words = {"cifar": "CIFAR-", "resnet": "ResNet-"}
    stem = file.stem.removesuffix("_features").replace("_", ", ")
    return re.sub(r"[a-z]+(?=\d)", lambda found: words.get(found[0], found[0]), stem)


def mean(values: Tensor, digits: int = 2, sign: str = "") -> str:
    """Mean and standard error over the rows."""
    return f"{values.mean():{sign}.{digits}f} ± {values.std() / len(values) ** 0.5:.{digits}f}"


def measure(file: Path) -> tuple[list[list[str]], list[tuple[float, float]]]:
    """Lines of the table, one for each metric; and mean and standard error of base, knn and resmem with plain keys."""
    train, val, test = rows_of(file)
    name, lines, dots = name_of(file), [], []
    for metric in METRICS:
        memory = tuned(train, val, metric)
        task, found = memory.task, memory.predictions(test.keys, test.outputs)
        found = found._replace(knn=best_knn(memory, val, test))
        right = [100 * task.score(prediction, test.targets).double() for prediction in found]
        before = nn.functional.cross_entropy(test.outputs, test.targets, reduction="none")
        losses = [before, task.loss(found.resmem, found.base, test.targets)]
        accuracies = [mean(part) for part in right]
        lines.append([name, metric, *accuracies, mean(right[2] - right[0], sign="+"), *(mean(p, 3) for p in losses)])
        if metric == METRICS[0]:
            dots = [(float(part.mean()), float(part.std() / len(part) ** 0.5)) for part in right]
    return lines, dots


def plot(dots: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Test accuracy of base, knn and resmem, network by network."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(dots), figsize=(2.6 * len(dots), 3.2), layout="constrained", squeeze=False)
    for ax, (name, values) in zip(axes[0], dots.items(), strict=True):
        heights, errors = zip(*values, strict=True)
        for place, (height, error, color) in enumerate(zip(heights, errors, ("0.3", "0.6", "#3f51b5"), strict=True)):
            ax.errorbar(place, height, error, marker="o", markersize=7, capsize=4, color=color)
            ax.annotate(f"{height:.1f}", (place, height), xytext=(8, -4), textcoords="offset points", color=color)
        ax.set(title=name, xlim=(-0.5, 2.8), xticks=range(3), xticklabels=("base", "knn", "resmem"))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with *_features.npz")
    parser.add_argument("--plot", type=Path, default=PICTURE, help="where the picture goes")
    arguments = parser.parse_args(argv)
    files = sorted(arguments.data.glob("*_features.npz")) if arguments.data else []
    if not files:
        print("Skipped: give --data FOLDER, a folder with NAME_features.npz.")
        return
    lines, dots = [], {}
    for file in files:
        found, dots[name_of(file)] = measure(file)
        lines += found
    header = ["network", "metric", "base", "knn", "resmem", "gain over base, points", "NLL of base", "NLL of resmem"]
    report("cifar_features", "Test accuracy, %", header, lines)
    plot(dots, arguments.plot)


if __name__ == "__main__":
    main()
