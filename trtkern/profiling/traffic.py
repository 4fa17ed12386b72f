"""The traffic model: the bytes that each op moves and keeps, per neuron-step, term by term.

A neuron-step is one neuron at one timestep. In the formulas ``e`` is the bytes of an element, ``T`` the timesteps and
``w = ceil(T/8) / T`` the bytes of the packed words. Vectors with a few numbers a channel are left out of the traffic;
what is kept of them is ``PER_CHANNEL``. Every function returns its terms; ``moved`` and ``kept`` add them up:

>>> moved(lif_forward(4, 4)), moved(lif_backward(4, 4))
(8.0, 12.0)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from trtkern.spec import LIFSpec

__all__ = [
    "Term", "batch_norm_lif_backward", "batch_norm_lif_forward", "batch_norm_lif_kept", "delay_backward",
    "delay_forward", "delay_kept", "edge_bytes", "kept", "lif_backward", "lif_forward", "lif_kept", "moved",
    "parameter_bytes", "recurrent_backward", "recurrent_forward", "recurrent_kept", "regularizer",
    "spike_input_kept", "spikes_pack", "spikes_unpack", "word_bytes",
]  # fmt: skip

PER_CHANNEL: Mapping[str, int] = MappingProxyType({"statistics": 2 * 8, "affine": 3 * 4})
"""Bytes a channel that BatchNorm + LIF keeps: mean and rstd in float64; center, scale and shift in float32.

With running statistics it keeps three numbers more, those of the gradient of its input (``RUNNING``)."""
RUNNING = 3 * 4

LIF = LIFSpec()
"""One state; the formulas are for it. A neuron with S states has S edges of a chunk, and chunks of 16 / S steps."""

Residual = Literal["dense", "packed", "unwritten"] | None
"""Of ``Spikes`` the words are kept; dense ones that were left unwritten are made for the forward pass too."""


class Term(NamedTuple):
    """One tensor that an op touches."""

    what: str
    """Its name: "x", "s", "words", "edges", ..."""
    access: Literal["read", "write", "keep"]
    """What is done with it: "read", "write" or "keep"."""
    bytes: float
    """Per neuron-step."""
    formula: str
    """The same in letters: "e", "e/4", "w", ..."""


Terms = tuple[Term, ...]


def moved(terms: Iterable[Term]) -> float:
    """Bytes read and written, per neuron-step.

    Args:
        terms: what one of the functions below gave.
    """
    return float(sum(term.bytes for term in terms if term.access != "keep"))


def kept(terms: Iterable[Term]) -> float:
    """Bytes kept for the backward pass, per neuron-step.

    Args:
        terms: what one of the functions below gave.
    """
    return float(sum(term.bytes for term in terms if term.access == "keep"))


def word_bytes(timesteps: int) -> float:
    """w = ceil(T/8) / T: a bit a step, in whole bytes a neuron.

    Args:
        timesteps: T, the steps of a call.
    """
    return ((timesteps + 7) // 8) / timesteps


def parameter_bytes(spec: LIFSpec = LIF) -> int:
    """Bytes a channel that a neuron keeps when one of its parameters is a tensor: all of them, in float32.

    Args:
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    return 4 * len(spec.row.params)


def edge_bytes(timesteps: int, spec: LIFSpec = LIF) -> float:
    """4 floor((T-1)/16) / T, at most 4/16: the float32 potentials that the backward pass restarts from.

    Of a neuron with S states 4 S floor((T-1)/K) / T, where K = ``spec.chunk`` is the steps of a chunk.

    Args:
        timesteps: T, the steps of a call.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    return _edge_total(timesteps, spec) / timesteps


def _edge_total(timesteps: int, spec: LIFSpec) -> int:
    return 4 * len(spec.row.states) * ((timesteps - 1) // spec.chunk)


def _dense(what: str, access: Literal["read", "write", "keep"], e: int) -> Term:
    return Term(what, access, float(e), "e")


def _input(what: str, access: Literal["read", "keep"], e: int, timesteps: int, static: bool) -> Term:
    """A tensor that may be one step, the same at all times: then it is in memory, and moved, once."""
    return Term(what, access, e / timesteps, "e/T") if static else _dense(what, access, e)


def _spikes(what: str, access: Literal["read", "write"], e: int, pool: bool) -> Term:
    return Term(what, access, e / 4, "e/4") if pool else _dense(what, access, e)


def _words(access: Literal["read", "write", "keep"], timesteps: int) -> Term:
    planes = (timesteps + 7) // 8
    return Term("words", access, word_bytes(timesteps), f"{planes}/T")


def _edges(access: Literal["read", "write", "keep"], timesteps: int, spec: LIFSpec) -> Terms:
    total = _edge_total(timesteps, spec)
    return (Term("edges", access, edge_bytes(timesteps, spec), f"{total}/T"),) if total else ()


def lif_forward(
    e: int,
    timesteps: int,
    *,
    packed: bool = False,
    unwritten: bool = False,
    returns_v: bool = False,
    grad: bool = True,
    static: bool = False,
    spec: LIFSpec = LIF,
) -> Terms:
    """Reads x, writes s: 2e; + e for a returned v or h, w packed, 4/16 when T exceeds 16 and a backward follows.

    ``unwritten``: the words stand for s, which is not written: e + w.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        packed: whether the spikes are also written as bits.
        unwritten: whether the bits alone are written, and no dense spikes.
        returns_v: whether the potentials are returned as well.
        grad: whether a backward pass will follow, for which states between chunks are kept.
        static: whether the input is the same at every step, and lies in memory once.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    return (
        _input("x", "read", e, timesteps, static),
        *[_dense("s", "write", e)] * (not unwritten),
        *[_dense("v", "write", e)] * returns_v,
        *[_words("write", timesteps)] * packed,
        *(_edges("write", timesteps, spec) if grad else ()),
    )


