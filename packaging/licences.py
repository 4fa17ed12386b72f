"""The licences of what comes with the package, by the metadata of an environment."""

from __future__ import annotations

import json
import re
from pathlib import Path

from try_wheel import Failed, alone, call

PERMISSIVE = re.compile(
    r"\b(MIT|MIT-CMU|BSD|BSD-[23]-Clause|Apache|Apache-2\.0|ISC|PSF|PSF-2\.0|Python-2\.0|Python Software Foundation|"
    r"HPND|Zlib|0BSD|Unlicense|CC0-1\.0|MPL-2\.0|Mozilla Public License 2\.0|matplotlib)\b",
    re.IGNORECASE,
)
"""Licences that ask no more than that they are named (MPL-2.0: that its own files stay open)."""
COPYLEFT = re.compile(r"\b(A?L?GPL|GNU)\b|(?<!\w)(A|L)?GPL", re.IGNORECASE)
OF_TORCH = re.compile(r"nvidia-|cuda-")
"""What a torch for NVIDIA GPUs brings, by NVIDIA's own licence; nothing of it is in a wheel."""
ASK = """
import json
from importlib.metadata import distributions
print(json.dumps([
    {"name": each.metadata["Name"], "expression": each.metadata.get("License-Expression") or "",
     "text": (each.metadata.get("License") or "").strip().splitlines()[:1],
     "classifiers": [c for c in each.metadata.get_all("Classifier") or () if c.startswith("License ::")]}
    for each in distributions()
]))
"""
TOOLS = ("pip", "setuptools", "wheel")


def verdict(about: dict[str, object]) -> str:
    """ "permissive", "copyleft" or "unknown", of the metadata of one package."""
    words = [str(about["expression"]), *map(str, about["text"]), *map(str, about["classifiers"])]  # type: ignore[call-overload]
    said = next((word for word in (words[0], " ".join(words[1:])) if word.strip()), "")
    if PERMISSIVE.search(said):  # "A OR B" leaves the choice
        return "copyleft" if COPYLEFT.search(said) and " OR " not in said and "WITH" not in said else "permissive"
    return "copyleft" if COPYLEFT.search(said) else "unknown"


def check(python: Path) -> str:
    """Look at every package of an environment.

    Raises:
        Failed: a package with another licence than a permissive one, or with none.
    """
    every = json.loads(call(python, "-c", ASK, cwd=python.parent, env=alone()))
    ours = [each for each in every if each["name"] not in TOOLS and not OF_TORCH.match(each["name"])]
    bad = [f"{each['name']} ({verdict(each)})" for each in ours if verdict(each) != "permissive"]
    if bad:
        raise Failed(f"expected permissive licences, got {', '.join(bad)}")
    apart = len(every) - len(ours)
    return f"{len(ours)} packages, all permissive; {apart} of pip and of torch's NVIDIA packages not looked at"
