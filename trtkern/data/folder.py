"""Data sets of image files in class folders, such as ImageNet: the files are decoded when they are asked for.

The folders are ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG`` (or ``test``); in ImageNet a class is a WordNet id,
n01440764. A label is the place of its folder's name among the sorted names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trtkern.data import files
from trtkern.data.augment import ResizedCrop

if TYPE_CHECKING:
    from PIL import Image

CLASS_LIST = "classes.txt"
"""The name that a class list has beside ``train`` and ``val``."""
_COPY = re.compile(rb"(.*?) ?\(\d+\)(\.[^.]*)", re.DOTALL)
"""A name as a second unpacking or download gives it: what it was is the first group and the second."""
_BITS = 258
"""TIFF's number for the bits of a channel."""
SUFFIXES = (".jpeg", ".jpg", ".png")
"""Of an image's name, in either case; other files in a class folder are passed over."""


class DataError(ValueError):
    """A file that is not what it should be, met while a run goes on; the message names it."""


class ImageFiles:
    """Images [N, 3, size, size] uint8 that are files: what stands for a tensor of them in a ``Split``.

    ``files[index]`` for a slice or a 1-d tensor of integers or bools is those files, still not decoded.

    Args:
        directory: what the names are relative to.
        names: paths of the files.
        size: height and width of an image as it is evaluated.

    Raises:
        ValueError: ``size`` is not above 0.
    """

    dtype = torch.uint8
    device = torch.device("cpu")

    def __init__(self, directory: str | Path, names: Sequence[str] | np.ndarray, size: int = 224) -> None:
        if size < 1:
            raise ValueError(f"data: expected images with a size of at least 1, got {size!r}")
        self.directory = os.fspath(directory)
        self.size = size
        # Fixed-width bytes: a million str objects take three times as much, and are copied into each worker process.
        self._names = names if isinstance(names, np.ndarray) else np.array([os.fsencode(name) for name in names], "S")

    @property
    def shape(self) -> torch.Size:
        """[N, 3, size, size]."""
        return torch.Size((len(self), 3, self.size, self.size))

    def __len__(self) -> int:
        return len(self._names)

    def dim(self) -> int:
        """4."""
        return 4

    def numel(self) -> int:
        """The values in all images."""
        return self.shape.numel()

    def to(self, device: torch.device) -> ImageFiles:
        """Itself: images are decoded on the CPU, and go to a device a batch at a time."""
        return self

    def __getitem__(self, index: slice | Tensor) -> ImageFiles:
        chosen = index.cpu().numpy() if isinstance(index, Tensor) and index.dim() == 1 else index
        if not isinstance(chosen, (slice, np.ndarray)):
            raise TypeError(
                f"data: expected a slice or a 1-d tensor as an index of image files, got {index!r}; use read"
            )
        return self._taken(chosen)

    def _taken(self, chosen: slice | np.ndarray) -> ImageFiles:
        return ImageFiles(self.directory, self._names[chosen], self.size)

    def name(self, index: int) -> bytes:
        """The path of an image below ``directory``, as the file system has it."""
        return bytes(self._names[index])

    def path(self, index: int) -> str:
        """Where an image lies: its file."""
        return os.path.join(self.directory, os.fsdecode(self.name(index)))

    def stored(self, index: int) -> int:
        """Bytes of an image as it is stored.

        Raises:
            OSError: its file is missing; the message names it.
        """
        path = self.path(index)
        try:
            return os.stat(path).st_size
        except OSError as error:
            raise files.unreadable("an image", path, error) from None

    def opened(self, index: int) -> BinaryIO:
        """An image as it is stored, to be read and closed.

        Raises:
            OSError: its file cannot be read.
        """
        return open(self.path(index), "rb")

    def order(self, generator: torch.Generator) -> Tensor:
        """[N] int64: a permutation, the order of an epoch."""
        return torch.randperm(len(self), generator=generator)

    def digests(self) -> list[bytes]:
        """SHA-256 of each file's bytes.

        Raises:
            OSError: a file cannot be read; the message names it.
        """
        return [bytes.fromhex(files.checksum(Path(self.path(index)), "sha256")) for index in range(len(self))]

    def image(self, index: int) -> Image.Image:
        """One image, decoded whole, in RGB; errors as of ``read``."""
        return _decode(partial(self.opened, index), self.path(index))

    def read(self, index: int, crop: ResizedCrop | None = None, seed: int | None = None) -> Tensor:
        """One image [3, size, size] uint8 in RGB.

        Without ``crop`` as in an evaluation: resized (bilinear, antialiased) until the shorter side is
        round(size * 256 / 224), then its centre. Orientation in EXIF is not looked at.

        Args:
            index: which one.
            crop: a window of the whole image, resized to ``crop.size``; out is [3, crop.size, crop.size].
            seed: of the draw of the window; one image and one seed make one window.

        Raises:
            ValueError: the file is no image or a damaged one, the message names it; a ``crop`` without ``seed``.
            OSError: the file cannot be read; the message names it.
            ImportError: Pillow is not installed.
        """
        image = self.image(index)
        if crop is None:
            image = _centre(image, self.size)
        elif seed is None:
            raise ValueError("data: expected a seed for the random window of an image, got none")
        else:
            generator = torch.Generator().manual_seed(seed)
            top, left, height, width = crop.draw(1, image.height, image.width, generator)[:, 0].tolist()
            # Cut out first: Image.resize(box=...) would let pixels from beyond the window in.
            image = _resized(image.crop((left, top, left + width, top + height)), crop.size, crop.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Contents(NamedTuple):
    """Files and labels [N] int64 of both splits; the classes, each a folder's name and what the class list adds."""

    train: ImageFiles
    train_labels: Tensor
    test: ImageFiles
    test_labels: Tensor
    classes: tuple[str, ...]


def load(directory: str | Path, class_list: str | Path | None, size: int = 224) -> Contents:
    """The files of ``directory``/train and ``directory``/val and their labels; no image is opened.

    Args:
        directory: the folder of both.
        class_list: a text file of the classes to take, see ``read_classes``; None takes all folders of train.
        size: height and width of an image.

    Raises:
        FileNotFoundError: a split, a class folder or the class list is missing.
        ValueError: a class without images, another class in val, a class list that is none.
        OSError: a folder or the list cannot be read.
        ImportError: Pillow is not installed.
    """
    _pillow()
    held = next((each for each in ("val", "test") if os.path.isdir(os.path.join(directory, each))), "val")
    folders = {split: _folders(os.path.join(directory, split)) for split in ("train", held)}
    if class_list is None:
        named = {name: name for name in sorted(folders["train"])}
        if more := sorted(folders[held] - named.keys()):
            raise ValueError(
                f"data: expected in {os.path.join(directory, held)} only classes that train has, got {_few(more)}; "
                f"name the classes to take in a class list"
            )
    else:
        named = read_classes(class_list)
    found = []
    for split, names in folders.items():
        where = os.path.join(directory, split)
        if missing := [name for name in named if name not in names]:
            raise FileNotFoundError(
                f"data: expected a folder of each of the {len(named):,} classes in {where}, got none of "
                f"{_few(missing)}; add the images, or leave the class out of the class list"
            )
        found.append(_scan(where, list(named), size))
    (train, train_labels), (test, test_labels) = found
    _check_copies(train, test)
    return Contents(train, train_labels, test, test_labels, tuple(named.values()))


def unsplit(directory: str | Path, size: int = 224) -> tuple[ImageFiles, Tensor, tuple[str, ...]]:
    """The files of the class folders of ``directory``, which has no splits, their labels and the classes.

    Raises:
        ValueError, OSError, ImportError: as ``load``.
    """
    _pillow()
    names = sorted(_folders(os.fspath(directory)))
    return *_scan(os.fspath(directory), names, size), tuple(names)


def read_classes(path: str | Path, sort: bool = True) -> dict[str, str]:
    """{folder: what its line says} of a text file with a folder a line and a name after it or none.

    Empty lines and what follows a # are passed over. Sorted by folder, or in the order of the lines.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no text, names no class, or one twice; the message has the lines.
        OSError: it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data: expected a class list, got no file {path}; write the folder of a class on each line"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"data: expected a class list, a text file in UTF-8, got other bytes in {path}") from None
    except OSError as error:
        raise files.unreadable("a class list", str(path), error) from None
    named: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.partition("#")[0].split():
            if words[0] in named:
                first = named[words[0]][0]
                raise ValueError(
                    f"data: expected each class once, got {words[0]} in lines {first} and {number} of {path}"
                )
            named[words[0]] = (number, " ".join(words))
    if not named:
        raise ValueError(f"data: expected a class on each line, got none in {path}")
    return {name: named[name][1] for name in (sorted(named) if sort else named)}


def _decode(opened: Callable[[], BinaryIO], path: str) -> Image.Image:
    """The image that lies there, whole and in RGB; errors as of ``ImageFiles.read``."""
    pillow = _pillow()
    try:
        with opened() as file:
            image = pillow.open(file)
            image.load()
            return image if image.mode == "RGB" else _rgb(image, path)
    except DataError:
        raise
    except pillow.UnidentifiedImageError:
        raise DataError(f"data: expected an image, got a file of another kind: {path}; get it again") from None
    except Exception as error:  # for a damaged file it may be a SyntaxError, a struct.error, ...
        if isinstance(error, MemoryError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise files.unreadable("an image", path, error) from None
        raise DataError(f"data: expected a whole image, got {path} ({error}); get it again") from None


def _rgb(image: Image.Image, path: str) -> Image.Image:
    """The image as 8 bits of RGB: grey, palettes and CMYK converted, opacity dropped, 16 bits scaled by 1/257.

    Pillow's own conversion would cut off what is above 255.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # which older Pillow says
    if sixteen and getattr(image, "tag_v2", {}).get(_BITS, (16,)) == (16,):
        values = np.asarray(image).astype(np.int64)
        return _pillow().fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"data: expected an image of 8 or 16 bits a channel, got mode {image.mode} (integers or floating point of "
            f"an unknown range) in {path}; convert it to 8 bits"
        )
    return image.convert("RGB")


