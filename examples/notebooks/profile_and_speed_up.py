# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Profile a spiking network, and speed it up
#
# Many spiking networks are written as one would write them on a blackboard: a loop over the time steps, and in it a
# few lines for the potential. That is easy to read and slow to run. Here we take such a network, look where its time
# goes, and make it faster in three steps of one line each. After each step we compare: does it still compute the same,
# how long does a training step take, and how much memory does it keep?
#
# It needs `pip install 'trtkern[train]'` and Jupyter, and runs in about a minute on two processor cores. The times
# that you see depend on your machine, so this text does not quote any.

# %%
import copy
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

from trtkern import interop
from trtkern import nn as snn
from trtkern.output import style
from trtkern.profiling import memory, profile

_ = torch.manual_seed(0)
plt.rcParams.update(style.options())  # the colours and sizes of this project

# %% [markdown]
# ## A network as one writes it
#
# The neuron is *leaky integrate-and-fire*: the potential leaks by the factor `decay`, takes in the input of the step,
# fires above the threshold, and is reset to 0 where it fired. A spike is a step, whose slope is of no use for training;
# so the backward pass uses a triangle in its place, the *surrogate gradient*.


# %%
class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * (1 - u.abs()).clamp(min=0)


class LoopLIF(nn.Module):
    """x [T, B, C, H, W] -> spikes of the same shape, one time step after the other."""

    takes_time = True  # tells TimeSequential that this layer wants the whole sequence

    def __init__(self, decay=0.5, threshold=1.0):
        super().__init__()
        self.decay, self.threshold = decay, threshold

    def forward(self, x):
        v, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            h = self.decay * v + x_t
            s = Spike.apply(h - self.threshold)
            v = h * (1 - s)
            spikes.append(s)
        return torch.stack(spikes)


def network():
    return snn.TimeSequential(
        nn.Conv2d(2, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), LoopLIF(), nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), LoopLIF(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), LoopLIF(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(64 * 8 * 8, 10),
    )  # fmt: skip


slow = network()
x = torch.rand(8, 4, 2, 32, 32).round()  # [T, B, C, H, W]: 8 steps, 4 samples, frames of 32 x 32
print("answers:", tuple(slow(x).shape), "= [T, B, classes]")

# %% [markdown]
# ## Where does the time go?
#
# `profile` runs a few training steps and gives a row for each layer: its time forward and backward, how many bytes it
# has to move, how many it keeps for the backward pass, and how near that comes to what this machine can do. The last
# lines say in words what bounds the step.

# %%
print(profile(slow, x, steps=3))

# %% [markdown]
# Look at the neurons (`LoopLIF`) in the table. They have next to no arithmetic to do, a few operations a neuron and
# step, and yet they take a large part of the time and keep more memory than anything else. Each line of the loop
# reads its operands from memory and writes its result back, T times, and most of these results are kept for the
# backward pass.
#
# ## How we compare
#
# Three things are measured for each version. **Equality**: `interop.check` runs both versions on the same input in
# float64 and compares outputs and gradients. **Time**: the median of several training steps; the versions take turns,
# so that a busy moment of the machine hits all of them. **Memory**: `memory(model, x)` counts the bytes that a
# forward pass keeps for its backward pass.
#
# ## First step: the neurons in one pass
#
# `interop.convert` replaces the neurons of a model by fused layers. It knows those of the usual libraries. `LoopLIF`
# is a class of our own, so we say once what it computes.

# %%
interop.register(
    "LoopLIF",
    lambda node: snn.LIF(node.decay, v_threshold=node.threshold, surrogate="triangle"),
    fields=("decay", "threshold"),
)
report = interop.ConvertReport()
fused = interop.convert(copy.deepcopy(slow), report)
print(report)
print(interop.check(slow, fused, x))

# %% [markdown]
# All T steps of a neuron now run in one pass over memory. The outputs agree, and nothing but the input of the neurons
# is kept: the backward pass computes the potentials again, which is cheaper than reading them.
#
# ## Second step: BatchNorm, neuron and pooling in one layer
#
# Around the neurons stand layers that do little arithmetic either. `convert_norm_lif` makes one layer of a BatchNorm,
# the neuron behind it and the average pooling behind that. The report names every layer that was fused, and says why
# another was not.

# %%
normed = copy.deepcopy(fused)
report = snn.ConversionReport()
snn.convert_norm_lif(normed, report)
print(report)
print(interop.check(slow, normed, x))

# %% [markdown]
# ## Third step: a spike is a bit
#
# A spike is 0 or 1, yet so far it takes the 32 bits of a float. `convert_spike_layers` packs spikes into bits, and
# lets the convolutions behind them compute on these: they add up the weights of what fired, and keep one bit a neuron
# and step for the backward pass.

# %%
packed = copy.deepcopy(normed)
report = snn.SpikeLayersReport()
snn.convert_spike_layers(packed, report)
print(report)
print(interop.check(slow, packed, x))

# %% [markdown]
# The sums of such a convolution are the same but for their order, so that the last digits of a float may differ.
# Where a potential lies within rounding of its threshold, a spike can then come out differently. `interop.check`
# compares in float64, where that is rarer.
#
# ## What it brought
#
# Now the four versions take turns, forward and backward, and their memory is counted.

# %%
versions = {
    "plain loop": slow,
    "LIF layers": fused,
    "+ convert_norm_lif": normed,
    "+ convert_spike_layers": packed,
}
seconds = {name: [] for name in versions}
for round_ in range(7):
    for name, model in versions.items():
        model.zero_grad()
        begun = time.perf_counter()
        model(x).square().mean().backward()
        if round_:  # the first round warms up
            seconds[name].append(time.perf_counter() - begun)
kept = {name: memory(model, x).measured / 2**20 for name, model in versions.items()}
for name, times in seconds.items():
    low, *_, high = sorted(times)
    print(f"{name:24} {1e3 * statistics.median(times):6.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f}), "
          f"keeps {kept[name]:5.1f} MiB")  # fmt: skip

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
for place, (name, times) in enumerate(seconds.items()):
    left.plot([1e3 * min(times), 1e3 * max(times)], [place, place], color=style.OURS, alpha=0.4, linewidth=5)
    left.plot(1e3 * statistics.median(times), place, "o", color=style.OURS)
    right.plot(kept[name], place, "o", color=style.THEIRS)
left.set(yticks=range(len(versions)), yticklabels=versions, xlabel="milliseconds a step, median and range", xlim=0)
right.set(xlabel="MiB kept for the backward pass", xlim=0)
left.invert_yaxis()
figure.suptitle("A training step, forward and backward")
plt.show()

# %% [markdown]
# Where the ranges of two versions overlap, as they may on a busy machine, one should not call the one faster. Memory
# has no such spread: it is counted, not timed.
#
# Where does the time go now? The neurons should have fallen far below the convolutions, which is where the arithmetic
# of a network is.

# %%
print(profile(packed, x, steps=3))

# %% [markdown]
# ## For a network of your own
#
# - `trtkern profile module:function --input 8,8,2,32,32` shows the same table for a network that a function of
#   yours makes, and `--html FILE.html` writes it as a page.
# - Networks of SpikingJelly, snnTorch, Norse, sinabs and Rockpool need no `register`: `interop.convert(model)` knows
#   their neurons, and its report names those that have no exact equal.
# - A loop over time *around* a network goes away with `interop.over_time`.
# - What a kernel takes by itself, beside other implementations and beside what the memory of the machine allows, is
#   measured by `trtkern bench`.
