"""The private ops ``lif_forward`` and ``lif_backward``: they allocate what the backends fill.

A ``Prepared`` runs them for calls of one kind, and holds what follows from the kind alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern._torch import recording
from trtkern.backends import named
from trtkern.backends.base import LIFBackward, LIFForward, LIFGrads, LIFInputs, Norm, NormGrads, Pool
from trtkern.ops import checks, layout
from trtkern.ops._known import recall, remember
from trtkern.ops._library import define
from trtkern.ops._mapped import Fold, Mapped, sample
from trtkern.ops._room import norm_grads
from trtkern.ops.spikes import Unwritten
from trtkern.spec import LIFSpec

WANT_SPIKES, WANT_V, WANT_STATE, WANT_EDGES, WANT_PACKED, WANT_H, WANT_LAZY = 1, 2, 4, 8, 16, 32, 64
WANT_SPARE = 128
NEED_V0, NEED_PARAMS, NEED_X, NEED_SUMS, GIVEN_H, NEED_COEF, NEED_Y = 1, 2, 4, 8, 16, 32, 64
"""NEED_Y: in place of gx the gradient of what was normalised with the statistics of a batch: a second pass.
WANT_LAZY: the spikes that are wanted are not written; they are made of the words if somebody asks for them.
WANT_SPARE: outputs of which no axis ever has 0 elements or 1, to which torch.compile would hold T: the edges as one row
with two numbers to spare, the words with planes to spare (``layout.planes``)."""


class Channels(NamedTuple):
    """Where the numbers of the channels belong."""

    axis: int | None
    """Of x; None: one number for all."""
    inner: int
    """Its stride in memory."""


class Call(NamedTuple):
    """What both directions are told, in the order of the schemas; tensors first."""

    x: Tensor
    """[T, ...], dense, or one dense step expanded along time."""
    v0: Tensor | None
    params: Tensor | None
    affine: Tensor | None
    """[3, C] float32: center, scale, shift; None: x is the input current."""
    residual: Tensor | None
    lengths: Tensor | None
    """int32 [B], contiguous: the steps of each sample, which lie side by side in x then; None: each has T."""
    scalars: Sequence[float]
    token: str
    inner: int
    pool: bool
    """Average s over 2 x 2 neurons; x is then [T, B, C, H, W], contiguous or channels last, H and W even."""


class Prepared:
    """Calls whose tensors are of one kind (shapes, strides, dtype, place), with the same numbers, neuron and backend.

    Parameters or the rows of a norm are there in all of them, or in none.

    Args:
        x: dense, or one dense step expanded along time; what it holds is not looked at.
        scalars, token, inner, pool: as in ``Call``.
        backend: its name.
    """

    __slots__ = (
        "_backend", "_firsts", "_halves", "_scalars", "_spec", "empty", "held", "inner", "pool", "run", "static",
        "token", "unwritten",
    )  # fmt: skip

    def __init__(self, x: Tensor, scalars: Sequence[float], token: str, inner: int, pool: bool, backend: str) -> None:
        self.static = layout.is_static(x)
        if not (self.static or layout.is_dense(x)):
            raise RuntimeError(f"lif: expected x to be dense with time outermost, got {checks.describe(x)}")
        if pool and (x.shape[-2] % 2 or x.shape[-1] % 2):
            raise RuntimeError(f"lif: expected images with even sides to pool, got {checks.describe(x)}")
        self.token, self.run, self.empty = token, named(backend).ops, not x.numel()
        self._scalars, self._spec, self.inner, self.pool = tuple(scalars), LIFSpec.from_token(token), inner, pool
        self._halves = Pool(x.stride(-2), x.stride(-1)) if pool else None
        # What backends and Functions make once for all calls of the kind; no tensor.
        self.held: dict[str, Any] = {}
        self.unwritten = _unwritten(x, pool)
        self._backend, self._firsts = backend, dict[int, Prepared]()

    def first(self, x: Tensor) -> Prepared:
        """For calls that have but the first steps: those of x."""
        found = self._firsts.get(len(x))
        if found is None:
            found = Prepared(x, self._scalars, self.token, self.inner, self.pool, self._backend)
            self._firsts[len(x)] = found
        return found

    def edges(self, edges: Tensor | None, steps: int) -> Tensor | None:
        """Of the states that a forward pass kept, those within the first steps."""
        rows = (steps - 1) // self._spec.chunk * len(self._spec.row.states)
        return None if edges is None else edges[:rows]

    def inputs(
        self, x: Tensor, v0: Tensor | None, params: Tensor | None, affine: Tensor | None, residual: Tensor | None,
        lengths: Tensor | None, before: bool,
    ) -> LIFInputs:  # fmt: skip
        """What the backend reads, in the layout that it expects; the last look before addresses are taken."""
        if v0 is not None:
            v0 = layout.aligned_state(v0, x)
        norm = None
        if affine is not None:
            norm = Norm(affine, residual if residual is None else layout.alike(residual, x))
        spec, inner, held = self._spec, self.inner, self.held
        if lengths is not None and not (layout.samples_apart(x) and lengths.is_contiguous()):
            raise RuntimeError(f"lif: expected samples side by side with lengths, got {checks.describe(x)}")
        return LIFInputs(x, v0, params, self._scalars, spec, inner, norm, self._halves, before, held, lengths)

    def look(self, params: Tensor) -> None:
        """What the parameters hold; a ValueError where a neuron cannot have it."""
        row = self._spec.row
        checks.parameter_values(self._spec.op, params, row.params, row.ranges)

    def forward(
        self, x: Tensor, v0: Tensor | None, params: Tensor | None, affine: Tensor | None, residual: Tensor | None,
        lengths: Tensor | None, flag: Tensor | None, want: int,
    ) -> LIFForward:  # fmt: skip
        """The outputs that are wanted, filled; the others are None."""
        if params is not None:
            self.look(params)
        inputs = self.inputs(x, v0, params, affine, residual, lengths, bool(want & WANT_H))
        out = allocate(x, self.token, self.pool, want, flag)
        if not self.empty:
            self.launch(inputs, out)
        return out

    def launch(self, inputs: LIFInputs, out: LIFForward) -> None:
        """Fill the outputs; the states of a single chunk, for which compiled code leaves room, are none."""
        few = out.edges is not None and len(inputs.x) <= self._spec.chunk
        self.run["lif_forward"](inputs, out._replace(edges=None) if few else out)

    def backward(
        self, x: Tensor, v0: Tensor | None, params: Tensor | None, affine: Tensor | None, residual: Tensor | None,
        lengths: Tensor | None, edges: Tensor | None, gs: Tensor | None, gv: Tensor | None, gv_final: Tensor | None,
        coef: Tensor | None, moments: Tensor | None, count: int, dtype: torch.dtype | None, needs: int,
        owner: Any = None, room: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """The seven outputs of ``lif_backward``; what is not needed is None.

        Args:
            owner: the context of a Function whose gradient of x may leave out the steps to which nothing comes, where
                someone looks for those (``_first_rows``).
            room: for the gradient of x.
        """
        few_needed = needs & ~GIVEN_H in (NEED_X, NEED_X + NEED_V0) and lengths is None
        if owner is not None and owner.first is not None and few_needed:
            steps = owner.first.steps(len(x), gs, gv, gv_final)
            if steps < len(x):
                few, whole = partial(_few, steps), owner.first.room(owner, partial(layout.empty, x))
                _, *others = self.first(x[:steps]).backward(
                    x[:steps], v0, params, affine, few(residual), None, self.edges(edges, steps), few(gs), few(gv),
                    None, coef, moments, count, dtype, needs, room=whole.rows(steps),
                )  # fmt: skip
                return whole.whole, *others
        inputs = self.inputs(x, v0, params, affine, residual, lengths, bool(needs & GIVEN_H))
        if gs is not None:
            gs = layout.aligned(gs, *layout.pooled_shape(x), x.dtype, x) if self.pool else layout.alike(gs, x)
        if gv is not None:
            gv = layout.alike(gv, x)
        if gv_final is not None:
            gv_final = layout.aligned_state(gv_final, x)
        out = _allocate_backward(x, self.token, params, affine, needs, room)
        norm = _finished(affine, moments, needs, count, dtype)
        if edges is not None and len(x) <= self._spec.chunk:
            edges = None
        if self.empty:
            for sums in (out.params, out.sums):
                if sums is not None:
                    sums.zero_()
            if norm is not None:
                self.run["batch_norm_lif_coefficients"](out.sums, None, norm)
        else:
            run, twice = self.run["lif_backward"], needs & NEED_Y
            first = LIFBackward(None, *out[1:]) if twice else out
            run(inputs, edges, LIFGrads(gs, gv, gv_final, coef), first, norm)
            if twice and norm is not None:
                run(inputs, edges, LIFGrads(gs, gv, gv_final, norm.coef), LIFBackward(out.x, None, None), None)
        return *out, *((None, None, None) if norm is None else norm[3:])


def prepared_for(
    x: Tensor, params: Tensor | None, channels: int | None, scalars: Sequence[float], token: str, inner: int,
    pool: bool, backend: str,
) -> Prepared:  # fmt: skip
    """What an earlier call of the kind prepared, or a new one; ``channels``: those of a norm."""
    numbers = array("d", scalars).tobytes()  # as bytes 0.0 and -0.0 are two
    rows = None if params is None else params.shape[1]
    laid = (x.shape, x.stride(), x.dtype, x.device)
    kind = (Prepared, laid, rows, channels, numbers, token, inner, pool, backend)
    found = recall(kind)
    if found is None:
        found = Prepared(x, scalars, token, inner, pool, backend)
        remember(kind, found)
    return found


IN_FORWARD_MODE = "where a forward mode pushes tangents (jvp, jacfwd, dual tensors)"


def refuse_lengths(op: str, lengths: Tensor | None, where: str) -> None:
    """Raise where there are lengths and no kernel that takes them."""
    if lengths is not None:
        raise RuntimeError(
            f'{op}: expected no lengths {where}, got {checks.describe(lengths)}; pass backend="reference", which takes '
            "them there, or run the samples one by one, each with its own T"
        )


def _few(steps: int, t: Tensor | None) -> Tensor | None:
    return None if t is None else t[:steps]


def _channels(affine: Tensor | None) -> int | None:
    return None if affine is None else affine.shape[1]


def _empty_pooled(x: Tensor) -> Tensor:
    return torch.empty_strided(*layout.pooled_shape(x), dtype=x.dtype, device=x.device)


def _states(token: str) -> int:
    return len(LIFSpec.from_token(token).row.states)


def wanted_with(x: Tensor, spec: LIFSpec, want: int, differentiable: bool) -> int:
    """What is wanted, with what a backward pass wants: the states between chunks.

    Compiled code asks for those of any T: it would be held to the answer.
    """
    compiled = torch.compiler.is_compiling() and not recording()
    if differentiable and (compiled or x.shape[0] > spec.chunk):
        want += WANT_EDGES
    return want + WANT_SPARE if compiled else want


def allocate(x: Tensor, token: str, pool: bool, want: int, flag: Tensor | None = None) -> LIFForward:
    """The outputs of the forward pass, in x's layout; an unwanted one is None."""
    s = v = v_final = edges = packed = None
    if want & WANT_SPIKES and not want & WANT_LAZY:
        s = _empty_pooled(x) if pool else layout.empty(x)
    if want & (WANT_V | WANT_H):
        v = layout.empty(x)
    if want & WANT_STATE:
        v_final = layout.empty_state(x, _states(token))
    if want & WANT_EDGES:
        count = (x.shape[0] - 1) // LIFSpec.from_token(token).chunk
        rows, each = count * _states(token), layout.neurons(x)
        size = (rows * each + 2,) if want & WANT_SPARE else (rows, each)
        edges = torch.empty(size, dtype=torch.float32, device=x.device)
    if want & WANT_PACKED:
        packed = layout.empty_planes(x, bool(want & WANT_SPARE))
    return LIFForward(s, v, v_final, edges, flag, packed)


