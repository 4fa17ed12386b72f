"""What nvcc made of csrc/*/*.cu against the traffic contract: each access by the tensor that it goes to.

A CUDA kernel holds what it can do besides (a returned v, learnt parameters, pooling, ...) in branches of its own, so
its code has more accesses than one launch makes. ``plain_contract`` and ``fused_contract`` say what may be there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from trtkern.backends.base import CHUNK
from trtkern.profiling.inspect import cuda_code, reading, report
from trtkern.profiling.inspect.contract import Kernel
from trtkern.profiling.inspect.cuda_code import BYTES, Access, CudaKernel
from trtkern.spec import LIFSpec
from trtkern.surrogates import BUILTIN


def plain_contract(k: CudaKernel) -> dict[tuple[str, str], int]:
    """("ld" | "st", tensor) to the bytes of all such accesses in a thread's code.

    Forward 2e a neuron-step (+ e for v when it is asked for), backward 3e (+ e for gv where it came), no more. gv is
    read before the step where it is the gradient of v, or behind it where it is that of h: one of the two runs.
    """
    row, once = k.row, 4 * k.vec
    if k.direction == "forward":
        want = {("ld", "x"): row, ("st", "s"): row, ("st", "v"): row, ("ld", "v0"): once}
        return want | {("st", "v_final"): once, ("st", "flag"): 4} | ({("st", "edges"): once} if k.loop else {})
    rounds = max(1, k.vec // (4 if k.steps <= 8 else 2))  # of the loop over a thread's neurons, one in the code
    want = {("ld", "x"): row, ("ld", "gs"): row, ("st", "gx"): row, ("ld", "gv"): 2 * row // rounds}
    want |= {("ld", "v0"): once, ("ld", "gv_final"): once, ("st", "gv0"): once}
    want |= {("st", "workspace"): 5 * once + 4, ("st", "counters"): 4}
    return want | ({("ld", "edges"): once} if k.loop else {})


def fused_contract(k: CudaKernel) -> dict[tuple[str, str], int]:
    """The same and e for the residual, a byte a neuron for packed spikes, 8 bytes a block for sums (7 numbers a neuron
    where packs change channel within), e for each pass that the normalisation adds. What is pooled stands beside what
    is not: one of the two runs."""
    row, once = k.row, 4 * k.vec
    if k.direction == "statistics":
        return {("ld", "x"): row, ("st", "workspace"): 2 * 2 * 8, ("st", "counters"): 4}
    if k.direction == "input_grad":
        small = {("ld", "affine"): once, ("ld", "coef"): 3 * once}
        return small | {("ld", "x"): row, ("ld", "gs"): row, ("st", "gx"): row}
    edges = {("st" if k.direction == "forward" else "ld", "edges"): once} if k.loop else {}
    if k.direction == "forward":
        want = {("ld", "x"): row, ("ld", "residual"): row, ("st", "s"): 2 * row, ("st", "v"): row, ("st", "flag"): 4}
        want |= {
            ("ld", "v0"): 2 * once,
            ("st", "v_final"): 2 * once,
            ("st", "packed"): k.vec,
            ("ld", "affine"): 3 * once,
        }
        return want | edges
    at_a_time = min(k.vec, 2)
    pooled = row + (row // 2 if k.vec > 1 else 0)  # each its own average, or two an average
    want = {("ld", "x"): row, ("ld", "residual"): row, ("ld", "gs"): row + pooled, ("st", "gx"): row}
    want |= {
        ("ld", "gv"): 2 * row * at_a_time // k.vec,
        ("ld", "v0"): once,
        ("ld", "gv_final"): once,
        ("st", "gv0"): once,
    }
    want |= {("ld", "affine"): 3 * 4 * at_a_time, ("ld", "coef"): 3 * 4 * at_a_time}
    return want | {("st", "workspace"): 7 * once + 4 + 4, ("st", "counters"): 4} | edges


def allowed(k: CudaKernel) -> dict[tuple[str, str], int]:
    """What the code of a kernel may move."""
    want = (fused_contract if k.fused else plain_contract)(k)
    at_a_time = {"forward": k.vec, "backward": min(k.vec, 4 if k.steps <= 8 and not k.fused else 2)}
    if k.direction in at_a_time:  # parameters that all neurons share, and each neuron's own
        want["ld", "params"] = 5 * 4 * (1 + at_a_time[k.direction])
    return want


def by_tensor(accesses: Sequence[Access]) -> Counter[tuple[str, str]]:
    """("ld" | "st", tensor) to bytes; a tensor that could not be told: its candidates, or "unknown"."""
    total: Counter[tuple[str, str]] = Counter()
    for access in accesses:
        total[access.kind, " or ".join(access.tensors) or "unknown"] += access.bytes
    return total


def excess(
    k: CudaKernel, accesses: Sequence[Access], machine: Mapping[tuple[str, int], int]
) -> tuple[dict[str, int], int]:
    """Bytes of a thread's code beyond the contract: by tensor in the PTX, and what the assembler added to that."""
    want, found = allowed(k), by_tensor(accesses)
    over = {f"{kind} {what}": size - want.get((kind, what), 0) for (kind, what), size in found.items()}
    moved = sum(width * count for (kind, width), count in machine.items() if kind != "local")
    return {what: size for what, size in over.items() if size > 0}, max(0, moved - sum(found.values()))


