"""What the traffic model allows each kernel, and what a thread's code may move beside it.

The kernels' names, the same for Triton and CUDA: ``forward``, ``backward``; behind a norm ``norm_statistics``,
``norm_forward``, the backward passes ``norm_sums`` and ``norm_input``, with a residual ``norm_sums`` and
``norm_input_grad``; ``regularizer``; ``spikes_packed`` and ``spikes_unpacked``; ``delay_forward`` and
``delay_backward``.
"""

from __future__ import annotations

from typing import NamedTuple

from trtkern.backends.base import CHUNK
from trtkern.neurons import lookup
from trtkern.profiling import traffic
from trtkern.profiling.traffic import Terms
from trtkern.spec import LIFSpec


class Kernel(NamedTuple):
    """A kernel and the options that change what it moves."""

    name: str
    element: int
    """Bytes of an element."""
    steps: int
    """Steps in the code of a thread: a chunk."""
    loop: bool = False
    """Whether T exceeds a chunk."""
    residual: bool = False
    packed: bool = False
    pool: str = "none"
    """none, rows (an average's neurons lie in two rows) or places (channels last), as in ``kernels/pooling.py``."""
    channels: int = 0
    """Channels of parameters that have gradients."""
    accumulate: bool = True
    """Of the regulariser: the gradient is added in place."""
    ahead: bool = False
    """Of the CUDA kernels: the one for long sequences of few neurons."""
    neuron: str = "LIF"
    """A name of ``trtkern.neurons.TABLE``."""

    @property
    def spec(self) -> LIFSpec:
        """Of that neuron, with the first of its resets."""
        return LIFSpec(next(iter(lookup(self.neuron).settle)), neuron=self.neuron)

    @property
    def edge(self) -> float:
        """Bytes of the edges per neuron-step of a whole chunk."""
        return 4 * len(self.spec.row.states) / self.spec.chunk

    @property
    def label(self) -> str:
        """The name with its options."""
        said = [*[self.neuron] * (self.neuron != "LIF"), self.name, *["reading ahead"] * self.ahead]
        said += [*["residual"] * self.residual, *["packed"] * self.packed]
        said += (
            [] if self.pool == "none" else [f"pooled ({'channels last' if self.pool == 'places' else 'contiguous'})"]
        )
        each = "" if self.name.startswith("delay") else f" x {len(self.spec.row.params)}"
        said += [f"learns {self.channels}{each}"] if self.channels else []
        return " ".join(said if self.accumulate else [*said, "(not in place)"])


OPS: dict[str, tuple[str, ...]] = {
    "lif": ("forward", "backward"),
    "bn-lif": ("norm_statistics", "norm_forward", "norm_sums", "norm_input", "norm_input_grad"),
    "regularizer": ("regularizer",),
    "pack": ("spikes_packed", "spikes_unpacked"),
    "delay": ("delay_forward", "delay_backward"),
}
"""The kernels of each op that can be asked for."""


def op_of(kernel: str) -> str:
    return next(op for op, kernels in OPS.items() if kernel in kernels)


