"""The CUDA kernels without a GPU: their threads run one by one on the CPU, against the float64 reference.

``cuda_threads.cpp`` compiles what a thread does (csrc/lif/cuda_body.h) with g++ and checks every access; here it stands
in for ``trtkern._cuda`` behind the real ``trtkern.backends.cuda``. What only a GPU can show is the launch itself, the
sums within a block, and speed.
"""

import itertools
import shutil
import subprocess

import cuda_threads
import pytest
import torch
from cuda_threads import NAME

from trtkern import LIFSpec, lif
from trtkern.backends import cpu, cuda
from trtkern.backends.base import CHUNK, LIFBackward, LIFForward, LIFGrads, LIFInputs, Norm, Pool
from trtkern.selftest import Cell, NormCell, cells, compare, compare_norm, norm_cells

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture
def threads(monkeypatch):
    return cuda_threads.as_backend(monkeypatch)


def check(cell):
    errors = (compare_norm if isinstance(cell, NormCell) else compare)(NAME, cell)
    assert errors.within(cell.dtype), f"{cell}: {errors}"


def test_every_neuron_is_owned_once(tmp_path):
    program = cuda_threads.compiled("cuda_index.cpp", tmp_path / "index")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_both_forms_of_the_step_agree_bitwise(threads):
    assert threads.library.flat_differences() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grid(threads, dtype):
    for cell in cells(shape=(1, 3, 8)):
        if cell.dtype == dtype:
            check(cell)


@pytest.mark.parametrize("timesteps", [1, 4, 5, 8, 9, 16, 17, 40])
def test_chunks_layouts_and_alignment(threads, timesteps):
    sizes = ((1, 3, 8), "contiguous"), ((1, 1009), "contiguous"), ((2, 5, 4, 6), "channels_last")
    for dtype, (shape, layout), learnable in itertools.product(
        (torch.float32, torch.bfloat16), sizes, ("none", "channel")
    ):
        for reset, surrogate in (("soft", "sigmoid"), ("hard", "atan")):
            check(Cell(dtype, surrogate, reset, False, learnable, timesteps, shape, layout))


@pytest.mark.parametrize("timesteps", [1, 7, 16, 17, 33])
def test_potentials_before_the_reset(threads, timesteps):
    """h and its gradient, with packs of neurons and one a thread, of a plain neuron and behind a norm."""
    grid = itertools.product(
        (torch.float32, torch.float16), ("hard", "soft"), (False, True), ("none", "channel"), (5, 8)
    )
    for dtype, reset, detach, learnable, width in grid:
        cell = Cell(dtype, "atan", reset, detach, learnable, timesteps, (2, 3, width), returned="h")
        check(cell)
        check(NormCell(**vars(cell), residual="dense" if detach else "none"))


@pytest.mark.parametrize("learnable", ["scalar", "channel"])
def test_many_blocks(threads, learnable):
    """Per channel: several segments of the reduction, wide (runs of 128 and 611) and narrow (channels_last)."""
    sizes = ((3, 7, 611), "contiguous"), ((40, 2, 128), "contiguous"), ((2, 5, 16, 40), "channels_last")
    for shape, layout in sizes:
        check(Cell(torch.float32, timesteps=3, learnable=learnable, shape=shape, layout=layout))


def test_a_tensor_that_starts_off_a_vector(threads):
    """N is a multiple of the vector, the address is not of 16 bytes: one neuron a thread."""
    x = torch.randn(4 * 64 + 1)[1:].reshape(4, 1, 64)
    spikes = lif(x, backend=NAME).spikes
    assert torch.equal(spikes, lif(x, backend="reference").spikes)