def _forward(x, v0, params, affine, residual, lengths, scalars, spec, inner, pool, flag, want, backend):
    prepared = prepared_for(x, params, _channels(affine), scalars, spec, inner, pool, backend)
    return outputs(prepared.forward(x, v0, params, affine, residual, lengths, flag, want))


def _forward_fake(x, v0, params, affine, residual, lengths, scalars, spec, inner, pool, flag, want, backend):
    return outputs(allocate(x, spec, pool, want))


def outputs(made: LIFForward) -> tuple[Tensor | None, ...]:
    """Those of ``lif_forward``, which has no flag among them."""
    return made.s, made.v, made.v_final, made.edges, made.packed


def with_spikes(made: tuple, want: int, x: Tensor, pool: bool, prepared: Prepared | None) -> tuple:
    """What a Function returns for its ``outputs``: the spikes that are left unwritten among them."""
    if not want & WANT_LAZY:
        return made
    unwritten = _unwritten(x, pool) if prepared is None else prepared.unwritten
    return unwritten.of(made[4]), *made[1:]


def _unwritten(x: Tensor, pool: bool) -> Unwritten:
    shape, stride = layout.pooled_shape(x) if pool else (x.shape, layout.empty_strides(x))
    return Unwritten(tuple(shape), tuple(stride), x.dtype, pool)


