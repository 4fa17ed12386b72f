"""The one definition of each surrogate against the derivative of its primitive, and its three dialects."""

import copy
import importlib
import io
import linecache
import math
import pickle
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

from trtkern import LIFSpec, dialect, lif, nn, reference, surrogates
from trtkern.backends import named
from trtkern.spec import ALPHAS
from trtkern.surrogates import exp, where

# The oracle: sigma(u) itself; its slope, by central differences in float64, is what the table must hold.
PRIMITIVES = {
    "triangle": lambda u, a: (
        0.0 if u <= -a else 1.0 if u >= a else (0.5 * (u + a) ** 2 / a**2 if u < 0 else 1 - 0.5 * (a - u) ** 2 / a**2)
    ),
    "sigmoid": lambda u, a: 1 / (1 + math.exp(-a * u)),
    "atan": lambda u, a: math.atan(math.pi / 2 * a * u) / math.pi + 0.5,
    "rectangle": lambda u, a: min(1.0, max(0.0, a * u + 0.5)),
    "fast_sigmoid": lambda u, a: u / (1 + a * abs(u)),
    "exponential": lambda u, a: math.exp(a * u) if u < 0 else 2 - math.exp(-a * u),
    "gaussian": lambda u, a: 0.5 * (1 + math.erf(a * u / math.sqrt(2))),
}


# What other libraries multiply with at u, for a threshold of 1 and alpha a: rows of the table in docs/neurons.md.
OTHERS = {
    "`Sigmoid(alpha)`": lambda u, a: a * (1 - 1 / (1 + math.exp(-a * u))) / (1 + math.exp(-a * u)),
    "`ATan(alpha)`": lambda u, a: a / 2 / (1 + (math.pi / 2 * a * u) ** 2),
    "`PiecewiseQuadratic(alpha)`": lambda u, a: 0.0 if abs(u) > 1 / a else a - a**2 * abs(u),
    "`Erf(alpha)`": lambda u, a: math.exp(-((a * u) ** 2)) * a / math.sqrt(math.pi),
    "`Rect(alpha)`": lambda u, a: a if abs(u) < 0.5 / a else 0.0,
    "`PiecewiseExp(alpha)`": lambda u, a: a / 2 * math.exp(-a * abs(u)),
    "`SoftSign(alpha)`": lambda u, a: 1 / (2 * a * (1 / a + abs(u)) ** 2),
    "`SuperSpike(alpha)`": lambda u, a: a / (abs(u) + 1) ** 2,
    "`PiecewiseLeakyReLU(w, c)`": lambda u, a: 1 / (2 * a) if abs(u) < a else 0.01,
    "`LeakyKReLU(leak, k)`": lambda u, a: a if u >= 0 else 0.3,
    "`DeterministicPass`": lambda u, a: 1.0,
    "`fast_sigmoid(slope)`": lambda u, a: 1 / (a * abs(u) + 1) ** 2,
    "`atan(alpha)`": lambda u, a: a / 2 / (1 + (math.pi / 2 * a * u) ** 2),
    "`sigmoid(slope)`": lambda u, a: a * math.exp(-a * u) / (math.exp(-a * u) + 1) ** 2,
    "`straight_through_estimator()`": lambda u, a: 1.0,
    "`heaviside()`": lambda u, a: float(u > 0),
    "`LeakySpikeOperator`, slope": lambda u, a: 1.0 if u > 0 else a,
    "`SFS(slope, B)`": lambda u, a: float(u > 0.2) / (a * abs(u) + 1) ** 2,
    "`spike_rate_escape(beta, slope)`": lambda u, a: 25.0 * math.exp(-a * abs(u - 1)),
    "`triangular(threshold)`": lambda u, a: -a if u >= 0 else a,
    "`Gaussian(sigma)`": lambda u, a: math.exp(-(u**2) / (2 * a**2)) / (a * math.sqrt(2 * math.pi)),
    "`SingleExponential(grad_width)`": lambda u, a: 1 / a * math.exp(-abs(u) / a),
    "`Heaviside(window)`": lambda u, a: float(u >= -a),
    "`super`": lambda u, a: 1 / (a * abs(u) + 1) ** 2,
    "`tent`": lambda u, a: max(0.0, 1 - abs(u)) * a,
    "`heavi_erfc`": lambda u, a: 2 * math.exp(-((a * u) ** 2)) / math.sqrt(math.pi),
}


