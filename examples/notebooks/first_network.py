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
# # A first spiking network
#
# A spiking network computes with events. Its neurons do not pass numbers to each other, as those of other neural
# networks do, but spikes: at each moment a neuron either fires or stays silent. This notebook begins with one
# neuron, explains how such a thing can be trained at all, and ends with a network that reads handwritten digits.
#
# It needs `pip install 'trtkern[train]'` and Jupyter, and runs in about a minute on two processor cores.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from trtkern import analysis, data, surrogates
from trtkern import nn as snn
from trtkern.output import style

torch.manual_seed(0)
torch.set_num_threads(1)  # the layers below are so small that a second thread has nothing to do
plt.rcParams.update(style.options())  # the colours and sizes of this project

# %% [markdown]
# ## One neuron
#
# The *leaky integrate-and-fire* neuron, LIF for short, holds one number, its **potential** v. Time goes in steps.
# At each step three things happen:
#
# 1. The potential leaks: it is multiplied by the `decay`, a number between 0 and 1.
# 2. The input `x[t]` of this step is added: `h[t] = decay * v[t-1] + x[t]`.
# 3. Where `h[t]` is above the threshold, here 1, the neuron fires a spike and its potential is reset to 0.
#    Otherwise the potential stays as it is: `v[t] = h[t]`.
#
# Here is such a neuron with a weak, noisy input. A layer takes the whole sequence at once. The first axis is time,
# the second the batch and the third the neurons, so one neuron over 60 steps is a tensor of shape `[60, 1, 1]`.
# `return_h=True` asks for the potential beside the spikes.

# %%
steps = 60
x = 0.25 * torch.rand(steps, 1, 1) + 0.05
spikes, potential = snn.LIF(decay=0.9)(x, return_h=True)

figure, (above, below) = plt.subplots(2, 1, figsize=(8, 4), sharex=True, height_ratios=(3, 1), layout="constrained")
above.plot(potential[:, 0, 0], ".-", label="potential before the reset, h")
above.axhline(1.0, color=style.ASIDE, linestyle="--", label="threshold")
above.set(ylabel="potential", ylim=(0, 1.4))
above.legend(loc="upper center", ncols=2)
below.vlines(spikes[:, 0, 0].nonzero()[:, 0], 0, 1, color=style.THEIRS, linewidth=2)
below.set(yticks=[], ylabel="spikes", xlabel="time step", ylim=(0, 1))
above.set_title("The potential climbs, crosses the threshold, and is reset")
plt.show()

# %% [markdown]
# The neuron adds up what comes in, forgets a little of it at every step, and fires when enough has come together. A
# stronger input makes it fire more often. The next cell gives 200 neurons a constant input each, from 0 to 1.2, and
# counts how often they fire. All of them run in one call, over all time steps.

# %%
current = torch.linspace(0, 1.2, 200)
spikes = snn.LIF(decay=0.9)(current.expand(200, 1, -1))  # [T, B, C] = [200, 1, 200]

plt.figure(figsize=(6, 3), layout="constrained")
plt.plot(current, spikes.mean((0, 1)))
plt.xlabel("constant input")
plt.ylabel("spikes per step")
plt.title("How often a neuron fires")
plt.show()

# %% [markdown]
# Below an input of 0.1 the leak wins: the potential never reaches the threshold. Above 1 the neuron fires at every
# step. Between the two the curve is a staircase, because the number of steps from one spike to the next is a whole
# number.
#
# ## How a network of such neurons is trained: the surrogate gradient
#
# Networks are trained by following the gradient of a loss downhill. A spike has no useful gradient. As a function
# of the potential it is a step, 0 below the threshold and 1 above. The slope of a step is 0 everywhere, and at the
# threshold there is none.
#
# The way out is a **surrogate**. Forward, the neuron computes the true spike. Backward, one pretends that the step
# was a little soft, and multiplies the gradient with the slope of something smooth instead. The neurons of this
# library offer several shapes of that slope. One function each defines them, in `trtkern.surrogates`.

# %%
u = torch.linspace(-1.5, 1.5, 301)  # the potential less the threshold
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(u, (u > 0).float(), color=style.DARK)
left.set(title="Forward: the spike itself", xlabel="potential - threshold", ylabel="spike")
for name in ("triangle", "sigmoid", "atan", "rectangle"):
    row = surrogates.TABLE[name]
    slope = [row.function(float(value), row.default_alpha) for value in u]
    right.plot(u, slope, label=name)
