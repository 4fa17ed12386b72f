"""What is wrong with a user's network, data or callbacks is named, before any epoch where it can be."""

from __future__ import annotations

import re
from pathlib import Path

import own_parts
import pytest
import torch
from own_parts import BACKEND, Net, Stripes, stripes
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trtkern import cli, own
from trtkern.train import Callback, CallbackError, OwnError, Trainer
from trtkern.training import checkpoint, run
from trtkern.training.callbacks import Callbacks

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")
FAST = ["--device", "cpu", "--threads", "1", "--backend", BACKEND]


def made(model=Net, data=None, **options):
    data = (stripes(48), stripes(16, 1)) if data is None else data
    return Trainer(model, data, **{"threads": 1, "device": "cpu", **options})


# Networks


def raising(hidden=3):
    raise RuntimeError("no such width")


def number():
    return 3


def pair():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), None

    return Pair()


def batch_first():
    class First(Net):
        def forward(self, x):
            return super().forward(x).transpose(0, 1)

    return First(timesteps=3)


def averaged():
    class Mean(Net):
        def forward(self, x):
            return super().forward(x).mean(0)

    return Mean()


def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 4))


def few_classes():
    return Net(classes=3)


def remembers():
    class Extra(Net):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    return Extra()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            raising,
            r"model: expected .*raising to return, got RuntimeError: no such width \(test_own_errors.py, line \d+\)",
        ),
        (number, r"model: expected .*number to give a torch.nn.Module, got int"),
        (
            pair,
            r"model: expected .*pair to give logits \[T, B, C\] for .*\[1, 1, 8, 8\] torch.float32, got a tuple of 2",
        ),
        (
            batch_first,
            r"give logits \[T, B, C\] with B = 1 for .*, got \[1, 3, 4\]; keep the output of every step, with time",
        ),
        (
            averaged,
            r"give logits \[T, B, C\] with B = 1 for a batch of \[1, 1, 8, 8\] .*, got \[1, 4\]; keep the output",
        ),
        (narrow, r"model: expected .*narrow to take a batch of \[1, 1, 8, 8\] .*, got RuntimeError: mat1 and mat2"),
        (few_classes, r"expected labels of 0..2, for 3 classes, got 3 for sample 3"),
        (remembers, r"model: expected a state_dict of tensors, which a checkpoint can hold, got dict for _extra_state"),
        (3, r"model: expected a torch.nn.Module, a function that makes one, or a name, got int"),
        ("resnet91", r"model: expected one of conv, .*, got 'resnet91'"),
        (
            "own_parts:Nett",
            r"model: expected a name of the module own_parts, got 'Nett', which it has not; did you mean 'Net'",
        ),
        (
            "nowhere:Net",
            r"model: expected module:function in a module that can be imported from .*, got nowhere:Net \(no module",
        ),
        (
            "own_parts:CLASSES",
            r"model: expected own_parts:CLASSES to be a function or a class that makes a network, got list",
        ),
        (
            {"name": "own_parts:Net", "width": 3},
            r"expected the arguments of own_parts:Net, which takes classes.*width=3",
        ),
        ({"name": "object"}, r"model: expected the network of .*that a program gave, which no settings can make"),
        (nn.Flatten(), r"TRTLoss: expected parameters to regularise, got none"),
    ],
)  # fmt: skip
def test_networks(model, message):
    with pytest.raises((ValueError, TypeError), match=message):
        made(model)


def test_a_network_without_weights():
    class Still(nn.Module):
        def forward(self, x):
            return x.flatten(1)[None, :, :4]

    with pytest.raises(ValueError, match="optimizer: expected a network with weights that can be trained, got none"):
        made(Still(), loss="sdt")


