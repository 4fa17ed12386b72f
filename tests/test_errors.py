"""What bad input gets: an error that names the op, what was expected, what came and what to do."""

import math
import warnings

import pytest
import torch

import trtkern
from trtkern import lif, nn
from trtkern.backends import BACKENDS
from trtkern.backends.base import RegularizerSpec
from trtkern.ops.regularizer import regularizer
from trtkern.ops.spikes import Spikes, pack, unpack

X = torch.zeros(4, 2, 3)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(0, 2, 3), ValueError, r"T >= 1, got a tensor of shape \(0, 2, 3\)"),
        (torch.zeros(()), ValueError, "T >= 1"),
        (torch.zeros(4, 2, 3, dtype=torch.int64), TypeError, r"x\.float\(\)"),
        ([1.0, 2.0], TypeError, "expected x to be a tensor"),
    ],
)
def test_input(x, error, message):
    with pytest.raises(error, match=message):
        lif(x)
    with pytest.raises((TypeError, ValueError)):
        nn.LIF()(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.5}, r"lif: expected decay to be in \[0, 1\], got 1.5"),
        ({"decay": -0.1}, "decay"),
        ({"decay": math.nan}, "decay to be finite, got nan"),
        ({"v_threshold": -1.0}, "v_threshold to be >= 0, got -1.0"),
        ({"v_threshold": math.nan}, "v_threshold to be finite"),
        ({"gain": math.inf}, "gain to be finite"),
        ({"gain": 1e39}, r"gain to be finite in float32, at most 3.4e\+38, got 1e\+39"),
        ({"v_threshold": 10**400}, "v_threshold to be finite in float32"),
        ({"v_reset": -1e39}, "v_reset to be finite in float32"),
        ({"bias": torch.tensor(1e39, dtype=torch.float64)}, "bias to be finite"),
        (
            {"fire_on_equal": True, "v_threshold": 0.0},
            "lif: expected v_threshold to be > 0 with fire_on_equal, got 0.0",
        ),
        ({"fire_on_equal": True, "v_threshold": torch.tensor([1.0, 0.0, 1.0])}, "> 0 with fire_on_equal, got 0.0"),
        ({"v_reset": torch.zeros(2, 2)}, r"shape \[\] or \[C\]"),
        ({"decay": torch.full((4,), 0.5)}, "1 or 3 values"),
        ({"decay": torch.full((3,), 1.5)}, r"decay to be in \[0, 1\]"),
        ({"v_threshold": torch.tensor(-2.0)}, "v_threshold to be >= 0"),
        ({"decay": torch.full((3,), 0.5), "channel_dim": 3}, "channel_dim to be an axis of x"),
        ({"decay": torch.full((4,), 0.5), "channel_dim": 0}, "differ from the time axis"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parameters(change, message, backend):
    with pytest.raises(ValueError, match=message):
        lif(X, backend=backend, **change)


def test_numbers_that_are_no_numbers():
    for value in ("0.5", None, True):
        with pytest.raises(TypeError, match="expected decay to be a number or a tensor"):
            lif(X, decay=value)


@pytest.mark.parametrize(
    ("v0", "error"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), TypeError),
        (torch.zeros(2, 3, dtype=torch.bfloat16), TypeError),
        (torch.zeros(4, 2, 3), ValueError),
        (0.0, TypeError),
    ],
)
def test_initial_state(v0, error):
    with pytest.raises(error, match="expected v0"):
        lif(X, v0)


@pytest.mark.parametrize(
    ("v0", "message"),
    [
        (0.0, r"got 0.0 \(float\); make one with torch.full\(\(2, 3\), 0.0, dtype=torch.float32, device='cpu'\)"),
        (1, r"got 1 \(int\); make one with torch.full\(\(2, 3\), 1, "),
        ([0.0], r"got \[0.0\] \(list\); make one with torch.full\(\(2, 3\), ..., "),
        (torch.zeros(2, 3).half(), r"got a tensor .* convert it with v0.to\(torch.float32\)"),
    ],
)
def test_the_advice_on_a_state_can_be_followed(v0, message):
    for call in (lambda: nn.LIF()(X, v0), lambda: nn.LI()(X, v0), lambda: nn.BatchNormLIF(3).eval()(X, None, v0)):
        with pytest.raises(TypeError, match=message):
            call()
    if isinstance(v0, float):
        made = torch.full((2, 3), 0.0, dtype=torch.float32, device="cpu")
        assert torch.equal(nn.LIF()(X, made), nn.LIF()(X))


