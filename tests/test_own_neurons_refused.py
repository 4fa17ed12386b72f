"""What is refused of a neuron of one's own: functions where they are registered, with file and line, and settings."""

import math

import pytest
import torch
from own_neurons import ADEX, PARAMS, B, C, T, charge, drawn, layer_of, registered, settle
from torch import nn

from trtkern import nn as snn
from trtkern import rows
from trtkern.neurons import where

MANY = math.inf


def looping(x, state, p):
    h = p.decay * state.v
    for _ in range(3):
        h = h + x
    return (h,)


def deciding(x, state, p):
    return (p.decay * state.v + x if x > 0 else x,)


def listing(x, state, p):
    return [p.decay * v + x for v in state]


def calling(x, state, p):
    return (p.decay * torch.tanh(state.v) + x,)


def calling_another(x, state, p):
    return charge(x, state, p)


def powering(x, state, p):
    return (p.decay * state.v**2 + x,)


def chained(x, state, p):
    return (where(0.0 < x < 1.0, x, p.decay * state.v),)


def endless(x, state, p):
    return (p.decay * state.v + x * MANY,)


def huge(x, state, p):
    return (p.decay * state.v + x * 1e39,)


def misspelt(x, state, p):
    return (p.dekay * state.v + x,)


def by_the_wrong_dot(x, state, p):
    return (p.v * state.v + x + p.decay,)


def of_the_wrong_kind(x, state, p):
    return (where(state.v, x, p.decay),)


def counting_a_condition(x, state, p):
    return (p.decay * state.v + (x > 0.0),)


def equal(x, state, p):
    return (where(x == 0.0, p.decay, state.v),)


def two_parts(x, state, p):
    return p.decay * state.v + x, x


def unpacking_three(x, state, p):
    a, b, c = p
    return (a * state.v + b * x + c,)


def words(x, state, p):
    return ("h",)


def constant(x, state, p):
    return (p.decay * 3.0,)


def deaf(x, state, p):
    return (p.decay * state.v,)


def forgetful(x, state, p):
    return (p.decay * x,)


def of_two(x, p):
    return (x,)


def any_number(*arguments):
    return (arguments[0],)


def importing(x, state, p):
    import math

    return (p.decay * math.sin(state.v) + x,)


def multiplying_the_spike(trace, s, p):
    return (trace.h - s * p.v_threshold,)


def always(trace, p):
    return p.decay, p.v_threshold


def capturing():
    captured = 2.0
    return lambda x, state, p: (p.decay * state.v + captured * x,)


def line_of(function, below):
    return function.__code__.co_firstlineno + below