def terms(kernel: Kernel) -> Terms:
    """The part of the traffic model that this kernel is responsible for, per neuron-step (regulariser: parameter)."""
    e, pool = kernel.element, kernel.pool != "none"
    residual: traffic.Residual = "dense" if kernel.residual else None
    T, spec = 2 * CHUNK if kernel.loop else kernel.steps, kernel.spec
    if kernel.name == "forward":
        return traffic.lif_forward(e, T, packed=kernel.packed, spec=spec)
    if kernel.name == "backward":
        return traffic.lif_backward(e, T, spec=spec)
    if kernel.name == "regularizer":
        return traffic.regularizer(e, in_place=kernel.accumulate)
    if kernel.name == "spikes_packed":
        return traffic.spikes_pack(e, T)
    if kernel.name == "spikes_unpacked":
        return traffic.spikes_unpack(e, T, pool=pool)
    if kernel.name == "delay_forward":
        return traffic.delay_forward(e)
    if kernel.name == "delay_backward":
        return traffic.delay_backward(e, learned=kernel.channels > 0)
    if kernel.name == "norm_statistics":
        return traffic.batch_norm_lif_forward(e, T)[:1]
    if kernel.name == "norm_forward":
        return traffic.batch_norm_lif_forward(
            e, T, residual=residual, packed=kernel.packed, pool=pool, training=False, spec=spec
        )
    if kernel.name == "norm_input":
        return traffic.batch_norm_lif_backward(e, T, pool=pool, training=False, spec=spec)
    if kernel.name == "norm_input_grad":
        return traffic.batch_norm_lif_backward(e, T, residual="dense")[-3:]
    if kernel.name == "norm_sums":
        both = traffic.batch_norm_lif_backward(e, T, residual=residual, pool=pool, spec=spec)
        return both[:-3] if residual else both[: len(both) // 2]
    raise ValueError(f"inspect: expected a kernel of {OPS}, got {kernel.name!r}")


def bytes_per_step(kernel: Kernel) -> float:
    """Per neuron-step of a whole chunk: where T exceeds one, each has 4/16 for its edge, of a neuron with two states
    8/8."""
    return sum(kernel.edge if term.what == "edges" else term.bytes for term in terms(kernel))


class Allowed(NamedTuple):
    """Bytes that the code of a thread loads and stores."""

    loads: float
    stores: float


def triton_bytes(kernel: Kernel, lanes: int, backend: str = "cuda", unrolled: bool = False) -> Allowed:
    """What the code of a thread of a Triton kernel moves by the contract, each instruction once, with what a thread
    needs once.

    Args:
        lanes: neurons side by side in a thread; of the regulariser its parameters.
        backend: Triton's, cuda or hip.
        unrolled: with pooling, tensors of the neurons' size are moved in a loop over the neurons of an average that
            are not side by side. It is once in the code, unless the compiler unrolls it.
    """
    from trtkern.kernels.pooling import POSITIONS  # needs Triton, which the CUDA kernels do not

    positions = POSITIONS[kernel.pool]
    sizes = {"read": 0.0, "write": 0.0}
    for term in terms(kernel):
        size = kernel.edge if term.what == "edges" else term.bytes
        outside = term.formula == "e/4" or kernel.name == "spikes_unpacked"
        sizes[term.access] += size * (positions if outside or unrolled else 1)
    paths = 2 if kernel.name == "regularizer" else 1  # of a whole piece, and of one that ends within
    loads, stores = (paths * lanes * kernel.steps * size for size in sizes.values())
    once = _once(kernel, lanes, backend)
    return Allowed(loads + once.loads, stores + once.stores)


def _once(kernel: Kernel, lanes: int, backend: str) -> Allowed:
    """What does not grow with T: numbers of a channel once a thread, or for each lane where the channels lie side by
    side; sums likewise; the flag; a row of the statistics that may be the last, and the counter of who comes last."""
    if kernel.name == "regularizer":  # the table of tensors and the slopes; the sum of a piece
        return Allowed(5 * 8 + 4 * 4 if backend == "cuda" else 2 * 4, 4)  # AMD's scalar loads are not counted
    if kernel.name.startswith("delay"):  # the delay; forward the row before the first one; the sums in float64
        before = lanes * kernel.element if kernel.name == "delay_forward" else 0
        return Allowed(4 + before, 8 * lanes * bool(kernel.channels))
    each = lanes if kernel.pool == "places" else 1
    words = {
        "forward": (0, 1), "norm_statistics": (lanes * kernel.element / 4, 4), "norm_forward": (3 * each, 1),
        "norm_sums": (3 * each, 2 * each), "norm_input": (6 * each, 0), "norm_input_grad": (4, 0),
    }  # fmt: skip
    loads, stores = words.get(kernel.name, (0, 0))
    own = lanes if kernel.channels > 1 else min(kernel.channels, 1)  # parameters that are used, and sums
    params = len(kernel.spec.row.params)  # all but what is not used: of LIF v_reset, or the reset's amount
    return Allowed(4 * (loads + (params - 1) * own), 4 * (stores + params * own))


def triton_excess(kernel: Kernel, lanes: int, backend: str, loads: float, stores: float) -> float:
    """Bytes per neuron-step that the code moves beyond the contract; below 0: fewer, which it cannot well do."""
    want = triton_bytes(kernel, lanes, backend)
    if backend == "hip" and kernel.pool != "none":
        unrolled = triton_bytes(kernel, lanes, backend, unrolled=True)
        if loads >= unrolled.loads and stores >= unrolled.stores:
            want = unrolled
    return (loads - want.loads + stores - want.stores) / (lanes * kernel.steps)


def spills_allowed(kernel: Kernel) -> int:
    """Bytes of local memory that are known and put up with: docs/design.md, "Known limits"."""
    return 60 if kernel.pool != "none" and kernel.loop else 32 if kernel.channels else 0
