"""The picture that a shared link to the documentation shows: `python docs/card.py docs/pages/assets/card.png`."""

import sys

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

NEIGHBORS = [(-0.9, 0.7), (0.9, 0.8), (0.8, -0.9), (-0.8, -0.8)]


def draw(path: str) -> None:
    """1,200 x 630 pixels, as social networks want it: a query and its neighbours, and what the package does."""
    figure = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="#3f51b5")
    axes = figure.add_axes((0.02, 0.1, 0.42, 0.8))
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    axes.axis("off")
    for x, y in NEIGHBORS:
        axes.plot([0, x], [0, y], color="white", alpha=0.75, linewidth=6)
    axes.scatter(*zip(*NEIGHBORS, strict=True), s=1500, color="white", zorder=2)
    axes.scatter(0, 0, s=5000, color="white", zorder=2)
    figure.text(0.45, 0.6, "lightning-resmem", color="white", fontsize=40, weight="bold")
    figure.text(0.45, 0.47, "Learn what you can,\nmemorize the rest.", color="white", fontsize=30, va="top")
    figure.text(0.45, 0.16, "ResMem for PyTorch Lightning", color="white", alpha=0.8, fontsize=22)
    figure.savefig(path, facecolor=figure.get_facecolor(), metadata={"Software": None})


if __name__ == "__main__":
    draw(sys.argv[1])
