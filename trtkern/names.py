"""What a user may name on the command line; stdlib only, so that it answers before torch is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

BACKENDS = ("auto", "cpu", "cuda", "reference", "triton")
"""What ``backend=`` of a layer can be."""

# The options that each loss takes, with their defaults.
LOSSES: dict[str, dict[str, Any]] = {
    "trt": {"lam": 1e-5, "delta": 0.25, "eta": 0.05, "exclude": []},
    "tet": {"lam": 0.05},
    "sdt": {},
    "mse": {"over": "mean"},
}
OVER = ("mean", "steps", "last")
"""Which output the loss mse compares with the target: the mean over the steps, that of each step, or the last one."""
# Likewise of the optimisers whose defaults are ours; their other numbers, and all other optimisers, are torch's.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"weight_decay": 0.0, "betas": [0.9, 0.999]},
    "adamw": {"weight_decay": 0.01, "betas": [0.9, 0.999]},
    "sgd": {"weight_decay": 0.0, "momentum": 0.9, "nesterov": False},
}

# Likewise of the learning rate's schedules; epochs are counted in ``step_size`` and ``milestones``.
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"eta_min": 0.0},
    "constant": {},
    "step": {"step_size": 10, "gamma": 0.1},
    "multi-step": {"milestones": [], "gamma": 0.1},
    "one-cycle": {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4},
}
# Likewise of what mixes the images of a batch, and their labels with them.
MIXES: dict[str, dict[str, Any]] = {"mixup": {"alpha": 0.2, "p": 1.0}, "cutmix": {"alpha": 1.0, "p": 1.0}}
OWN = "module:function"
"""How something of the user's is named: what follows the colon, in a module that can be imported."""
OWN_NEURON = "module:NAME of what trtkern.neurons.register returned"
"""How a neuron of the user's own is named."""
OBJECT = "object"
"""What stands for something that a program gave as an object, which no name leads to."""
FOLDER = "folder:"
"""What a data set's name begins with that is a folder of files by class."""
TAR = "tar:"
"""What a data set's name begins with that is a folder of tar shards."""

# The neurons that a recipe may name, each with the settings that not all of them take.
NEURONS: dict[str, tuple[str, ...]] = {
    "LIF": ("decay", "gain", "v_leak"),
    "IF": ("gain",),
    "PLIF": ("init_tau", "channels", "decay_input", "v_leak"),
    "CUBALIF": ("decay_syn", "gain_syn", "decay", "gain", "v_leak"),
    "ALIF": ("decay", "gain", "decay_a", "gain_a", "beta", "v_leak"),
    "AdLIF": ("decay", "gain", "decay_w", "a", "b", "v_leak"),
    "CLIF": ("decay", "gain", "rate", "v_leak"),
    "QIF": ("tau", "a0", "v_rest", "v_c"),
    "EIF": ("tau", "delta_t", "theta_rh", "v_rest"),
    "Izhikevich": ("tau", "a0", "v_rest", "v_c", "tau_w", "a", "b"),
}

AMP = ("none", "bf16", "fp16")
"""What autocast computes in; "none" is float32 throughout."""
PARALLEL = ("ddp", "fsdp")
"""How a network lies on several processes: whole on each of them, or in parts."""
OBSERVE = ("fisher",)
"""What `trtkern train --observe` looks at."""
SELECT = ("validation", "test", "last")
"""Which epoch's weights are reported: the best on held-out training images, the best on the test images, the last."""
CURVATURES = ("auto", "exact", "differences")
"""How products with a Hessian are made."""
VIEWS = ("sdt", "tet")
"""The losses that a landscape shows."""
SPLITS = ("train", "validation", "test")
KERNELS = ("lif", "bn-lif", "regularizer", "pack", "delay")
"""The ops that are measured and inspected kernel by kernel."""
DTYPES = ("float32", "bfloat16", "float16")
"""Of their inputs."""
TARGETS = ("sm_80", "sm_90", "gfx942")
"""The GPUs that `trtkern inspect` compiles for."""
COMPILED = ("triton", "cuda", "all")
"""Whose kernels it shows."""
CONFIDENCES = ("probability", "entropy")
"""When `trtkern analyze early` holds a network to be sure."""
STATIC, ZEROS, INTEGERS = ("once", "every step"), ("skipped", "counted"), ("mac", "sums")
"""How `trtkern analyze energy` counts inputs that are the same at every step, zeros, and sums of spikes."""
DVS_RESIZE = ("bilinear", "paper")
"""How frames of events are resized: each channel by itself, or as the paper's reference does."""


def is_own(name: object) -> bool:
    """Whether that names something of the user's own (``OWN``, ``OBJECT``)."""
    return isinstance(name, str) and (":" in name or is_object(name))


def is_object(name: str) -> bool:
    """Whether that stands for an object; behind a colon it may have a name."""
    return name == OBJECT or name.startswith(f"{OBJECT}:")


def short(name: str) -> str:
    """What a folder is called for: "dataset" of "mine:dataset", "cats" of "folder:/home/me/cats"."""
    return name.rpartition(":")[2].rstrip("/").rpartition("/")[2] or OBJECT


def one_of(option: str, value: str, choices: Iterable[str], others: str = "") -> str:
    """``value`` if it is one of the choices; ``unknown`` otherwise."""
    if value not in tuple(choices):
        raise unknown(f"--{option}", value, choices, others)
    return value


def device(name: str) -> tuple[str, int]:
    """The kind of a device and its number: ("cuda", 1) of "cuda:1"; whether this machine has it is not looked at.

    Raises:
        ValueError: it is none of auto, cpu, cuda and cuda:N.
    """
    kind, colon, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise unknown("--device", name, ("auto", "cpu", "cuda", "cuda:N"))
    return kind, int(index or 0)


def inspectable(
    target: str, op: str, backend: str, timesteps: int, dtype: str, neuron: str, known: Iterable[str]
) -> None:
    """Raise a ValueError for what `trtkern inspect` cannot be asked for.

    Args:
        known: the neurons that there are.
    """
    one_of("target", target, TARGETS)
    one_of("op", op, (*KERNELS, "all"))
    one_of("backend", backend, COMPILED)
    one_of("dtype", dtype, DTYPES)
    one_of("neuron", neuron, known)
    if neuron != "LIF" and op not in ("lif", "bn-lif"):
        raise ValueError(f"--neuron: expected --op lif or bn-lif with {neuron}, got {op}")
    if neuron != "LIF" and backend == "cuda":
        raise ValueError(f"--neuron: expected LIF with --backend cuda, got {neuron}; use --backend triton")
    if timesteps < 1:
        raise ValueError(f"--timesteps: expected at least 1, got {timesteps}")


def unknown(where: str, got: object, choices: Iterable[str], others: str = "") -> ValueError:
    """The error for a name that is none of the choices: it lists them, and names the one that is spelt most like it.

    Args:
        where: what takes the name: an option, a function.
        others: what else could stand there, in words: ", or a .toml file".
    """
    listed = ", ".join(choices) or "no options"
    return ValueError(f"{where}: expected one of {listed}{others}, got {got!r}{nearest(got, choices)}")


def nearest(got: object, choices: Iterable[str]) -> str:
    """ "; did you mean 'train'?" for 'trian'; empty where no choice is like it."""
    spelt = {choice.lower(): choice for choice in choices}
    alike = difflib.get_close_matches(str(got).lower(), spelt, 1)
    return f"; did you mean {spelt[alike[0]]!r}?" if alike else ""