def lif_backward(
    e: int, timesteps: int, *, returns_v: bool = False, static: bool = False, spec: LIFSpec = LIF
) -> Terms:
    """Reads x and gs, writes gx: 3e; + e for the gradient of a returned v or h, + 4/16 when T exceeds 16.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        returns_v: whether the potentials are returned as well.
        static: whether the input is the same at every step, and lies in memory once.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    return (
        _input("x", "read", e, timesteps, static),
        _dense("gs", "read", e),
        *[_dense("gv", "read", e)] * returns_v,
        *_edges("read", timesteps, spec),
        _dense("gx", "write", e),
    )


def recurrent_forward(
    e: int, timesteps: int, *, packed: bool = False, returns_v: bool = False, grad: bool = True, spec: LIFSpec = LIF
) -> Terms:
    """Of neurons that feed each other: reads x, writes s: 2e; with a backward pass also the current, e, and the words,
    w. The weights stay in the caches.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        packed: whether the spikes are also written as bits.
        returns_v: whether the potentials are returned as well.
        grad: whether a backward pass will follow, for which states between chunks are kept.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    return (
        *lif_forward(e, timesteps, packed=packed or grad, returns_v=returns_v, grad=grad, spec=spec),
        *[_dense("current", "write", e)] * grad,
    )


def recurrent_backward(e: int, timesteps: int, *, returns_v: bool = False, spec: LIFSpec = LIF) -> Terms:
    """Reads the current and gs, writes gx: 3e; for the gradient of the weights gx and the words again: e + w.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        returns_v: whether the potentials are returned as well.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    return (
        _dense("current", "read", e),
        *lif_backward(e, timesteps, returns_v=returns_v, spec=spec)[1:],
        _dense("gx", "read", e),
        _words("read", timesteps),
    )


def recurrent_kept(e: int, timesteps: int, spec: LIFSpec = LIF) -> Terms:
    """The current, e, and the words, w; + 4/16 when T exceeds 16.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    return _dense("current", "keep", e), _words("keep", timesteps), *_edges("keep", timesteps, spec)


def lif_kept(e: int, timesteps: int, *, static: bool = False, spec: LIFSpec = LIF) -> Terms:
    """x: e; + 4/16 when T exceeds 16. Tensors among the neuron's parameters: ``parameter_bytes`` a channel more.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        static: whether the input is the same at every step, and lies in memory once.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    return _input("x", "keep", e, timesteps, static), *_edges("keep", timesteps, spec)


def batch_norm_lif_forward(
    e: int,
    timesteps: int,
    *,
    residual: Residual = None,
    packed: bool = False,
    unwritten: bool = False,
    pool: bool = False,
    training: bool = True,
    grad: bool = True,
    static: bool = False,
    spec: LIFSpec = LIF,
) -> Terms:
    """Statistics read y, the fused pass reads y and writes s: 3e; 2e in evaluation, where there are no statistics.

    Besides: e for a residual (also a packed one comes with its dense spikes), w packed, and 4/16 when T exceeds 16.
    Pooled, the spikes are e/4. ``unwritten``: the words stand for s, which is not written; those of a residual are
    unpacked before: w + e more.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        residual: what is added in front of the neurons: None, "dense", "packed" or "unwritten" spikes.
        packed: whether the spikes are also written as bits.
        unwritten: whether the bits alone are written, and no dense spikes.
        pool: whether 2x2 averages of the spikes come out.
        training: whether the BatchNorm takes the statistics of the batch.
        grad: whether a backward pass will follow, for which states between chunks are kept.
        static: whether the input is the same at every step, and lies in memory once.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    return (
        *(spikes_unpack(e, timesteps) if residual == "unwritten" else ()),
        *[_input("y", "read", e, timesteps, static)] * (2 if training else 1),
        *[_dense("residual", "read", e)] * (residual is not None),
        *[_spikes("s", "write", e, pool)] * (not unwritten),
        *[_words("write", timesteps)] * packed,
        *(_edges("write", timesteps, spec) if grad else ()),
    )


