"""The model of a step on several processes: what it says by hand, and that two processes send what it says."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import said, went_right

from trtkern import nn
from trtkern.profiling import scaling
from trtkern.profiling.collectives import covered
from trtkern.profiling.scaling import LINKS, Link, Row, Traffic, least_compute, predict, traffic

CHECKS = ("ddp", "ddp_accumulated", "fsdp", "fsdp_accumulated", "penalty", "control")
WIDTH = 700


def network(sync: bool = False) -> torch.nn.Sequential:
    """Two layers with norms and a classifier, over [T, B, 300]."""
    torch.manual_seed(0)
    norm = partial(nn.BatchNormLIF, WIDTH, channel_dim=-1, sync=sync)
    return torch.nn.Sequential(
        torch.nn.Linear(300, WIDTH), norm(), torch.nn.Linear(WIDTH, WIDTH), norm(), torch.nn.Linear(WIDTH, 9)
    )


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What two processes say of each check of ``scaling_checks.py``."""
    file = Path(__file__).with_name("scaling_checks.py")
    return said(file, tmp_path_factory.mktemp("scaling"), {2: CHECKS})


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_send_what_the_model_says(counted, name):
    went_right(counted, 2, name)


def test_a_span_that_is_covered_twice_counts_once():
    assert covered([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4 and covered([]) == 0


def test_traffic_of_one_is_nothing():
    assert traffic(network(), 1).rows == () and traffic(network(), 1).bytes == 0
    assert predict(2.0, traffic(network(), 1), 1, LINKS["gloo"]) == (2.0, 1.0, 0.0)
    assert least_compute(traffic(network(), 1), LINKS["gloo"]) == 0


def test_what_a_rank_sends():
    assert [scaling.sent(kind, 800, 4) for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast")] == [
        1200, 600, 600, 800,
    ]  # fmt: skip
    assert [scaling.messages(kind, 8) for kind in ("all_reduce", "all_gather", "broadcast")] == [14, 7, 3]
    assert [scaling.messages("all_reduce", ranks, tree=True) for ranks in (2, 8, 512)] == [2, 6, 18]


def test_buckets_are_filled_from_the_last_layer_on():
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(9)])  # 4 MiB each
    rows = [row for row in traffic(model, 4).rows if row.what.startswith("gradients")]
    assert [row.bytes / 2**20 for row in rows] == [4, 28, 4]
    assert [row.during for row in rows] == ["backward", "backward", None]
    model[0].weight.requires_grad_(False)
    assert [row.bytes / 2**20 for row in traffic(model, 4).rows[:-1]] == [4, 28]
    norm = torch.nn.Sequential(nn.BatchNormLIF(3))
    assert [row.what for row in traffic(norm, 2).rows] == ["gradients, bucket 1 of 1", "control"]


def test_shards_are_padded_and_gathered_in_the_dtype_of_the_policy():
    model = torch.nn.Sequential(torch.nn.Linear(8, 5, bias=False), torch.nn.Linear(5, 8, bias=False))
    settings = {"parallel": "fsdp", "blocks": list(model), "param_dtype": torch.bfloat16}
    rows = {row.what: row for row in traffic(model, 4, **settings, reduce_dtype=torch.float32, accumulate=3).rows}
    first, second = 8 * 8, 8 * 5  # 5 rows become 8, two a rank
    assert rows["weights forward, waited for"].bytes == 3 * 2 * first
    assert rows["weights forward, others"].bytes == rows["weights backward, waited for"].bytes == 3 * 2 * second
    assert rows["gradients, waited for"].bytes == 4 * first and rows["gradients, others"].times == 1
    again = {row.what: row for row in traffic(model, 4, parallel="fsdp", blocks=[model[1]]).rows}
    assert again["weights backward, others"].bytes == 4 * first and again["weights backward, others"].times == 1
    whole = traffic(model, 4, parallel="fsdp", accumulate=3, reshard_root=False)  # one group, which stays gathered
    assert [row.collective for row in whole.rows] == ["all_gather", "reduce_scatter", "all_reduce", "all_reduce"]
    assert whole.rows[0].times == 3 and whole.rows[0].bytes == 3 * 4 * (first + second)
    assert whole.rows[-2] == Row("penalty", "all_reduce", 4, 6)


