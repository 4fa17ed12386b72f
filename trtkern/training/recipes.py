"""Recipes: what a run is made of, in TOML files. A control changes a part of one: "cifar10+l2"."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trtkern.names import NEURONS, is_own, unknown
from trtkern.training.options import OPTIONS, RECIPE

FOLDER = Path(__file__).resolve().parent.parent / "recipes"

KEYS: dict[str, type] = {
    name: dict if option.table else option.kind for name, option in OPTIONS.items() if RECIPE in option.where
}
"""What a recipe may hold, and its type. Of the tables, [model] has what its builder takes, [loss] and [optimizer] what
``trtkern.names`` has."""


def names() -> list[str]:
    """The recipes of the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def controls() -> list[str]:
    """What may follow a "+"."""
    return sorted(path.stem for path in (FOLDER / "controls").glob("*.toml"))


def load(name: str, changes: Iterable[str] = (), own: dict[str, Any] | None = None) -> dict[str, Any]:
    """The recipe of that name with its controls, and with changes "key=value" or "table.key=value".

    Args:
        name: one of ``names``, or a path of a .toml file; then controls, each after a "+".
        changes: values in TOML's notation; what is none is a string.
        own: what there is instead of a recipe.

    Raises:
        ValueError: an unknown name, key or control, a value of another type; the message lists the known ones.
        OSError: a file cannot be read.
    """
    base, *added = name.split("+")
    if own is not None:
        recipe = dict(own)
    elif base.endswith(".toml"):
        recipe = _read(Path(base))
    elif base in names():
        recipe = _read(FOLDER / f"{base}.toml")
    else:
        raise unknown("--recipe", base, names(), ", or a .toml file")
    for control in added:
        if control not in controls():
            raise unknown("--recipe", control, controls(), " after a '+'")
        _merge(recipe, _read(FOLDER / "controls" / f"{control}.toml"))
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set: expected key=value, got {change!r}")
        table, dot, inner = key.strip().partition(".")
        value = _value(text.strip())
        part = {table: {inner: value}} if dot else {table: value}
        _check(part, "--set")
        _merge(recipe, part)
    missing = [key for key in KEYS if OPTIONS[key].default is ... and key not in recipe]
    if own is not None and "model" in missing:
        raise ValueError(f"--model: expected a network beside --data {own['data']}, which has no recipe, got none")
    if missing:
        raise ValueError(f"--recipe: expected {', '.join(missing)} in {name}, got {', '.join(recipe) or 'nothing'}")
    if "name" not in recipe["model"]:
        raise ValueError(f"--recipe: expected name in [model] of {name}, got {', '.join(recipe['model']) or 'nothing'}")
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--recipe: expected a TOML file, got {path} ({error})") from None
    _check(recipe, f"--recipe: {path}")
    return recipe


def _check(recipe: dict[str, Any], where: str) -> None:
    for key, value in recipe.items():
        if key not in KEYS:
            raise unknown(where, key, KEYS)
        if not fits(value, KEYS[key]):
            table = f"; a table is set as {key}.name=..." if KEYS[key] is dict else ""
            raise ValueError(f"{where}: expected {key} as {KEYS[key].__name__}, got {value!r}{table}")


def fits(value: Any, kind: type) -> bool:
    """Whether a value is of that type; an integer is a float too, and a bool is no number."""
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _merge(recipe: dict[str, Any], part: dict[str, Any]) -> None:
    """Tables key by key, unless they are of another name: another loss or model starts from its own defaults, and
    another neuron from its own."""
    if "neuron" in part.get("model", {}) and "model" in recipe:
        own = NEURONS.get(str(recipe["model"].get("neuron", "LIF")), ())
        named = str(part["model"]["neuron"])
        kept = () if is_own(named) else NEURONS.get(named, own)
        recipe["model"] = {key: value for key, value in recipe["model"].items() if key not in own or key in kept}
    for key, value in part.items():
        old = recipe.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("name", old.get("name")) == old.get("name"):
            recipe[key] = {**old, **value}
        else:
            recipe[key] = value
