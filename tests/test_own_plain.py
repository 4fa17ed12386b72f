"""The loop against loops of plain torch: the same network, data, order and optimiser make the same weights."""

from __future__ import annotations

import numpy as np
import own_parts
import pytest
import torch
from own_parts import Net, Sequences, Stripes
from torch.nn import functional as F
from torch.utils.data import DataLoader

from trtkern.data.mix import Mix
from trtkern.nn import TETLoss, TRTLoss
from trtkern.train import Trainer
from trtkern.training.schedules import Schedule, checked

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")
SEED, BATCH, EPOCHS = 3, 16, 5


def adam(weights):
    return torch.optim.Adam(weights, lr=0.01)


def cross_entropy(logits, target):
    return F.cross_entropy(logits.mean(0), target)


def trained(tmp_path, model, data, **options):
    """The weights that the loop makes."""
    options = {"epochs": EPOCHS, "batch_size": BATCH, "threads": 1, "device": "cpu", "select": "last", **options}
    options = {"schedule": "constant", "seed": SEED, "optimizer": adam, "loss": cross_entropy, **options}
    made = Trainer(model, (data, data), **options)
    made.fit(tmp_path / "run", show=False)
    return made, [weight.detach().clone() for weight in model.parameters()]


def batches(data, epochs=EPOCHS, batch=BATCH):
    """In the order of the loop: a permutation an epoch, whose rest that fills no batch is left out."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        order = torch.randperm(len(data[0]), generator=generator)
        for places in order[: len(order) // batch * batch].split(batch):
            yield data[0][places], data[1][places]


def plain(model, found, loss=cross_entropy, make=adam, scheduler=None):
    """The loop that everybody writes."""
    torch.manual_seed(SEED)
    optimizer = make(model.parameters())
    after = None if scheduler is None else scheduler(optimizer)
    model.train()
    for x, y in found:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        if after is not None:
            after.step()
    return [weight.detach() for weight in model.parameters()]


def twice(make=Net, **options):
    """A network and another one with the same weights."""
    torch.manual_seed(0)
    one, two = make(**options), make(**options)
    two.load_state_dict(one.state_dict())
    return one, two


def equal(one, two):
    return len(one) == len(two) and all(map(torch.equal, one, two))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_fifty_steps_are_those_of_a_plain_loop(tmp_path, batch_norm):
    """Bit for bit, of a DataLoader, with Dropout, which draws in each step."""

    class Normed(Net):
        def __init__(self):
            super().__init__(dropout=0.3)
            if batch_norm:
                self.layers.insert(1, torch.nn.LayerNorm(16))

    ours, theirs = twice(Normed)
    images, labels = own_parts.stripes(160)

    def loader():
        shuffled = torch.Generator().manual_seed(9)
        return DataLoader(list(zip(images, labels, strict=True)), BATCH, shuffle=True, generator=shuffled)

    begun = [weight.detach().clone() for weight in ours.parameters()]
    made, got = trained(tmp_path, ours, loader())
    assert made.steps * EPOCHS == 50 and not equal(got, begun)
    mine = loader()
    assert equal(got, plain(theirs, (batch for _ in range(EPOCHS) for batch in mine)))


def test_fifty_steps_of_tensors_and_of_a_dataset(tmp_path):
    data = own_parts.stripes(165)
    for kind in ("tensors", "dataset"):
        ours, theirs = twice(dropout=0.3)
        given = data if kind == "tensors" else list(zip(*data, strict=True))
        made, got = trained(tmp_path / kind, ours, given)
        assert made.steps == 10 and equal(got, plain(theirs, batches(data)))


def soft(labels, classes=4):
    return 0.8 * F.one_hot(labels, classes).float() + 0.2 / classes


def test_soft_labels(tmp_path):
    images, labels = own_parts.stripes(96)
    data = images, soft(labels)
    ours, theirs = twice()
    made, got = trained(tmp_path, ours, data, loss="sdt")
    assert equal(got, plain(theirs, batches(data)))
    assert made.data.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_images(tmp_path, name):
    """As the papers write it, of the same draws."""
    data = own_parts.stripes(96)
    ours, theirs = twice()
    _, got = trained(tmp_path, ours, data, loss="sdt", mix={"name": name, "alpha": 0.7, "p": 0.8})
    seeded = torch.Generator().manual_seed(SEED)
    draws = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=seeded)))

    def mixed():
        for x, y in batches(data):
            hard = F.one_hot(y, 4).float()
            skipped = torch.rand(1, dtype=torch.float64, generator=draws) >= 0.8
            lam = np.random.default_rng(int(torch.randint(2**62, (), generator=draws))).beta(0.7, 0.7)
            order = torch.randperm(len(x), generator=draws)
            row, column = (torch.rand(2, dtype=torch.float64, generator=draws) * 8).int().tolist()
            if skipped:
                yield x, hard
            elif name == "mixup":
                yield lam * x + (1 - lam) * x[order], lam * hard + (1 - lam) * hard[order]
            else:
                half = int(8 * (1 - lam) ** 0.5) // 2
                inside = torch.zeros(8, 8, dtype=torch.bool)
                inside[max(0, row - half) : row + half, max(0, column - half) : column + half] = True
                left = 1 - inside.sum().item() / 64
                yield torch.where(inside, x[order], x), left * hard + (1 - left) * hard[order]

    assert equal(got, plain(theirs, mixed()))


def test_the_shares_of_mixup_are_those_of_its_beta_distribution():
    """Mean 1/2, variance 1 / (4 (2 alpha + 1))."""
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    pairs = [
        Mix("mixup", 0.4)(images, torch.tensor([0, 1]), 2, torch.Generator().manual_seed(seed)) for seed in range(800)
    ]
    shares = torch.tensor([out[1].item() for out, _ in pairs if out[1] != 1])  # the others were mixed with themselves
    assert len(shares) > 300 and abs(shares.mean() - 0.5) < 0.06
    assert abs(shares.var() - 1 / (4 * 1.8)) < 0.02


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_a_target_for_each_step(tmp_path, kind):
    x = torch.randn(96, 6, 5)
    y = torch.randint(3, (96, 6))
    y = y if kind == "labels" else soft(y, 3)
    ours, theirs = twice(Sequences)

    def loss(logits, target):
        steps = [F.cross_entropy(out, aim) for out, aim in zip(logits, target.transpose(0, 1), strict=True)]
        return torch.stack(steps).mean()

    made, got = trained(tmp_path, ours, (x, y), loss={"name": "tet", "lam": 0.0}, time_first=True)
    wanted = plain(theirs, ((a.transpose(0, 1), b) for a, b in batches((x, y))), loss)
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    averages = made.evaluate(made.data.test)
    answers = made.model(x.transpose(0, 1)).argmax(2).T
    right = y if kind == "labels" else y.argmax(2)
    assert averages["accuracy"] == pytest.approx((answers == right).float().mean().item())


def test_losses_of_each_step_are_means_over_the_steps():
    logits, y = torch.randn(4, 6, 3, dtype=torch.float64), torch.randint(3, (4, 6))
    weights = [("w", torch.randn(5))]
    for loss in (TETLoss(lam=0.2), TRTLoss(weights, eta=0.2)):
        for target in (y, soft(y, 3)):
            whole = loss.parts(logits, target)
            steps = [loss.parts(logits[t : t + 1], target[t]) for t in range(4)]
            for part in ("cross_entropy", "mse"):
                mean = torch.stack([getattr(each, part) for each in steps]).mean()
                torch.testing.assert_close(getattr(whole, part), mean)


@pytest.mark.parametrize("over", ["mean", "last", "steps", "each"])
def test_regression(tmp_path, over):
    x = torch.randn(96, 6, 5)
    y = torch.randn(96, 6, 2) if over == "each" else torch.randn(96, 2)
    ours, theirs = twice(Sequences, outputs=2)

    def loss(out, aim):
        if over == "each":
            return F.mse_loss(out, aim.transpose(0, 1))
        if over == "steps":
            return (out - aim).square().mean()
        return F.mse_loss(out.mean(0) if over == "mean" else out[-1], aim)

    named = "mse" if over == "each" else {"name": "mse", "over": over}
    made, got = trained(tmp_path, ours, (x, y), loss=named, time_first=True)
    assert equal(got, plain(theirs, ((a.transpose(0, 1), b) for a, b in batches((x, y))), loss))
    averages = made.evaluate(made.data.test)
    assert set(averages) == {"loss", "cross_entropy", "mse", "regularizer"} and averages["loss"] == averages["mse"]
    assert "accuracy" not in made.fit(tmp_path / "run", show=False).rows[-1]["train"]


def sgd(weights):
    return torch.optim.SGD(weights, lr=0.05, momentum=0.9, nesterov=True)


def adamw(weights):
    return torch.optim.AdamW(weights, lr=0.02, weight_decay=0.1)


SCHEDULES = {
    "step": (
        {"name": "step", "step_size": 2, "gamma": 0.3}, sgd, lambda o: torch.optim.lr_scheduler.StepLR(o, 2 * 6, 0.3),
    ),
    "multi-step": (
        {"name": "multi-step", "milestones": [1, 3], "gamma": 0.3}, sgd,
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [6, 18], 0.3),
    ),
    "one-cycle": (
        {"name": "one-cycle", "pct_start": 0.4}, adamw,
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=30, pct_start=0.4, cycle_momentum=False),
    ),
    "cosine": (
        {"name": "cosine", "eta_min": 0.001}, adamw,
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30, eta_min=0.001),
    ),
    "constant": ({"name": "constant"}, sgd, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_optimiser_with_a_schedule(tmp_path, name):
    """SGD that falls in steps, AdamW in one cycle: torch's own schedulers."""
    told, make, scheduler = SCHEDULES[name]
    data = own_parts.stripes(96)
    ours, theirs = twice()
    made, got = trained(tmp_path, ours, data, optimizer=make, schedule=told)
    wanted = plain(theirs, batches(data), make=make, scheduler=scheduler)
    if name in ("step", "multi-step", "constant"):
        assert equal(got, wanted)
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert made.steps == 6