def shared_bytes(k: CudaKernel, timesteps: int, residual: bool) -> int:
    """Dynamic shared memory of a block, as the launcher takes it, without pooling and gradients of parameters."""
    if k.direction not in ("forward", "backward"):
        return 0
    native = import_module("trtkern._cuda")
    args = native.LifArgs()
    args.x = args.gx = 16
    args.T, args.N, args.processors = timesteps, 1024, 1_000 if k.ahead else 0
    args.x_stride, args.dtype = args.N, list(BYTES).index(k.element)
    args.affine, args.residual = 16 * k.fused, 16 * residual
    return native.lif_shared_bytes(args, k.direction == "backward")


def extension() -> list[Path]:
    """The file of the built extension, as the functions of ``cuda_code`` take it.

    Raises:
        RuntimeError: it was not built.
    """
    spec = find_spec("trtkern._cuda")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "inspect: trtkern._cuda was not built; install the CUDA toolkit (nvcc) and install trtkern again with "
            "TRTKERN_CUDA=1"
        )
    return [Path(spec.origin)]


ELEMENTS = {"float32": "Float32", "bfloat16": "BFloat16", "float16": "Float16"}
CASES: dict[str, tuple[tuple[str, str, bool, bool], ...]] = {
    "lif": (("forward", "forward", False, False), ("backward", "backward", False, False)),
    "bn-lif": (
        ("norm_statistics", "statistics", False, False),
        ("norm_forward", "forward", False, False),
        ("norm_forward", "forward", True, True),
        ("norm_sums", "backward", False, False),
        ("norm_sums", "backward", True, False),
        ("norm_input", "backward", False, False),
        ("norm_input_grad", "input_grad", False, False),
    ),
}
"""Of each op the contract's kernel, the kernel of csrc/ that computes it, with a residual, with packed words."""


def _chosen(
    kernels: Sequence[CudaKernel], direction: str, op: str, element: str, timesteps: int, ahead: bool
) -> CudaKernel:
    """The kernel that the launcher takes for aligned rows and the default surrogate."""
    surrogate = BUILTIN.index(LIFSpec().surrogate) if direction == "backward" and op == "lif" and not ahead else 0
    wanted = (direction, element, op != "lif", surrogate, ahead)
    same = [
        k for k in kernels
        if (k.direction, k.element, k.fused, k.surrogate, k.ahead) == wanted and (k.vec > 1 or ahead)
    ]  # fmt: skip
    if not same:
        raise RuntimeError(f"inspect: trtkern._cuda holds no {direction} kernel of {element}; install trtkern again")
    fits = [k for k in same if k.steps >= timesteps]
    return min(fits, key=lambda k: k.steps) if fits else max(same, key=lambda k: k.steps)


def rows(ops: Sequence[str], target: str, timesteps: int, dtype: str, binaries: Sequence[Path]) -> Iterator[report.Row]:
    """A row for each kernel of these ops, of those in ``CASES``.

    Raises:
        RuntimeError: no machine code for the target, or a program of the CUDA toolkit is missing.
    """
    found, usage = cuda_code.ptx(binaries), cuda_code.usage(binaries, target)
    cases = [(op, case, False) for op in ops for case in CASES[op]]
    if timesteps > CHUNK:
        cases += [(op, case, True) for op in ops if op == "lif" for case in CASES[op]]
    chosen = [_chosen(list(found), case[1], op, ELEMENTS[dtype], timesteps, ahead) for op, case, ahead in cases]
    names = {found[k][0] for k in chosen}
    if not names <= set(usage):
        held = ", ".join(cuda_code.targets(binaries))
        raise RuntimeError(
            f"inspect: trtkern._cuda holds no machine code for {target}, only for {held}; install trtkern again with "
            f"TRTKERN_CUDA_ARCHS naming it"
        )
    machine = cuda_code.machine_code(binaries, target, names)
    for k, (_, (name, _, residual, packed), ahead) in zip(chosen, cases, strict=True):
        mangled, body = found[k]
        over, added = excess(k, cuda_code.accesses(body), machine[mangled])
        why = [f"{size} bytes of {what}" for what, size in over.items()]
        why += [f"{added} bytes that the assembler added"] * (added > 0)
        kernel = Kernel(name, BYTES[k.element], k.steps, timesteps > k.steps, residual, packed, ahead=ahead)
        read, threads = reading.of_sass(usage[mangled], machine[mangled]), cuda_code.threads(body)
        shared = read.shared + shared_bytes(k, timesteps, residual)
        extra = (sum(over.values()) + added) / (k.vec * k.steps)
        yield report.row("cuda", target, kernel, read, threads, shared, extra, ", ".join(why))
