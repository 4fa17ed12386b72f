"""Reads the PTX of the CUDA kernels for ``test_cuda_build.py``: which they are, whose memory each access goes to."""

import collections
import re
from functools import cache
from typing import NamedTuple

KERNEL = re.compile(
    r"(forward|backward|statistics|input_grad)I\w*?(Float32|BFloat16|Float16)E?Li(\d+)E"
    r"(?:Li(\d+)ELb(\d)E)?(?:Li(\d+)E)?(?:Lb(\d)E)?"
)
BYTES = {"Float32": 4, "BFloat16": 2, "Float16": 2}
# What LifArgs begins with: addresses of 8 bytes each.
POINTERS: tuple[str, ...] = ("x", "v0", "params", "affine", "residual", "s", "v", "v_final", "edges", "packed", "flag")
POINTERS += ("gs", "gv", "gv_final", "coef", "gx", "gv0", "gparams", "norm_sums", "workspace")


class Kernel(NamedTuple):
    """A kernel by its mangled name: neurons a thread, steps of a chunk, whether T may exceed it.

    ``fused``: one that a plain LIF has no use for; it holds every surrogate, or none.
    """

    direction: str
    element: str
    vec: int
    steps: int
    loop: bool
    surrogate: int
    fused: bool

    @property
    def row(self) -> int:
        """Bytes of a thread's part of all steps of a chunk."""
        return self.steps * self.vec * BYTES[self.element]


class Access(NamedTuple):
    """A global load or store: its bytes, and the tensors whose address it is made of."""

    kind: str
    bytes: int
    tensors: tuple[str, ...]


def kernel(name):
    """The Kernel of a mangled name; None for the reduction."""
    found = KERNEL.search(name)
    if found is None:
        return None
    direction, element, vec, steps, loop, surrogate, fused = found.groups()
    fused = fused == "1" or "fused" in name or steps is None
    return Kernel(direction, element, int(vec), int(steps or 4), loop == "1", int(surrogate or 0), fused)


def accesses(body):
    """The global accesses in the PTX of a kernel, each with the tensors that its address comes from."""
    definitions = collections.defaultdict(list)
    found = []
    for line in body.splitlines():
        text = re.sub(r"^@!?%\w+\s+", "", line.split("//")[0].strip().rstrip(";"))
        operation, _, operands = text.partition(" ")
        if re.match(r"(ld|st)\.(volatile\.)?(global|[vbuf]\d)", operation):
            wide, bits = re.search(r"(?:\.v(\d))?\.[busf](\d+)$", operation).groups()
            base = re.search(r"\[(%\w+)", operands)[1]
            found.append((operation[:2], int(wide or 1) * int(bits) // 8, base))
        elif not operation.startswith(("ld.shared", "st.", "bra", "setp")):
            registers = re.findall(r"%\w+", operands)
            if registers:
                definitions[registers[0]].append((operation, operands, registers[1:]))

    @cache
    def offset(register):
        """Bytes into LifArgs, for a register that points into it; None for another."""
        for operation, operands, sources in definitions[register]:
            if operation.startswith("mov") and "_param_0" in operands:
                return 0
            within = offset(sources[0]) if sources and operation.startswith(("mov", "add")) else None
            if within is not None:
                constant = re.search(r", (-?\d+)$", operands)
                return within + (int(constant[1]) if constant else 0)
        return None

    def roots(register):
        """The tensors whose address reaches a register."""
        tensors, reached, todo = set(), {register}, [register]
        while todo:
            for operation, operands, sources in definitions[todo.pop()]:
                if operation.startswith("ld."):
                    base, plus = re.search(r"\[(%?\w+)(?:\+(-?\d+))?\]", operands).groups()
                    start = 0 if "_param_0" in base else offset(base)
                    if start is not None and (at := start + int(plus or 0)) < 8 * len(POINTERS):
                        tensors.add(POINTERS[at // 8])
                else:
                    todo += set(sources) - reached
                    reached |= set(sources)
        return tensors

    return [Access(kind, size, tuple(sorted(roots(base)))) for kind, size, base in found]