@pytest.mark.parametrize("name", ["cosine", "step", "multi-step", "one-cycle"])
def test_rates_are_those_of_torch(name):
    told, make, scheduler = SCHEDULES[name]
    optimizer = make([torch.nn.Parameter(torch.zeros(1))])
    peak = optimizer.param_groups[0]["lr"]
    after = scheduler(optimizer)
    options = {key: value for key, value in checked(told, 0.0).items() if key != "name"}
    ours = Schedule(name, options)
    for step in range(30):
        wanted = optimizer.param_groups[0]["lr"]
        assert ours.rate(peak, step, 6, 5) == pytest.approx(wanted, rel=1e-12), step
        optimizer.step()
        after.step()


def test_every_optimiser_of_torch_by_name_is_torch_s(tmp_path):
    """With its arguments, bit for bit; what ours are called stays ours."""
    from trtkern.training import optimizers

    data = own_parts.stripes(48)
    arguments = {"SGD": {"momentum": 0.5, "dampening": 0.1}, "RMSprop": {"alpha": 0.9, "momentum": 0.1}}
    made = 0
    for name in optimizers.names():
        if name in ("adam", "adamw", "sgd", "Muon"):  # Muon takes weights of two axes alone
            continue
        told = arguments.get(name, {})
        ours, theirs = twice()
        kind = getattr(torch.optim, name)
        rate = {} if name == "Adafactor" else {"lr": 0.01}
        _, got = trained(tmp_path / name, ours, data, optimizer={"name": name.lower(), **told}, lr=0.01, epochs=2)
        make = lambda weights, kind=kind, told=told, rate=rate: kind(weights, **told, **(rate or {"lr": 0.01}))  # noqa: E731
        assert equal(got, plain(theirs, batches(data, 2), make=make)), name
        made += 1
    assert made > 5


