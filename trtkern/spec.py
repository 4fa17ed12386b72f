"""What selects code: the frozen description of a neuron that every backend compiles against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from trtkern import neurons, surrogates

RESETS = ("hard", "soft", "none")
ALPHAS = (2.0**-60, 2.0**60)
"""The smallest and the largest sharpness: surrogates square it and divide by that, which float32 holds in between."""


CHUNK = 16
"""Numbers of traces that a backward pass keeps at once; ``csrc/lif/args.h`` has the same one (a test compares them)."""


@dataclass(frozen=True)
class LIFSpec:
    """The choices of a neuron that select code; everything else is a number or a tensor.

    Args:
        reset: "hard" (v = v_reset after a spike), "soft" (v = h - reset_amount) or "none".
        surrogate: a name in ``trtkern.surrogates.TABLE``, or a plain function of ``(u, alpha)``, which then goes by
            its name and a digest of its code.
        alpha: sharpness of the surrogate; None is the default of its row.
        detach_reset: no gradient through the spike in what follows it within the neuron: the reset, the adaptation.
        neuron: a name in ``trtkern.neurons.TABLE``, or that of one of the user's own (``trtkern.neurons.register``),
            which then goes by its name and a digest of its code.

    Raises:
        ValueError: an unknown neuron, reset or surrogate, a reset that the neuron cannot have, or an alpha that is not
            finite and positive, or outside ``ALPHAS``.
    """

    reset: str = "hard"
    surrogate: str | Callable = "triangle"
    alpha: float | None = None
    detach_reset: bool = False
    neuron: str = "LIF"
    token: str = field(init=False, repr=False, compare=False)
    """The spec as one string, the form in which it passes through ``torch.ops``."""
    row: neurons.Neuron = field(init=False, repr=False, compare=False)
    """The neuron's row of the table."""
    chunk: int = field(init=False, repr=False, compare=False)
    """Steps whose traces a backward pass keeps at once: 16 where a trace is one number, as LIF's is."""
    op: str = field(init=False, repr=False, compare=False)
    """What the op of that neuron is called in messages: its name in small letters."""
    builtin: bool = field(init=False, repr=False, compare=False)
    """Whether neuron and surrogate are rows that the extensions were built with."""

    def __post_init__(self) -> None:
        if self.reset not in RESETS:
            raise ValueError(f"LIFSpec: expected reset to be one of {', '.join(RESETS)}, got {self.reset!r}")
        neuron = neurons.lookup(self.neuron)
        possible = neuron.settle
        if self.reset not in possible:
            raise ValueError(
                f"LIFSpec: expected the reset of {self.neuron} to be {' or '.join(possible)}, got {self.reset!r}, "
                "which this neuron does not have"
            )
        name = surrogates.register(self.surrogate) if callable(self.surrogate) else self.surrogate
        found = surrogates.lookup(name)
        name = found.name
        try:
            alpha = found.default_alpha if self.alpha is None else float(self.alpha)
        except (TypeError, ValueError):
            raise TypeError(f"LIFSpec: expected alpha to be a number or None, got {self.alpha!r}") from None
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"LIFSpec: expected alpha to be finite and positive, got {self.alpha!r}")
        if not ALPHAS[0] <= alpha <= ALPHAS[1]:
            raise ValueError(
                f"LIFSpec: expected alpha from {ALPHAS[0]:.1e} to {ALPHAS[1]:.1e}, whose squares float32 holds, got "
                f"{self.alpha!r}; scale the potentials and the threshold instead"
            )
        # Made once: torch.compile takes a string as a constant, where it would trace the number inside.
        token = f"{self.reset}|{name}|{alpha!r}|{int(self.detach_reset)}"
        token += "" if neuron.name == "LIF" else f"|{neuron.name}"
        settled = {"surrogate": name, "alpha": alpha, "detach_reset": bool(self.detach_reset), "token": token}
        settled |= {"neuron": neuron.name, "row": neuron, "chunk": CHUNK // len(neuron.trace)}
        settled |= {"op": neuron.name.partition("@")[0].lower()}
        for attribute, value in (settled | {"builtin": neuron.builtin and found.builtin}).items():
            object.__setattr__(self, attribute, value)

    def __reduce__(self) -> tuple:
        # A surrogate or a neuron of the user's own is only a name in another process.
        surrogate, neuron = surrogates.reference(str(self.surrogate)), neurons.reference(self.neuron)
        return _restored, (self.reset, surrogate, self.alpha, self.detach_reset, neuron)

    @staticmethod
    @cache
    def from_token(token: str) -> LIFSpec:
        """The spec that ``token`` came from."""
        reset, surrogate, alpha, detach, *neuron = token.split("|")
        return LIFSpec(reset, surrogate, float(alpha), detach == "1", *neuron)


def _restored(
    reset: str, surrogate: str | tuple, alpha: float, detach_reset: bool, neuron: str | tuple = "LIF"
) -> LIFSpec:
    return LIFSpec(reset, surrogates.restore(surrogate), alpha, detach_reset, neurons.restore(neuron))
