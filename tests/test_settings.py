"""Options as settings, and the memory pages of a training process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trtkern.training import settings


def resolve(**options) -> settings.Settings:
    return settings.resolve(**{"device": "cpu", **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "cifar"}, "--data: expected one of digits, fashion-mnist, cifar10, cifar100, .*, got 'cifar'"),
        ({"loss": "l2"}, "--loss: expected one of trt, tet, sdt, mse, or module:function, got 'l2'"),
        ({"backend": "numba"}, "--backend: expected one of auto, .*, got 'numba'"),
        ({"device": "tpu"}, "--device: expected one of auto, cpu, cuda, cuda:N, got 'tpu'"),
        ({"device": "cpu:1"}, "--device: expected one of"),
        ({"epochs": 0}, "--epochs: expected an integer of at least 1, got 0"),
        ({"batch_size": -4}, "--batch-size: expected an integer of at least 1, got -4"),
        ({"timesteps": 0}, "--timesteps: expected an integer of at least 1, got 0"),
        ({"threads": 0}, "--threads: expected an integer of at least 1, got 0"),
        ({"lr": float("nan")}, "--lr: expected a finite number above 0, got nan"),
        ({"lr": 0.0}, "--lr: expected a finite number above 0, got 0.0"),
        ({"lr": float("inf")}, "--lr: expected a finite number above 0, got inf"),
        ({"lam": -1.0}, "--lam: expected a finite number of at least 0, got -1.0"),
        ({"eta": 1.5}, "--eta: expected a number of 0 to 1, got 1.5"),
        ({"delta": float("nan")}, "--delta: expected a finite number of at least 0, got nan"),
        ({"loss": "sdt", "eta": 0.1}, "--eta: expected with --loss trt only, got it with --loss sdt"),
        ({"loss": "tet", "lam": 1.5}, "--lam: expected a number of 0 to 1, got 1.5"),
        ({"seed": -1}, "--seed: expected an integer of 0 to"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolve(**options)


def test_device_that_is_not_there_is_refused():
    with pytest.raises(
        RuntimeError, match=r"--device: cuda:99 was asked for, but this machine has .*; use --device cpu"
    ):
        resolve(device="cuda:99")


def test_defaults_are_the_recipe_and_the_loss():
    plan = settings.resolve(data="fashion-mnist", loss="tet")
    assert (plan.epochs, plan.batch_size, plan.lr, plan.augment) == (5, 128, 4e-3, [{"name": "flip", "p": 0.5}])
    assert plan.loss_options == {"lam": 0.05}
    assert resolve(eta=0.5).loss_options == {"lam": 1e-5, "delta": 0.25, "eta": 0.5, "exclude": []}
    assert resolve(lam=0.0).loss_options["lam"] == 0.0


PAGES = """
import resource, torch
torch.set_num_threads(1)
from trtkern.malloc import keep_pages, mapping_anew
def faults(blocks=1):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.empty(33 << 20, dtype=torch.uint8).fill_(1) for _ in range(blocks)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
default = faults()
took = keep_pages()
print(took, default, *(faults() for _ in range(24)))
with mapping_anew():
    print(*(faults(4) for _ in range(4)))
print(*(faults(4) for _ in range(24)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_pages_are_kept():
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    first, anew, again = (line.split() for line in done.stdout.splitlines())
    took, default, *kept = first
    assert took == "True" and max(map(int, kept[-4:])) < int(default) / 10, done.stdout
    assert min(map(int, anew)) > 2 * int(default), "more than is kept: mapped at each call"
    assert max(map(int, again[-4:])) < int(default) / 10, "kept again"
