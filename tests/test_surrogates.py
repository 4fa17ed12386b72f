"""The one definition of each surrogate against the derivative of its primitive, and its three dialects."""

import math

import pytest
import torch

from trtkern import LIFSpec, dialect, reference, surrogates
from trtkern.surrogates import exp

# The oracle: sigma(u) itself; its slope, by central differences in float64, is what the table must hold.
PRIMITIVES = {
    "triangle": lambda u, a: (
        0.0 if u <= -a else 1.0 if u >= a else (0.5 * (u + a) ** 2 / a**2 if u < 0 else 1 - 0.5 * (a - u) ** 2 / a**2)
    ),
    "sigmoid": lambda u, a: 1 / (1 + math.exp(-a * u)),
    "atan": lambda u, a: math.atan(math.pi / 2 * a * u) / math.pi + 0.5,
    "rectangle": lambda u, a: min(1.0, max(0.0, a * u + 0.5)),
    "fast_sigmoid": lambda u, a: u / (1 + a * abs(u)),
    "gaussian": lambda u, a: 0.5 * (1 + math.erf(a * u / math.sqrt(2))),
}


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


def test_a_users_function_is_known_by_its_name_and_registers_once():
    spec = LIFSpec(surrogate=mine)
    assert spec.surrogate == f"{mine.__module__}.mine"
    assert LIFSpec(surrogate=mine) == spec == LIFSpec.from_token(spec.token)
    with pytest.raises(ValueError, match="taken"):
        surrogates.register(lambda u, alpha: u, name=spec.surrogate)


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
    ],
)
def test_a_bad_spec_says_what_was_expected(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LIFSpec(**change)


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
