"""One table of options: the command line, recipes, plans, settings and --resume follow from it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
from typer.main import get_command

from trtkern import cli
from trtkern.commands import app, train
from trtkern.training import options, plan, recipes
from trtkern.training.options import CALL, COMMAND, OPTIONS, RECIPE, RESUME, Range
from trtkern.training.settings import Settings

RANGED = [name for name, option in OPTIONS.items() if option.range is not None]
CHOSEN = [name for name, option in OPTIONS.items() if option.choices is not None and not option.table]


def test_the_command_line_is_the_table():
    params = {param.name: param for param in get_command(app).commands["train"].params}
    wanted = {name: option for name, option in {**OPTIONS, **CALL}.items() if COMMAND in option.where}
    assert params.keys() == wanted.keys() and len(wanted) == len(options.of_command())
    for name, option in wanted.items():
        assert tuple(params[name].opts) == option.flags and not params[name].required
        assert params[name].help and "{" not in params[name].help
        assert all(choice in params[name].help for choice in option.choices or ())


def test_recipes_settings_and_resume_are_the_table():
    assert [field.name for field in dataclasses.fields(Settings)] == list(OPTIONS)
    assert plan.make().keys() == OPTIONS.keys()
    kinds = {
        "data": str, "data_options": dict, "time_first": bool, "mix": dict, "accumulate": int, "schedule": dict,
        "timesteps": int, "epochs": int, "batch_size": int, "lr": float, "warmup": float, "threads": int,
        "amp": str, "train_images": int, "augment": list, "model": dict, "loss": dict, "optimizer": dict, "clip": float,
        "label_smoothing": float, "select": str, "validation": float, "workers": int, "dvs_resize": str,
        "compile": bool, "exact_convolutions": bool, "cuda_graphs": bool, "parallel": str, "sync_norm": bool,
        "memory": str,
    }  # fmt: skip
    assert kinds == recipes.KEYS
    free = {"data_dir", "workers", "device", "threads", "epochs", "parallel", "timeout"}
    assert set(options.FREE) == free
    assert options.LOSS == ("lam", "delta", "eta")


@pytest.mark.parametrize("name", RANGED)
def test_what_is_out_of_range_is_refused_by_the_name_that_a_user_says(name):
    option = OPTIONS[name]
    wrong = {int: -1, str: "nan"}.get(option.kind, float("nan"))
    said = re.escape(f"{option.spoken}: expected {option.range.words}, got {wrong}")
    with pytest.raises(ValueError, match=f"^{said}"):
        plan.checked({**plan.make(), name: wrong, "observe": "fisher"})
    assert option.default is None or option.default is ... or option.range.holds(option.default)


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_no_choice_is_refused(name):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')}: expected one of .*, got 'nobody'"):
        plan.checked({**plan.make(), name: "nobody"})


@pytest.mark.parametrize("name", OPTIONS)
def test_another_type_is_refused(name):
    wrong = 3 if OPTIONS[name].kind in (str, bool) else "three"
    with pytest.raises(ValueError, match=rf"^{OPTIONS[name].spoken}: expected {OPTIONS[name].kind.__name__}, got "):
        plan.checked({**plan.make(), name: wrong})


def test_a_new_option_is_a_row(monkeypatch, capsys):
    """On the command line, in recipes, checked, and beside --resume."""
    momentum = options.Option(
        "momentum", float, "Share of the last step.", where=COMMAND | RECIPE | RESUME, default=0.5,
        shown="that of the recipe, else 0.5", range=Range("a share", lambda value: 0 <= value < 1),
    )  # fmt: skip
    monkeypatch.setitem(OPTIONS, "momentum", momentum)
    monkeypatch.setitem(recipes.KEYS, "momentum", float)
    monkeypatch.setattr(plan, "SAID", (*plan.SAID, "momentum"))
    assert plan.make()["momentum"] == 0.5 and plan.make(changes=["momentum=0.25"])["momentum"] == 0.25
    assert plan.make(changes=["momentum=0.25"], momentum=0.125)["momentum"] == 0.125
    with pytest.raises(ValueError, match=r"--momentum: expected a share, got 2\.0"):
        plan.make(momentum=2)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(train.train, "__signature__", train._signature())
    assert cli.main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--momentum" in said and "Share of the last step." in said and "else 0.5" in said


def test_help_and_errors_need_no_torch():
    code = (
        "import sys; from trtkern import cli; assert cli.main(['train', '--help']) == 0;"
        "assert cli.main(['train', '--lr', '-1']) == 2; assert cli.main(['train', '--set', 'clip=0']) == 2;"
        "assert not {'torch', 'numpy', 'triton'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "trtkern: --lr: expected a finite number above 0, got -1.0",
        "trtkern: --set clip: expected a finite number above 0, got 0.0",
    ]