def batch_norm_lif_backward(
    e: int,
    timesteps: int,
    *,
    residual: Residual = None,
    pool: bool = False,
    training: bool = True,
    static: bool = False,
    spec: LIFSpec = LIF,
) -> Terms:
    """Two passes that recompute, each reading y and gs, the second writing gy: 5e; 3e in evaluation, one pass.

    With a residual 7e: the first pass reads it too and writes gx, which is its gradient; the second reads gx and y and
    writes gy. A packed residual is unpacked before: + w + e. Pooled, gs is e/4; + 4/16 a pass that recomputes when T
    exceeds 16.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        residual: what is added in front of the neurons: None, "dense", "packed" or "unwritten" spikes.
        pool: whether 2x2 averages of the spikes come out.
        training: whether the BatchNorm takes the statistics of the batch.
        static: whether the input is the same at every step, and lies in memory once.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    recompute = (
        _input("y", "read", e, timesteps, static),
        _spikes("gs", "read", e, pool),
        *_edges("read", timesteps, spec),
    )
    gy = _dense("gy", "write", e)
    if residual is None:
        return (*recompute * (2 if training else 1), gy)
    unpacked = () if residual == "dense" else spikes_unpack(e, timesteps)
    first = (*recompute, _dense("residual", "read", e), _dense("gx", "write", e))
    return (*unpacked, *first, _dense("gx", "read", e), _input("y", "read", e, timesteps, static), gy)


def batch_norm_lif_kept(
    e: int,
    timesteps: int,
    *,
    residual: Residual = None,
    checkpoint: bool = False,
    static: bool = False,
    spec: LIFSpec = LIF,
) -> Terms:
    """y: e; + e for a dense residual or w for a packed one, + 4/16 when T exceeds 16; ``PER_CHANNEL`` a channel more.

    With a block checkpoint y is made again, from what the convolution before would keep. The words of its own spikes
    are kept by the layer that reads them (``spike_input_kept``).

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        residual: what is added in front of the neurons: None, "dense", "packed" or "unwritten" spikes.
        checkpoint: whether y is made again in the backward pass and so not kept.
        static: whether the input is the same at every step, and lies in memory once.
        spec: the neuron and its reset, which say how many numbers a state and its parameters have.
    """
    beside: Terms = ()
    if residual is not None:
        beside = (_dense("residual", "keep", e) if residual == "dense" else _words("keep", timesteps),)
    y = () if checkpoint else (_input("y", "keep", e, timesteps, static),)
    return (*y, *beside, *_edges("keep", timesteps, spec))


def spike_input_kept(e: int, timesteps: int, *, packed: bool = True) -> Terms:
    """What a convolution or a Linear keeps of the spikes that it reads, per neuron-step of theirs: w, or e if dense.

    Of pooled spikes too the words are those of the neurons, before the average.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        packed: whether the layer keeps bits in place of dense spikes.
    """
    return (_words("keep", timesteps) if packed else _dense("input", "keep", e),)


def spikes_pack(e: int, timesteps: int) -> Terms:
    """Dense spikes to words: e + w.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
    """
    return _dense("s", "read", e), _words("write", timesteps)


def spikes_unpack(e: int, timesteps: int, *, pool: bool = False) -> Terms:
    """Words to dense spikes: w + e, or w + e/4 for 2x2 averages.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        timesteps: T, the steps of a call.
        pool: whether 2x2 averages of the spikes come out.
    """
    return _words("read", timesteps), _spikes("s", "write", e, pool)


def regularizer(e: int = 4, *, in_place: bool = True) -> Terms:
    """Per parameter, not neuron-step: value, and gradient added in place: 2 reads, 1 write; a fresh one: 1 and 1.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        in_place: whether the gradient is added to ``.grad`` directly.
    """
    grad = _dense("grad", "read", e)
    return (_dense("weight", "read", e), *[grad] * in_place, _dense("grad", "write", e))


def delay_forward(e: int) -> Terms:
    """Reads x, writes y: 2e.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
    """
    return _dense("x", "read", e), _dense("y", "write", e)


def delay_backward(e: int, *, learned: bool = False) -> Terms:
    """Reads gy, writes gx: 2e; + e for x where the delays have a gradient.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        learned: whether the delays have a gradient.
    """
    return _dense("gy", "read", e), *[_dense("x", "read", e)] * learned, _dense("gx", "write", e)


def delay_kept(e: int, *, learned: bool = False) -> Terms:
    """Nothing, but x where the delays have a gradient.

    Args:
        e: bytes of an element: 4 for float32, 2 for float16 and bfloat16.
        learned: whether the delays have a gradient.
    """
    return (_dense("x", "keep", e),) * learned
