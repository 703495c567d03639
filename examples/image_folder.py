"""Images in class folders: a small CNN before and after ResMem, and which training images changed a prediction.

    python examples/image_folder.py                    # digits written as PNG files: half a minute
    python examples/image_folder.py --data photos      # photos/cat/1.jpg, photos/dog/2.png, ...

Of each class 60% are trained on, 20% tuned on, 20% tested on. The picture shows test images whose prediction ResMem
changed, or the first one, and the training images behind it.
"""

import argparse
import itertools
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_resmem import ResMemCallback

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images of `root/CLASS/**`, square, as float32 in [0, 1], and the numbers of their classes.

    Raises:
        ValueError: If there are less than two folders with images, or one is no image.
    """

    def __init__(self, root: Path, size: int) -> None:
        found = [file for file in sorted(root.glob("*/**/*")) if file.suffix.lower() in ENDINGS]
        names = [file.relative_to(root).parts[0] for file in found]
        self.files, self.class_names, self.size = found, sorted(set(names)), size
        self.labels = [self.class_names.index(name) for name in names]
        if len(self.class_names) < 2:
            raise ValueError(
                f"--data {root}: found {len(found)} images in {len(self.class_names)} class folders, not 2."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            with Image.open(self.files[index]) as image:
                pixels = np.asarray(image.convert("RGB").resize((self.size, self.size)), dtype=np.float32)
        except UnidentifiedImageError as error:
            raise ValueError(f"{self.files[index]} is no image that Pillow can read.") from error
        return torch.from_numpy(pixels / 255).permute(2, 0, 1), self.labels[index]

    def split(self, seed: int) -> list[Subset[tuple[Tensor, int]]]:
        """60%, 20% and 20% of each class."""
        parts: list[list[int]] = [[], [], []]
        for label in range(len(self.class_names)):
            rows = np.random.default_rng([seed, label]).permutation(np.flatnonzero(np.equal(self.labels, label)))
            for part, chosen in zip(parts, np.split(rows, [len(rows) * 6 // 10, len(rows) * 8 // 10]), strict=True):
                part += chosen.tolist()
        return [Subset(self, sorted(part)) for part in parts]


class CNN(L.LightningModule):
    """Three blocks, and the mean over what they see."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))
            for before, after in itertools.pairwise(widths)
        ]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def write_digits(root: Path, count: int) -> None:
    """scikit-learn's handwritten digits, 8 x 8 pixels, as files."""
    data = load_digits()
    for index, (image, label) in enumerate(zip(data.images[:count], data.target[:count], strict=True)):
        folder = root / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{index}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with a folder for each class (default: digits)")
    parser.add_argument("--size", type=int, default=16, help="pixels of a side, to which images are scaled")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--count", type=int, default=1797, help="of the digits")
    parser.add_argument("--plot", type=Path, default=Path("neighbours.png"), help="where the picture goes")
    given = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as directory:
        if given.data is None:
            write_digits(Path(directory), given.count)
        try:
            images = ImageFolder(given.data or Path(directory), given.size)
        except ValueError as error:
            parser.error(str(error))
        train, val, test = images.split(seed=0)
        resmem = ResMemCallback()
        trainer = L.Trainer(
            max_epochs=given.epochs,
            callbacks=[resmem],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(CNN(len(images.class_names)), DataLoader(train, 64, shuffle=True), DataLoader(val, 256))
        trainer.test(resmem.module, DataLoader(test, 256))
        batch = [test[index] for index in range(len(test))]
        found = resmem.module.explain(batch, top=5)
        base, combined = (part.argmax(dim=1) for part in (found.predictions.base, found.predictions.resmem))
        changed = (base != combined).nonzero()[:6, 0].tolist() or [0]
        shown = resmem.module.explain([batch[index] for index in changed], top=5)
        shown.figure(dataset=train, class_names=images.class_names).savefig(given.plot)
    print(f"{int((base != combined).sum())} of {len(test)} predictions changed; see {given.plot}.")


if __name__ == "__main__":
    main()