@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_accumulated_gradients(tmp_path, kind):
    """Three batches an update; of a DataLoader the last update has the two that are left."""
    data = own_parts.stripes(96 if kind == "tensors" else 128)
    ours, theirs = twice()
    given = data if kind == "tensors" else DataLoader(list(zip(*data, strict=True)), BATCH)
    made, got = trained(tmp_path, ours, given, accumulate=3, epochs=2)
    assert made.steps == (2 if kind == "tensors" else 3)
    torch.manual_seed(SEED)
    optimizer = adam(theirs.parameters())
    found = list(batches(data, 2)) if kind == "tensors" else 2 * list(given)
    each = len(found) // 2
    for epoch in (found[:each], found[each:]):
        for first in range(0, each, 3):
            some = epoch[first : first + 3]
            optimizer.zero_grad()
            for x, y in some:
                (cross_entropy(theirs(x), y) / len(some)).backward()
            optimizer.step()
    assert equal(got, [weight.detach() for weight in theirs.parameters()])


def test_accumulated_gradients_of_the_whole_loss(tmp_path):
    """The penalty of TRT counts once in an update."""
    data = own_parts.stripes(96)
    ours, theirs = twice()
    _, got = trained(tmp_path, ours, data, accumulate=3, epochs=2, loss={"name": "trt", "lam": 0.01}, clip=0.5)
    loss = TRTLoss(theirs, lam=0.01)
    optimizer = adam(theirs.parameters())
    found = list(batches(data, 2))
    for first in range(0, len(found), 3):
        optimizer.zero_grad()
        for x, y in found[first : first + 3]:
            (loss(theirs(x), y) / 3).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
    for one, two in zip(got, theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two.detach(), rtol=1e-3, atol=1e-5)


def test_groups_of_an_optimiser_go_each_from_its_own_rate(tmp_path):
    data = own_parts.stripes(96)
    ours, theirs = twice()

    def make(model):
        first, *rest = model.parameters()
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.01}], lr=0.0)

    made, got = trained(tmp_path, ours, data, optimizer=make(ours), schedule=SCHEDULES["step"][0])
    wanted = plain(theirs, batches(data), make=lambda _: make(theirs), scheduler=SCHEDULES["step"][2])
    assert equal(got, wanted) and made.settings.lr == 0.1


def test_samples_that_are_read_are_those_of_the_plain_loop(tmp_path):
    """A DataLoader over a Dataset whose samples are random: ours are seeded, so that a run can be taken up."""
    first = [batch[0] for batch in loader_of(tmp_path)]
    assert all(map(torch.equal, first, [batch[0] for batch in loader_of(tmp_path)]))


def loader_of(tmp_path):
    shuffled = torch.Generator().manual_seed(1)
    loader = DataLoader(Stripes(64), BATCH, shuffle=True, generator=shuffled)
    made = Trainer(Net(), (loader, loader), threads=1, device="cpu", epochs=1)
    plan = made.loader.draw(made.batches, made.batch_size, torch.Generator().manual_seed(0))
    return list(made.loader.batches(plan, 0, torch.Generator()))
