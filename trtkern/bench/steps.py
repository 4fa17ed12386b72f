"""Whole training steps of networks: what ``trtkern bench --op step`` measures of them.

A step is forward, the TRT loss, backward and a fused Adam; bfloat16 is autocast. Compared are this project on each
backend, with torch's own convolutions, replayed from a CUDA graph and with checkpointed blocks, SpikingJelly's neurons
in each implementation that it offers here and the networks that it has of its own, the plain network (neurons over
unbind, a penalty that loops over T and the weights), and the network with ReLU in place of the neurons, the last three
in both memory layouts. SpikingJelly's and the ReLU network have this project's penalty: what differs is the neuron.
Each network with neurons is compared with the plain one first, in float32 at few pixels; a graph is made of other
images, then replayed on these. Of the network itself, as it is timed, each layer that a kernel computes from packed
spikes is compared with float64 (``by_layer``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from trtkern import reference
from trtkern.bench import by_layer, peers, plain, rows
from trtkern.bench.cases import CANDIDATES, Case
from trtkern.bench.contest import Contestant
from trtkern.bench.gate import Verdict
from trtkern.bench.layers import Neuron
from trtkern.bench.networks import Entry, LeftOut, Network, entries, inputs, of, plain_network, small
from trtkern.profiling import memory as kept_by
from trtkern.profiling.memory.peak import peak
from trtkern.training.step import CapturedStep, Step
from trtkern.training.tally import Tally

DRAWS, LOSS_ERROR, COSINE = 4, 1e-2, 0.95
"""Draws of images, of which one has to agree: how far the losses may be apart; the least cosine of the gradients of the
first convolution. Where rounding moves a spike the network carries it on, until that gradient is another one: at 32x32
and T = 6 the two memory layouts of plain torch have a cosine of 0.03. So few pixels mostly have no such spike."""


def steps(
    case: Case, device: torch.device, backends: Sequence[str], found: Sequence[peers.Peer],
    candidates: Sequence[str] = CANDIDATES,
) -> Iterator[tuple[Contestant, str] | LeftOut]:  # fmt: skip
    """The training steps of a case, each with the library that it is of."""
    network = of(case)
    twins = entries(small(network), device, backends, found, candidates)
    for twin, entry in zip(twins, entries(network, device, backends, found, candidates), strict=True):
        if isinstance(entry, LeftOut):
            yield entry
        else:
            assert isinstance(twin, Entry)
            yield _contestant(entry, twin, network, device, case.torch_dtype), entry.library


class _Eager:
    """A training step in its two halves, in which nothing waits for a GPU."""

    def __init__(self, entry: Entry, x: Tensor, y: Tensor, dtype: torch.dtype) -> None:
        self.entry, self.x, self.y = entry, x, y
        self.autocast = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        self.optimizer = adam(entry, 1e-4)
        self.total: Tensor | None = None

    def loss(self, logits: Tensor) -> Tensor:
        """Without the penalty, where its gradient is added in place."""
        return _loss(self.entry, logits.float(), self.y)

    def inference(self) -> None:
        """The forward pass alone."""
        with torch.no_grad(), self.autocast():
            self.entry.model(self.x)

    def forward(self) -> None:
        """To the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.entry.model(self.x)
        self.total = self.loss(logits)

    def backward(self) -> None:
        """From there to the new weights."""
        assert self.total is not None
        self.total.backward()
        self.total = None
        if self.entry.loss is not None:
            self.entry.loss.add_grad_()
        self.optimizer.step()

    def gradients(self) -> None:
        """Forward and backward alone: those of the loss without its penalty."""
        with self.autocast():
            logits = self.entry.model(self.x)
        self.loss(logits).backward()

    def release(self) -> None:
        """Lets go of the graph."""
        self.total = None

    def kept(self) -> str:
        """What the forward pass keeps for the backward pass, in words."""
        try:
            with self.autocast():
                found = kept_by(self.entry.model, self.x, loss=self.loss)
        except Exception as error:  # of whatever kind: the step is measured
            return f"what it keeps was not counted: {rows.words(error)}"
        return f"keeps {found.measured / 2**20:.1f} MiB for its backward pass"


def _loss(entry: Entry, logits: Tensor, y: Tensor) -> Tensor:
    if entry.loss is None:
        return plain.trt_loss(entry.model, logits, y)
    return entry.loss.parts(logits, y, regularize=False).total


