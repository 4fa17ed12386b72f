"""Whole training steps: a spiking network against the same network with BatchNorm + ReLU on the same T * B images.

    python bench/step.py                    every case; rows go to bench/results.csv
    python bench/step.py --case vggsnn-4    one case

A step is forward, loss, backward and Adam. Both networks have the same convolutions, BatchNorms, pooling, readout and
loss, see the same images in the same rounds, and run in channels_last. "x limit" is the ratio to the ReLU network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from measure import Candidate, command_line
from torch import Tensor, nn
from torch.nn import functional

from trtkern.models import vggsnn
from trtkern.models.conv import VGGSNN

CASES = {"vggsnn-4": (4, 8)}
"""T and the batch, of 2x48x48 frames."""


class ReLUNet(nn.Module):
    """The layers of ``ConvSNN`` with BatchNorm + ReLU in place of the neurons."""

    def __init__(self, shape: tuple[int, int, int], layers: Sequence[int | str], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        modules: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, str):
                modules.append(nn.AvgPool2d(2))
                height, width = height // 2, width // 2
            else:
                conv = nn.Conv2d(channels, layer, 3, padding=1, bias=False)
                modules += [conv, nn.BatchNorm2d(layer), nn.ReLU(inplace=True)]
                channels = layer
        self.layers = nn.Sequential(*modules)
        self.classifier = nn.Linear(channels * height * width, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, C, H, W] -> [T, B, classes]."""
        images = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.classifier(self.layers(images).flatten(1)).unflatten(0, x.shape[:2])


def step(model: nn.Module, frames: Tensor, target: Tensor) -> Callable[[], float]:
    """One training step, mean cross-entropy over every timestep; returns the loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(frames)
        loss = functional.cross_entropy(logits.flatten(0, 1), target.repeat(len(frames)))
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def agrees(case: str, model: nn.Module, reference: nn.Module, frames: Tensor) -> bool:
    """Whether the fused network computes what the readable one does, of one frame of the batch: logits within the few
    spikes that rounding may move, and the gradient of the first convolution in the same direction."""
    reference.load_state_dict(model.state_dict())
    found = []
    for net in (model, reference):
        net.zero_grad()
        logits = net(frames)
        logits.square().mean().backward()
        found.append((logits.detach(), next(net.parameters()).grad.flatten()))
    (mine, grad), (want, expected) = found
    error = ((mine - want).norm() / want.norm()).item()
    cosine = functional.cosine_similarity(grad, expected, dim=0).item()
    if error < 0.02 and cosine > 0.99:
        return True
    print(f"{case}: WRONG and not timed: logits differ by {error:.1e}, gradients point apart (cosine {cosine:.3f})")
    return False


def build(case: str, backend: str) -> tuple[list[Candidate], Candidate]:
    """The candidates, and the ReLU network as what they are measured against."""
    timesteps, batch = CASES[case]
    frames = torch.rand(timesteps, batch, 2, 48, 48)
    target = torch.randint(10, (batch,))
    relu = Candidate("BatchNorm + ReLU", step(ReLUNet((2, 48, 48), VGGSNN, 10), frames, target), 0)
    candidates = []
    model = vggsnn(backend=backend)
    if agrees(case, model, vggsnn(backend="reference"), frames[:, :1]):
        candidates.append(Candidate(f"trtkern {backend}", step(model, frames, target), 0))
        checkpointed = vggsnn(backend=backend, checkpoint=True)
        candidates.append(Candidate(f"trtkern {backend}, checkpoint", step(checkpointed, frames, target), 0))
    return candidates, relu


if __name__ == "__main__":
    command_line(__doc__ or "", dict.fromkeys(CASES, build), rounds=15)