def _centre(image: Image.Image, size: int) -> Image.Image:
    """The size x size pixels in the middle of the image, after its shorter side became round(size * 256 / 224)."""
    side = round(size * 256 / 224)
    short = min(image.width, image.height)
    image = _resized(image, int(side * image.width / short), int(side * image.height / short))
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), _pillow().Resampling.BILINEAR)  # antialiased


def _scan(where: str, classes: list[str], size: int) -> tuple[ImageFiles, Tensor]:
    """The image files in the class folders of ``where``, by class and then by name, and their labels."""
    names: list[bytes] = []
    counts = []
    for name in classes:
        folder = os.path.join(where, name)
        entries = _entries(folder)
        found = sorted(entry.name for entry in entries if _is_image(entry))
        broken = [entry.name for entry in entries if entry.is_symlink() and not entry.is_file() and _named(entry)]
        if broken:
            raise FileNotFoundError(
                f"data: expected images in {folder}, got links to nothing: {_few(sorted(broken))}; mend or delete them"
            )
        if not found:
            raise ValueError(f"data: expected images (*{', *'.join(SUFFIXES)}) of class {name}, got none in {folder}")
        names += [os.fsencode(os.path.join(name, file)) for file in found]
        counts.append(len(found))
    labels = torch.repeat_interleave(torch.tensor(counts))
    return ImageFiles(where, np.array(names, "S"), size), labels


