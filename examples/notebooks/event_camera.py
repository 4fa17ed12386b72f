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
# # Data of an event camera
#
# An ordinary camera takes a whole picture many times a second. An **event camera** has no pictures. Each of its
# pixels watches its own brightness and sends a message, an *event*, at the moment when it changes: "at time t, the
# pixel at column x and row y became brighter (or darker)". What does not move sends nothing.
#
# This is the kind of data that spiking networks are made for, since here time carries information. In this notebook
# we make a small set of such recordings, turn it into frames, train a network on it, and then look at *when* the
# network knows the answer. Nothing is downloaded.
#
# It needs `pip install 'trtkern[train]'` and Jupyter, and runs in about a minute on two processor cores.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from trtkern import analysis
from trtkern.data.events import Events, by_count, by_time
from trtkern.models import ConvSNN
from trtkern.output import style
from trtkern.train import Trainer

plt.rcParams.update(style.options())  # the colours and sizes of this project

# %% [markdown]
# ## Recordings: a dot that turns
#
# A bright dot enters at the left edge of a sensor of 16 by 16 pixels and runs to the middle. There it goes up, goes
# down, runs on straight ahead, or turns back. The class of a recording is what the dot does. **Until the middle all
# four classes look the same**: whoever guesses then is right in one case of four.
#
# A pixel that the dot reaches becomes brighter (polarity 1), and the pixel that it leaves becomes darker (polarity
# 0). Real sensors are noisy, so a third as many events again come at random from anywhere.
#
# `Events` is this package's type for a recording: four arrays of whole numbers for time (in microseconds), column,
# row and polarity.

# %%
SIDE, DURATION = 16, 100_000  # pixels, and microseconds
CLASSES = ("up", "down", "straight", "back")
TURN = {"up": (0, -1), "down": (0, 1), "straight": (1, 0), "back": (-1, 0)}