def test_a_module_that_fails_when_it_is_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken_for_a_test.py").write_text("import torch\n\nx = 1 / 0\n")
    Path("lacking_for_a_test.py").write_text("import nothing_of_that_name\n")
    for place, said in (
        ("broken", "ZeroDivisionError: division by zero (broken_for_a_test.py, line 3)"),
        ("lacking", "ModuleNotFoundError: No module named 'nothing_of_that_name' (lacking_for_a_test.py, line 1)"),
    ):
        assert cli.main(["train", "--model", f"{place}_for_a_test:net", "--run-dir", "a", *FAST]) == 2
        error = capsys.readouterr().err
        assert f"expected the module {place}_for_a_test to be imported, got {said}" in error and error.count("\n") == 1
        assert not Path("a").exists()


# Data


class Sized(Dataset):
    """Items that a test says, by place."""

    def __init__(self, item, count=24):
        self.item, self.count = item, count

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        return self.item(place)


class Endless(IterableDataset):
    def __iter__(self):
        yield from Stripes()


class Lengthless(Dataset):
    def __getitem__(self, place):
        return torch.zeros(1, 8, 8), 0


def image(*shape, dtype=torch.float32):
    return torch.zeros(*(shape or (1, 8, 8)), dtype=dtype)


IMAGES, LABELS = stripes(48)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Endless(), "data: expected a data set with __len__ and __getitem__, got Endless, which has no length"),
        (DataLoader(Endless()), "expected a data set with __len__ and __getitem__, got Endless, which has no length"),
        (Lengthless(), "data: expected a data set with __len__ and __getitem__, got Lengthless, which has no length"),
        (Sized(lambda place: (image(), 0), 0), "data: expected samples in Sized, got none"),
        (Sized(lambda place: 1 / 0), "expected Sized to give sample 0, got ZeroDivisionError: division by zero"),
        (Sized(lambda place: {"x": image(), "y": 0}), r"a sample as a pair \(input, target\), got a dict of x, y"),
        (Sized(lambda place: (image(), 0, 0)), r"expected a sample as a pair \(input, target\), got list of 3"),
        (Sized(lambda place: (image(), "cat")), "a sample with a real target, which becomes a tensor .*, got tuple"),
        (Sized(lambda place: (object(), 0)), "expected the samples 0 of Sized to become a batch, got TypeError"),
        (
            Sized(lambda place: (image(), torch.tensor(1, dtype=torch.int32))),
            "expected int64 labels, .* got torch.int32",
        ),
        (
            (IMAGES, LABELS.int()),
            "expected int64 labels, or soft labels or numbers .*, got torch.int32; make labels .long",
        ),
        ((IMAGES, LABELS[:40]), "train split: expected a target for each of 48 samples, got 40"),
        (((IMAGES, LABELS + 1), (IMAGES, LABELS)), "expected labels of 0..3, for 4 classes, got 4 for sample 3"),
        ((IMAGES, LABELS - 1), "expected labels of 0 and above, got -1 for sample 0"),
        ((IMAGES[:, :, :0], LABELS), r"expected samples \[N, ...\] with no empty axis, got \[48, 1, 0, 8\]"),
        (
            ((IMAGES, LABELS), (IMAGES[..., :7], LABELS)),
            r"test split: expected samples of \[1, 8, 8\] torch.float32 as in",
        ),
        (((IMAGES, LABELS), (IMAGES.double(), LABELS)), "test split: expected samples of .* got .* torch.float64"),
        ([IMAGES, LABELS, IMAGES], r"data: expected a pair of tensors or \(train, test\), got 3 things"),
        (IMAGES, "data: expected a pair of tensors .samples, targets., a torch Dataset, a DataLoader, .*, got Tensor"),
        (DataLoader(Stripes(32)), r"data: expected \(train, test\) of DataLoaders, got one alone"),
        ("own_parts:gone", "data: expected a name of the module own_parts, got 'gone'"),
        (
            "digitts",
            "--data: expected one of digits, .*, folder:DIR or tar:DIR, got 'digitts'; did you mean 'digits'",
        ),
        ("folder:nowhere", "data: expected folder:DIR with a folder of files for each class, got no folder .*nowhere"),
        ("object:it", "data: expected the data that a program gave, which no settings can make"),
    ],
)  # fmt: skip
def test_data(data, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        made(data=data, loss="sdt")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            lambda place: (image(1, 8, 8 + (place == 3)), 0),
            r"samples of one shape of Sized, got \(1, 8, 8\), \(1, 8, 9\)",
        ),
        (lambda place: (image(1, 8, 8 + (place > 0)), 0), "expected samples of one shape"),
        (
            lambda place: (image(dtype=torch.float64 if place == 5 else torch.float32), 0),
            "samples of one dtype|one dtype",
        ),
        (lambda place: (image(), 0 if place != 7 else 9), r"labels in \[0, 4\), got labels from 0 to 9"),
        (lambda place: (image(), 0) if place != 9 else 1 / 0, "expected Sized to give sample 9, got ZeroDivisionError"),
    ],
)  # fmt: skip
def test_samples_that_are_met_on_the_way(item, message, tmp_path):
    """What only reading shows: the error has the sample; out of a worker too."""
    data = (Sized(item), Sized(lambda place: (image(), 0), 8))
    for workers in (0, 1) if "dtype" in message else (0,):
        with pytest.raises((ValueError, TypeError), match=message):
            made(data=data, loss="sdt", batch_size=8, workers=workers, select="last").fit(tmp_path / "a", show=False)


