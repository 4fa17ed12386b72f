"""One name for one thing: the table of docs/design.md, "The names", against the code of the kernels."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = " (outside CUDA and spike_conv)"


def never() -> dict[str, str]:
    """The names of the last column, each with what restricts it."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("## The names\n")[2].partition("\n## ")[0]
    last = [line.rsplit("|", 2)[1] for line in table.splitlines() if line.startswith("|")][2:]
    return dict(re.findall(r"`(\w+)`((?: \(outside CUDA and spike_conv\))?)", " ".join(last)))


def python_names(path: Path) -> set[str]:
    with io.BytesIO(path.read_bytes()) as source:
        return {token.string for token in tokenize.tokenize(source.readline) if token.type == tokenize.NAME}


def cpp_names(path: Path) -> set[str]:
    text = re.sub(r'//.*|"[^"\n]*"', "", path.read_text(encoding="utf-8"))
    return set(re.findall(r"[A-Za-z_]\w*", text))


def is_apart(path: Path) -> bool:
    """Whether it is of CUDA, or of what computes on packed spikes."""
    return path.parent.name in ("cuda", "spike_conv") or path.stem.startswith(("cuda", "spike_conv"))


def sources() -> list[Path]:
    return [*sorted((ROOT / "kernels").glob("*.py")), *sorted(p for p in (ROOT / "csrc").glob("*/*") if p.is_file())]


def test_the_table_names_what_it_forbids():
    assert never().keys() >= {"poison", "bad", "seen", "kGv", "pool_inner", "words", "y"}
    assert never()["words"] == never()["y"] == OUTSIDE and never()["poison"] == ""


@pytest.mark.parametrize("path", sources(), ids=lambda path: "/".join(path.parts[-2:]))
def test_no_second_name(path):
    found = python_names(path) if path.suffix == ".py" else cpp_names(path)
    forbidden = {name for name, where in never().items() if not (where == OUTSIDE and is_apart(path))}
    assert not found & forbidden, f"{path.name}: expected the names of docs/design.md, got {sorted(found & forbidden)}"
