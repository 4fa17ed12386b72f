"""What is measured: ops, shapes and the suites that name them; how large a case is, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trtkern import neurons
from trtkern.names import DTYPES, KERNELS, one_of
from trtkern.spec import LIFSpec

if TYPE_CHECKING:
    import torch

OPS = ("all", *KERNELS, "recurrent", "step", "overhead")
"""What ``--op`` may be: "all" is the kernels; "recurrent" neurons that feed each other, "step" a whole training step,
"overhead" the host's time for a layer."""
DIRECTIONS = ("fwd", "bwd", "both", "each")
"""What ``--direction`` may be."""
LAYOUTS = ("contiguous", "channels_last")


class Trained(NamedTuple):
    """A network whose training steps are measured."""

    axes: str
    """What its shapes say; a number among the letters is the only one that it takes there."""
    shape: tuple[int, ...]
    """That of the suite "default"."""
    least: int
    """The least height and width; the last number is a multiple of it where there are neither."""
    neurons: float
    """Neuron-steps for each number of a shape multiplied out."""
    images: bool = False
    """Whether it is shown one image T times, not frames."""

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether it has steps of that shape."""
        axes = self.axes.split(",")
        if len(axes) != len(shape) or any(a.isdecimal() and int(a) != n for a, n in zip(axes, shape, strict=True)):
            return False
        return min(shape[3:]) >= self.least if axes[-1] == "W" else shape[-1] % self.least == 0


NETWORKS = {
    "resnet19": Trained("T,B,3,H,W", (6, 8, 3, 32, 32), 8, 448.0, images=True),
    "vggsnn": Trained("T,B,2,H,W", (4, 8, 2, 48, 48), 16, 200.0),
    "sew_resnet34": Trained("T,B,3,H,W", (4, 8, 3, 64, 64), 32, 27.0, images=True),
    "mlp": Trained("T,B,n", (100, 64, 784), 1, 1.4),
    "spikformer": Trained("T,B,tokens,D", (4, 8, 196, 384), 32, 11.0),
    "spikformer_4_384": Trained("T,B,3,H,W", (4, 8, 3, 32, 32), 8, 472.0, images=True),
    "sdt_2_512": Trained("T,B,3,H,W", (4, 8, 3, 32, 32), 8, 333.0, images=True),
}
"""The networks of the op "step", of which "spikformer" is a block of one. Of those that take a shape that was named
alone, the first one trains."""
CANDIDATES = ("own", "relu", "exact", "peers", "plain", "captured", "checkpoint")
"""What is compared in a step: this project; ReLU in place of the neurons; this project with torch's own convolutions;
the neurons of other libraries; plain torch; the step of ``trtkern train``; checkpointed blocks."""
SHAPES = {
    "lif": "T,N or T,B,N", "bn-lif": "T,B,C or T,B,C,H,W", "regularizer": "T,N", "pack": "T,N or T,B,N",
    "step": ", ".join(f"{each.axes} ({name})" for name, each in NETWORKS.items()), "overhead": "T,B,C,H,W",
    "recurrent": "T,B,N", "delay": "T,B,C",
}  # fmt: skip
AXES = {
    "lif": (2, 3), "bn-lif": (3, 5), "regularizer": (2,), "pack": (2, 3), "linear-lif": (3,), "overhead": (5,),
    "recurrent": (3,), "delay": (3,),
}  # fmt: skip
"""How many numbers the shape of an op may have; of a step its network says it."""


@dataclass(frozen=True)
class Case:
    """One op on one shape. ``linear-lif`` is Linear(n, n) + LIF on [T, B, n]."""

    op: str
    shape: tuple[int, ...]
    """T first."""
    dtype: str = "float32"
    layout: str = "contiguous"
    neuron: str = "LIF"
    """Of op "lif": a name of ``trtkern.neurons.TABLE``; of "overhead" the layer of ``trtkern.nn`` that a row is of."""
    network: str = ""
    """Of a step: the name of what it trains, of ``NETWORKS``."""

    @property
    def name(self) -> str:
        """Unique among the cases: "lif 4x2097152 float32", "CUBALIF lif 100x32x2048 float32"."""
        last = "" if self.layout == "contiguous" else f" {self.layout}"
        named = self.neuron != "LIF" or self.op == "overhead"
        first = f"{self.network} " if self.op == "step" else f"{self.neuron} " if named else ""
        return f"{first}{self.op} {'x'.join(map(str, self.shape))} {self.dtype}{last}"

    @property
    def timesteps(self) -> int:
        """T."""
        return self.shape[0]

    @property
    def elements(self) -> int:
        """Neuron-steps; of the regulariser, weights."""
        return math.prod(self.shape[1:] if self.op == "regularizer" else self.shape)

    @property
    def element_size(self) -> int:
        """Bytes."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """What torch calls its dtype."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found