def recording(kind, rng):
    """The events of one dot of 3 x 3 pixels."""
    row, middle = rng.integers(7, 9), rng.integers(7, 9)
    steps = SIDE - 1
    path = [(min(step, middle), row) for step in range(middle + 1)]
    for step in range(1, steps - middle + 1):
        path.append((middle + step * TURN[kind][0], row + step * TURN[kind][1]))
    rows = []
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1)
    covered = np.zeros((SIDE, SIDE), dtype=bool)
    for step, (column, line) in enumerate(path):
        now = (abs(grid - (column, line)) <= 1).all(-1)
        for polarity, changed in ((1, now & ~covered), (0, covered & ~now)):
            for y, x in np.argwhere(changed):
                rows.append((step * DURATION // len(path) + rng.integers(2_000), x, y, polarity))
        covered = now
    for _ in range(len(rows) // 3):
        rows.append((rng.integers(DURATION), *rng.integers(SIDE, size=2), rng.integers(2)))
    return Events(*np.array(sorted(rows)).T)


rng = np.random.default_rng(0)
events = recording("up", rng)
print(f"{len(events.t)} events; the first of them:")
for t, x, y, p in zip(*(part[:4] for part in events), strict=True):
    print(f"  at {t:>5} µs, column {x:>2}, row {y:>2}: {'brighter' if p else 'darker'}")

# %% [markdown]
# Here is one recording of each class in space and time. The path is a line that bends in the middle, and the noise
# is everywhere.

# %%
figure = plt.figure(figsize=(10, 3.2), layout="constrained")
for place, kind in enumerate(CLASSES):
    shown = recording(kind, rng)
    axis = figure.add_subplot(1, 4, place + 1, projection="3d")
    axis.scatter(shown.t / 1000, shown.x, SIDE - 1 - shown.y, s=4, c=np.where(shown.p, style.THEIRS, style.OURS))
    axis.set(title=kind, xlabel="ms", ylabel="column", zlabel="row")
    axis.tick_params(labelsize=6)
    axis.set_box_aspect(None, zoom=0.8)
figure.suptitle("Events in space and time: brighter in orange, darker in blue")
plt.show()

# %% [markdown]
# ## From events to frames
#
# A network that computes in time steps needs events in time steps. One divides the recording into T parts and counts,
# in each part, the events of each pixel and polarity. The result is a sequence of frames of shape `[T, 2, H, W]`.
# There are two usual ways to divide it:
#
# - `by_time` makes parts of **equal duration**. Where little moves, a frame is nearly empty.
# - `by_count` makes parts of **equally many events**. Frames are equally full then, and their durations differ.
#
# SHD (spoken digits) is usually framed by time, DVS-CIFAR10 and DVS128 Gesture by count. Both functions count in whole
# numbers, so nothing is lost to rounding.

# %%
T, SIZE = 8, (2, SIDE, SIDE)
frames = {"by time": by_time(events, T, SIZE, 0, DURATION), "by count": by_count(events, T, SIZE)}
figure, axes = plt.subplots(2, T, figsize=(10, 2.9), layout="constrained")
for line, (name, counted) in zip(axes, frames.items(), strict=True):
    for step, axis in enumerate(line):
        axis.imshow(counted[step, 1] - counted[step, 0], cmap=style.AROUND, vmin=-2, vmax=2)
        axis.set(xticks=[], yticks=[], title=f"{name}\nframe 1" if step == 0 else f"frame {step + 1}")
        axis.title.set_fontsize(8)
figure.suptitle("Brighter less darker events of one recording, as frames")
plt.show()

# %% [markdown]
# We frame all recordings by time, so that a frame has a clock: frames 1 to 4 are the way to the middle, and what
# happens behind the turn is in frames 5 to 8.

# %%
labels = torch.arange(1200) % 4
framed = [by_time(recording(CLASSES[label], rng), T, SIZE, 0, DURATION) for label in labels.tolist()]
frames = torch.from_numpy(np.stack(framed)).float()
train, test = (frames[:800], labels[:800]), (frames[800:], labels[800:])
print("training:", tuple(train[0].shape), "= [N, T, polarities, rows, columns]")

# %% [markdown]
# ## Training
#
# `Trainer` takes pairs of tensors. It sees by their five axes that the samples are sequences, and gives them to the
# network as `[T, B, C, H, W]`, time first. The network is a small one of convolutions and LIF neurons. Its neurons
# carry their potential from frame to frame; that is the only memory it has.
#
# The loss is TET (temporal efficient training): the mean of the losses of all T answers. So each single step is asked
# for the class, the first steps too, although they cannot know it.

# %%
folder = Path(tempfile.mkdtemp())
model = ConvSNN(SIZE, (8, "pool", 16, "pool"), len(CLASSES), timesteps=T, decay=0.75)
trainer = Trainer(model, (train, test), loss="tet", lr=1e-2, epochs=8, classes=CLASSES, threads=1, seed=0)
result = trainer.fit(folder / "run", show=False)
for row in result.rows:
    print(f"epoch {row['epoch']}: loss {row['train']['loss']:.3f}, held out {row['validation']['accuracy']:.1%}")
print(f"test accuracy: {result.final.splits['test']['accuracy']:.1%}")

# %% [markdown]
# ## When does the information arrive?
#
# The network answers at every step. What would it have said if we had stopped it earlier? `analysis.early` tells,
# with 95 % intervals over the 400 test recordings.

# %%
samples = trainer.samples("test")
early = analysis.early(model, samples)
print(early.table().text())
early.plot()

# %% [markdown]
# The curve is what we built into the data. Over the first four frames the accuracy stays near one in four, because
# there is nothing to be known. At the turn the information arrives, and the accuracy jumps. The dashed line is the
# answer of that step alone. It is ahead of the mean of all steps so far, since the mean still carries the guesses of
# the first steps with it.
#
# *Early exit*, in the second picture, stops each recording when the network is sure. Here it brings nothing: nobody can
# be sure before the turn, and behind it the mean answer has the unsure first steps in it for a while. Early exit pays
# where the samples differ in how long they take. Where all of them become clear at the same moment, a fixed number of
# steps does as well.
#
# A second view of the same is the **Fisher information** `I[t]`. It asks how strongly the answer after the first t
# steps depends on the weights, sample by sample. Its centre in time, the *centroid*, is low where early steps hold
# the information, and (T + 1) / 2 = 4.5 where it is spread evenly.

# %%
fisher = analysis.fisher(model, trainer.samples("train", 200))
low, high = fisher.centroid_interval
print(f"centroid: step {fisher.centroid:.2f}, 95 % interval {low:.2f} to {high:.2f}")
fisher.plot()

# %% [markdown]
# Read `I[t]` with care. It is large where the network is still unsure, since then a change of the weights changes the
# probability of the right class the most; it falls when the samples are fitted. So a fall of `I[t]` behind the turn
# means that the answer has settled, not that the later frames are empty. Which steps the answer *needs* is what the
# accuracies above say.
#
# ## Real recordings
#
# The published sets go the same way. Get the files, unpack them, and name the folder; where each comes from, with its
# checksum, is on the page "Events" of the documentation. Reading their formats takes `pip install
# 'trtkern[events]'`. For DVS-CIFAR10, ten classes of images that were moved before an event camera:
#
# ```
# trtkern train --recipe dvs-cifar10 --data-dir DIR
# trtkern analyze early runs/dvs-cifar10-trt-seed0
# ```
#
# The frames are made once and kept in a cache. `n-caltech101`, `n-mnist`, `dvs-gesture` and `shd` are there in the
# same way, and a folder of recordings of your own is `--data folder:DIR`. In Python, `trtkern.data.load("dvs-cifar10",
# "DIR", timesteps=10)` gives the same frames that we made by hand here.
