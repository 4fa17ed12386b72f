"""Text of the user, such as the name of a folder, is printed as it is: no markup, no traceback, on any terminal."""

from __future__ import annotations

import ast
import io
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from trtkern import backends, cli
from trtkern.commands import _common, _runs, app
from trtkern.output.console import console
from trtkern.training import progress, recipes, run

ROOT = Path(__file__).resolve().parent.parent
# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if backends.named("cpu").missing() is None else "reference"
FAST = ["--backend", BACKEND, "--threads", "1", "--device", "cpu"]
NAMES = ("[/x]", "[bold]", os.fsdecode(b"\xff"), ":smile:")


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ascii_output(monkeypatch) -> io.BytesIO:
    """Standard output as PYTHONIOENCODING=ascii makes it."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors="strict"))
    return written


def test_a_run_whose_names_are_markup_or_not_utf8(monkeypatch, no_pictures):
    """Recipe, run folder and files of that name: train, evaluate and resume, on a terminal that knows ASCII only."""
    text = (recipes.FOLDER / "digits.toml").read_text().replace('layers = [16, 32, "pool"]', "layers = [2]")
    for name in (NAMES[0], NAMES[2]):
        folder = f"runs-{os.fsencode(name).hex()}"
        os.mkdir(folder)
        os.chdir(folder)
        Path("[").mkdir()
        Path(f"{name}.toml").write_text(text)
        shown = name.encode("ascii", "backslashreplace")
        for arguments in (
            ["train", "--recipe", f"{name}.toml", "--epochs", "1", "-T", "1", "--run-dir", name, *FAST],
            ["evaluate", name],
        ):
            written = ascii_output(monkeypatch)
            assert cli.main(arguments) == 0
            assert shown in written.getvalue() and b"test accuracy" in written.getvalue()
        assert (Path(name) / run.REPORT).is_file()
        os.chdir("..")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [
        ["{}"],
        ["--{}"],
        ["train", "--{}"],
        ["train", "--data", "{}"],
        ["train", "--data", "fashion-mnist", "--data-dir", "{}"],
        ["train", "--recipe", "{}.toml"],
        ["train", "--recipe", "digits+{}"],
        ["train", "--set", "{}"],
        ["train", "--set", "model.layers={}"],
        ["train", "--resume", "{}"],
        ["train", "--device", "{}"],
        ["train", "--seeds", "{}"],
        ["train", "--epochs", "{}"],
        ["evaluate", "{}"],
        ["profile", "{}"],
        ["profile", "{}:x", "--input", "3"],
        ["profile", "--html", "{}/x/y.html"],
        ["bench", "--op", "{}"],
        ["bench", "--csv", "{}/x", "--peers", "{}"],
        ["inspect", "--target", "{}"],
        ["inspect", "--csv", "{}/x/y"],
    ],
)
def test_errors_show_the_user_s_text(name, arguments, capsys):
    assert cli.main([argument.format(name) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trtkern: ") and error.count("\n") == 1
    assert "--epochs" in arguments or name.encode("utf-8", "backslashreplace").decode() in error.replace("\\\\", "\\")


def test_there_is_one_console_and_its_tables_take_text_as_it_is(monkeypatch):
    """Every other way into rich reads markup: no file but one makes a Console, and a status gets a ``Text``."""
    for path in ROOT.glob("trtkern/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if "rich" in path.read_text() else ():
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                assert name not in ("from_markup", "render_markup"), path
                assert name != "Console" or path.name == "_common.py", path
                assert name != "status" or getattr(node.args[0].func, "id", "") == "Text", path
    written = ascii_output(monkeypatch)
    cli.main(["--version"])  # prepares the stream
    console().print(progress.facts("".join(NAMES), {"[/y]": "[/z] :smile:"}))
    sys.stdout.flush()
    assert all(part in written.getvalue() for part in (b"[/x][bold]\\udcff:smile:", b"[/y]", b"[/z] :smile:"))


def test_a_caret_stays_below_its_token_on_the_terminal(capsys):
    assert cli.main(["train", "--set", "model={name='topology', layers='FC-8_FD-3'}", *FAST]) == 2
    said, shown, caret = capsys.readouterr().err.splitlines()
    assert "token 2, column 6" in said and shown[caret.index("^") :] == "FD-3_L-10"
    assert _common.one_line(ValueError("a\n  b\n c")) == "a b c"


@pytest.mark.parametrize(
    "reason", [KeyboardInterrupt(), OSError(28, "No space left on device"), BrokenPipeError(32, "pipe")]
)
def test_ctrl_c_and_an_output_that_is_full_or_gone_are_one_line(capsys, monkeypatch, reason):
    def fails():
        raise reason

    app.command("fails")(fails)
    try:
        try:
            status = cli.main(["fails"])
        except SystemExit as exit_:  # click's answer to a broken pipe
            status = exit_.code
    finally:
        app.registered_commands.pop()
    error = capsys.readouterr().err
    assert status == (130 if isinstance(reason, KeyboardInterrupt) else 1)
    assert not error or re.fullmatch(r"\n?trtkern: .*\n", error)