@pytest.mark.parametrize("theirs", OTHERS)
def test_the_table_of_other_libraries(theirs):
    """What the page gives for another library's surrogate is that surrogate."""
    page = (Path(__file__).parent.parent / "docs" / "neurons.md").read_text()
    (here,) = re.findall(rf"^\| \w* ?\| {re.escape(theirs)} \| (.+) \|$", page, flags=re.MULTILINE)
    own, named_here = re.match(r"own: `(.+?)`", here), re.match(r"`\"(\w+)\"`, (.+)", here)
    for a in (0.4, 1.0, 2.5):
        given = dict.fromkeys(("alpha", "slope", "sigma", "grad_width", "W", "K", "WINDOW"), a)
        names = {**given, "threshold": 1.0, "sqrt": math.sqrt, "C": 0.01, "LEAK": 0.3, "B": 0.2, "SLOPE": 25.0}
        if own:
            names |= {"exp": exp, "where": where, "maximum": max}
            function, alpha = eval(f"lambda u, alpha: {own[1]}", names), a
        else:
            function, alpha = surrogates.lookup(named_here[1]).function, eval(named_here[2], names)
        for u in (-2.3, -0.83, -0.11, 0.0171, 0.23, 0.94, 3.1):
            assert function(u, alpha) == pytest.approx(OTHERS[theirs](u, a), rel=1e-12, abs=1e-300), (a, u)


def test_every_row_of_that_table_is_tested():
    page = (Path(__file__).parent.parent / "docs" / "neurons.md").read_text()
    rows = re.findall(r"^\| \w* ?\| (`[A-Za-z_]+.*?) \| (?!none)(.+) \|$", page, flags=re.MULTILINE)
    rows = [theirs for theirs, here in rows if "own" in here or here.startswith('`"')]
    assert {*rows} == {*OTHERS, "`MultiGaussian`", "`tanh`"}
    k, u = 2.0, 0.3
    assert surrogates.sigmoid(u, 2 * k) == pytest.approx(1 - math.tanh(k * u) ** 2)
    s = 1 / (1 + math.exp(-2 * 0.7 * u))
    assert 4 * s * (1 - s) == pytest.approx(1 - math.tanh(0.7 * u) ** 2)


def test_every_surrogate_has_an_oracle():
    assert set(PRIMITIVES) == set(surrogates.BUILTIN)


@pytest.mark.parametrize("name", surrogates.BUILTIN)
@pytest.mark.parametrize("alpha", [None, 0.7, 3.0])
def test_derivative_of_the_primitive(name, alpha):
    row = surrogates.TABLE[name]
    alpha = alpha or row.default_alpha
    for u in (-2.3, -0.81, -0.11, -0.013, 0.017, 0.23, 0.94, 3.1):
        step = 1e-6
        slope = (PRIMITIVES[name](u + step, alpha) - PRIMITIVES[name](u - step, alpha)) / (2 * step)
        assert row.function(u, alpha) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", surrogates.BUILTIN)
def test_torch_dialect_is_the_python_function(name):
    row = surrogates.TABLE[name]
    u = torch.linspace(-3, 3, 41, dtype=torch.float64)
    got = reference.surrogate_derivative(u, name, 1.3)
    want = torch.tensor([row.function(value, 1.3) for value in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-300)


def test_extreme_arguments_stay_finite():
    u = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf])
    for name in surrogates.BUILTIN:
        assert (reference.surrogate_derivative(u, name, 1.0).abs() < 1e-6).all(), name


WIDTH = 2.0


def mine(u, alpha):
    return WIDTH * alpha * exp(-abs(u))


def test_a_users_function_is_known_by_its_name_and_code_and_registers_once():
    spec = LIFSpec(surrogate=mine)
    name, _, digest = spec.surrogate.rpartition("@")
    assert name == f"{mine.__module__}.mine" and len(digest) == 12
    assert LIFSpec(surrogate=mine) == spec == LIFSpec.from_token(spec.token) == LIFSpec(surrogate=name)
    assert surrogates.register(mine) == spec.surrogate


def test_a_closure_is_refused():
    width = 3.0
    with pytest.raises(TypeError, match="closure"):
        LIFSpec(surrogate=lambda u, alpha: u * width)


def distant(u, alpha):
    return surrogates.maximum(u, alpha)