def _folded(count: int, dims: tuple, call: Call, own: bool) -> tuple[Fold, Call]:
    """The call of all samples together; ``own``: each has sums of its own over the neurons of a channel."""
    refuse_lengths("lif", call.lengths, "beneath torch.vmap")
    at: Any = Call(*dims[: len(call)])
    rows, at_rows = (call.params, at.params) if call.affine is None else (call.affine, at.affine)
    own = own or at.params is not None or at.affine is not None
    channels = sample(rows, at_rows).shape[1] if own and rows is not None else None
    fold = Fold(call.x, at.x, count, channels, call.inner, call.pool)
    return fold, call._replace(
        x=fold.steps(call.x, at.x),  # type: ignore[arg-type]
        v0=fold.state(call.v0, at.v0, _states(call.token)),
        params=fold.rows(call.params, at.params),
        affine=fold.rows(call.affine, at.affine),
        residual=fold.steps(call.residual, at.residual),
        inner=fold.inner,
    )


def _made(*outputs: tuple[bool, Callable[[Tensor], Mapped], Tensor]) -> tuple[tuple[Tensor, ...], tuple]:
    """What a rule returns: of every output that was wanted, the samples apart."""
    tensors, dims = zip(*((apart(t) if wanted else (t, None)) for wanted, apart, t in outputs), strict=True)
    return tensors, dims