def test_what_collate_gives():
    data = Sized(lambda place: (image(), 0)), Sized(lambda place: (image(), 0), 8)
    for collate, message in (
        (lambda items: torch.zeros(3), r"expected what collate gives as a pair \(input, target\), got Tensor"),
        (lambda items: (image(2, 1, 8, 8), torch.zeros(3).long()), "as many inputs as targets in a batch, got 2 and 3"),
        (lambda items: 1 / 0, "samples 0 of Sized to become a batch, got ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=message):
            made(data=data, collate=collate)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "cosinus"},
            r"schedule.name: expected one of cosine, constant, step, .* or module:function, got 'cosinus'; did",
        ),
        ({"schedule": {"name": "step", "step": 3}}, "schedule: step: expected one of step_size, gamma, got 'step'"),
        ({"schedule": {"name": "step", "step_size": 0}}, "schedule.step_size: expected a number of epochs .*, got 0"),
        ({"schedule": "multi-step"}, "schedule.milestones: expected the epochs after which the rate falls, got none"),
        (
            {"schedule": "one-cycle", "warmup": 0.1},
            "warmup: expected 0 with one-cycle, whose rise is pct_start, got 0.1",
        ),
        ({"schedule": lambda step, steps: -1.0}, "schedule: expected .*lambda> to give a finite number of at least 0"),
        ({"schedule": lambda step: 1.0}, "schedule: expected .*lambda> to return for step .*, got TypeError"),
        ({"schedule": 3}, "schedule: expected a name, a table with a name, or a function, got int"),
        (
            {"optimizer": "rmsprob"},
            r"optimizer.name: expected one of adam, adamw, sgd, .*got 'rmsprob'; did you mean 'RMSprop'",
        ),
        ({"optimizer": "LBFGS"}, "optimizer.name: expected one of adam, .*, got 'LBFGS'"),
        (
            {"optimizer": {"name": "adam", "beta": 1}},
            "optimizer: adam: expected one of betas, .*, got 'beta'; did you mean",
        ),
        (
            {"optimizer": {"name": "RMSprop", "alpha": -1.0}},
            "optimizer: RMSprop: expected arguments that it takes, .*alpha",
        ),
        ({"optimizer": {"name": "Adagrad", "lr_decay": "x"}}, "optimizer: Adagrad: expected arguments that it takes"),
        ({"optimizer": lambda weights: 3}, "optimizer: expected .*lambda> to give a torch.optim.Optimizer, got int"),
        ({"optimizer": lambda weights: 1 / 0}, "optimizer: expected .*lambda> to make one of the weights, got ZeroDiv"),
        (
            {"optimizer": torch.optim.SGD(Net().parameters(), lr=1.0)},
            "optimizer: expected one of the weights of this network",
        ),
        ({"loss": "ttr"}, "--loss: expected one of trt, tet, sdt, mse, or module:function, got 'ttr'"),
        (
            {"loss": lambda logits, target: logits},
            r"loss: expected .*lambda> to give a 0-dim tensor .*, got torch.float32 \[4, 1",
        ),
        (
            {"loss": lambda logits, target: 1 / 0},
            r"loss: expected .*lambda> to return for logits .*, got ZeroDivisionError",
        ),
        ({"loss": "mse"}, r"mse: expected a target of a floating dtype, got torch.int64"),
        ({"loss": {"name": "mse", "over": "first"}}, "loss.over: expected one of mean, steps, last, got 'first'"),
        (
            {"loss": "mse", "label_smoothing": 0.1},
            "label_smoothing: expected it with a loss of classes, got it with --loss mse",
        ),
        ({"mix": "mixupp"}, "mix.name: expected one of mixup, cutmix, got 'mixupp'"),
        ({"mix": {"name": "mixup", "alpha": 0}}, "mix.alpha: expected a finite number above 0, got 0"),
        ({"accumulate": 40}, "accumulate: expected at most 21, the batches of an epoch, got 40"),
        ({"accumulate": 0}, "accumulate: expected an integer of at least 1, got 0"),
        ({"augment": lambda images, generator: images[0]}, None),
        ({"augment": 3}, r"augment: expected a list of changes, or a function of \(batch, generator\), got int"),
        ({"augment": ["own_parts:gone"]}, "augment: expected a name of the module own_parts, got 'gone'"),
        ({"callbacks": [3]}, "callbacks: expected objects with some of the methods start, step, epoch, end, got int"),
        ({"callbacks": [own_parts.Impatient]}, "got the class Impatient; make an object of it"),
        ({"callbacks": own_parts.Impatient(1, 1)}, "callbacks: expected a list of objects, got Impatient"),
        ({"batchsize": 3}, "Trainer: expected one of model, .*, got 'batchsize'; did you mean 'batch_size'"),
        ({"lr": "fast"}, "--lr: expected float, got 'fast'"),
        ({"classes": 3}, "train split: expected labels of 0..2, for 3 classes, got 3 for sample 3"),
        (
            {"classes": 5, "model": few_classes},
            r"expected logits \[T, B, 5\] for the 5 classes of the data, got \[2, 1, 3\]",
        ),
        ({"classes": "cats"}, "data: expected classes as a number of at least 1 or a list of names, got 'cats'"),
        (
            {"model_options": {"classes": 4}, "model": Net()},
            "model_options: expected a function that makes the network",
        ),
        (
            {"data_options": {"count": 4}},
            "data_options: expected it with data of your own|data_options: expected a function",
        ),
    ],
)  # fmt: skip
def test_options(options, message, tmp_path):
    options = {"batch_size": 2, **options}
    if message is None:  # what only a batch shows
        with pytest.raises(OwnError, match=r"augment: expected .* to give images \[2, 1, 8, 8\], got \[1, 8, 8\]"):
            made(**options).fit(tmp_path / "a", show=False)
        return
    with pytest.raises((ValueError, TypeError), match=message):
        made(**options)