def _contestant(entry: Entry, twin: Entry, network: Network, device: torch.device, dtype: torch.dtype) -> Contestant:
    """The step of ``entry``, judged by its small ``twin``."""
    x, y = inputs(network, device)
    eager = _Eager(entry, x, y, dtype)
    made = Contestant(
        entry.name, eager.inference, eager.forward, eager.backward, lambda: Verdict(True, ""), eager.release
    )
    if entry.captured:
        made.directions = ("both",)
        made.forward, made.backward = partial(captured_step(entry, dtype, 1e-4), x, y), lambda: None

    def check() -> Verdict:
        if entry.judged and (why := differs(twin, small(network), device)):
            return Verdict(False, why)
        found = by_layer.judged(entry.model, eager.gradients)
        if found.wrong:
            return Verdict(False, found.wrong)
        made.check = lambda: Verdict(True, "")  # lets go of the twin
        said = entry.note or ("" if entry.judged else "no neuron")
        if found.kernels:
            said = (
                f"{found.kernels} of {found.layers} layers from packed spikes, each off by {found.error:.1e} of its "
                f"sums in float64 at the most"
            )
        if entry.against is not None:
            said = "ATan(2), not the triangle"
        if not entry.captured:
            made.note = "; ".join(filter(None, (said, eager.kept())))
        elif device.type == "cuda":
            for _ in range(CapturedStep.WARM_UP):
                made.both()
            # Of the call that captures: a replay allocates nothing.
            made.peak = peak(made.both, device)
        return Verdict(True, "")

    made.check = check
    return made


def whole_loss(entry: Entry, x: Tensor, y: Tensor) -> Tensor:
    """The loss with its penalty, and its gradients into ``.grad``."""
    if entry.captured:
        run = captured_step(entry, torch.float32, rate=0.0)
        for _ in range(CapturedStep.WARM_UP + 1):
            run(x.flip(-1), y.flip(0))  # made of these, and replayed on those
        return run(x, y)
    total = _loss(entry, entry.model(x).float(), y)
    total.backward()
    return total.detach() if entry.loss is None else total.detach() + entry.loss.add_grad_()


def adam(entry: Entry, rate: float) -> torch.optim.Optimizer:
    """The same for all: one kernel."""
    graph = entry.captured and next(entry.model.parameters()).is_cuda
    return torch.optim.Adam(entry.model.parameters(), lr=rate, fused=True, capturable=graph)


def captured_step(entry: Entry, dtype: torch.dtype, rate: float) -> Callable[[Tensor, Tensor], Tensor]:
    """This project's captured training step: the total loss of images and labels."""
    device = next(entry.model.parameters()).device

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return entry.model(images).float()

    assert entry.loss is not None
    kind, tally = CapturedStep if device.type == "cuda" else Step, Tally(str(device))
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    run = kind(forward, entry.loss, adam(entry, rate), scaler, None, lambda total: None)
    return lambda x, y: run(x, y, tally)


@contextmanager
def exactly() -> Iterator[None]:
    """Without TF32, which moves spikes."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _as_reference(neuron: Neuron, threshold: float) -> Callable[[Tensor], Tensor]:
    """The reference's neuron with that threshold."""
    decay, gain, bias, reset_amount, _, v_reset = neuron.numbers
    numbers = decay, gain, bias, reset_amount, threshold, v_reset
    return lambda x: reference.lif(x, None, numbers, neuron.spec).s


def differs(entry: Entry, network: Network, device: torch.device) -> str:
    """Why an entry is WRONG: loss or gradient are not those of the plain network with its neuron; empty if they are."""
    run = None
    if entry.against is not None:
        run = partial(_as_reference, entry.against.neuron)
    twin = Entry("", "", plain_network(network, device, run), None)
    said = ""
    for seed in range(DRAWS):
        x, y = inputs(network, device, seed)
        for each in (entry, twin):
            each.model.zero_grad(set_to_none=True)
        with exactly():
            found, wanted = whole_loss(entry, x, y).item(), whole_loss(twin, x, y).item()
        mine, theirs = (next(each.model.parameters()).grad for each in (entry, twin))
        if mine is None or theirs is None:
            return "the first convolution has no gradient"
        cosine = functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0).item()
        error = abs(found / wanted - 1)
        if error < LOSS_ERROR and cosine > COSINE:
            return ""
        said = f"loss off by {error:.1e}, cosine of the first gradients {cosine:.4f}, draw {seed + 1} of {DRAWS}"
    return said
