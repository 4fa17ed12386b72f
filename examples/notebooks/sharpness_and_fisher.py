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
# # Sharpness and Fisher information of two losses
#
# Two networks can be equally accurate and still be different inside. This notebook trains the same network with two
# losses and asks two questions about what came out. *Where in time* does the network hold its information? And *how
# flat* is the minimum that it lies in? At the end stands what so small an experiment can say, and what it cannot.
#
# It needs `pip install 'trtkern[train]'` and Jupyter, and runs in about a minute on two processor cores.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from trtkern import analysis
from trtkern.output import style
from trtkern.train import Trainer

torch.set_num_threads(1)  # the network is so small that a second thread has nothing to do
plt.rcParams.update(style.options())  # the colours and sizes of this project

# %% [markdown]
# ## Two losses
#
# A spiking network answers at each of its T time steps: its output is a tensor `[T, B, C]` of scores for C classes.
# The losses differ in how they look at these T answers.
#
# - **SDT** (standard direct training) takes the mean of the answers over time, and the cross entropy of that. A step
#   may be wrong as long as the mean is right.
# - **TRT** (temporal regularization training, [arXiv 2506.19256](https://arxiv.org/abs/2506.19256)) asks each step for
#   the right answer: it takes the mean of the T cross entropies, and with a small weight a squared error. To that it
#   adds a penalty on the weights, which is strong for the first steps and fades over time.
#
# The paper that introduced TRT says that its minima are flatter, and that its information lies at other steps. We
# train with each loss and with the same two seeds. A seed fixes the first weights and the order of the images, so two
# runs of one seed differ in their loss alone.

# %%
LOSSES, SEEDS, T = ("sdt", "trt"), (0, 1), 6
folder = Path(tempfile.mkdtemp())
trained, accuracy = {}, {}
for loss in LOSSES:
    for seed in SEEDS:
        trainer = Trainer(
            "conv", "digits", model_options={"layers": [8, 16, "pool"]}, timesteps=T,
            loss=loss, lr=5e-3, epochs=5, seed=seed, select="last", threads=1,
        )  # fmt: skip
        result = trainer.fit(folder / f"{loss}{seed}", show=False)
        trained[loss, seed] = trainer
        accuracy[loss, seed] = result.final.splits["test"]["accuracy"]
        print(f"{loss}, seed {seed}: test accuracy {accuracy[loss, seed]:.1%}")

# %% [markdown]
# The accuracies lie close together. With 360 test images, one image is 0.28 points, and the 95 % interval of an
# accuracy of 97 % is about two points to either side. So none of these networks is better than another as far as we
# can tell.
#
# ## Where in time is the information?
#
# The Fisher information `I[t]` says how strongly the answer after the first t steps depends on the weights. For each
# image one takes the log-probability of the right class, its gradient by all weights, and the sum of the gradient's
# squares; `I[t]` is the mean of that over the images. Its size falls as a network fits its images, so only its shape
# over time is compared. The *centroid* is its centre: low if early steps hold much of the information, and
# (T + 1) / 2 = 3.5 if all steps hold the same.

# %%
fishers = {key: analysis.fisher(run.model, run.samples("train", 256)) for key, run in trained.items()}
for (loss, seed), found in fishers.items():
    low, high = found.centroid_interval
    print(f"{loss}, seed {seed}: centroid {found.centroid:.2f} (95 % interval over the images {low:.2f} to {high:.2f})")

# %%
COLOR = {"sdt": style.OURS, "trt": style.THEIRS}
STYLE = {0: "-", 1: "--"}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for (loss, seed), found in fishers.items():
    share = found.information / found.information.sum()
    left.plot(range(1, T + 1), share, STYLE[seed], color=COLOR[loss], label=f"{loss.upper()}, seed {seed}")
    right.plot(found.centroid, loss.upper(), "o", color=COLOR[loss])
left.axhline(1 / T, color=style.ASIDE, linewidth=0.8)
left.set(xlabel="first t steps", ylabel="share of the information", ylim=0, title="Where in time")
left.legend(fontsize=8)
right.axvline((T + 1) / 2, color=style.ASIDE, linewidth=0.8)
right.set(xlabel="information centroid (time step)", title="Its centre; a dot is a seed", ylim=(-0.5, 1.5))
plt.show()