@pytest.mark.parametrize(
    ("changes", "below", "message"),
    [
        ({"charge": looping}, 2, "expected a straight line, got a branch, a loop or a chain of comparisons; use where"),
        ({"charge": deciding}, 1, "expected a straight line, got a branch"),
        ({"charge": listing}, 1, "expected a straight line, got a"),
        ({"charge": chained}, 1, "expected a straight line, got a branch, a loop or a chain of comparisons"),
        ({"charge": calling}, 1, r"expected arithmetic .* fma, exp, abs, maximum, where, got 'torch'; write `from"),
        ({"charge": calling_another}, 1, "where, got 'charge'"),
        ({"charge": powering}, 1, r"expected arithmetic .*, got TypeError: unsupported operand type.* \*\*"),
        ({"charge": endless}, 1, "expected MANY to be a finite number, got inf"),
        ({"charge": huge}, 0, "expected numbers that are finite in float32, got 1e[+]39"),
        ({"charge": misspelt}, 1, "behind a dot, got 'dekay'; did you mean 'decay'"),
        ({"charge": by_the_wrong_dot}, 1, "expected p to have decay, v_threshold, got p.v"),
        ({"charge": of_the_wrong_kind}, 0, "expected a condition first in where, got the number state_v"),
        ({"charge": counting_a_condition}, 0, r"got the condition \(x > 0.0\); write where\(\(x > 0.0\), 1.0, 0.0\)"),
        ({"charge": equal}, 1, "expected <, <=, > or >=, got a comparison with =="),
        ({"charge": two_parts}, 0, "expected it to return h, got 2 parts instead of 1"),
        ({"charge": unpacking_three}, 1, "got ValueError: not enough values to unpack"),
        ({"charge": words}, 0, "expected a number for h, got 'h'"),
        ({"charge": constant}, 0, r"expected h to depend on what the step has, got h = \(p_decay \* 3.0\)"),
        ({"charge": deaf}, 0, "expected the input current x in h of the same step, got h = "),
        ({"charge": forgetful}, 0, "expected the state v to be used, got functions that do not; leave it out"),
        ({"charge": of_two}, 0, r"expected a function of \(x, state, p\), got \(x, p\); take just these"),
        ({"charge": any_number}, 0, r"expected a function of \(x, state, p\), got \(\*arguments\)"),
        ({"charge": importing}, 1, "expected a straight line, got an import inside"),
        ({"charge": capturing()}, 0, "expected a function without a closure, got one that captures 'captured'"),
        ({"settle": multiplying_the_spike}, 0, r"got the condition s; write where\(s, 1.0, 0.0\)"),
        ({"fire": always}, 0, "expected a number of the trace in what it compares, got none: it fires always"),
        ({"params": {**PARAMS, "beta": 1.0}}, 0, "expected the parameter beta to be used"),
    ],
)
def test_functions_that_are_refused(changes, below, message):
    (part, function) = next(iter(changes.items()))
    function = function if callable(function) else charge
    part = part if part != "params" else "charge"
    with pytest.raises(TypeError, match=message) as caught:
        registered(**changes)
    place = (
        f"neurons.register: Mine, {part} ({function.__code__.co_filename}, line {line_of(function, below)}): expected"
    )
    assert str(caught.value).startswith(place), caught.value
    assert "Mine" not in rows.LATEST


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("LIF", {}, "expected a name of letters, digits, _ . and - that no built-in neuron has, got 'LIF'"),
        ("a@b", {}, "expected a name of letters.*, got 'a@b'"),
        ("a|b", {}, "expected a name of letters.*, got 'a|b'"),
        ("Mine", {"states": ("u",)}, "expected one or two states, v among them, got u"),
        ("Mine", {"states": ("v", "w", "z")}, "expected one or two states, v among them, got v, w, z"),
        ("Mine", {"states": ("v", "v")}, "expected states to differ, got v, v"),
        ("Mine", {"trace": ("v",)}, "expected a trace of 1 names, as many as states, with h among them, got v"),
        ("Mine", {"params": {}}, "expected params as .* with 1 to 10 names"),
        ("Mine", {"params": {"alpha": 1.0}}, "expected parameters whose names no option of a layer has, got 'alpha'"),
        ("Mine", {"params": {"1st": 1.0}}, "expected params to be names, got '1st'"),
        ("Mine", {"params": {"decay": "big"}}, "expected the default of decay to be a number or None, got 'big'"),
        (
            "Mine",
            {"ranges": {"dekay": (0, 1)}},
            "ranges: expected one of decay, v_threshold, got 'dekay'; did you mean",
        ),
        ("Mine", {"ranges": {"decay": (1, 0)}}, r"expected the range of decay as \(lowest, highest\), got \(1, 0\)"),
        ("Mine", {"ranges": {"decay": (0.6, 1)}}, "expected the default of decay to be finite, 0.6 to 1, got 0.5"),
        ("Mine", {"settle": {"none": settle}}, "expected settle to be a function or .*, got"),
    ],
)
def test_names_and_numbers_that_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        registered(name, **changes)


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"Mine, charge: expected a plain function of \(x, state, p\), got <built-in"):
        registered(charge=max)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"taw": 1.0}, TypeError, "AdEx: expected one of tau, .*got 'taw'; did you mean 'tau_w'"),
        ({"tau": 0.0}, ValueError, "AdEx: expected tau to be from 0.001 to inf, got 0.0"),
        ({"tau": torch.tensor([1.0, -1.0])}, ValueError, "AdEx: expected tau to be from 0.001 to inf, got values from"),
        ({"tau": snn.Bounded(2.0, "clamp", low=-1.0, high=4.0)}, ValueError, "AdEx: expected tau to be bounded within"),
        ({"a": float("nan")}, ValueError, "AdEx: expected a to be finite, got nan"),
        ({"v_reset": None}, TypeError, "AdEx: expected a value of v_reset, which has no default, got none"),
        ({"reset": "soft"}, ValueError, "AdEx: expected reset to be hard, got 'soft'"),
        ({"fire_on_equal": True, "v_threshold": -1.0}, ValueError, "AdEx: expected v_threshold to be > 0 with fire_on"),
    ],
)
def test_settings_that_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        snn.Neuron(ADEX, **settings)
    with pytest.raises(error, match=message):
        snn.BatchNormNeuron(C, neuron="AdEx", **settings)


def test_names_that_are_no_neuron_of_ones_own():
    with pytest.raises(
        ValueError, match=r"Neuron: expected a neuron that was registered, got 'ALIF', which is snn.ALIF"
    ):
        snn.Neuron("ALIF")
    with pytest.raises(ValueError, match=r"neuron: expected one of LIF, .*AdEx.*, got 'AdEks'; did you mean 'AdEx'"):
        snn.Neuron("AdEks")
    with pytest.raises(TypeError, match=r"expected what trtkern.neurons.register returned"):
        snn.Neuron(charge)
    needs = registered("Needs", params={"decay": None, "v_threshold": 1.0})
    with pytest.raises(TypeError, match=r"Needs: expected a value of decay, which has no default, got none"):
        snn.Neuron(needs)
    odd = registered("Odd", params={"step": 0.5, "v_threshold": 1.0}, charge=lambda x, state, p: state.v * p.step + x)
    with pytest.raises(
        ValueError, match=r"Odd: expected parameters whose names no attribute of a layer has, got 'step'"
    ):
        snn.Neuron(odd)


def test_a_learned_parameter_that_left_its_range():
    layer = layer_of(tau=nn.Parameter(torch.tensor(2.0)))
    with torch.no_grad():
        layer.tau.fill_(-2.0)
    with pytest.raises(
        ValueError, match=r"expected tau to be from 0.001 to inf, got -2.0; a learned one stays there as"
    ):
        layer(drawn(T, B, C))
    free = registered("Free", params={"decay": 7.0, "v_threshold": -1.0})
    assert snn.Neuron(free, decay=nn.Parameter(torch.tensor(-3.0)), backend="reference")(drawn(2, B, C)).shape == (
        2,
        B,
        C,
    )
