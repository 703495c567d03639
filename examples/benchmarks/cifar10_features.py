"""Accuracy of ResMem on the features of a small ResNet on CIFAR-10; fails if it is not what it was."""

import sys

import numpy as np
import torch
from _harness import features_file, report

from lightning_resmem import LocalMemory, ResMemParams

# k, sigma, softmax_temperature, and the test accuracy in percent.
EXPECTED = [(100, 0.17, 1.4, 80.46), (53, 0.7, 1.4, 80.00), (10, 0.2, 1.0, 79.83)]
BASE, TOLERANCE = 79.45, 0.03


def main() -> int:
    file = features_file()
    if file is None:
        print("Skipped: give the path of the features file, or set RESMEM_FEATURES.")
        return 0
    with np.load(file) as data:
        train, test = (
            [torch.from_numpy(data[f"{part}_{name}"]) for name in ("embeddings", "logits", "labels")]
            for part in ("train", "test")
        )
    memory = LocalMemory(params=ResMemParams())
    memory.add(train[0].float(), train[1].float(), train[2].long())
    labels, table, failed = test[2].long(), [], False
    for k, sigma, softmax_temperature, expected in EXPECTED:
        memory.params = ResMemParams(k=k, sigma=sigma, softmax_temperature=softmax_temperature)
        found = memory.predictions(test[0].float(), test[1].float())
        base, knn, resmem = (100 * (part.argmax(dim=1) == labels).float().mean().item() for part in found)
        failed |= abs(base - BASE) > TOLERANCE or abs(resmem - expected) > TOLERANCE
        setting = f"k={k}, sigma={sigma}, softmax_temperature={softmax_temperature}"
        table.append([setting, f"{base:.2f}", f"{knn:.2f}", f"{resmem:.2f}", f"{expected:.2f}"])
    report("cifar10_features", "Test accuracy, %", ["setting", "base", "knn", "resmem", "resmem expected"], table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
