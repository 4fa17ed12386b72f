"""A profile as JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from trtkern.profiling.step.advice import Advice
from trtkern.profiling.step.conditions import Conditions
from trtkern.profiling.step.parts import Operator, Part, PartTime
from trtkern.profiling.step.rates import Rates

if TYPE_CHECKING:
    from trtkern.profiling.step.report import StepProfile

SCHEMA = {"name": "trtkern profile", "version": 1}
"""What a file says that it is; the version counts changes after which older programs read it wrongly."""
_Profile = TypeVar("_Profile", bound="StepProfile")
_PLAIN = ("title", "gpu", "about", "machine", "kept", "load", "versions")
_TUPLES = ("walls", "plains", "changes", "operators")


def to_json(found: StepProfile) -> dict[str, Any]:
    """All of a profile but its trace: seconds, bytes, FLOP, a list with a number a profiled step for each time."""
    return {
        "schema": dict(SCHEMA),
        **{name: getattr(found, name) for name in _PLAIN},
        **{name: list(getattr(found, name)) for name in _TUPLES},
        "measured": [rates._asdict() for rates in found.measured],
        "conditions": [each._asdict() for each in found.conditions],
        "advice": [each._asdict() for each in found.advice],
        "rows": [_row(row) for row in found.rows],
    }  # fmt: skip


def _row(row: PartTime) -> dict[str, Any]:
    return {**row._asdict(), "forward": _part(row.forward), "backward": _part(row.backward)}


def _part(part: Part) -> dict[str, Any]:
    ran = [{**each._asdict(), "times": list(each.times)} for each in part.operators]
    return {**part._asdict(), "times": list(part.times), "operators": ran}


def from_json(kind: type[_Profile], found: Mapping[str, Any], name: str) -> _Profile:
    """What ``to_json`` made.

    Raises:
        ValueError: it is no profile, or of another version.
    """
    schema = found.get("schema")
    if not isinstance(schema, Mapping) or schema.get("name") != SCHEMA["name"]:
        raise ValueError(
            f"expected {name} to be a profile that `trtkern profile --json` wrote, got "
            f"{'no schema' if schema is None else repr(schema)} in it"
        )
    if schema.get("version") != SCHEMA["version"]:
        raise ValueError(
            f"expected {name} to be a profile of version {SCHEMA['version']}, got version {schema.get('version')!r}; "
            "profile again"
        )
    try:
        made: dict[str, Any] = {key: found[key] for key in _PLAIN} | {key: tuple(found[key]) for key in _TUPLES}
        made["measured"] = tuple(Rates(**each) for each in found["measured"])
        made["conditions"] = tuple(Conditions(**each) for each in found["conditions"])
        made["advice"] = tuple(Advice(**each) for each in found["advice"])
        made["rows"] = tuple(_read(each) for each in found["rows"])
        steps = len(made["walls"])
        lengths = {len(made["plains"]), len(made["measured"])} | {
            len(times) for row in made["rows"] for times in (row.forward.times, row.backward.times)
        }
        if not steps or lengths != {steps}:
            raise ValueError("not as many times for each row as there are steps")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected {name} to be a whole profile, got one without what it needs: {error}") from None
    assert {field.name for field in fields(kind)} == {*made, "trace"}
    return kind(**made)


def _read(row: Mapping[str, Any]) -> PartTime:
    return PartTime(**{**row, "forward": _half(row["forward"]), "backward": _half(row["backward"])})


def _half(part: Mapping[str, Any]) -> Part:
    ran = tuple(Operator(**{**each, "times": tuple(each["times"])}) for each in part["operators"])
    return Part(**{**part, "times": tuple(part["times"]), "operators": ran})
