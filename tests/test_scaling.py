"""The model of a step on several processes: what it says by hand, and that two processes send what it says."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
import torch
from processes import together, wire
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trtkern import nn
from trtkern.profiling import scaling
from trtkern.profiling.collectives import Counted, covered, timed
from trtkern.profiling.scaling import LINKS, Link, Row, Traffic, least_compute, predict, traffic

WIDTH, STEPS, BATCH = 700, 4, 6
OWN = ("control", "penalty")
"""Rows of the trainer, which a bare step does not send."""


def network(sync: bool = False) -> torch.nn.Sequential:
    torch.manual_seed(0)
    norm = partial(nn.BatchNormLIF, WIDTH, channel_dim=-1, sync=sync)
    return torch.nn.Sequential(
        torch.nn.Linear(300, WIDTH), norm(), torch.nn.Linear(WIDTH, WIDTH), norm(), torch.nn.Linear(WIDTH, 9)
    )


def blocks(model: torch.nn.Sequential) -> list[torch.nn.Module]:
    """What is sharded apart: the last layer stays the root's."""
    return list(model[:4])


def sharded(model: torch.nn.Sequential) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in blocks(model):
        fully_shard(layer)
    return fully_shard(model)


def step(model: torch.nn.Module, accumulate: int, penalised: bool = False) -> None:
    """An update's forward and backward passes; gradients go out with the last of them."""
    loss = nn.TRTLoss(model) if penalised else nn.SDTLoss()
    x, target = torch.randn(STEPS, BATCH, 300), torch.arange(BATCH)
    for batch in range(accumulate):
        last = batch == accumulate - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last  # what no_sync() sets
        else:
            model.set_requires_gradient_sync(last)
        loss(model(x), target).backward()


def told(model: torch.nn.Module, **settings: object) -> dict[str, tuple[int, int]]:
    """{collective: (bytes of whole tensors, calls)} of a step, by the model."""
    whole, times = Counter(), Counter()
    for row in traffic(model, 2, broadcast_buffers=True, **settings).rows:
        if row.what not in OWN:
            whole[row.collective] += row.bytes
            times[row.collective] += row.times
    return {name: (whole[name], times[name]) for name in whole}


def sent(model: torch.nn.Module, accumulate: int, penalised: bool = False) -> tuple[dict[str, tuple[int, int]], int]:
    """The same, counted; and the bytes that the sockets sent in another such step."""
    for _ in range(2):  # DDP makes its buckets anew after the first
        step(model, accumulate, penalised)
    with Counted() as found:
        step(model, accumulate, penalised)
    dist.barrier()
    before = wire()
    step(model, accumulate, penalised)
    return {name: (found.bytes(name), found.times(name)) for name in {call.collective for call in found.calls}}, (
        wire() - before
    )


CASES = {
    "ddp": {},
    "ddp, accumulated, synchronised": {"accumulate": 2, "sync_norm": True},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, accumulated, synchronised": {"parallel": "fsdp", "accumulate": 2, "sync_norm": True},
}


def counted(rank: int) -> dict[str, object]:
    """Of each case: what the model says, what was counted, what the sockets sent."""
    results: dict[str, object] = {}
    for name, case in CASES.items():
        plain = network(bool(case.get("sync_norm")))
        model = sharded(plain) if case.get("parallel") == "fsdp" else DistributedDataParallel(plain)
        inner = plain if case.get("parallel") == "fsdp" else model.module
        results[name] = told(inner, **case), *sent(model, int(case.get("accumulate", 1)))
    results["penalty"] = sent(DistributedDataParallel(network()), 1, penalised=True)[0]
    with timed() as found:
        dist.all_reduce(torch.ones(2**20))
    results["timed"] = (found.seconds, found.wall, found.alone)
    with Counted() as few:
        dist.barrier()
        dist.all_reduce(torch.ones(scaling.CONTROL // 8, dtype=torch.float64))
    results["control"] = few.calls
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return together(2, tmp_path_factory.mktemp("scaling"), counted)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_hand_over_what_the_model_says(found, name):
    by_model, by_count, _ = found[name]
    assert by_model == by_count


@pytest.mark.parametrize("name", CASES)
def test_the_sockets_send_it(found, name):
    """gloo adds a header a message, and has no reduce-scatter: it sends an all-reduce."""
    by_model, _, by_wire = found[name]
    carried = {"reduce_scatter": "all_reduce"}
    wanted = sum(scaling.sent(carried.get(kind, kind), whole, 2) for kind, (whole, _) in by_model.items())
    calls = sum(times for _, times in by_model.values())
    assert wanted <= by_wire <= wanted + 1024 * calls


def test_the_penalty_sends_nothing_under_ddp(found):
    assert found["penalty"] == found["ddp"][1]


def test_the_time_of_a_collective_is_seen(found):
    seconds, wall, alone = found["timed"]
    assert 0 < seconds <= wall and alone is None
    assert found["control"] == [("all_reduce", scaling.CONTROL)]


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
    whole = traffic(model, 4, parallel="fsdp", accumulate=3)  # one group, which stays gathered
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