def _folders(where: str) -> set[str]:
    """The names of the folders in a split."""
    if not os.path.exists(where):
        raise FileNotFoundError(f"data: expected {where} with a folder of images for each class, got no such folder")
    entries = _entries(where)
    folders = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
    if not folders:
        images = sum(map(_is_image, entries))
        raise ValueError(
            f"data: expected a folder of images for each class in {where}, got {images:,} images and no folder; "
            f"ImageNet's validation images come like that: move each into the folder of its class, which the labels "
            f"file says (LOC_val_solution.csv, or ILSVRC2012_validation_ground_truth.txt of the development kit)"
        )
    return folders


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise files.unreadable("a folder", folder, error) from None


def _is_image(entry: os.DirEntry[str]) -> bool:
    return _named(entry) and entry.is_file()


def _named(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")


def _check_copies(train: ImageFiles, test: ImageFiles) -> None:
    """Raise if an image is there twice: under one name in both splits, or once more as ``name (1).JPEG``.

    Only files whose names say so are compared: by size, and where that agrees by content.
    """
    in_test = {test.name(index): index for index in range(len(test))}
    pairs = [
        (train.path(index), test.path(in_test[name]))
        for index in range(len(train))
        if (name := train.name(index)) in in_test
    ]
    for images in (train, test):
        for index in range(len(images)):
            if match := _COPY.fullmatch(images.name(index)):
                for other in (train, test):
                    first = os.path.join(other.directory, os.fsdecode(match[1] + match[2]))
                    if os.path.isfile(first):
                        pairs.append((first, images.path(index)))
    for pair in pairs:
        files.check_different(map(Path, pair), "images")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _pillow() -> Any:
    """PIL.Image, which comes with an extra."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("data: expected Pillow for image files, got none; pip install 'trtkern[data]'") from None
    return Image
