"""What bench/claims.py says of its rows: intervals, verdicts, the strength that the validation images choose."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import claims

    monkeypatch.setattr(claims, "VALIDATION", dict(claims.VALIDATION))
    return claims


def test_an_interval_is_student_s(claims):
    found = claims.claims_page.Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.high - 3.0 == pytest.approx(2.776 * math.sqrt(2.5 / 5)) == 3.0 - found.low


@pytest.mark.parametrize(
    ("values", "better", "verdict"),
    [
        ((1.0, 1.1, 1.2), 1, "supported"),
        ((1.0, 1.1, 1.2), -1, "contradicted"),
        ((-1.0, -1.1, -1.2), -1, "supported"),
        ((-1.0, 1.1, 0.0), -1, "not decided"),
        ((math.nan, 1.0, 1.1), 1, "not measured"),
        ((math.inf, 1.0, 1.1), 1, "not measured"),
    ],
)
def test_a_verdict_needs_the_whole_interval(claims, values, better, verdict):
    assert claims.claims_page.Interval.of(values).verdict(better) == verdict


def test_differences_pair_the_seeds(claims):
    found = {
        "a": {seed: {"test": 0.9 + 0.01 * seed} for seed in range(4)},
        "b": {seed: {"test": 0.8 + 0.01 * seed} for seed in (3, 2, 1)},
    }
    interval = claims.claims_page.difference(found, "a", "b", "test")
    assert (interval.mean, interval.low, interval.high) == pytest.approx((10, 10, 10))


def test_the_strongest_penalty_that_costs_no_validation_accuracy_is_chosen(claims, tmp_path):
    """Within a standard error of the best: 0.0226 for 0.9 of 88 images twice; the test images have no say."""
    accuracies = dict(zip(claims.SWEEP, (0.89, 0.90, 0.88, 0.879, 0.7), strict=True))
    for lam, accuracy in accuracies.items():
        for seed in claims.SWEEP_SEEDS:
            place = tmp_path / "digits" / claims.Arm("l2", lam).folder / f"seed{seed}"
            place.mkdir(parents=True)
            shift = 0.05 if seed else -0.05  # their mean counts
            found = {"validation": {"accuracy": accuracy + shift}, "test": {"accuracy": 1 - accuracy}}
            (place / "result.json").write_text(json.dumps(found))
    claims.VALIDATION["digits"] = 88
    assert claims.chosen("digits", "l2", tmp_path) == claims.SWEEP[3]
    claims.VALIDATION["digits"] = 10_000
    assert claims.chosen("digits", "l2", tmp_path) == claims.SWEEP[1]


def test_every_command_is_one_of_trtkern_train(claims):
    """No typing error waits for the end of a sweep."""
    from trtkern.training import plan

    for data in claims.DATA:
        for arm in [*claims.FIXED.values(), *(run[1] for run in claims.sweep(data))]:
            words = list(arm.arguments(data))
            given = dict(zip(words[::2], words[1::2], strict=True))
            changes = [value for name, value in zip(words[::2], words[1::2], strict=True) if name == "--set"]
            numbers = {
                "lam": float,
                "delta": float,
                "epochs": int,
                "keep_every": int,
                "batch_size": int,
                "timesteps": int,
            }
            options = {name: kind(given[f"--{name.replace('_', '-')}"]) for name, kind in numbers.items()
                       if f"--{name.replace('_', '-')}" in given}  # fmt: skip
            made = plan.make(recipe=given["--recipe"], changes=changes, **options)
            assert made["timesteps"] == 10
            if arm.control in ("", "l2"):
                wanted = (arm.lam, 0.5 if not arm.control else 0.0)
                assert (made["loss_options"]["lam"], made["loss_options"]["delta"]) == wanted
