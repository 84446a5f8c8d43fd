"""Fashion-MNIST from the four .gz files of Debian's package dataset-fashion-mnist."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np


def read(folder: str | Path, part: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``n`` images of "train" or "t10k", uint8 (n, 28, 28), and their labels, uint8 (n,)."""
    root = Path(folder)
    with gzip.open(root / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + n * 784), np.uint8, offset=16).reshape(n, 28, 28)
    with gzip.open(root / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + n), np.uint8, offset=8)
    return pixels, labels