def _forward_mapped(info: Any, dims: tuple, *arguments: Any) -> tuple:
    *inputs, flag, want, backend = arguments
    want &= ~WANT_SPARE
    fold, call = _folded(info.batch_size, dims, Call(*inputs), False)
    # The kernel raises one flag, which is then that of every sample.
    raised = flag if dims[len(inputs)] is None else flag.new_zeros(1)
    s, v, v_final, edges, packed = torch.ops.trtkern.lif_forward(*call, raised, want, backend)
    if raised is not flag:
        flag.bitwise_or_(raised)
    return _made(
        (bool(want & WANT_SPIKES), fold.out_steps, s),
        (bool(want & (WANT_V | WANT_H)), fold.out_steps, v),
        (bool(want & WANT_STATE), partial(fold.out_state, states=_states(call.token)), v_final),
        (bool(want & WANT_EDGES), fold.out_flat, edges),
        (bool(want & WANT_PACKED), fold.out_steps, packed),
    )


_CALL = (
    "Tensor x, Tensor? v0, Tensor? params, Tensor? affine, Tensor? residual, Tensor? lengths, float[] scalars, "
    "str spec, SymInt inner, bool pool"
)
lif_forward = define(
    f"lif_forward({_CALL}, Tensor(a!)? flag, int want, str backend) "
    "-> (Tensor s, Tensor v, Tensor v_final, Tensor edges, Tensor packed)",
    _forward,
    _forward_fake,
    _forward_mapped,
)