def test_the_potential_equals_the_cpu_backend_bitwise(threads):
    if cpu.missing() is not None:
        pytest.skip(cpu.missing())
    for dtype, reset, timesteps in itertools.product((torch.float32, torch.float16), ("hard", "soft"), (5, 33)):
        x = (torch.randn(timesteps, 2, 3, 24) + 0.5).to(dtype)
        neuron = {"decay": 0.7, "gain": 0.3, "bias": 0.1, "spec": LIFSpec(reset)}
        outputs = [lif(x, **neuron, backend=name, return_state=True, return_v=True) for name in (NAME, "cpu")]
        for ours, theirs in list(zip(*outputs, strict=True))[:3]:
            assert torch.equal(ours, theirs)
        norm = Norm(torch.tensor([[0.4, 0.1, -2.0], [1.3, 0.7, 0.2], [0.1, 0.3, 0.5]]), x.flip(0))
        inp = LIFInputs(x.view(timesteps, -1), None, None, (0.7, 0.3, 0.1, 0.8, 1.0, 0.0), LIFSpec(reset), 24, norm)
        states = [torch.full((144,), torch.nan) for _ in range(2)]
        for backend, state in zip((cuda, cpu), states, strict=True):
            backend.lif_forward(inp, LIFForward(None, None, state, None, None))
        assert torch.equal(*states)


