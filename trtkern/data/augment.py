"""Random changes to training images: a whole batch at once, where it is, before it is normalised.

    >>> pipeline = Pipeline((Crop(padding=4), Flip(), Cutout(16)))
    >>> generator = torch.Generator().manual_seed(0)
    >>> images = pipeline(images, generator)  # [B, C, H, W], or [T, B, C, H, W]

Each image has its own draw; the frames of a sequence share one. All draws come from the generator, on the CPU, so that
a GPU sees the same images and ``generator.get_state()`` is all that a run needs to go on bitwise. A transform draws
numbers first (``draw``) and then applies them (``apply``). Images may have any real dtype, which is kept; a hole or a
margin is raw 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trtkern import own
from trtkern.data.transform import WHOLE, Part, Transform, below, check, real, take, whole
from trtkern.names import is_object, is_own, short, unknown

__all__ = ["TRANSFORMS", "Crop", "Cutout", "Flip", "OwnChange", "Pipeline", "ResizedCrop", "Roll"]


@dataclass(frozen=True)
class Crop(Transform):
    """A window at a random place in the image with a margin of zeros around it.

    out[i, j] = padded[top + i, left + j], with top of 0..H + 2 padding - size and left likewise, all equally likely.
    ``padding`` is the margin in pixels, ``size`` the height and width of the window; None is that of the image.

    Args:
        padding: pixels of zeros around the image.
        size: height and width of the window; None is those of the image.
    """

    name: ClassVar[str] = "crop"
    padding: int = 4
    size: int | None = None

    def __post_init__(self) -> None:
        whole(self.name, "padding", self.padding, 0)
        if self.size is not None:
            whole(self.name, "size", self.size, 1)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """[2, count]: top and left, in the padded image."""
        room = [side + 2 * self.padding - (self.size or side) for side in (height, width)]
        if min(room) < 0:
            wanted = f"at least {(self.size or 0) - 2 * self.padding} pixels a side for {self}"
            raise ValueError(f"augment: crop: expected images of {wanted}, got {height} x {width}; raise the padding")
        return below(torch.tensor(room)[:, None] + 1, count, generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """drawn: [2, B], top and left."""
        rows, columns = (
            start[:, None] - self.padding + torch.arange(self.size or side, device=images.device)
            for start, side in zip(drawn, images.shape[-2:], strict=True)
        )
        return take(images, rows, columns)


@dataclass(frozen=True)
class Flip(Transform):
    """Mirrored left to right with probability ``p``.

    Args:
        p: the probability, 0 to 1.
    """

    name: ClassVar[str] = "flip"
    p: float = 0.5

    def __post_init__(self) -> None:
        if not (real(self.p) and 0 <= self.p <= 1):
            raise ValueError(f"augment: flip: expected p of 0 to 1, got {self.p!r}")

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """[count] bool: mirrored."""
        return torch.rand(count, dtype=torch.float64, generator=generator) < self.p

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """drawn: [B] bool."""
        return torch.where(drawn.view(-1, 1, 1, 1), images.flip(-1), images)


@dataclass(frozen=True)
class Cutout(Transform):
    """One square hole of raw 0 (DeVries and Taylor 2017, arXiv 1708.04552).

    Its centre is any pixel, all equally likely: rows centre - length // 2 .. + length - 1, columns likewise. What lies
    beyond the border is lost, so that a hole is between a quarter of length ** 2 and all of it.

    Args:
        length: height and width of the hole, in pixels.
    """

    name: ClassVar[str] = "cutout"
    length: int = 16

    def __post_init__(self) -> None:
        whole(self.name, "length", self.length, 1)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """[2, count]: row and column of the centre."""
        return below(torch.tensor([[height], [width]]), count, generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """drawn: [2, B], the centre."""
        places = zip(drawn[:, :, None] - self.length // 2, images.shape[-2:], strict=True)
        offsets = [torch.arange(side, device=images.device) - start for start, side in places]
        rows, columns = ((offset >= 0) & (offset < self.length) for offset in offsets)
        return images.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0)


@dataclass(frozen=True)
class Roll(Transform):
    """Shifted in a circle along both axes by -``shift`` .. ``shift`` pixels, all equally likely.

    out[i, j] = in[(i - dy) mod H, (j - dx) mod W]

    Args:
        shift: the most pixels along each axis.
    """

    name: ClassVar[str] = "roll"
    shift: int = 5

    def __post_init__(self) -> None:
        whole(self.name, "shift", self.shift, 0)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """[2, count]: dy (down) and dx (right)."""
        return below(torch.full((2, 1), 2 * self.shift + 1), count, generator) - self.shift

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """drawn: [2, B], dy and dx."""
        rows, columns = (
            (torch.arange(side, device=images.device) - offset[:, None]) % side
            for offset, side in zip(drawn, images.shape[-2:], strict=True)
        )
        return take(images, rows, columns)


@dataclass(frozen=True)
class ResizedCrop(Transform):
    """A window of random size and shape, resized to size x size pixels (Szegedy et al. 2014, arXiv 1409.4842).

    Area / (H W) is uniform in ``scale`` and the logarithm of width / height in that of ``ratio``. Of ten such draws
    the first that fits is placed anywhere, all places equally likely; without one, the largest window in the middle
    whose shape is within ``ratio``. Resizing is bilinear with antialiasing, within the window alone::

        out[i, j] = sum_{r, c} k_y[i, r] k_x[j, c] in[r, c],   k_y[i, r] ~ max(0, 1 - |r + 1/2 - y_i| / max(s, 1))

    where s = h / size is the window's scale, y_i = top + (i + 1/2) s, and each row of k sums to 1. Integers are
    rounded. ``scale`` and ``ratio`` are (least, greatest).

    Args:
        size: height and width that come out, in pixels.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width / height of the window.
    """

    name: ClassVar[str] = "resized_crop"
    ATTEMPTS: ClassVar[int] = 10
    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        whole(self.name, "size", self.size, 1)
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(real, value))
            if not pair or not 0 < value[0] <= value[1] < math.inf:
                raise ValueError(f"augment: resized_crop: expected {name} as 0 < least <= greatest, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # a recipe file has a list

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """[4, count]: top, left, height and width of the windows."""
        share, log_ratio = torch.rand(2, self.ATTEMPTS, count, dtype=torch.float64, generator=generator)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * share)
        ratio = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** log_ratio
        wide, high = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
        first = fits.byte().argmax(0, keepdim=True)
        wide, high = wide.gather(0, first)[0], high.gather(0, first)[0]
        place = below(torch.stack([height - high + 1, width - wide + 1]), count, generator)
        middle_wide = min(width, max(1, round(height * self.ratio[1])))
        middle_high = min(height, max(1, round(width / self.ratio[0])))
        middle = [(height - middle_high) // 2, (width - middle_wide) // 2, middle_high, middle_wide]
        return torch.where(fits.any(0), torch.stack([*place, high, wide]), torch.tensor(middle)[:, None])

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """drawn: [4, B], top, left, height and width."""
        top, left, high, wide = drawn
        height, width = images.shape[-2:]
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        rows, columns = (self._weights(*part).to(dtype) for part in ((top, high, height), (left, wide, width)))
        with torch.autocast(images.device.type, enabled=False):
            out = torch.einsum("bir,...bcrs->...bcis", rows, images.to(dtype))
            out = torch.einsum("bjs,...bcis->...bcij", columns, out)
        return (out if images.is_floating_point() else out.round()).to(images.dtype)

    def _weights(self, start: Tensor, length: Tensor, side: int) -> Tensor:
        """k [B, size, side] in float64."""
        scale = length.double()[:, None] / self.size
        centre = start[:, None] + (torch.arange(self.size, device=start.device) + 0.5) * scale
        pixel = torch.arange(side, device=start.device)
        weight = (1 - (pixel + 0.5 - centre[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]).clamp(min=0)
        inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
        weight = weight * inside[:, None, :]
        return weight / weight.sum(-1, keepdim=True)


TRANSFORMS: dict[str, type[Transform]] = {kind.name: kind for kind in (Crop, Flip, Cutout, Roll, ResizedCrop)}
"""The changes by the names that a recipe and ``Trainer(augment=...)`` use."""


@dataclass(frozen=True)
class OwnChange:
    """A change of the user's: a function of a batch and a generator, from which alone it draws.

    Args:
        name: of the function, "module:function".
        options: what it takes besides.
        function: it.
    """

    name: str
    options: dict[str, Any]
    function: Callable[..., Tensor]

    def __call__(self, images: Tensor, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
        """The images, changed. Each part of a batch has a generator of its own.

        Raises:
            OwnError: it raised, or gave no tensor of the same number of images.
        """
        if part.parts > 1:
            seed = int(torch.randint(2**62, (), generator=generator))
            generator = torch.Generator().manual_seed(seed + part.number)
        try:
            changed = self.function(images, generator, **self.options)
        except Exception as error:
            raise own.failed(error, f"augment: expected {self.name} to change images {list(images.shape)}") from error
        if not isinstance(changed, Tensor) or changed.dim() != images.dim():
            got = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise own.OwnError(f"augment: expected {self.name} to give images {list(images.shape)}, got {got}")
        return changed


@dataclass(frozen=True)
class Pipeline:
    """Transforms, one after the other, from one generator.

    Args:
        transforms: what is done, in this order.
    """

    transforms: tuple[Transform | OwnChange, ...] = ()

    def __call__(self, images: Tensor, generator: torch.Generator, part: Part = WHOLE) -> Tensor:
        """As ``Transform.__call__``; without transforms the images themselves."""
        if any(isinstance(transform, Transform) for transform in self.transforms):
            check(images, generator)
        for transform in self.transforms:
            images = transform(images, generator, part)
        return images

    @classmethod
    def from_recipe(cls, recipe: Sequence[Mapping[str, Any]]) -> Pipeline:
        """From what a recipe file holds: [{"name": "crop", "padding": 4}, {"name": "flip"}].

        Raises:
            ValueError: an unknown name or number; the message says which and lists the known ones.
        """
        transforms: list[Transform | OwnChange] = []
        for step in recipe:
            if not isinstance(step, Mapping) or "name" not in step:
                raise ValueError(f"augment: expected a table with name = one of {', '.join(TRANSFORMS)}, got {step!r}")
            numbers = dict(step)
            name = numbers.pop("name")
            if is_own(name):
                transforms.append(_own(name, numbers))
                continue
            if name not in tuple(TRANSFORMS):
                raise unknown("augment", name, TRANSFORMS, ", or module:function")
            known = [field.name for field in fields(TRANSFORMS[name])]
            if others := sorted(set(numbers) - set(known)):
                raise unknown(f"augment: {name}", others[0], known)
            transforms.append(TRANSFORMS[name](**numbers))
        return cls(tuple(transforms))

    def to_recipe(self) -> list[dict[str, Any]]:
        """The inverse of ``from_recipe``, every number written out, as plain JSON types."""
        return [
            {"name": step.name, **step.options}
            if isinstance(step, OwnChange)
            else {"name": step.name, **json.loads(json.dumps(asdict(step)))}
            for step in self.transforms
        ]


def _own(name: str, options: dict[str, Any]) -> OwnChange:
    if is_object(name):
        return OwnChange(name, options, partial(_gone, name))
    function = own.imported(name, "augment")
    if not callable(function):
        raise own.OwnError(f"augment: expected {name} to be a function of (images, generator), got {function!r}")
    return OwnChange(name, options, function)


def _gone(name: str, *_: Any) -> Tensor:
    raise own.OwnError(
        f"augment: expected the function {short(name)} that a program gave, which no settings can make; go on with "
        f"that program, or give it a function of a module, which can be named"
    )