def _allocate_backward(
    x: Tensor, token: str, params: Tensor | None, affine: Tensor | None, needs: int, room: Tensor | None = None
) -> LIFBackward:
    sums = None
    if needs & NEED_SUMS and affine is not None:
        sums = torch.empty(2, affine.shape[1], dtype=torch.float64, device=x.device)
    return LIFBackward(
        None if not needs & (NEED_X | NEED_Y) else layout.empty(x) if room is None else room,
        layout.empty_state(x, _states(token)) if needs & NEED_V0 else None,
        torch.empty_like(params) if needs & NEED_PARAMS and params is not None else None,
        sums,
    )


def _finished(affine: Tensor | None, norm: Tensor | None, needs: int, count: int, dtype: Any) -> NormGrads | None:
    if norm is None or affine is None or not needs & NEED_SUMS:
        return None
    return norm_grads(affine, norm, count, bool(needs & NEED_COEF), dtype)


def _backward(
    x, v0, params, affine, residual, lengths, scalars, spec, inner, pool, edges, gs, gv, gv_final, coef, moments, count,
    dtype, needs, backend,
):  # fmt: skip
    return prepared_for(x, params, _channels(affine), scalars, spec, inner, pool, backend).backward(
        x, v0, params, affine, residual, lengths, edges, gs, gv, gv_final, coef, moments, count, dtype, needs
    )


def _backward_fake(
    x, v0, params, affine, residual, lengths, scalars, spec, inner, pool, edges, gs, gv, gv_final, coef, moments, count,
    dtype, needs, backend,
):  # fmt: skip
    norm = _finished(affine, moments, needs, count, dtype)
    made = _allocate_backward(x, spec, params, affine, needs)
    return *made, *((None, None, None) if norm is None else norm[3:])


def _backward_mapped(info: Any, dims: tuple, *arguments: Any) -> tuple:
    *inputs, edges, gs, gv, gv_final, coef, moments, count, dtype, needs, backend = arguments
    at_edges, at_gs, at_gv, at_gv_final, at_coef, at_moments = dims[len(inputs) : len(inputs) + 6]
    own = bool(needs & (NEED_PARAMS | NEED_SUMS)) or at_coef is not None
    fold, call = _folded(info.batch_size, dims, Call(*inputs), own)
    gx, gv0, gparams, gsums, gcoef, gweight, gbias = torch.ops.trtkern.lif_backward(
        *call,
        fold.flat(edges, at_edges) if edges is not None and edges.dim() > 1 else edges,
        fold.steps(gs, at_gs),
        fold.steps(gv, at_gv),
        fold.state(gv_final, at_gv_final, _states(call.token)),
        fold.rows(coef, at_coef),
        fold.rows(moments, at_moments),
        count,
        dtype,
        needs,
        backend,
    )
    summed = bool(needs & NEED_SUMS) and call.affine is not None
    finished = summed and moments is not None
    return _made(
        (bool(needs & (NEED_X | NEED_Y)), fold.out_steps, gx),
        (bool(needs & NEED_V0), partial(fold.out_state, states=_states(call.token)), gv0),
        (bool(needs & NEED_PARAMS) and call.params is not None, fold.out_rows, gparams),
        (summed, fold.out_rows, gsums),
        (finished and bool(needs & NEED_COEF), fold.out_rows, gcoef),
        (finished and dtype is not None, fold.out_channels, gweight),
        (finished and dtype is not None, fold.out_channels, gbias),
    )


lif_backward = define(
    f"lif_backward({_CALL}, Tensor? edges, Tensor? gs, Tensor? gv, Tensor? gv_final, Tensor? coef, Tensor? moments, "
    "SymInt count, ScalarType? dtype, int needs, str backend) -> (Tensor gx, Tensor gv0, Tensor gparams, Tensor sums, "
    "Tensor made_coef, Tensor gweight, Tensor gbias)",
    _backward,
    _backward_fake,
    _backward_mapped,
)