def test_a_callback_that_raises_is_named_and_the_checkpoints_stay(tmp_path, capsys):
    class Broken:
        def __init__(self, event):
            self.event = event

        def step(self, trainer, epoch, step, loss):
            if self.event == "step" and (epoch, step) == (2, 2):
                raise KeyError("gone")

        def epoch(self, trainer, row):
            row["mine"] = {1, 2} if self.event == "row" else 1
            if self.event == "epoch" and row["epoch"] == 2:
                raise OSError("full")

        def end(self, trainer, result):
            if self.event == "end":
                raise ValueError("late")

    said = {
        "step": r"callback: expected .*Broken.step to return, got KeyError: 'gone' \(test_own_errors.py, line \d+\)",
        "epoch": r"callback: expected .*Broken.epoch to return, got OSError: full \(test_own_errors.py, line \d+\)",
        "row": "callback: expected what epoch adds to the row to be of JSON's types, got .* set is not JSON",
        "end": "callback: expected .*Broken.end to return, got ValueError: late",
    }
    whole = made(batch_size=16, epochs=3).fit(tmp_path / "whole", show=False)
    for event, message in said.items():
        torch.manual_seed(0)
        with pytest.raises(CallbackError, match=message):
            made(batch_size=16, epochs=3, callbacks=[Broken(event)]).fit(tmp_path / event, show=False)
        kept = {"step": 1, "epoch": 2, "row": 1, "end": 3}[event]
        assert checkpoint.load(tmp_path / event).metadata["epoch"] == kept
        assert len(run.read_metrics(tmp_path / event)) == kept
        again = made(batch_size=16, epochs=3).fit(tmp_path / event, show=False)
        assert [row["train"] for row in again.rows] == [row["train"] for row in whole.rows]


