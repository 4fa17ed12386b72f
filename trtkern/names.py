"""What a user may name on the command line; stdlib only, so that it answers before torch is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

BACKENDS = ("auto", "cpu", "cuda", "reference", "triton")

# The options that each loss takes, with their defaults.
LOSSES: dict[str, dict[str, Any]] = {
    "trt": {"lam": 1e-5, "delta": 0.25, "eta": 0.05, "exclude": []},
    "tet": {"lam": 0.05},
    "sdt": {},
}
# Likewise of the optimisers; their other numbers are torch's.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"weight_decay": 0.0, "betas": [0.9, 0.999]},
    "adamw": {"weight_decay": 0.01, "betas": [0.9, 0.999]},
    "sgd": {"weight_decay": 0.0, "momentum": 0.9, "nesterov": False},
}

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
OBSERVE = ("fisher",)
"""What `trtkern train --observe` looks at."""
SELECT = ("validation", "test", "last")
"""Which epoch's weights are reported: the best on held-out training images, the best on the test images, the last."""
CURVATURES = ("auto", "exact", "differences")
"""How products with a Hessian are made."""
VIEWS = ("sdt", "tet")
"""The losses that a landscape shows."""
SPLITS = ("train", "validation", "test")
DVS_RESIZE = ("bilinear", "paper")
"""How frames of events are resized: each channel by itself, or as the paper's reference does."""


def one_of(option: str, value: str, choices: Iterable[str]) -> str:
    """``value`` if it is one of the choices; ``unknown`` otherwise."""
    if value not in tuple(choices):
        raise unknown(f"--{option}", value, choices)
    return value


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