SUITES: dict[str, tuple[Case, ...]] = {
    "default": (
        Case("lif", (4, 2_097_152)),
        Case("lif", (100, 32, 2048)),
        Case("lif", (500, 16, 512)),
        Case("bn-lif", (4, 8, 128, 32, 32)),
        Case("bn-lif", (4, 8, 128, 32, 32), layout="channels_last"),
        Case("regularizer", (6, 12_625_280)),
        Case("pack", (4, 2_097_152)),
        Case("delay", (250, 128, 512)),
        *(Case("step", each.shape, network=name) for name, each in NETWORKS.items()),
        Case("overhead", (4, 2, 8, 4, 4)),
        Case("recurrent", (250, 128, 512)),
    ),
    "long": (
        Case("lif", (100, 32, 2048)),
        Case("lif", (500, 16, 512)),
        Case("lif", (1000, 16, 256)),
        Case("bn-lif", (100, 2, 64, 16, 16)),
    ),
    "open-neuromorphic": tuple(Case("linear-lif", (500, 16, n)) for n in (512, 1024, 2048, 4096)),
    "sizes": (),
}
"""By name; the cases of "sizes" are made by ``sizes.cases``, since they are those of the networks' own layers."""


def select(
    op: str, shapes: list[str], dtype: str, suite: str, neuron: str = "LIF", networks: Sequence[str] = ()
) -> list[Case]:
    """The cases that the command line asks for.

    Args:
        op: one of ``OPS``; of the Open Neuromorphic suite it is always Linear + LIF.
        neuron: of op "lif", which must then be named if it is another than LIF.
        shapes: "T,N" and so on; each goes to the ops that take so many axes. None: those of the suite.
        networks: of op "step", names of ``NETWORKS``; none: all of the suite, or the first that takes a shape.

    Raises:
        ValueError: an unknown op, dtype or suite, or a shape that no op takes.
    """
    one_of("op", op, OPS)
    one_of("dtype", dtype, DTYPES)
    one_of("suite", suite, SUITES)
    one_of("neuron", neuron, neurons.TABLE)
    if neuron != "LIF" and (op != "lif" or suite == "open-neuromorphic"):
        raise ValueError(
            f"--neuron: expected --op lif with {neuron} and a suite of neurons alone, got --op {op} --suite {suite}"
        )
    if op == "step" and dtype == "float16":
        raise ValueError("--dtype: expected float32 or bfloat16 with --op step, got float16, which needs a scaled loss")
    for name in networks:
        one_of("network", name, NETWORKS)
    if networks and op != "step":
        raise ValueError(f"--network: expected --op step beside it, got --op {op}")
    linear = suite == "open-neuromorphic"
    if linear and op not in ("all", "lif"):
        raise ValueError(f"--suite open-neuromorphic: it is Linear + LIF; expected no --op or --op lif, got {op!r}")
    ops: tuple[str, ...] = ("linear-lif",) if linear else KERNELS if op == "all" else (op,)
    if suite == "sizes":
        ops = tuple(each for each in ops if each in ("lif", "bn-lif"))
        if not ops:
            raise ValueError(f"--suite sizes: expected no --op, --op lif or --op bn-lif, got {op!r}")
    if not shapes:
        of_suite = [case for case in _of_suite(suite) if case.op in ops]
        of_suite = [case for case in of_suite if not networks or case.network in networks]
        if not of_suite:
            raise ValueError(f"--suite {suite}: it has no shapes of {op}; name one with --shape {SHAPES[op]}")
        return [replace(case, dtype=dtype, neuron=neuron) for case in of_suite]
    made = []
    for text in shapes:
        shape = parse_shape(text)
        if op == "step":
            made += _trained(text, shape, dtype, networks)
            continue
        fits = [
            Case(each, shape, dtype, layout, neuron)
            for each in ops
            if len(shape) in AXES[each]
            for layout in _layouts(each, shape, suite)
        ]
        if not fits:
            wanted = "; ".join(f"{each}: {SHAPES.get(each, 'T,B,n')}" for each in ops)
            raise ValueError(f"--shape: expected {wanted}; got {text!r} with {len(shape)} numbers")
        made += fits
    return made


def _trained(text: str, shape: tuple[int, ...], dtype: str, networks: Sequence[str]) -> list[Case]:
    """The steps of a shape, of the networks that were named, or of the first that takes it."""
    fits = [Case("step", shape, dtype, network=name) for name in networks or NETWORKS if NETWORKS[name].takes(shape)]
    if not fits or (networks and len(fits) < len(networks)):
        wanted = "; ".join(
            f"{name}: {each.axes}, " + (f"H and W at least {each.least}" if each.axes.endswith("W") else
            f"the last a multiple of {each.least}")
            for name, each in NETWORKS.items() if name in (networks or NETWORKS)
        )  # fmt: skip
        raise ValueError(f"--shape: expected {wanted}; got {text!r}")
    return fits if networks else fits[:1]


def _of_suite(name: str) -> tuple[Case, ...]:
    if name != "sizes":
        return SUITES[name]
    from trtkern.bench import sizes  # which needs the networks

    return sizes.cases()