def test_numbers_that_are_not_finite_are_named(tmp_path):
    class Exploding(Net):
        def forward(self, x):
            return super().forward(x) * (float("inf") if self.training else 1.0)

    with pytest.raises(RuntimeError, match="got NaN or Inf in epoch 1, step 1"):
        made(Exploding(), batch_size=16).fit(tmp_path / "a", show=False)


def test_the_command_line_says_it_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for options, message in (
        (["--data", "own_parts:data"], "--model: expected a network beside --data own_parts:data, which has no recipe"),
        (
            ["--data", "own_parts:data", "--model", "own_parts:gone"],
            "expected a name of the module own_parts, got 'gone'",
        ),
        (["--model", "own_parts:network", "--data", "own_parts:CLASSES"], "data: expected a pair of tensors"),
        (
            ["--model", "own_parts:network", "--loss", "own_parts:margin", "--lam", "1"],
            "--lam: expected with a loss of trtkern",
        ),
        (["--recipe", "own", "--data", "own_parts:data"], "--recipe: expected one of cifar10, .*, got 'own'"),
        (["--set", "data_options.count=3"], "data_options: expected it with data of your own"),
        (["--model", "own_parts:network"], "expected labels|expected own_parts:network to give logits"),
        (["--set", "schedule.name=cosinus"], "got 'cosinus'; did you mean 'cosine'?"),
        (["--set", "optimizer.name=Adem"], "got 'Adem'; did you mean 'adam'?"),
    ):  # fmt: skip
        assert cli.main(["train", "--run-dir", "a", *options, *FAST]) == 2, options
        error = capsys.readouterr().err
        assert re.search(message, error) or message in error, error
        assert error.count("\n") == 1 and not Path("a").exists()


def test_a_trainer_trains_once(tmp_path):
    trainer = made(batch_size=16, epochs=1)
    trainer.fit(tmp_path / "a", show=False)
    with pytest.raises(
        RuntimeError, match="fit: expected a new Trainer for a new run, got one that has trained already"
    ):
        trainer.fit(tmp_path / "b", show=False)
    assert not (tmp_path / "b").exists()


def test_a_callback_whose_methods_nobody_calls():
    class Misspelt(Callback):
        def on_epoch(self, trainer, row): ...

    with pytest.raises(TypeError, match=r"Misspelt to have some of the methods .*, got on_epoch, which"):
        Callbacks([Misspelt()])


def test_what_an_installed_library_raises_is_told_by_the_line_that_called_it():
    with pytest.raises(RuntimeError) as raised:
        torch.nn.Linear(3, 2)(torch.ones(5))
    assert f"({Path(__file__).name}, line " in str(own.failed(raised.value, "expected this"))
