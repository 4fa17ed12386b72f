"""The instruction sets of the cpu backend agree bit for bit, streaming or not; TRTKERN_CPU_ISA chooses one."""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trtkern import LIFSpec, backends, cli, dialect, lif, neurons, selftest, surrogates
from trtkern.backends import _args, cpu
from trtkern.backends.base import RegularizerSpec
from trtkern.neurons import CENTERS
from trtkern.nn import PLIF, BatchNormLIF
from trtkern.ops.lif import neuron, wanted
from trtkern.ops.regularizer import regularizer

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=f"cpu: {cpu.missing()}")


@pytest.fixture
def extension():
    module = import_module("trtkern._cpu")
    yield module
    module.use_isa("")
    module.stream_from(4 << 20)


def isas(extension, dtype):
    return [name for name in extension.isas() if name != "wide" or dtype == torch.float32]


def results(shape, dtype, surrogate, reset, learnable):
    """Everything that a LIF call and its backward pass make."""
    torch.manual_seed(1)
    x = (torch.randn(shape) + 0.4).to(dtype).requires_grad_()
    decay = torch.linspace(0.2, 0.9, shape[2]).requires_grad_() if learnable else 0.6
    v0 = torch.randn(shape[1:]).requires_grad_()
    output = lif(x, v0, decay=decay, spec=LIFSpec(reset, surrogate), backend="cpu", return_state=True, return_v=True)
    out = [output.spikes, output.state, output.v]
    grads = [torch.randn(t.shape).to(t.dtype) for t in out]
    inputs = [x, v0, *([decay] if learnable else [])]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, inputs, grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 1, 3, 7), (1, 1, 1, 1), (18, 1, 5, 41), (5, 2, 3, 1009), (4, 1, 8, 64)], ids=str)
def test_all_agree_bitwise(extension, dtype, shape):
    names = isas(extension, dtype)
    assert len(names) >= 2 or os.uname().machine != "x86_64"
    choices = zip(surrogates.BUILTIN, itertools.cycle(("hard", "soft", "none")), itertools.cycle((True, False)))
    for surrogate, reset, learnable in choices:
        want = None
        for name in names:
            for threshold in (1, 4 << 20):  # bytes from which outputs are streamed past the caches
                extension.use_isa(name)
                extension.stream_from(threshold)
                got = results(shape, dtype, surrogate, reset, learnable)
                if want is None:
                    want = got
                for a, b in zip(got, want, strict=True):
                    assert torch.equal(a, b), (name, threshold, surrogate, reset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 2, 5, 7, 6), (3, 2, 3, 36, 40), (18, 1, 4, 4, 34), (5, 3, 70, 2, 2), (2, 40, 96, 1, 1)], ids=str
)
def test_batch_norm_lif_agrees_bitwise(extension, dtype, shape):
    cases = itertools.product((False, True), (torch.contiguous_format, torch.channels_last), (1, 2), (False, True))
    # Every third of them, which divides no axis.
    for i, (residual, layout, pool, learn) in itertools.islice(enumerate(cases), shape[0] % 3, None, 3):
        if pool > 1 and (shape[3] % 2 or shape[4] % 2):
            continue
        surrogate = surrogates.BUILTIN[i % len(surrogates.BUILTIN)]
        want = None
        for name, threshold in itertools.product(isas(extension, dtype), (1, 4 << 20)):
            extension.use_isa(name)
            extension.stream_from(threshold)
            torch.manual_seed(i)
            options = {"neuron": PLIF, "channels": shape[2]} if learn else {"v_reset": None if i % 2 else 0.0}
            layer = BatchNormLIF(shape[2], pool=pool, surrogate=surrogate, backend="cpu", **options)
            x, r = (
                torch.randn(shape)
                .flatten(0, 1)
                .to(dtype, memory_format=layout)
                .unflatten(0, shape[:2])
                .requires_grad_()
                for _ in range(2)
            )
            s = layer(x, r if residual else None)
            inputs = [x, *layer.parameters(), *([r] if residual else [])]
            got = [s.detach(), *layer.buffers(), *torch.autograd.grad(s, inputs, torch.randn(s.shape).to(s.dtype))]
            want = want or got
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b), (name, threshold, residual, layout, pool, learn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in neurons.TABLE if name != "LIF"])
def test_the_other_neurons_agree_bitwise(extension, dtype, name):
    row = neurons.lookup(name)
    for shape, (reset, learn) in zip(
        ((18, 1, 3, 7), (4, 2, 3, 1009), (9, 1, 8, 64)), itertools.product(row.settle, (True, False)), strict=False
    ):
        want = None
        for isa, threshold in itertools.product(isas(extension, dtype), (1, 4 << 20)):
            extension.use_isa(isa)
            extension.stream_from(threshold)
            torch.manual_seed(1)
            x = (torch.randn(shape) + 0.4).to(dtype).requires_grad_()
            held = {each: torch.full((shape[2],), CENTERS[each]).requires_grad_() for each in row.params}
            values = held if learn else {each: CENTERS[each] for each in row.params}
            out = neuron(x, None, values, LIFSpec(reset, "atan", neuron=name), wanted(True, learn, True, False), "cpu")
            made = [t for t in (out.spikes, out.v, out.state) if t is not None]
            grads = [torch.randn(t.shape).to(t.dtype) for t in made]
            inputs = [x, *(held.values() if learn else [])]
            got = [*(t.detach() for t in made), *torch.autograd.grad(made, inputs, grads, materialize_grads=True)]
            want = want or got
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b), (isa, threshold, shape, reset, learn)


