"""Recipes: every one builds what it says, a control changes its part, and what is wrong is named."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from trtkern import cli, nn
from trtkern.backends import named
from trtkern.models._blocks import neuron_of
from trtkern.models.build import _options as options_of
from trtkern.names import NEURONS
from trtkern.nn import PLIF
from trtkern.nn._neuron import Spiking
from trtkern.training import checkpoint, recipes, run, seeds, settings
from trtkern.training.build import build_loss, build_model

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"


def resolve(recipe, *changes, **options):
    return settings.resolve(recipe=recipe, changes=changes, backend=BACKEND, device="cpu", threads=1, **options)


def test_the_paper_s_settings():
    plan = resolve("cifar10")
    assert (plan.timesteps, plan.epochs, plan.batch_size, plan.lr, plan.warmup) == (6, 300, 64, 1e-3, 0.0)
    assert plan.loss_options == {"lam": 1e-5, "delta": 0.25, "eta": 0.05, "exclude": []}
    assert [step["name"] for step in plan.augment] == ["crop", "flip", "cutout"]


def test_controls():
    def loss(control):
        plan = resolve(f"cifar10+{control}")
        return plan.loss, plan.loss_options

    full = {"lam": 1e-5, "delta": 0.25, "eta": 0.05, "exclude": []}
    assert loss("sdt") == ("sdt", {}) and loss("tet") == ("tet", {"lam": 0.05})
    assert loss("tet-mse") == ("trt", {**full, "lam": 0.0}) and loss("l2") == ("trt", {**full, "delta": 0.0})
    assert loss("trt-narrow") == ("trt", {**full, "exclude": ["norm", "classifier"]})
    assert set(recipes.controls()) == {"sdt", "tet", "tet-mse", "l2", "trt-narrow"}
    plan = resolve("digits+trt-narrow")
    model = build_model(plan, (1, 8, 8), 10)
    chosen = [name for name, _ in build_loss(plan, model).regularized()]
    assert chosen == ["layers.0.conv.weight", "layers.1.conv.weight"]


def test_changes_and_options_go_over_the_recipe(tmp_path):
    plan = resolve("digits", "lr=1e-2", "loss.eta=0.5", "model.layers=[8, 'pool']", "augment=[{name='flip', p=1.0}]")
    assert (plan.lr, plan.loss_options["eta"], plan.model["layers"]) == (1e-2, 0.5, [8, "pool"])
    assert plan.augment == [{"name": "flip", "p": 1.0}]
    assert resolve("digits", "lr=1e-2", lr=1e-4).lr == 1e-4
    assert resolve("digits", "loss.name=tet").loss_options == {"lam": 0.05}
    assert resolve("cifar10", loss="tet").loss_options == {"lam": 0.05}
    own = tmp_path / "own.toml"
    own.write_text((recipes.FOLDER / "digits.toml").read_text().replace("epochs = 15", "epochs = 7"))
    assert resolve(f"{own}+l2").epochs == 7


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (
            "cifar",
            (),
            "--recipe: expected one of cifar10, cifar100, digits, .*, or a .toml file, got 'cifar'",
        ),
        ("digits+l1", (), r"--recipe: expected one of l2, .* after a '\+', got 'l1'"),
        ("cifar1O", (), "got 'cifar1O'; did you mean 'cifar10'"),
        ("", (), "--recipe: expected one of cifar10, .*, got ''"),
        ("digits+tet-mes", (), "got 'tet-mes'; did you mean 'tet-mse'"),
        ("digits", ("lrr=1",), "got 'lrr'; did you mean 'lr'"),
        (
            "digits",
            ("loss.name=ttr",),
            "--loss: expected one of trt, tet, sdt, mse, or module:function, got 'ttr'; did you mean 'trt'",
        ),
        ("digits", ("augment=[{name='flpi'}]",), "got 'flpi'; did you mean 'flip'"),
        ("digits", ("lr",), "--set: expected key=value, got 'lr'"),
        ("digits", ("learning_rate=1",), "--set: expected one of data, .*, got 'learning_rate'"),
        ("digits", ("epochs=many",), "--set: expected epochs as int, got 'many'"),
        (
            "digits",
            ("loss.beta=1",),
            "loss trt: expected one of lam, delta, eta, exclude, got 'beta'; did you mean 'eta'",
        ),
        ("digits", ("loss.lam=-1",), "--lam: expected a finite number of at least 0, got -1"),
        ("digits", ("warmup=2.0",), "warmup: expected a number of 0 to 1, got 2.0"),
        ("digits", ("augment=[{name='mixup'}]",), "augment: expected one of crop, .*, got 'mixup'"),
    ],
)
def test_what_is_wrong_is_named(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(recipe, *changes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("model={name='resnet'}", ValueError, "model: expected one of conv, .*, got 'resnet'"),
        ("model={name='vggsnn', layers=[8]}", TypeError, "layers"),
        ("model.decya=0.5", TypeError, "got 'decya'; did you mean 'decay'"),
        ("model.depth=3", TypeError, "model: conv: expected one of layers, .*, got 'depth'"),
    ],
)
def test_a_model_that_is_wrong_is_named(change, error, message):
    with pytest.raises(error, match=message):
        build_model(resolve("digits", change), (1, 8, 8), 10)


def test_a_neuron_by_its_name():
    """It starts from its own settings: those of the recipe that only another neuron takes go, the others stay."""
    model = build_model(resolve("cifar10", "model.neuron=PLIF", "model.init_tau=4.0", "model.width=2"), (3, 8, 8), 10)
    neurons = [layer for layer in model.modules() if isinstance(layer, PLIF)]
    assert neurons and all(float(layer.decay) == pytest.approx(0.75) for layer in neurons)
    plan = resolve("digits", "model.decay=0.9", "model.v_threshold=0.7", "model.neuron=IF")
    assert plan.model == {"name": "conv", "layers": [16, 32, "pool"], "v_threshold": 0.7, "neuron": "IF"}
    assert resolve("cifar10", "model.neuron=LIF").model["decay"] == 0.5
    shared = inspect.signature(Spiking).parameters
    for name, own in NEURONS.items():  # the names that recipes know before torch is loaded are those of the classes
        taken = inspect.signature(neuron_of(name)).parameters.values()
        assert {*own} == {each.name for each in taken if each.kind is not each.VAR_KEYWORD} - {*shared}
        assert {*own} <= {*options_of("conv", neuron_of(name))}
        getattr(nn, name)(**{key: 2.0 if key == "init_tau" else 1 for key in own if key != "decay_input"})
    for wrong in ("PLIFF", "plif", 3):
        with pytest.raises(ValueError, match=r"model\.neuron: expected one of LIF, IF, PLIF, CUBALIF, .*, got"):
            resolve("digits", f"model.neuron={wrong}")
    with pytest.raises(
        ValueError,
        match=r"neuron: expected one of LIF, IF, PLIF, .*, a class .*, or module:NAME .*; did you mean 'PLIF'",
    ):
        neuron_of("PLIFF")


def test_a_topology_in_a_recipe_gets_its_readout_and_says_so():
    def built(layers):
        change = f"model={{name='topology', layers='{layers}'}}"
        return build_model(resolve("digits", change), (1, 8, 8), 10)

    for layers in ("CONVAP-4-3-1-1_FC-8", "CONVAP-4-3-1-1_FC-8_L-10"):
        assert built(layers).topology == "CONVAP-4-3-1-1_FC-8_L-10"
    said = (
        r"token 2, column 16: expected .*, got 'CONVA'; did you mean 'CONVAP'\?; _L-10 is the readout, which is added"
    )
    for layers, message, place in (
        ("CONVAP-4-3-1-1_CONVA-8-3-1-1", said, "CONVA-8-3-1-1_L-10"),
        ("FC-8_L-5", "token 2, column 6: expected L-10, a readout of the 10 classes of the data, or none", "L-5"),
        ("L-10_FC-8", "token 1, column 1: expected L-n as the last token only", "L-10_FC-8_L-10"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            built(layers)
        _, shown, caret = str(caught.value).splitlines()
        assert shown[caret.index("^") :] == place
    with pytest.raises(TypeError, match=r"expected layers as a string .*, got \[16, 32, 'pool'\]; a list of channels"):
        build_model(resolve("digits", "model={name='topology', layers=[16, 32, 'pool']}"), (1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"ConvSNN: expected layers as a list .* model\.name = \"topology\""):
        build_model(resolve("digits", "model.layers=CONVAP-4-3-1-1"), (1, 8, 8), 10)


def test_files_that_are_wrong_are_named(tmp_path):
    path = tmp_path / "own.toml"
    for text, message in (
        ("lr = ", "expected a TOML file, got .*own.toml"),
        (f"lr = {'[' * 5000}", "expected a TOML file, got .*own.toml"),
        ("speed = 1", "expected one of data, .*, got 'speed'"),
        ("lr = 1", r"expected data, model in .*own.toml, got lr"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            recipes.load(str(path))
    for gone in (str(tmp_path / "gone.toml"), f"{tmp_path}.toml"):
        with pytest.raises(ValueError, match=r"expected a TOML file, got .*\.toml"):
            recipes.load(gone)
    path.write_text("data='digits'\nmodel={layers=[8]}\nloss={}\ntimesteps=2\nepochs=1\nbatch_size=8\nlr=1")
    with pytest.raises(ValueError, match=r"expected name in \[model\] of .*own.toml, got layers"):
        recipes.load(str(path))


def test_several_seeds(tmp_path, capsys, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    options = ["--seeds", "3,5", "--epochs", "1", "-T", "2", "--set", "model.layers=[4,'pool']", "--run-dir", "both"]
    options += ["--device", "cpu", "--backend", BACKEND, "--threads", "1"]
    assert cli.main(["train", *options]) == 0
    out = capsys.readouterr().out
    summary = json.loads(Path("both", seeds.SUMMARY).read_text())
    tests = [run.read_result(Path("both", f"seed{seed}"))["test"]["accuracy"] for seed in (3, 5)]
    assert [row["test"] for row in summary["seeds"].values()] == tests
    assert summary["mean"]["test"] == pytest.approx(sum(tests) / 2)
    assert summary["sd"]["test"] == pytest.approx(abs(tests[0] - tests[1]) / 2**0.5)
    assert f"{100 * summary['mean']['gap']:.2f} ± {100 * summary['sd']['gap']:.2f}" in out
    # Again: what was lost is made again, to the same numbers; what is done stays.
    before = [path.stat().st_mtime_ns for path in checkpoint.found(Path("both", "seed3"))]
    for path in checkpoint.found(Path("both", "seed5")):
        path.unlink()
    assert cli.main(["train", *options]) == 0
    assert json.loads(Path("both", seeds.SUMMARY).read_text()) == summary
    assert [path.stat().st_mtime_ns for path in checkpoint.found(Path("both", "seed3"))] == before
    capsys.readouterr()
    assert cli.main(["train", *options, "--lr", "1"]) == 2
    assert "--seeds: expected a run of these settings in both/seed3, got others" in capsys.readouterr().err
    for wrong in ("0,0", "one", "1,", "-1"):
        assert cli.main(["train", f"--seeds={wrong}"]) == 2
        assert "--seeds: expected different integers" in capsys.readouterr().err