def test_a_name_that_no_backend_knows_is_refused():
    with pytest.raises(TypeError, match=r"got 'surrogates'; write `from trtkern.surrogates import exp"):
        LIFSpec(surrogate=distant)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surrogate": "trianlge"}, "expected one of triangle, sigmoid"),
        ({"reset": "medium"}, "hard, soft, none"),
        ({"alpha": float("nan")}, "finite and positive"),
        ({"alpha": -1}, "finite and positive"),
        ({"alpha": "big"}, "number or None"),
        ({"alpha": 1e-20}, "expected alpha from 8.7e-19 to 1.2e[+]18, whose squares float32 holds, got 1e-20"),
        ({"alpha": 1e39, "surrogate": "sigmoid"}, "from 8.7e-19 to 1.2e[+]18"),
    ],
)
def test_a_bad_spec_says_what_was_expected(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LIFSpec(**change)


def cell(text, filename="<cell>"):
    """The function ``bell`` that a notebook's cell of that text defines, in a namespace that lasts."""
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), NOTEBOOK)
    return NOTEBOOK["bell"]


NOTEBOOK = {"__name__": "notebook", "exp": exp}
BELL = "def bell(u, alpha):\n    return {} * exp(-abs(u))\n"


def gradients(*layers, backend="reference"):
    found = []
    for layer in layers:
        layer.backend = backend
        x = torch.full((1, 1, 1), 1.5, requires_grad=True)
        layer(x).sum().backward()
        found.append(x.grad.item())
    return found


SLOPE = math.exp(-0.5)


RUNS_A_USERS = [name for name in ("reference", "triton") if named(name).missing() is None]


@pytest.mark.parametrize("backend", RUNS_A_USERS)
def test_a_cell_that_runs_again_is_the_same_and_an_edited_one_another(backend):
    first = nn.LIF(surrogate=cell(BELL.format("alpha"), "<1>"))
    again = nn.LIF(surrogate=cell(BELL.format("alpha"), "<2>"))
    edited = nn.LIF(surrogate=cell(BELL.format("3.0 * alpha"), "<3>"))
    assert first.spec == again.spec != edited.spec and first.spec.token != edited.spec.token
    assert gradients(edited, first, again, edited, backend=backend) == pytest.approx(
        [3 * SLOPE, SLOPE, SLOPE, 3 * SLOPE]
    )
    assert surrogates.lookup("notebook.bell").name == edited.spec.surrogate
    back = nn.LIF(surrogate=cell(BELL.format("alpha"), "<4>"))
    assert back.spec == first.spec and LIFSpec(surrogate="notebook.bell") == first.spec


@pytest.mark.parametrize("backend", RUNS_A_USERS)
def test_a_global_number_counts_with_its_value_of_then(backend):
    layers = []
    for width in (1.0, 2.0):
        NOTEBOOK["WIDTH"] = width
        layers.append(nn.LIF(surrogate=cell(BELL.format("WIDTH"), f"<width {width}>")))
    assert gradients(*layers, backend=backend) == pytest.approx([SLOPE, 2 * SLOPE])


def straight_through(u, alpha):
    return 1.0


def leaky(u, alpha):
    return where(u > 0.0, 1.0, alpha)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("v_reset", [0.3, None])
