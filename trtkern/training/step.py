"""One step of training, eagerly or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from trtkern.nn import LossParts
from trtkern.training.losses import Loss, arranged
from trtkern.training.tally import Tally

Batch = tuple[Tensor, Tensor]
DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Step:
    """Forward, loss, backward, penalty, clipping, update; nothing in it waits for a GPU.

    The forward pass runs under autocast; loss, backward and update outside, in float32. In float16 the loss is scaled;
    gradients are unscaled before the penalty's gradient is added and before they are clipped, and a step whose
    gradients overflow changes no weight.

    Args:
        forward: logits [T, B, C] in float32 of raw images, under autocast.
        loss: of the logits.
        optimizer: of the weights; fused, so that it takes the scale and the overflow on the device.
        scaler: of the gradients; one that is not enabled does nothing.
        clip: the largest norm of all gradients together, penalty included; None leaves them.
        check: looks at the loss before the update, and raises if it is not finite.
        apart: a context for a batch whose gradients other processes need not have yet.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip: float | None,
        check: Callable[[LossParts], None],
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._forward, self.loss, self.optimizer = forward, loss, optimizer
        self.scaler, self._clip, self._check, self._apart = scaler, clip, check, apart

    def __call__(self, images: Tensor, target: Tensor, tally: Tally, more: Sequence[Batch] = ()) -> Tensor:
        """The total loss, 0-dim; the loss's parts are added to ``tally``.

        Args:
            images: a batch.
            target: of it.
            tally: of the epoch.
            more: batches that go into the same update: their gradients are averaged, one batch after the other.
        """
        share = 1 + len(more)
        self.optimizer.zero_grad(set_to_none=True)
        found = []
        for number, batch in enumerate([(images, target), *more], 1):
            with self._apart() if number < share else nullcontext():
                found.append(self._forward_backward(*batch, share))
        self.scaler.unscale_(self.optimizer)
        first = found[0][0]
        penalty = first.regularizer + self.loss.add_grad_()
        means = (
            first
            if share == 1
            else LossParts(*(torch.stack(part).mean() for part in zip(*(f[0] for f in found), strict=True)))
        )
        total = means.total.detach() + penalty
        if self._clip is not None:
            clip_grad_norm_(self._weights(), self._clip)
        self._check(LossParts(total, means.cross_entropy, means.mse, penalty))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for parts, logits, aim in found:
            whole = total if share == 1 else parts.total.detach() + penalty
            tally.add(LossParts(whole, parts.cross_entropy, parts.mse, penalty), logits, aim)
        return total

    def _forward_backward(self, images: Tensor, target: Tensor, share: int) -> tuple[LossParts, Tensor, Tensor]:
        """The parts of a batch's loss without its penalty, its logits, and its targets as the loss takes them."""
        logits = self._forward(images)
        target = arranged(target, logits)
        parts = self.loss.parts(logits, target, regularize=False)
        self.scaler.scale(parts.total if share == 1 else parts.total / share).backward()
        return parts, logits, target

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]


class CapturedStep(Step):
    """The same as one CUDA graph: loss, penalty and update included.

    The first steps run eagerly on a stream of their own, which compiles what there is to compile and makes the
    optimiser's state; the next is captured, and from then on a step is two copies and one launch. Batches must have one
    shape, and ``tally`` must be one object throughout.
    """

    WARM_UP = 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._left, self._graph, self._stream = self.WARM_UP, torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self._images: Tensor | None = None

    def __call__(self, images: Tensor, target: Tensor, tally: Tally, more: Sequence[Batch] = ()) -> Tensor:
        """As ``Step.__call__``, of one batch; the total is overwritten by the next step."""
        if self._left:
            self._left -= 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                total = super().__call__(images, target, tally)
            torch.cuda.current_stream().wait_stream(self._stream)
            return total
        if self._images is None:
            self._images, self._target = images.clone(), target.clone()
            self.optimizer.zero_grad(set_to_none=True)  # the graph's own gradients lie in its pool
            counted = tally.images
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # loaders have threads
                self._total = super().__call__(self._images, self._target, tally)
            self._count, tally.images = tally.images - counted, counted  # a capture computes nothing
        if images.shape != self._images.shape:
            raise ValueError(
                f"--cuda-graphs: expected batches of shape {list(self._images.shape)}, got {list(images.shape)}"
            )
        self._images.copy_(images)
        self._target.copy_(target)
        self._graph.replay()
        tally.images += self._count
        return self._total