def many(suite: str) -> bool:
    """Whether a suite has so many cases that only the strongest are compared (``layers.Layer.strong``)."""
    return suite in ("sizes", "sweep")


def _layouts(op: str, shape: tuple[int, ...], suite: str) -> tuple[str, ...]:
    """How the tensors of a shape that was named lie in memory: in the suite "sizes" both ways, as all of its images."""
    return LAYOUTS if suite == "sizes" and op == "bn-lif" and len(shape) == 5 else LAYOUTS[:1]


def candidates(text: str, op: str) -> tuple[str, ...]:
    """What "own,relu" names of ``CANDIDATES``, in their order; "all" is all.

    Raises:
        ValueError: an unknown one, or another op than "step".
    """
    if text == "all":
        return CANDIDATES
    if op != "step":
        raise ValueError(f"--candidates: expected --op step beside it, got --op {op}")
    named = [one_of("candidates", each.strip(), CANDIDATES) for each in text.split(",")]
    return tuple(each for each in CANDIDATES if each in named)


def part(chosen: list[Case], text: str) -> list[Case]:
    """The cases of a part "2/8": of eight parts, which take turns among the cases, the second.

    Raises:
        ValueError: no such part.
    """
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"--part: expected K/N with 1 <= K <= N, such as 2/8, got {text!r}")
    return chosen[int(number) - 1 :: int(parts)]


def parse_shape(text: str, option: str = "--shape") -> tuple[int, ...]:
    """ "500,16,512" as numbers, all at least 1."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option}: expected whole numbers such as 500,16,512, got {text!r}") from None
    if min(shape) < 1:
        raise ValueError(f"{option}: expected T, N and all others to be at least 1, got {text!r}")
    return shape


def least_bytes(case: Case, direction: str) -> int:
    """What has to be moved, by the traffic model (docs/traffic.md); 0 where it has no formula or none matters (Linear,
    a step, the overhead)."""
    from trtkern.profiling import traffic

    e, steps = case.element_size, case.timesteps
    if case.op in ("linear-lif", "recurrent", "step", "overhead"):
        return 0
    if case.op == "lif":
        reset = next(iter(neurons.lookup(case.neuron).settle))
        spec = LIFSpec(reset, neuron=case.neuron)
        fwd = traffic.moved(traffic.lif_forward(e, steps, grad=direction != "fwd", spec=spec))
        bwd = traffic.moved(traffic.lif_backward(e, steps, spec=spec))
    elif case.op == "bn-lif":
        fwd = traffic.moved(traffic.batch_norm_lif_forward(e, steps, grad=direction != "fwd"))
        bwd = traffic.moved(traffic.batch_norm_lif_backward(e, steps))
    elif case.op == "delay":
        fwd, bwd = traffic.moved(traffic.delay_forward(e)), traffic.moved(traffic.delay_backward(e))
    elif case.op == "pack":
        fwd, bwd = traffic.moved(traffic.spikes_pack(e, steps)), traffic.moved(traffic.spikes_unpack(e, steps))
    else:
        # Value alone: one read; with its gradient: a read and a write, in one pass or in two.
        fwd, bwd = float(e), float(e)
    return round(case.elements * {"fwd": fwd, "train-fwd": fwd, "bwd": bwd, "both": fwd + bwd}[direction])


def cache_bytes(device: torch.device) -> int:
    """The last cache: of the GPU its L2; of the CPU what Linux says, 32 MiB where it says nothing."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return max(sizes) or 32 << 20


def rotations(case: Case, device: torch.device) -> int:
    """How many sets of inputs take turns so that none is in the cache when its turn comes: 1 for large ones, 16 at the
    most."""
    one = case.elements * case.element_size
    return max(1, min(16, math.ceil(2 * cache_bytes(device) / max(one, 1))))


def memory_needed(case: Case, device: torch.device) -> int:
    """Bytes at the peak of a case: inputs, gradients, what an eager loop keeps (9 tensors, measured), the gate's, which
    behind a BatchNorm is 14 in float64. Of a step what the plain network keeps, and the weights of all networks."""
    if case.op == "step":
        return round(case.elements * NETWORKS[case.network].neurons) * 4 * 14 + (3 << 30)
    tensors = 2 * rotations(case, device) + 12
    exact = {"bn-lif": 112, "delay": 24}.get(case.op, 8)
    weights = 12 * case.shape[-1] ** 2 if case.op in ("linear-lif", "recurrent") else 0
    return case.elements * (tensors * case.element_size + exact) + weights


def check_memory(case: Case, device: torch.device) -> None:
    """A ValueError if the case is larger than what is free."""
    from trtkern.profiling.step.conditions import memory_free

    need, free = memory_needed(case, device), memory_free(device)
    if free is not None and need > free:
        raise ValueError(
            f"bench: expected a shape that fits into {free / 2**30:.1f} GiB, which are free on {device}, got "
            f"{case.name}, about {need / 2**30:.1f} GiB with all that is compared; take a smaller --shape"
        )
