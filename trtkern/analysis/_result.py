"""What every analysis returns: numbers with a table, pictures and a file."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from trtkern.names import unknown
from trtkern.output import style
from trtkern.output.files import parse, write
from trtkern.output.text import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A picture that can be drawn anywhere: on a page, into a file."""

    draw: Callable[[Axes], None]
    """Draws on axes that are given, with titles and labels."""
    size: tuple[float, float] = (style.WIDTH, style.HEIGHT)
    """Width and height in inches."""


class Table(NamedTuple):
    """Rows of words and numbers."""

    head: Sequence[str]
    """What stands above the columns."""
    rows: Sequence[Sequence[str]]
    """The cells, a sequence a row."""
    words: int = 1
    """The first so many columns are words, the others numbers."""

    def text(self) -> str:
        """Lines of plain text, words to the left and numbers to the right of their columns."""
        lines = [list(map(str, self.head)), *([str(cell) for cell in row] for row in self.rows)]
        return "\n".join(line.rstrip() for line in aligned(lines, right=range(self.words, len(self.head))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The base of what the analyses return. A subclass is a frozen dataclass of tensors, numbers, words and
    lists or dictionaries of them; ``save`` and ``load`` follow from its fields.

    Args:
        about: where the numbers come from, in words: the run, its weights, the samples, the versions.
    """

    about: dict[str, str] = dataclasses.field(default_factory=dict)

    NAME: ClassVar[str]
    """As in ``trtkern analyze NAME``."""
    _kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls) -> None:
        Result._kinds[cls.NAME] = cls

    def table(self) -> Table:
        """The numbers, for a console and for a page."""
        raise NotImplementedError

    def remarks(self) -> list[str]:
        """Full sentences: what the numbers show, how they were made, what they do not say."""
        return []

    @classmethod
    def pictures(cls, results: Mapping[str, Self]) -> dict[str, Picture]:
        """{caption: picture} of one result, or of several in the same pictures.

        Args:
            results: by the names that a legend shows; a single one is called "".
        """
        raise NotImplementedError

    def plot(self, path: str | Path | None = None) -> Figure:
        """All pictures in one figure of matplotlib; with ``path`` also written there (.png, .svg, .pdf).

        Raises:
            ImportError: matplotlib is not installed.
            OSError, ValueError: the file cannot be written, or is of an unknown kind.
        """
        try:
            import matplotlib.figure  # noqa: F401

            from trtkern.output.pictures import styled
        except ImportError:
            raise ImportError(
                f"{type(self).__name__}.plot: expected the package matplotlib, got none; "
                "type: pip install 'trtkern[train]'"
            ) from None
        figure = drawn(self.pictures({"": self}))
        with styled():
            figure.draw_without_rendering()  # what is laid out later would have the style of its own time
            if path is not None:
                figure.savefig(path, dpi=style.DPI)
        return figure

    def __str__(self) -> str:
        """The table and the remarks as plain text."""
        return "\n".join([self.table().text(), *self.remarks()])

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; what is not finite becomes a word ("nan", "inf", "-inf")."""
        return {"analysis": self.NAME, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all; ``load`` reads it.

        Raises:
            OSError: it cannot be written; the message names it.
        """
        write(Path(path), (json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What ``save`` wrote; of the class that it was.

        Raises:
            ValueError: the file is none of an analysis, of another one, or damaged; the message names it.
            OSError: it cannot be read.
        """
        try:
            values = parse(Path(path).read_bytes())
            kind = Result._kinds.get(name := values.pop("analysis", None))
            if kind is None:
                raise unknown("analysis", name, Result._kinds)
            if not issubclass(kind, cls):
                raise ValueError(f"an analysis of {cls.NAME} where {name} stands")
            hints = get_type_hints(kind)
            names = {field.name for field in dataclasses.fields(kind)}
            if names != set(values):
                raise ValueError(f"fields {', '.join(sorted(names ^ set(values)))} that are missing or not known")
            return kind(**{name: _typed(hints[name], value) for name, value in values.items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"analysis: expected a file that an analysis saved, got {path} ({error}); make it anew"
            ) from None


def drawn(pictures: Mapping[str, Picture], columns: int = 2) -> Figure:
    """All pictures in one figure, in rows of so many, each row as high as its highest."""
    from matplotlib.figure import Figure

    from trtkern.output.pictures import styled

    shown = list(pictures.values())
    columns = min(columns, len(shown))
    heights = [max(each.size[1] for each in shown[at : at + columns]) for at in range(0, len(shown), columns)]
    wide = columns * max(each.size[0] for each in shown)
    with styled():
        figure = Figure(figsize=(wide, sum(heights)), layout="constrained")
        grid: dict[str, Any] = {"height_ratios": heights}
        places = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw=grid).flatten().tolist()
        for axes, picture in zip(places, shown, strict=False):
            picture.draw(axes)
        for axes in places[len(shown) :]:
            axes.remove()
    return figure


def _plain(value: Any) -> Any:
    """As JSON types."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _typed(hint: Any, value: Any) -> Any:
    """The inverse of ``_plain`` for a field of that type; tensors are float64."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(kind for kind in arguments if kind is not type(None)), value)
    if hint is Any:
        return value
    if hint is Tensor:
        return torch.tensor(_numbers(value), dtype=torch.float64)
    if hint is float:
        return float(value)
    if origin is dict:
        return {(arguments[0](name)): _typed(arguments[1], part) for name, part in value.items()}
    if origin is list:
        return [_typed(arguments[0], part) for part in value]
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        return tuple(_typed(kind, part) for kind, part in zip(kinds, value, strict=True))
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields")):
        hints = get_type_hints(hint)
        return hint(**{name: _typed(hints[name], part) for name, part in value.items()})
    if not isinstance(value, hint):
        raise TypeError(f"{value!r} where {hint.__name__} stands")
    return value


def _numbers(value: Any) -> Any:
    """Nested lists of numbers, words for what is not finite made numbers again."""
    return [_numbers(part) for part in value] if isinstance(value, list) else float(value)