@pytest.mark.parametrize("backend", RUNS_A_USERS)
def test_a_derivative_that_is_constant(backend, v_reset, detach):
    """Straight-through, 1 everywhere: the sum over t runs through the decay alone where the reset is detached."""
    x = torch.randn(5, 2, 3)
    layers = [
        nn.LIF(0.5, surrogate=straight_through, v_reset=v_reset, detach_reset=detach, backend=backend),
        nn.LIF(0.5, surrogate=leaky, alpha=0.25, v_reset=v_reset, detach_reset=detach, backend=backend),
    ]
    for layer, below in zip(layers, (1.0, 0.25), strict=True):
        mine, g = x.clone().requires_grad_(), torch.zeros_like(x)
        layer(mine).sum().backward()
        s, v = layer(x, return_v=True)
        h = 0.5 * torch.cat([torch.zeros(1, 2, 3), v[:-1]]) + x
        gv = torch.zeros(2, 3)
        for t in reversed(range(5)):
            slope = torch.where(s[t] > 0, 1.0, below)
            change = -1.0 if v_reset is None else v_reset - h[t]  # of v[t] by s[t]; the soft reset subtracts 1
            kept = 1.0 if v_reset is None else 1 - s[t]
            g[t] = slope * (1 + (0 if detach else gv * change)) + gv * kept
            gv = 0.5 * g[t]
        torch.testing.assert_close(mine.grad, g, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            mine[2, 0, 0] = torch.nan
        mine.grad = None
        layer(mine).sum().backward()
        assert mine.grad[:, 0, 0].isnan().all() and mine.grad.isnan().sum() == 5


def test_names_that_are_not_given():
    for name in ("triangle", "a@b", "a|b"):
        with pytest.raises(ValueError, match=r"without @ and \| that no built-in surrogate has"):
            surrogates.register(mine, name)
    assert surrogates.TABLE["triangle"].builtin


@pytest.fixture
def elsewhere(monkeypatch):
    """Another process, in which no function of a user's is registered."""
    monkeypatch.setattr(surrogates, "_VERSIONS", {})
    builtin = {name: surrogates.TABLE[name] for name in surrogates.BUILTIN}

    def go():
        monkeypatch.setattr(surrogates, "TABLE", dict(builtin))
        surrogates._VERSIONS.clear()
        LIFSpec.from_token.cache_clear()
        reference._derivative.cache_clear()

    yield go
    LIFSpec.from_token.cache_clear()
    reference._derivative.cache_clear()


def test_a_pickled_layer_takes_its_function_along(elsewhere, tmp_path, monkeypatch):
    (tmp_path / "bells.py").write_text(f"from trtkern.surrogates import exp\n{BELL.format('alpha')}")
    monkeypatch.syspath_prepend(tmp_path)
    import bells

    layer = nn.BatchNormLIF(1, surrogate=bells.bell, alpha=2.0)
    want, saved = layer.lif.spec, io.BytesIO()
    torch.save(layer, saved)
    for fresh in (True, False):
        elsewhere()
        if fresh:
            monkeypatch.delitem(sys.modules, "bells")
        saved.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = torch.load(saved, weights_only=False)
        assert loaded.lif.spec == want and gradients(loaded.lif) == pytest.approx([2 * SLOPE])
    (tmp_path / "bells.py").write_text(f"from trtkern.surrogates import exp\n{BELL.format('3.0 * alpha')}")
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "bells")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    elsewhere()
    saved.seek(0)
    with pytest.warns(UserWarning, match="'bells.bell' is not the one that the layer was saved with"):
        loaded = torch.load(saved, weights_only=False)
    assert gradients(loaded.lif) == pytest.approx([6 * SLOPE])


@pytest.mark.parametrize("function", [lambda u, alpha: alpha * exp(-abs(u)), cell(BELL.format("alpha"))])
def test_a_function_that_has_no_place_is_missed_when_loading(elsewhere, function):
    layer = nn.LIF(surrogate=function)
    saved = pickle.dumps(layer)
    for copied in (pickle.loads(saved), copy.deepcopy(layer)):
        assert copied.spec == layer.spec and gradients(copied) == pytest.approx([SLOPE])
    elsewhere()
    name = f"{function.__module__}.{function.__qualname__}"
    with pytest.raises(ValueError, match=rf"expected '{name}' to be importable where .*register\(function, '{name}'"):
        pickle.loads(saved)
    surrogates.register(function)
    assert pickle.loads(saved).spec == layer.spec


def test_a_built_in_surrogate_is_its_name():
    spec = LIFSpec("soft", "atan", 3.0, True)
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec and spec.token == "soft|atan|3.0|1"


def _in_another_process(layer, found):
    found.put(gradients(layer))


def test_a_spawned_process_gets_the_layer():
    context = torch.multiprocessing.get_context("spawn")
    found = context.Queue()
    other = context.Process(target=_in_another_process, args=(nn.LIF(surrogate=mine), found))
    other.start()
    try:
        assert found.get(timeout=PATIENCE) == pytest.approx([WIDTH * SLOPE])
        other.join(PATIENCE)
    finally:
        other.kill()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", surrogates.BUILTIN)
def test_every_sharpness_within_the_range_has_finite_derivatives(backend, device, name, alpha):
    """At 0, within and far beyond the width of the surrogate, at the ends of float32."""
    distances = [0.0, 0.25 * alpha, 0.25 / alpha, 1e-3, 1.0, 1e30, 3e38]
    u = torch.tensor([sign * distance for distance in distances for sign in (1, -1)], device=device)
    x = u.reshape(1, 1, -1).requires_grad_()
    lif(x, v_threshold=0.0, spec=LIFSpec("none", name, alpha), backend=backend).spikes.sum().backward()
    assert x.grad.isfinite().all() and x.grad.flatten()[0] > 0
    want = reference.surrogate_derivative(u.cpu().double(), name, alpha)
    torch.testing.assert_close(x.grad.flatten().cpu().double(), want, rtol=1e-5, atol=1e-37)


def test_cpp_refuses_what_it_cannot_print():
    def looping(u, alpha):
        while u:
            u = u - 1
        return u

    def calling(u, alpha):
        return math.cos(u)

    for function in (looping, calling):
        with pytest.raises(ValueError, match="no C\\+\\+ for"):
            dialect.to_cpp(function)
