"""How spikes attend to spikes: products and masks of the tokens [T, B, L, C], of which the words alone are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from trtkern.ops._lazy import Lazy
from trtkern.ops._library import apply, is_dual, undisturbed
from trtkern.ops._saved import keep, kept
from trtkern.ops.spikes import Spikes, Unwritten, current, dense, remember, unpack

WHO = "spiking attention"


@fx.wrap
def spiking_attention(q: Tensor | Spikes, k: Tensor | Spikes, v: Tensor | Spikes, heads: int, scale: float) -> Tensor:
    """scale Q (K^T V) of each head at every step (Zhou et al. 2022, arXiv 2209.15425): currents [T, B, L, C].

    No softmax stands between the products, so they are taken from the right, which costs L C^2 / heads and not L^2 C.
    K^T V counts in how many tokens two channels fire together, and Q (K^T V) adds up such counts: whole numbers, which
    float32 holds exactly. Half precision holds those up to 256 (bfloat16) or 2048 (float16); with more tokens than that
    the products are taken in float32. What is larger in the result is rounded to the dtype of the spikes. It is above
    256 ``scale`` then, 32 for the scale of the paper, where the neurons behind it, of threshold 1/2, fire in any case.

    Args:
        q, k, v: spikes [T, B, L, C]; channel c belongs to head c // (C / heads).
        heads: a divisor of C.
        scale: what the product is multiplied with; a power of two changes no digit.
    """
    given = _packed(q, k, v)
    if given is not None:
        return apply(_Attention, WHO, *(x.spikes for x in given), *(x.words for x in given), heads, scale)
    with _in_their_dtype(dense(q)):
        return _joined(_product(*(_heads(dense(x), heads) for x in (q, k, v)), scale=scale))


@fx.wrap
def firing_together(k: Tensor | Spikes, v: Tensor | Spikes) -> Tensor:
    """In how many tokens two spikes [T, B, L, C] fire together, channel by channel: [T, B, 1, C].

    Half precision rounds counts above 256 (bfloat16) or 2048 (float16).
    """
    given = _packed(k, v)
    if given is not None:
        return apply(_Together, WHO, *(x.spikes for x in given), *(x.words for x in given))
    return (dense(k) * dense(v)).sum(2, keepdim=True, dtype=dense(k).dtype)


@fx.wrap
def masked(q: Tensor | Spikes, mask: Tensor | Spikes) -> Tensor | Spikes:
    """The spikes q [T, B, L, C] in the channels where the mask [T, B, 1, C] fires; packed where both are."""
    given = _packed(q, mask)
    if given is None:
        return dense(q) * dense(mask)
    (spikes, words), (of_mask, mask_words) = given
    both = words & mask_words
    like = Unwritten.like(given[0]) if isinstance(spikes, Lazy) and not spikes.is_made else None
    made = apply(_Masked, WHO, spikes, of_mask, words, mask_words, both, like)
    remember(made)
    return Spikes(made, both)


def _packed(*given: Tensor | Spikes) -> list[Spikes] | None:
    """All of them as packed spikes, if their words can stand for them; None where torch is to compute."""
    if not undisturbed():
        return None
    found = [current(x) if isinstance(x, Spikes) else x for x in given]
    packed = [x for x in found if isinstance(x, Spikes) and x.addends == 1 and not x.pooled]
    return packed if len(packed) == len(given) and not is_dual(*(x.spikes for x in packed)) else None


def _in_their_dtype(x: Tensor) -> torch.autocast:
    """Without autocast, which would have a dtype of its own."""
    return torch.autocast(x.device.type, enabled=False)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[T, B, L, C] -> [T, B, heads, L, C / heads], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(2, 3)


def _joined(x: Tensor) -> Tensor:
    """[T, B, heads, L, C / heads] -> [T, B, L, C]."""
    return x.transpose(2, 3).flatten(3)


def _product(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """scale q (k^T v) of every head, in the dtype of q."""
    exact = _counting(q.dtype, q.shape[-2])
    counts = k.to(exact).transpose(-1, -2) @ v.to(exact)
    return (q.to(exact) @ (counts * scale)).to(q.dtype)


def _counting(dtype: torch.dtype, tokens: int) -> torch.dtype:
    """The dtype, or float32 where it does not hold every whole number up to that of the tokens."""
    return dtype if tokens * torch.finfo(dtype).eps <= 2 else torch.float32


def _written(words: Tensor, steps: int, dtype: torch.dtype, heads: int = 0) -> Tensor:
    """The spikes of words [planes, B, L, C]; with ``heads`` each head by itself, [T, B, heads, L, C / heads]: what is
    moved then are bytes."""
    return unpack(_heads(words, heads).contiguous() if heads else words, steps, dtype=dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, q_words, k_words, v_words, heads, scale):
        split = (_written(words, q.shape[0], q.dtype, heads) for words in (q_words, k_words, v_words))
        with _in_their_dtype(q):
            return _joined(_product(*split, scale=scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        q, _, _, *words, heads, scale = inputs
        ctx.settings = q.shape[0], q.dtype, heads, scale
        keep(ctx, *words)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        needs = ctx.needs_input_grad[:3]
        found = apply(_Once, WHO, _attention_grads, grads[0], *kept(ctx), *ctx.settings, needs)
        return (*found, None, None, None, None, None)


def _attention_grads(g, q_words, k_words, v_words, steps, dtype, heads, scale, needs):
    exact = _counting(dtype, g.shape[2])
    q, k, v = (_written(words, steps, exact, heads) for words in (q_words, k_words, v_words))
    with _in_their_dtype(g):
        g = _heads(g.to(exact), heads).contiguous()
        gq = g @ ((k.transpose(-1, -2) @ v) * scale).transpose(-1, -2) if needs[0] else None
        of_counts = (q.transpose(-1, -2) @ g) * scale
        gk = v @ of_counts.transpose(-1, -2) if needs[1] else None
        gv = k @ of_counts if needs[2] else None
    return tuple(x if x is None else _joined(x).to(dtype) for x in (gq, gk, gv))


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(k, v, k_words, v_words):
        return _written(k_words & v_words, k.shape[0], k.dtype).sum(2, keepdim=True, dtype=k.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        k, _, *words = inputs
        ctx.settings = k.shape[0], k.dtype
        keep(ctx, *words)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        found = apply(_Once, WHO, _together_grads, grads[0], *kept(ctx), *ctx.settings, ctx.needs_input_grad[:2])
        return (*found, None, None)


def _together_grads(g, k_words, v_words, steps, dtype, needs):
    gk = _written(v_words, steps, dtype).mul_(g) if needs[0] else None
    gv = _written(k_words, steps, dtype).mul_(g) if needs[1] else None
    return gk, gv


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(q, mask, q_words, mask_words, both, like):
        return _written(both, q.shape[0], q.dtype) if like is None else like.of(both)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        q, _, *words, _, _ = inputs
        ctx.settings = q.shape[0], q.dtype
        keep(ctx, *words)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        found = apply(_Once, WHO, _masked_grads, grads[0], *kept(ctx), *ctx.settings, ctx.needs_input_grad[:2])
        return (*found, None, None, None, None)


def _masked_grads(g, q_words, mask_words, steps, dtype, needs):
    gq = g * _written(mask_words, steps, dtype) if needs[0] else None
    of_mask = _written(q_words, steps, dtype).mul_(g).sum(2, keepdim=True, dtype=dtype) if needs[1] else None
    return gq, of_mask


class _Once(torch.autograd.Function):
    """A gradient that has none itself: of the spikes there are the words alone, to which no gradient flows."""

    @staticmethod
    def forward(run: Callable[..., tuple[Tensor | None, ...]], *arguments: Any) -> tuple[Tensor | None, ...]:
        return run(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        raise RuntimeError(
            f"{WHO}: expected a first derivative, got a second one; packed spikes are differentiable once: build the "
            "network with packed=False to differentiate twice"
        )
