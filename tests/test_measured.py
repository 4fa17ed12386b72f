"""The measured numbers of the pages are those of the rows: docs/measured.py, and what it answers to."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def numbers():
    spec = importlib.util.spec_from_file_location("numbers_of_pages", ROOT / "docs" / "measured.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


ROWS = "bench/results/amd-epyc-family-25-model-1-2-cores-avx2.csv"
LIF = {"rows": ROWS, "case": "lif 4x2097152 float32", "direction": "both", "take": "p50_ms"}


def test_every_measured_number_has_a_row(numbers):
    said, unmeasured = numbers.table()
    pages = numbers.pages()
    assert "README.md" in pages and not {page for each in said for page in each.pages} - set(pages)
    assert not set(unmeasured) - set(pages)
    wrong = [
        problem
        for page in pages
        for problem in numbers.problems(page, (ROOT / page).read_text(), said, unmeasured.get(page, []))
    ]
    assert not wrong, "\n".join(wrong)
    assert len([each for each in said if "README.md" in each.pages]) > 4


def test_a_number_without_a_row_is_named(numbers):
    ours = {"ours": {**LIF, "candidate": "trtkern cpu", "as": ".2f"}}
    said = [numbers.Said(("a.md",), "LIF takes {ours} ms", ours)]
    assert not [*numbers.problems("a.md", "LIF takes\n6.72 ms. `7.1 ms` is code.", said, [])]
    [wrong] = numbers.problems("a.md", "LIF takes 6.72 ms, and ReLU 0.5 ms.", said, [])
    assert "no row for '0.5 ms'" in wrong
    [first, second] = numbers.problems("a.md", "LIF takes 6.73 ms", said, [])
    assert "the rows say 'LIF takes 6.72 ms'" in first and "no row for '6.73 ms'" in second
    assert not [*numbers.problems("a.md", "In a second, 5 % of it", [], ["5 % of it"])]
    [gone] = numbers.problems("a.md", "Nothing", [], ["5 % of it"])
    assert "does not stand there" in gone
    for text in ("0.9 times as long", "**0.54**", "12 GB/s", "3 minutes", "2 MiB", "7%"):
        assert [*numbers.problems("a.md", text, [], [])], text
    assert not [*numbers.problems("a.md", "T = 4, 8 x 3 x 32, sm_90, 2048 neurons, 2**16", [], [])]


def test_what_a_query_gives(numbers):
    ours, relu = {**LIF, "candidate": "trtkern cpu"}, {**LIF, "candidate": "copy_"}
    assert numbers.value(ours) == 6.7199  # the last of the rows, which are only ever added
    assert numbers.value({**ours, "of": {"candidate": "copy_"}}) == pytest.approx(6.7199 / numbers.value(relu))
    assert numbers.value({**ours, "inverse": True, "scale": 1e-3}) == pytest.approx(1 / 6.7199e-3)
    assert numbers.value({**ours, "reduce": "max"}) >= numbers.value({**ours, "reduce": "mean"})
    assert numbers.value({**ours, "count": True}) > 3
    with pytest.raises(ValueError, match=r"expected a row of .* got none"):
        numbers.value({**ours, "candidate": "nobody"})
    with pytest.raises(ValueError, match="expected numbers in note"):
        numbers.value({**ours, "take": "note"})
