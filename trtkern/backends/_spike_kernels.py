"""Which CPU kernel computes on packed spikes: a choice by sizes, instruction set and firing rate, never by a timing.

So a run chooses the same kernels whenever it is repeated or resumed on a machine of the same kind.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """What an instruction set does, in one direction, for a class of convolutions."""

    dense: str | None
    """The kernel whose time does not depend on the firing rate; None: torch's own."""
    lists_below: float
    """The firing rate below which the lists of active inputs are faster than that."""


OWN = "torch's own"
LEAST_WORK = 2**24
"""Products of spikes and weights (T B out_h out_w K C kernel_h kernel_w) below which torch's own kernels run: what is
done around a kernel takes longer than it saves there."""

Choices = tuple[Choice, Choice]
"""Forward, and for the weight's gradient."""


class Row(NamedTuple):
    """What an instruction set does for the classes of convolutions."""

    windows: Choices
    """Kernels of more than one place that move place by place: the taps of neighbours read the same spikes."""
    places: Choices
    """Matrix products, kernels of one place, and strides."""
    counts: Choices
    """2x2 averages and sums of spikes."""
    image: str | None = None
    """What computes the gradient of the image, which has no spikes in it, where a kernel has several places."""


# By the instruction set in use, and who made the processor where that matters. The measurements are in
# bench/spike_thresholds.csv; bench/spike_thresholds.py prints the rates at which lists and the others meet.
TABLE: dict[tuple[str, str], Row] = {
    ("amx", ""): Row(
        windows=(Choice("tiles", 0.15), Choice("tiles", 0.15)),
        places=(Choice("tiles", 0.28), Choice("tiles", 0.25)),
        counts=(Choice("tiles", 0.0), Choice("tiles", 0.0)),
        image="tiles",
    ),
    # One permutation of 512 bits a clock: a table in a register is no faster than one in the L1 cache.
    ("avx512", ""): Row(
        windows=(Choice("tables", 0.28), Choice("tables", 0.32)),
        places=(Choice("tables", 0.28), Choice("registers", 0.28)),
        counts=(Choice(None, 0.18), Choice(None, 0.18)),
    ),
    # From a prototype's measurements on a Zen 5, which has two.
    ("avx512", "amd"): Row(
        windows=(Choice("registers", 0.12), Choice("registers", 0.1)),
        places=(Choice("registers", 0.12), Choice("registers", 0.1)),
        counts=(Choice(None, 0.18), Choice(None, 0.18)),
    ),
    ("avx2", ""): Row(
        windows=(Choice("tables", 0.3), Choice("tables", 0.35)),
        places=(Choice("tables", 0.3), Choice("tables", 0.37)),
        counts=(Choice(None, 0.27), Choice(None, 0.3)),
    ),
}


def class_of(args: Any) -> str:
    """The class of a convolution, a field of ``Row``."""
    if args.pool != 1 or args.addends != 1:
        return "counts"
    moves = args.stride_h == args.stride_w == 1 and args.out_h * args.out_w > 1
    return "windows" if moves and args.kernel_h * args.kernel_w > 1 else "places"


def row(extension: ModuleType) -> tuple[str, str] | None:
    """The row of the table for this machine, or None."""
    isa, maker = extension.isa(), extension.maker()
    return next((key for key in ((isa, maker), (isa, "")) if key in TABLE), None)


def described(extension: ModuleType) -> str:
    """What the row of this machine says, in one line."""
    key = row(extension)
    if key is None:
        return f"packed spikes: torch's own kernels, {extension.isa()} has none that are faster"
    said = []
    for name in ("windows", "places", "counts"):
        choices = getattr(TABLE[key], name)
        both = []
        for choice in choices:
            lists = f"lists below {choice.lists_below:g}, else " if choice.lists_below else ""
            both.append(f"{lists}{choice.dense or OWN}")
        said.append(f"{name} {both[0] if both[0] == both[1] else ' and '.join(both)}")
    said.append(f"gradient of the image {TABLE[key].image or OWN}")
    return f"packed spikes ({' '.join(filter(None, key))}), by firing rate: {'; '.join(said)}"


LEAST_ROWS = 64
"""Images times places of y below which torch's own kernels run: a kernel lays out all weights for them."""


def of_image(extension: ModuleType, args: Any) -> str | None:
    """The kernel that is to compute the gradient of the image, None for torch's own."""
    key = row(extension)
    kernel = None if key is None else TABLE[key].image
    if kernel is None or _work(args) < LEAST_WORK or args.kernel_h * args.kernel_w < 4:
        return None
    return kernel if _takes(extension, args, kernel, INPUT_GRAD) else None


def choose(extension: ModuleType, args: Any, *, weight_grad: bool) -> tuple[str | None, str]:
    """The kernel that is to run, None for torch's own, and why."""
    work = _work(args)
    if work < LEAST_WORK:
        return None, f"{work} products of spikes and weights are fewer than {LEAST_WORK}"
    rows = args.T * args.B * args.out_h * args.out_w
    if rows < LEAST_ROWS:
        return None, f"{rows} places of all images together are fewer than {LEAST_ROWS}"
    isa, key = extension.isa(), row(extension)
    if key is None:
        return None, f"{isa} has no kernel that computes on packed spikes faster than torch"
    choice = getattr(TABLE[key], class_of(args))[weight_grad]
    if choice.lists_below > 0 and _takes(extension, args, "lists", int(weight_grad)):
        rate = _rate(extension, args)
        if rate < choice.lists_below:
            return "lists", f"with {isa}, for a firing rate of {rate:.3f}, below {choice.lists_below:g}"
    if choice.dense is not None and _takes(extension, args, choice.dense, int(weight_grad)):
        return choice.dense, f"with {isa}, the fastest that does not depend on the firing rate"
    return None, f"no kernel of {isa} takes these sizes at this firing rate"


def _work(args: Any) -> int:
    """Products of the image and the weight."""
    return args.T * args.B * args.out_h * args.out_w * args.K * args.C * args.kernel_h * args.kernel_w


FORWARD, WEIGHT_GRAD, INPUT_GRAD = range(3)
"""The passes, as ``SPIKE_PASSES`` of the extension has them."""


def _takes(extension: ModuleType, args: Any, kernel: str, which: int) -> bool:
    args.kernel = extension.SPIKE_KERNELS.index(kernel)
    return extension.spike_conv_takes(args, which)


def _rate(extension: ModuleType, args: Any) -> float:
    """The share of the spikes that are 1; of what is averaged or added up, each by itself."""
    planes = (args.T + 7) // 8
    neurons = args.addends * args.B * args.words_h * args.words_w * args.C
    return extension.spikes_count(args.words, planes * neurons, args.threads) / (args.T * neurons)
