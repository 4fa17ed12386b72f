"""The data set of a run: by the name that its settings have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trtkern import own
from trtkern.data import Dataset, load
from trtkern.data import own as own_data
from trtkern.data.folders import by_class
from trtkern.data.tar_sets import by_shard
from trtkern.names import FOLDER, TAR, is_object, is_own, short
from trtkern.training.settings import Settings


def gather(
    settings: Settings,
    download: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    function: Callable[..., Any] | None = None,
) -> Dataset:
    """The data set of these settings.

    Args:
        settings: of the run.
        download: fetch missing files first.
        progress: told while frames of events are made.
        function: what makes the user's own, where a program has it; None imports it.

    Raises:
        ValueError, TypeError, OSError: no such data; the message says what was expected.
        ImportError: what reads its files is not installed.
    """
    crops = [step["size"] for step in settings.augment if step["name"] == "resized_crop"]
    size = {"size": crops[0]} if crops else {}
    name, options = settings.data, settings.data_options
    forms: dict[str, Callable[..., Dataset]] = {FOLDER: partial(by_class, timesteps=settings.timesteps), TAR: by_shard}
    for form, make in forms.items():
        if name.startswith(form):
            place = Path(settings.data_dir or name.removeprefix(form))
            return make(place, cache=settings.cache_dir, progress=progress, **{**size, **options})
    if not is_own(name):
        return load(
            name, settings.data_dir, download, timesteps=settings.timesteps, resize=settings.dvs_resize,
            cache=settings.cache_dir, class_list=settings.class_list, progress=progress, **size,
        )  # fmt: skip
    if is_object(name):
        raise own.OwnError(
            "data: expected the data that a program gave, which no settings can make; go on with that program, or give "
            "it the function that makes them, which can be named"
        )
    found = own.imported(name, "data") if function is None else function
    if makes_data(found):
        known = {"timesteps": settings.timesteps, "data_dir": settings.data_dir}
        found = own.called(found, name, "data", **own.offered(found, options, known))
    elif options:
        raise own.OwnError(f"data: expected {name} to be a function that takes {', '.join(options)}, got {found!r}")
    return own_data.made(found, short(name), time_first=settings.time_first)


def makes_data(thing: Any) -> bool:
    """Whether it is a function or a class, and no data itself."""
    return isinstance(thing, type) or (callable(thing) and not hasattr(thing, "__getitem__"))