def test_parameters_without_an_axis_are_averaged_together():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), nn.PLIF(), nn.PLIF())
    found = {row.what: row for row in traffic(model, 4, parallel="fsdp", accumulate=3).rows}
    assert found["gradients, scalars"] == Row("gradients, scalars", "all_reduce", 24, 36, 3)
    assert found["gradients, waited for"].bytes == 4 * 16
    model[1].w.requires_grad_(False)
    assert traffic(model, 4, parallel="fsdp").rows[-3].bytes == 4


ROWS = (
    Row("weights", "all_gather", 400, 300, 2, "forward"),
    Row("gradients", "reduce_scatter", 800, 600, 1, "backward"),
    Row("control", "all_reduce", 32, 48),
)


def test_a_step_is_the_formula():
    link = Link("ours", latency=0.1, bandwidth=100.0)
    forward, backward, control = 2 * 3 * 0.1 + 3.0, 3 * 0.1 + 6.0, 4 * 0.1 + 0.48  # on a tree of 4: 4 messages
    given = Traffic(4, ROWS)
    found = predict(6.0, given, 4, link, overlap=0.5)
    assert found.step == pytest.approx(6 + control + (forward - 1) + (backward - 2))
    assert found.efficiency == pytest.approx(6 / found.step)
    assert found.communication == pytest.approx((forward + backward + control) / found.step)
    assert predict(60.0, given, 4, link).step == pytest.approx(60 + control)
    assert predict(6.0, given, 4, link, overlap=0).step == pytest.approx(6 + forward + backward + control)
    bare = predict(6.0, given, 4, link._replace(tree=False, scatters=False), overlap=0)
    assert bare.step == pytest.approx(6 + forward + (6 * 0.1 + 12.0) + 6 * 0.1 + 0.48)
    kept = predict(6.0, Traffic(4, ROWS, batches=4), 4, link, overlap=0.5)  # the last of four backward passes hides
    assert kept.step == pytest.approx(6 + control + (forward - 1) + (backward - 0.5))
    shared = predict(6.0, given, 4, link._replace(start=2.0, shared=True), overlap=0)  # 4 collectives; 4 x the bytes
    assert shared.step == pytest.approx(6 + forward + backward + control + 4 * 2 + 3 * 9.48)
    assert given.bytes == 948 and given.messages == 2 * 3 + 3 + 6


@pytest.mark.parametrize("efficiency", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 1.0])
def test_the_least_compute_gives_just_that_efficiency(efficiency, overlap):
    given, link = Traffic(4, ROWS), Link("ours", 0.1, 100.0)
    least = least_compute(given, link, efficiency, overlap)
    assert predict(least, given, 4, link, overlap).efficiency == pytest.approx(efficiency)
    assert predict(0.9 * least, given, 4, link, overlap).efficiency < efficiency


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda m: traffic(m, 2, parallel="fdsp"), "parallel: expected one of ddp, fsdp, got 'fdsp'; did you mean"),
        (lambda m: traffic(m, 0), "expected ranks to be an int of at least 1, got 0"),
        (lambda m: traffic(m, 2, accumulate=True), "expected accumulate to be an int of at least 1, got True"),
        (lambda m: predict(1.0, traffic(m, 2), 4, LINKS["nvlink"]), "expected the traffic of 4 ranks, got that of 2"),
        (lambda m: predict(math.nan, traffic(m, 2), 2, LINKS["nvlink"]), "expected compute to be seconds above 0, got"),
        (lambda m: predict(1.0, traffic(m, 2), 2, LINKS["nvlink"], 1.5), "expected overlap to be a number from 0 to 1"),
        (lambda m: least_compute(traffic(m, 2), LINKS["pcie"], 1.0), "expected efficiency between 0 and 1, got 1.0"),
    ],
)
def test_what_is_refused(call, why):
    with pytest.raises(ValueError, match=why):
        call(network())
