"""A tiny folder of images like ImageNet's: JPEGs of several sizes in class folders, and the odd ones that it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n02102040")
SIZES = ((48, 40), (33, 57), (40, 40))
"""(width, height) of the images of a class in train; val has one image a class, of the first size."""


def pixels(width: int, height: int, seed: int) -> np.ndarray:
    """A smooth picture [height, width, 3] uint8: waves of a seed, so that JPEG keeps it well."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    fy, fx, phase = rng.uniform(0.05, 0.3, (3, 3))
    waves = [np.sin(fy[c] * y + fx[c] * x + 6 * phase[c]) for c in range(3)]
    return np.clip(128 + 100 * np.stack(waves, -1), 0, 255).astype(np.uint8)


def write_jpeg(path: Path, width: int, height: int, seed: int, mode: str = "RGB") -> Path:
    """A JPEG of ``pixels``, in RGB, L (grey) or CMYK."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(width, height, seed)).convert(mode).save(path, "JPEG", quality=90)
    return path


def write_folder(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """train/<class>/<class>_<i>.JPEG and val/<class>/ILSVRC2012_val_<i>.JPEG, all different; returns ``folder``."""
    for label, name in enumerate(classes):
        for number, (width, height) in enumerate(SIZES):
            write_jpeg(folder / "train" / name / f"{name}_{number}.JPEG", width, height, 10 * label + number)
        val = folder / "val" / name / f"ILSVRC2012_val_{label:08}.JPEG"
        write_jpeg(val, *SIZES[0], seed=1000 + label)
    return folder
