"""What a user may name on the command line; stdlib only, so that it answers before torch is loaded."""

from __future__ import annotations

from typing import Any

BACKENDS = ("auto", "cpu", "cuda", "reference", "triton")
DATASETS = (
    "digits", "fashion-mnist", "cifar10", "cifar100", "imagenet100", "imagenet", "dvs-cifar10", "n-caltech101",
    "n-mnist", "dvs-gesture", "shd",
)  # fmt: skip

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

AMP = ("none", "bf16", "fp16")
"""What autocast computes in; "none" is float32 throughout."""
SELECT = ("validation", "test", "last")
"""Which epoch's weights are reported: the best on held-out training images, the best on the test images, the last."""
DVS_RESIZE = ("bilinear", "paper")
"""How frames of events are resized: each channel by itself, or as the paper's reference does."""


def one_of(option: str, value: str, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of the choices; a ValueError that lists them otherwise."""
    if value not in choices:
        raise ValueError(f"--{option}: expected one of {', '.join(choices)}, got {value!r}")
    return value
