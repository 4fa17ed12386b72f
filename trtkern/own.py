"""What is the user's own: imported by its name, "module:function", and called; errors say where they came from.

The standard library only, so that names are checked before torch is loaded.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from trtkern.names import OBJECT, OWN, nearest


class OwnError(ValueError):
    """Something of the user's own that failed; the message says what, and in which line."""


def imported(name: str, what: str) -> Any:
    """The object of that name, "module:function", from a module of the current folder or of sys.path.

    Args:
        name: the module, a colon, and a name in it, which may have dots.
        what: what asks for it, for the messages.

    Raises:
        OwnError: no such module or name, or a module that fails; the message has the line.
    """
    place, _, path = name.partition(":")
    if not place or not path:
        raise OwnError(f"{what}: expected {OWN}, got {name!r}")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        main = sys.modules.get("__main__")
        running = main is not None and place not in sys.modules and place == _spelt(main)
        found: Any = main if running else import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise failed(error, f"{what}: expected the module {place} to be imported") from error
        raise OwnError(
            f"{what}: expected {OWN} in a module that can be imported from {folder}, got {name} (no module "
            f"{error.name}); go to its folder, or put that on PYTHONPATH"
        ) from None
    except Exception as error:
        raise failed(error, f"{what}: expected the module {place} to be imported") from error
    for part in path.split("."):
        if not hasattr(found, part):
            public = [each for each in vars(found) if not each.startswith("_")] if hasattr(found, "__dict__") else []
            raise OwnError(
                f"{what}: expected a name of the module {place}, got {path!r}, which it has not"
                f"{nearest(part, public)} ({getattr(sys.modules.get(place), '__file__', place)})"
            )
        found = getattr(found, part)
    return found


def called(function: Callable[..., Any], name: str, what: str, **arguments: Any) -> Any:
    """What the user's function gives for these arguments.

    Raises:
        OwnError: it takes others, or it raised; the message has the line.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        taken = ", ".join(str(each) for each in _parameters(function).values()) or "nothing"
        raise OwnError(
            f"{what}: expected the arguments of {name}, which takes {taken}, got "
            f"{', '.join(f'{key}={value!r}' for key, value in arguments.items()) or 'none'} ({error})"
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    try:
        return function(**arguments)
    except Exception as error:
        raise failed(error, f"{what}: expected {name} to return") from error


def offered(function: Callable[..., Any], given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, and of what is ``known`` what the function has a parameter for; a None is not known."""
    try:
        parameters = _parameters(function)
    except ValueError:
        return dict(given)
    taken = {key: value for key, value in known.items() if key in parameters and value is not None}
    return {**taken, **given}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def failed(error: Exception, wanted: str) -> OwnError:
    """The error of the user's code in one line, with the place in it that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).resolve().parent)
    others = [frame for frame in frames if not frame.filename.startswith((here, "<"))]
    # What an installed library raised is told by the line that called it.
    theirs = [frame for frame in others if "site-packages" not in Path(frame.filename).parts] or others
    place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    return OwnError(f"{wanted}, got {type(error).__name__}: {error}{place}")


def name_of(thing: Any) -> str:
    """The name under which a module has this function or class, "module:function"; ``OBJECT`` where it has none.

    What a program defines that is run as a script has the name of its file: so it is found where it lies.
    """
    path, place = getattr(thing, "__qualname__", None), getattr(thing, "__module__", None)
    module = sys.modules.get(str(place))
    if path is None or module is None:
        return OBJECT
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return f"{_spelt(module)}:{path}" if found is thing else OBJECT


def class_of(thing: Any) -> str:
    """The class of an object, as "module.Class"."""
    kind = type(thing)
    return f"{_spelt(sys.modules.get(kind.__module__), kind.__module__)}.{kind.__qualname__}"


def _spelt(module: ModuleType | None, name: str = "") -> str:
    """A module's name; of the program that is run, that of its file."""
    if module is None:
        return name
    if module.__name__ != "__main__":
        return module.__name__
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    return spec.name if spec is not None else Path(file).stem if file else "__main__"