@pytest.mark.parametrize(
    ("flag", "error", "message"),
    [
        (torch.zeros(1), TypeError, r"flag to be an int32 tensor of shape \(1,\)"),
        (torch.zeros(2, dtype=torch.int32), TypeError, "shape"),
        (torch.zeros(1, dtype=torch.int32, device="meta"), ValueError, r"layer\.to\(x\.device\)"),
    ],
)
def test_flag(flag, error, message):
    with pytest.raises(error, match=message):
        lif(X, flag=flag)


def test_a_layer_on_another_device_is_named():
    with pytest.raises(ValueError, match=r"layer\.to\(x\.device\)"):
        nn.LIF().to("meta")(X)


def test_an_unknown_backend_gets_the_list():
    for call in (lambda: lif(X, backend="cudda"), lambda: nn.LIF(backend="cudda")):
        with pytest.raises(ValueError, match="expected one of auto, cpu, cuda, reference, triton, got 'cudda'"):
            call()


def test_a_named_backend_runs_or_raises():
    with pytest.raises(ValueError, match="'cpu' was asked for, but"):
        lif(X.double(), backend="cpu")
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, ValueError), match="'cuda' was asked for, but"):
            lif(X, backend="cuda")


def test_a_missing_backend_is_named_and_auto_goes_on(monkeypatch):
    for backend in BACKENDS:
        if backend.name != "reference":
            monkeypatch.setitem(backend.__dict__, "missing", lambda: "it was taken away; put it back")
    with pytest.raises(RuntimeError, match="it was taken away; put it back"):
        lif(X, backend="cpu")
    assert nn.LIF().backend_for(X).startswith("reference (not cpu: ")
    lif(X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LIF(decay=2), r"LIF: expected decay to be in \[0, 1\], got 2"),
        (lambda: nn.LIF(v_threshold=-1), "LIF: expected v_threshold"),
        (lambda: nn.LIF(v_threshold=1e39), "LIF: expected v_threshold to be finite in float32"),
        (lambda: nn.LIF(v_leak=-1e39), "LIF: expected v_leak to be finite in float32"),
        (lambda: nn.LIF(v_threshold=0.0, fire_on_equal=True), "LIF: expected v_threshold to be > 0 with fire_on_equal"),
        (
            lambda: nn.BatchNormLIF(3, eps=1e-50),
            "eps to be a number > 0 that float32 holds, 1.2e-38 to 3.4e.38, got 1e",
        ),
        (lambda: nn.BatchNormLIF(3, eps=1e39), "eps to be a number > 0 that float32 holds"),
        (lambda: nn.LIF()(X, return_v=True, return_h=True), "return_v or return_h, got both; ask for h"),
        (lambda: nn.LIF(surrogate="trianglr"), "expected one of triangle"),
        (lambda: nn.LIF(reset_amount=0.5), "pass v_reset=None"),
        (
            lambda: nn.PLIF(init_tau=1.0),
            r"a number > 1, got 1.0; at 1 w is infinite .* LIF\(decay=0.0\)",
        ),
        (lambda: nn.LIF(v_reset=None, reset_amount=math.inf), "reset_amount to be finite"),
        (lambda: nn.PLIF(channels=0), "channels"),
        (lambda: nn.PLIF(decay=0.5), "expected no decay"),
        (lambda: nn.IF(v_leak=0.5), "expected no v_leak"),
        (lambda: nn.LIF(decay=torch.nn.Parameter(torch.full((3,), -1.0))), "decay"),
        (lambda: nn.LIF(time_dim=5)(X), "time_dim=5 for a tensor of shape"),
        (lambda: nn.LIF(decay=torch.full((3,), 0.5), channel_dim=7)(X), "channel_dim"),
        (lambda: nn.LIF(decay=torch.full((3,), 0.5), time_dim=2)(X), "differ from the time axis"),
    ],
)
def test_layers(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("field", ["lam", "delta", "eps"])
def test_numbers_of_the_regularizer_that_float32_does_not_hold(field):
    for value in (1e39, math.inf, math.nan, -1.0):
        spec = RegularizerSpec(**{"timesteps": 4, "lam": 1e-5, "delta": 0.5, "eps": 1e-5, field: value})
        with pytest.raises(ValueError, match=f"expected {field} to be a finite number >= 0, at most 3.4e"):
            regularizer([torch.ones(3)], spec)


def odd_tensors(of):
    """The values of ``of`` in forms that no kernel can read, with what to do about each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta, prototype, deprecated, says torch
        yield of.to_sparse(), r"got a sparse_coo tensor of shape .*\.to_dense\(\)"
        yield of.flatten(1).to_sparse_csr(), r"got a sparse_csr tensor of shape .*\.to_dense\(\)"
        if of.dtype == torch.float32:
            if torch.backends.mkldnn.is_available():
                yield of.to_mkldnn(), r"got a mkldnn tensor of shape .*\.to_dense\(\)"
            yield (
                torch.quantize_per_tensor(of, 0.1, 0, torch.quint8),
                r"got a tensor of .*, torch.quint8, .*\.dequantize\(\)",
            )
            yield torch.complex(of, of), r"got a tensor of .*, torch.complex64, .*\.real, or "
            for layout in (torch.strided, torch.jagged):
                yield torch.nested.nested_tensor(list(of), layout=layout), "got a nested tensor of 4 parts, .*to_padded"


def refuses(name, call, of):
    """``call`` refuses every odd form of ``of``, naming what it is and the way out."""
    for odd, message in odd_tensors(of):
        with pytest.raises(TypeError, match=f"expected {name} to be a dense tensor of real numbers, {message}"):
            call(odd)


CALLS = {
    "x": (lambda t: lif(t), X),
    "x of a layer": (lambda t: nn.LIF()(t), X),
    "x of an integrator": (lambda t: nn.LI()(t), X),
    "x behind a norm": (lambda t: nn.BatchNormLIF(3)(t), X),
    "v0": (lambda t: lif(torch.zeros(4, 4, 2, 3), t), X),
    "flag": (lambda t: lif(X, flag=t), torch.ones(4, 1, dtype=torch.int32)),
    "decay": (lambda t: lif(X, decay=t), torch.full((4, 2), 0.5)),
    "v_leak": (lambda t: nn.LIF(v_leak=t), torch.full((4, 2), 0.5)),
    "residual": (lambda t: nn.BatchNormLIF(3)(X, t), X),
    "spikes": (lambda t: pack(t), X),
    "words": (lambda t: unpack(t, 4, dtype=torch.float32), torch.ones(4, 2, 3, dtype=torch.uint8)),
    "spikes of a layer": (lambda t: nn.SpikeLinear(3, 2)(Spikes(t, X)), X),
    "words of a layer": (lambda t: nn.SpikeLinear(3, 2)(Spikes(X, t)), torch.ones(1, 2, 3, dtype=torch.uint8)),
    "weight": (lambda t: regularizer([t], RegularizerSpec(4, 1e-5, 0.5, 1e-5)), X),
    "logits": (lambda t: nn.SDTLoss()(t, torch.tensor([0, 1])), X),
    "target": (lambda t: nn.SDTLoss()(X, t), torch.ones(4, 2, dtype=torch.int64)),
}


@pytest.mark.parametrize("what", CALLS)
def test_tensors_without_memory_of_their_own_are_named(what):
    call, of = CALLS[what]
    name = "x" if what == "spikes" else what.split(" of ")[0].split(" behind ")[0]
    refuses(name, call, of)


def test_what_has_no_numbers_stays_without():
    """Tensors of the meta device go through the reference, which says what comes out."""
    out = lif(X.to("meta"), return_state=True)
    assert out.spikes.device.type == "meta" and out.spikes.shape == X.shape and out.state.shape == X.shape[1:]


def test_second_derivative_names_the_way_out(backend, device):
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    (gx,) = torch.autograd.grad(lif(x, backend=backend).spikes.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        gx.sum().backward()


def test_the_reference_has_second_derivatives():
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def gradient(x):
        out = lif(x, spec=trtkern.LIFSpec(surrogate="sigmoid"), backend="reference", return_v=True)
        return torch.autograd.grad(out.v.sum(), x, create_graph=True)[0]

    second = torch.autograd.grad(gradient(x)[0].sum(), x)[0]
    assert second.abs().max() > 0


def test_debug_raises_at_once(backend, device):
    x = torch.zeros(4, 2, 3, device=device)
    x[1, 1, 1] = torch.nan
    layer = nn.LIF(backend=backend).to(device)
    layer(x)
    with trtkern.debug(), pytest.raises(RuntimeError, match="finite potentials"):
        layer(x)
    layer(x)
    clean = torch.zeros(4, 2, 3, device=device)
    for call in (layer, lambda t: lif(t, backend="reference"), lambda t: lif(t, backend=backend)):
        with trtkern.debug():
            call(clean)
            with pytest.raises(RuntimeError, match="finite potentials"):
                call(x)
    assert layer.nonfinite.item() == 1