def off_by(t, elements):
    """The same numbers at an address that is so many elements from alignment."""
    return torch.cat([t.new_zeros(elements), t.flatten()])[elements:].view(t.shape)


def first_steps(x, gs, v0, steps, spec, layer):
    """Of the first ``steps`` steps of a call: what it makes, and the gradients where none comes from later ones."""
    x, gs = x.clone().requires_grad_(), gs.clone()
    gs[steps:] = 0
    if layer is None:
        out = lif(x, v0, decay=0.6, spec=spec, backend="cpu", return_v=True)
        spikes, made = out.spikes, [out.spikes[:steps], out.v[:steps]]
    else:
        spikes = layer(x)
        made = [spikes[:steps]]
    inputs = [x] if layer is None else [x, *layer.parameters()]
    gx, *others = torch.autograd.grad(spikes, inputs, gs)
    return [*(t.detach() for t in made), gx[:steps], *others]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inner", [3, 128, 1040])
def test_short_sequences_are_the_first_steps_of_long_ones(extension, dtype, inner, monkeypatch):
    """Those of few steps go another way than those of 18, which is more than a chunk of them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # sums of few numbers are not split, those of many are
    choices = itertools.cycle(itertools.product(surrogates.BUILTIN, ("hard", "soft", "none"), (False, True)))
    torch.manual_seed(inner)
    for isa, threshold in itertools.product(isas(extension, dtype), (1, 4 << 20)):
        extension.use_isa(isa)
        extension.stream_from(threshold)
        for steps in (1, 4, 5, 8, 16):
            surrogate, reset, detach = next(choices)
            spec = LIFSpec(reset, surrogate, detach_reset=detach)
            options = {"surrogate": surrogate, "v_reset": None if reset == "soft" else 0.1, "detach_reset": detach}
            norm = BatchNormLIF(4, backend="cpu", **options).eval()
            with torch.no_grad():
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(0.0, 0.5)
            v0 = torch.randn(1, 4, inner)
            for layer, away in ((None, 0), (None, 3), (norm, 0)):
                x, gs = (off_by((torch.randn(18, 1, 4, inner) + 0.4).to(dtype), away) for _ in range(2))
                want = first_steps(x, gs, v0, steps, spec, layer)
                got = first_steps(off_by(x[:steps], away), gs[:steps], v0, steps, spec, layer)
                for a, b in zip(got, want, strict=True):
                    assert torch.equal(a, b), (isa, threshold, steps, reset, surrogate, detach, layer is None)


def test_the_regularizer_agrees_bitwise(extension):
    weights = [torch.randn(70000, requires_grad=True), torch.randn(3, 5, requires_grad=True)]
    for timesteps in (1, 6, 10, 23):
        found = []
        for name in extension.isas():
            extension.use_isa(name)
            value = regularizer(weights, RegularizerSpec(timesteps, 1e-3, 0.3, 1e-5), backend="cpu")
            found.append([value.detach(), *torch.autograd.grad(value, weights)])
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


def test_an_extension_of_other_tables_is_not_used(extension, monkeypatch):
    """Its numbers would be those of what stood in the tables when it was built."""
    assert _args.stale(extension) is None
    changed = {**neurons.TABLE, "QIF": replace(neurons.TABLE["QIF"], charge=neurons.eif_charge)}
    for table in (changed, dict(reversed(neurons.TABLE.items())), {"LIF": neurons.TABLE["LIF"]}):
        with monkeypatch.context() as patch:
            patch.setattr(neurons, "TABLE", table)
            assert "trtkern._cpu was built from other neurons" in _args.stale(extension)
            with pytest.raises(RuntimeError, match="install trtkern again"):
                cpu.missing.cache_clear()
                lif(torch.zeros(2, 1, 3), backend="cpu")
    cpu.missing.cache_clear()
    assert "install trtkern again" in _args.stale(SimpleNamespace(__name__="trtkern._cpu"))  # one that shows nothing


def test_the_environment_chooses_one_or_names_the_choices(extension, monkeypatch):
    monkeypatch.setattr(selftest, "BACKENDS", [backends.named("cpu")])
    monkeypatch.setenv("TRTKERN_CPU_ISA", "baseline")
    chosen = []
    monkeypatch.setattr(extension, "use_isa", lambda isa, use=extension.use_isa: (chosen.append(isa), use(isa)))
    cpu._extension.cache_clear()
    assert cli.main(["doctor"]) == 0 and chosen == ["baseline"]
    environment = {**os.environ, "TRTKERN_CPU_ISA": "avx9000", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "trtkern.cli", "doctor"]
    wrong = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert wrong.returncode in (1, 2) and "avx9000" in wrong.stdout + wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_each_header_includes_what_it_uses(tmp_path):
    """Read by itself, as an editor reads it, a header is whole.

    Of the compiler's own headers they see what every x86 has: all of <immintrin.h>, once a header, takes twice as long
    as ours together.
    """
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    for name, text in dialect.headers().items():
        (tmp_path / f"trtkern_{name}.h").write_text(text)
    (tmp_path / "immintrin.h").write_text("#include <emmintrin.h>\n")
    table = csrc / "cpu" / "isa_kernels.h"  # which each instruction set names
    headers = {*csrc.glob("cpu/*.h"), *csrc.glob("*/cpu*.h"), csrc / "lif" / "math.h"} - {table}
    assert len(headers) >= 11
    command = ["g++", "-std=c++17", "-fsyntax-only", "-w", "-x", "c++", f"-I{csrc}", f"-I{tmp_path}", *sorted(headers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