@pytest.mark.parametrize("timesteps", [4, 7, 16, 40])
@pytest.mark.parametrize("neurons", [64, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic(threads, dtype, timesteps, neurons):
    """Bytes of a training step: forward 2e, backward 3e, and v once every 16 steps; then learnable parameters."""
    x = torch.randn(timesteps, 1, neurons).to(dtype).requires_grad_()
    rows, row, edges = timesteps * neurons * x.element_size(), neurons * 4, (timesteps - 1) // CHUNK
    forward = {"x": (rows, 0), "s": (0, rows)}
    backward = {"x": (rows, 0), "gs": (rows, 0), "gx": (0, rows)}
    if edges:
        forward["edges"], backward["edges"] = (0, edges * row), (edges * row, 0)
    spikes = lif(x, backend=NAME).spikes
    assert threads.traffic() == forward
    spikes.backward(torch.ones_like(spikes))
    assert threads.traffic() == backward

    decay = torch.full((neurons,), 0.5, requires_grad=True)
    spikes = lif(x, decay=decay, backend=NAME).spikes
    spikes.backward(torch.ones_like(spikes))
    learning = threads.traffic()
    assert {name: learning[name] for name in backward} == backward
    assert learning["workspace"][1] >= 5 * row and learning["gparams"] == (0, 6 * row)

    with_x, decay.grad = decay.grad, None
    spikes = lif(x.detach(), decay=decay, backend=NAME).spikes
    spikes.backward(torch.ones_like(spikes))
    assert torch.allclose(decay.grad, with_x)  # whether gx is written or not


def test_a_neuron_that_is_not_finite_stays_alone(threads):
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(20, 1, 40)
        x[3, 0, 17] = bad
        x.requires_grad_()
        flag = torch.zeros(1, dtype=torch.int32)
        spikes, state, *_ = lif(x, backend=NAME, return_state=True, flag=flag)
        (spikes.sum() + state.sum()).backward()
        others = torch.arange(40) != 17
        assert flag.item() == 1
        assert torch.isfinite(state[0, others]).all() and torch.isfinite(x.grad[:, 0, others]).all()
        if bad != bad:
            assert torch.isnan(state[0, 17]) and torch.isnan(x.grad[3, 0, 17]) and spikes[3:, 0, 17].sum() == 0
    lif(torch.randn(20, 1, 40), backend=NAME, flag=flag.zero_())
    assert flag.item() == 0


def test_a_potential_beyond_float16_is_infinite_in_v_only(threads):
    """v in x's dtype rounds to inf, as torch would round it; the float32 state keeps the number."""
    x = torch.full((1, 1, 8), 6e4, dtype=torch.float16)
    spec = LIFSpec("none")
    flag = torch.zeros(1, dtype=torch.int32)
    _, state, v, *_ = lif(x, gain=2.0, spec=spec, backend=NAME, return_state=True, return_v=True, flag=flag)
    assert flag.item() == 1 and torch.equal(state, torch.full((1, 8), 2 * x[0, 0, 0].item())) and torch.isinf(v).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_grid(threads, dtype):
    for cell in list(norm_cells(shape=(2, 4, 4)))[::5]:
        if cell.dtype == dtype:
            check(cell)


@pytest.mark.parametrize("timesteps", [1, 4, 7, 16, 40])
def test_norm_layouts(threads, timesteps):
    """A pack of one channel, of several (channels last), and of some that change within it; N no multiple of a pack."""
    sizes = [(shape, "contiguous", False) for shape in ((2, 3, 8), (8, 3, 5), (3, 3, 5))]
    sizes += [
        ((2, 16, 3, 3), "channels_last", False),
        ((2, 12, 4, 4), "channels_last", False),
        ((1, 5, 24), "contiguous", True),
    ]
    options = (True, "none", "none"), (True, "dense", "channel"), (False, "packed", "channel"), (False, "none", "none")
    for dtype in (torch.float32, torch.bfloat16):
        for (shape, layout, last), (training, residual, learnable) in itertools.product(sizes, options):
            cell = Cell(dtype, "sigmoid", "hard", False, learnable, timesteps, shape, layout)
            check(NormCell(**vars(cell), training=training, residual=residual, last=last))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("timesteps", [1, 4, 7, 16, 19])
def test_pooling(threads, layout, timesteps):
    """With packs over 2 x 2 places, beside each other in a row, and one neuron at a time; odd images."""
    for dtype, shape in itertools.product(
        (torch.float32, torch.bfloat16), ((2, 3, 4, 6), (1, 16, 2, 4), (2, 2, 4, 32), (1, 1, 2, 2), (2, 5, 7, 4))
    ):
        for residual, learnable, static in (("dense", "none", False), ("none", "channel", timesteps > 1)):
            if timesteps * shape[0] * shape[2] * shape[3] > 4:
                cell = Cell(dtype, "triangle", "soft", False, learnable, timesteps, shape, layout)
                check(NormCell(**vars(cell), residual=residual, pool=True, static=static))


def test_many_blocks_of_a_norm(threads):
    for shape, last, learnable in (
        ((1, 7, 2011), False, "channel"),
        ((1, 4001, 7), True, "none"),
        ((3, 40, 96), False, "none"),
    ):
        check(NormCell(timesteps=3, shape=shape, last=last, learnable=learnable))
    check(NormCell(torch.bfloat16, timesteps=3, shape=(1, 501, 96), last=True, learnable="channel"))


def test_packed_spikes_of_a_plain_lif(threads):
    for timesteps, neurons in ((3, 64), (8, 37), (21, 64)):
        x = torch.randn(timesteps, 2, neurons)
        found = lif(x, backend=NAME, return_packed=True)
        bits = found.packed.repeat_interleave(8, 0)[:timesteps] >> (torch.arange(timesteps) % 8).view(-1, 1, 1) & 1
        assert torch.equal(bits.float(), found.spikes) and torch.equal(found.spikes, lif(x, backend=NAME).spikes)


@pytest.mark.parametrize(
    "size", [(4, 3, 64, 1), (4, 5, 7, 3), (9, 33, 64, 1), (3, 2, 3, 1024), (2, 1, 40000, 1), (1, 2, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics(threads, dtype, size):
    """Numbers far from 0, and an outlier in front: x is [T, outer, C, inner]."""
    for offset, outlier in ((0.0, 0.0), (1e4, 0.0), (0.0, 3e4)):
        steps, _, channels, inner = size
        x = torch.randn(size, dtype=torch.float64) + offset
        x[0, 0, 0] += outlier
        x = x.to(dtype)
        stats = torch.full((2, channels), torch.nan, dtype=torch.float64)
        cuda.batch_norm_lif_statistics(x.view(steps, -1), channels, inner, stats)
        mean = x.double().mean((0, 1, 3))
        squares = (x.double() - mean.view(-1, 1)).square().sum((0, 1, 3))
        # What a mean is off by is measured by the spread of the numbers.
        assert ((stats[0] - mean).abs() <= 2e-7 * squares.sqrt()).all()
        assert torch.allclose(stats[1], squares, rtol=2e-6, atol=0)


NEURONS, CHANNELS = 192, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", [None, Pool(16, 1)], ids=["dense", "pooled"])
@pytest.mark.parametrize("neuron", ["LIF", "AdLIF"])
def test_every_combination_of_what_backward_writes(threads, neuron, dtype, pool):
    """Each result is the same whatever else is asked for, and what is not asked for is not written."""
    draw = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 5, NEURONS, generator=draw).to(dtype)
    affine, coef = torch.rand(2, 3, CHANNELS, generator=draw)
    spec = LIFSpec(neuron=neuron)
    centers = {"decay": 0.5, "bias": 0.0, "decay_w": 0.5, "v_reset": 0.0}
    params = torch.tensor([centers.get(name, 1.0) for name in spec.row.params]).unsqueeze(1).repeat(1, CHANNELS)
    state = (len(spec.row.states), NEURONS)
    gs = torch.randn(5, NEURONS // (4 if pool else 1), generator=draw).to(dtype)
    for kept, use in itertools.product((None, residual), (None, coef)):
        inp = LIFInputs(x, None, params, (), spec, NEURONS // CHANNELS, Norm(affine, kept), pool)
        right = None
        for wanted in itertools.product((True, False), repeat=4):  # all of them first
            if not any(wanted) or (use is not None and not wanted[0]):
                continue
            made = [torch.full(size, torch.nan) for size in ((5, NEURONS), state, params.shape, (2, CHANNELS))]
            made = [made[0].to(dtype), *made[1:3], made[3].double()]
            asked = [t if wish else None for t, wish in zip(made, wanted, strict=True)]
            cuda.lif_backward(inp, None, LIFGrads(gs, None, None, use), LIFBackward(*asked))
            right = right or made
            for found, wish, expected in zip(made, wanted, right, strict=True):
                assert torch.equal(found, expected) if wish else torch.isnan(found).all()


@pytest.mark.parametrize("timesteps", [4, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_of_a_norm(threads, dtype, timesteps):
    """Bytes of a training step: forward e + 2e (+ e residual, + 1/8), backward 2e + 3e, or 4e + 3e with a residual."""
    shape = (timesteps, 8 * NEURONS)
    x, residual, gs, gx, s = (torch.randn(shape).to(dtype) for _ in range(5))
    affine, coef, e = torch.rand(3, CHANNELS), torch.rand(3, CHANNELS), x.numel() * x.element_size()
    stats, sums = torch.empty(2, 2, CHANNELS, dtype=torch.float64)
    words = torch.empty(-(-timesteps // 8), shape[1], dtype=torch.uint8)

    def total(*small):
        """Bytes of all tensors but those whose size is that of the channels."""
        found = {name: sum(both) for name, both in threads.traffic().items()}
        partial = found.pop("workspace", 0)
        assert partial <= 0.05 * e and found.keys() >= set(small)
        return sum(size for name, size in found.items() if name not in (*small, "params"))

    cuda.batch_norm_lif_statistics(x, CHANNELS, 64, stats)
    assert total("stats") == e
    for kept in (None, residual):
        inp = LIFInputs(x, None, None, (0.5, 1.0, 0.0, 1.0, 1.0, 0.0), LIFSpec(), 64, Norm(affine, kept))
        dense = 0 if kept is None else e
        cuda.lif_forward(inp, LIFForward(s, None, None, None, None, words))
        assert total("affine") == 2 * e + dense + words.numel()
        cuda.lif_backward(
            inp, None, LIFGrads(gs, None, None), LIFBackward(None if kept is None else gx, None, None, sums)
        )
        assert total("affine", "norm_sums") == 2 * e + 2 * dense
        if kept is None:
            cuda.lif_backward(inp, None, LIFGrads(gs, None, None, coef), LIFBackward(gx, None, None))
        else:
            cuda.batch_norm_lif_input_grad(gs, x, affine, coef, 64, gx)
        assert total("affine", "coef") == 3 * e