# %% [markdown]
# The interval beside each centroid stands for the choice of images. It does *not* say how far another training would
# lie away; for that one looks at the distance between the dots of one loss.
#
# ## How flat is the minimum?
#
# Imagine the loss as a landscape over all weights. Training ends in a valley. If its walls are steep, a small change of
# the weights ruins the network; if they are flat, it does not matter much. Two ways to look at it:
#
# **A slice.** Walk from the trained weights in a random direction, and plot the loss along the way. The direction is
# *filter-normalised*: each filter of it is as long as that filter of the weights, so that 1 on the axis means "changed
# by as much as its own length". Networks of one architecture get the same random numbers. The loss in the picture is
# the cross entropy of the mean answer for all of them, without a penalty, whatever they were trained with.

# %%
slices = {
    f"{loss.upper()}, seed {seed}": analysis.landscape(run.model, run.samples("train", 256), dims=1, points=21)
    for (loss, seed), run in trained.items()
}
pictures = analysis.Landscape.pictures(slices)
figure, axes = plt.subplots(1, len(pictures), figsize=(6 * len(pictures), 3.6), layout="constrained", squeeze=False)
for axis, picture in zip(axes[0], pictures.values(), strict=True):
    picture.draw(axis)
plt.show()

# %% [markdown]
# **Curvature.** How steeply the walls rise right at the bottom is in the second derivatives, the Hessian. Its largest
# eigenvalue belongs to the steepest direction, its trace adds up all directions. The table also has the *rise*: the
# largest loss that a search finds when each filter may move by 5 % of its length.

# %%
curvatures = {
    key: analysis.curvature(
        run.model, run.samples("train", 128, batch_size=16), method="differences", eigenvalues=1, starts=1,
        iterations=12, tolerance=1e-2, trace_vectors=4, balls={"filters": 0.05},
    )
    for key, run in trained.items()
}  # fmt: skip
for (loss, seed), found in curvatures.items():
    print(f"--- {loss}, seed {seed}")
    print(found.table().text())

# %% [markdown]
# A spike is there or not, so the true loss is a staircase of tiny steps, and has no second derivative. What is measured
# here is how the surrogate gradient of the training changes over a small distance (`method="differences"`). The
# documentation's page on analysis says what that means, and how it compares with the exact second derivatives of the
# surrogate.
#
# ## What can be said, and what not
#
# The next cell compares the two losses number by number. For each it prints how far the means of the losses are apart,
# and beside it how far the two seeds of one loss are apart. A difference that is not clearly larger than the distance
# of the seeds is none.

# %%
measures = {
    "test accuracy (%)": lambda key: 100 * accuracy[key],
    "centroid": lambda key: fishers[key].centroid,
    "largest eigenvalue": lambda key: curvatures[key].eigenvalues[0],
    "trace": lambda key: curvatures[key].trace,
}
print(f"{'':20} {'SDT':>18} {'TRT':>18}   apart   seeds apart")
for name, measure in measures.items():
    values = {loss: [float(measure((loss, seed))) for seed in SEEDS] for loss in LOSSES}
    mean = {loss: sum(found) / len(found) for loss, found in values.items()}
    within = max(max(found) - min(found) for found in values.values())
    cells = [", ".join(f"{value:.2f}" for value in values[loss]) for loss in LOSSES]
    print(f"{name:20} {cells[0]:>18} {cells[1]:>18} {abs(mean['sdt'] - mean['trt']):7.2f} {within:13.2f}")

# %% [markdown]
# Two seeds are far too few for a verdict. With two values a loss, one cannot even say how large the spread is, and
# whoever looks at four numbers and a few pictures always finds something that points one way. What this notebook shows
# is how the question is asked:
#
# - Same seeds, same architecture, same images for every network.
# - One loss for all in the comparison, without the penalty: otherwise one would measure the penalty's own bowl.
# - The distance of the losses beside the distance of the seeds.
# - Eigenvalues and traces change when the weights before a normalisation are scaled, though the network does not.
#   Where two losses leave weights of different length, and a penalty makes them shorter, the slice and the rise within
#   filters are the fair comparison.
# - None of this shows that a flatter network answers better on new images.
#
# For an answer, train more seeds and longer. On the command line that is `trtkern train --loss sdt --seeds 0,1,2,3,4`,
# the same with `--loss trt`, then `trtkern report RUN RUN`, which puts all analyses side by side on one page. The page
# "Results" of the documentation does so for the claims of the paper.