right.set(title="Backward: the slope that stands in for it", xlabel="potential - threshold", ylabel="slope")
right.legend()
plt.show()

# %% [markdown]
# Is that really what the layer does? With one time step the potential equals the input, so the gradient of the
# spikes by the input must be that very curve.

# %%
x = torch.linspace(-0.5, 2.5, 301, requires_grad=True)
snn.LIF(surrogate="triangle")(x.view(1, 1, -1)).sum().backward()
expected = [surrogates.triangle(float(value), 1.0) for value in x.detach() - 1.0]
print("largest difference:", float((x.grad - torch.tensor(expected)).abs().max()))

# %% [markdown]
# Only neurons near their threshold learn: far away from it the slope is small or 0. That is why the inputs of
# spiking neurons are usually normalised, so that they come near the threshold.
#
# ## A network that reads digits
#
# The package comes with 1,797 handwritten digits of 8 by 8 pixels. An image has no time in it, so it is shown to the
# network T times in a row, and the network gives an answer at every step. The mean of these answers counts.

# %%
digits = data.load("digits")
train, test = digits.normalise(digits.train.images), digits.normalise(digits.test.images)
print(f"{len(train)} training images, {len(test)} test images of {tuple(train.shape[1:])}")

figure, axes = plt.subplots(1, 8, figsize=(8, 1.4), layout="constrained")
for axis, image, label in zip(axes, digits.test.images, digits.test.labels, strict=False):
    axis.imshow(image[0], cmap=style.COUNTS)
    axis.set(title=str(int(label)), xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The network is built as one builds any other with PyTorch. `TimeSequential` is like `nn.Sequential`, but knows of
# time: layers without time, such as a convolution, see all steps as one large batch, and the neurons see the
# sequence. With `timesteps=8` it takes images and shows each of them for eight steps.

# %%
T = 8


def network():
    return snn.TimeSequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), snn.LIF(decay=0.5),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), snn.LIF(decay=0.5),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
        timesteps=T,
    )  # fmt: skip


model = network()
print("answers for one image:", tuple(model(test[:1]).shape), "= [T, batch, classes]")

# %% [markdown]
# The training loop is the usual one. `SDTLoss` is the cross entropy of the mean answer over all steps. (SDT stands
# for standard direct training. `TETLoss` and `TRTLoss`, which are called in the same way, look at the answer of
# every single step.)

# %%
loss_of = snn.SDTLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
curve = []
for epoch in range(6):
    for places in torch.randperm(len(train)).split(64):
        loss = loss_of(model(train[places]), digits.train.labels[places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    print(f"epoch {epoch + 1}: loss {sum(curve[-20:]) / 20:.3f}")

# %%
plt.figure(figsize=(6, 3), layout="constrained")
plt.plot(curve)
plt.xlabel("training step")
plt.ylabel("loss")
plt.title("The loss falls although no spike has a true gradient")
plt.show()

# %% [markdown]
# ## How long does it have to look?
#
# The network answers at every step, so one can ask how good the answer is after fewer steps than it was trained
# for. `analysis.early` measures that on the test images, with a 95 % interval: with 360 images one should not take
# half a point too seriously. It also tries *early exit*, where each image stops as soon as the network is sure.

# %%
early = analysis.early(model, (test, digits.test.labels))
print(early.table().text())
early.plot()

# %% [markdown]
# The digits are easy: nearly all that the network knows it says at the first step, and the accuracies of the other
# steps lie within each other's intervals. The second picture shows what that is worth. Most images can stop at once,
# and only those that the network is not sure of take longer, so the mean number of steps is far below T. Less time
# means fewer spikes, and on hardware that computes only where a spike arrives, less energy.
#
# ## Who fires?
#
# Last, a look inside. A dot in the raster is a spike of one neuron at one step, for the first test image.

# %%
found = analysis.spikes(model, (test[:64], digits.test.labels[:64]), neurons=64)
print(found.table().text())
found.plot()

# %% [markdown]
# ## Where to go next
#
# - `trtkern train` on the command line does all of the above, keeps checkpoints and writes a report.
# - The notebook `event_camera` has data in which time carries the information.
# - The notebook `sharpness_and_fisher` compares two losses.
# - The notebook `profile_and_speed_up` makes a slow spiking network fast, step by step.
