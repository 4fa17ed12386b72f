"""Models of other libraries before and after ``trtkern.interop.convert``: outputs, gradients, and the time of a step.

    python bench/migrate.py                        every case whose library is installed; rows go to bench/migrate.csv
    python bench/migrate.py --only spikingjelly    the cases whose name starts so
    python bench/migrate.py --page                 the table of docs/migrate.md, from the rows

A case is a network of the library's own, as its tutorials use it. Outputs and gradients are compared in float64, where
the two differ by rounding alone. Times are of forward and backward in float32, the two in turn, the median of five; a
network of one step is looped over in Python before, as its library has it, and runs all steps at once after.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trtkern import interop  # noqa: E402
from trtkern.bench import rows  # noqa: E402
from trtkern.bench.measure import append  # noqa: E402
from trtkern.malloc import keep_pages  # noqa: E402

CSV, PAGE = ROOT / "bench" / "migrate.csv", ROOT / "docs" / "migrate.md"
BEGIN, END = "<!-- bench/migrate.py --page writes from here -->", "<!-- to here -->"


@dataclass(frozen=True)
class Case:
    """A network of a library, and how it is called."""

    library: str
    """The name of its package."""
    title: str
    """What the page calls it."""
    make: Callable[[], nn.Module]
    """The network, with random weights; the seed is set before."""
    shape: tuple[int, ...]
    """Of the input, [T, B, ...], drawn between 0 and ``scale``."""
    scale: float = 1.0
    run: Callable[[nn.Module, Tensor], Any] | None = None
    """(network, x) -> outputs [T, ...] as the library runs it; None calls it with x. ``loop`` calls it step by step."""
    run_after: Callable[[nn.Module, Tensor], Any] | None = None
    """The same of the converted network; where ``run`` is ``loop`` that is ``over_time``."""
    fuse: bool = False


def loop(net: nn.Module, x: Tensor) -> Tensor:
    """A network of one step, step by step."""
    return torch.stack([net(step) for step in x])


def spikingjelly_model(name: str) -> ModuleType:
    """A file of spikingjelly.activation_based.model; three of them import torchvision for weights to download."""
    needed = ("torchvision", "torchvision.models", "torchvision.models.utils")
    missing = () if importlib.util.find_spec("torchvision") else needed
    for path in missing:
        sys.modules[path] = ModuleType(path)
        sys.modules[path].load_state_dict_from_url = None  # type: ignore[attr-defined]
    try:
        return importlib.import_module(f"spikingjelly.activation_based.model.{name}")
    finally:
        for path in missing:
            del sys.modules[path]


def sew_resnet18(step_mode: str) -> nn.Module:
    from spikingjelly.activation_based import functional, neuron, surrogate

    net = spikingjelly_model("sew_resnet").sew_resnet18(
        spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), detach_reset=True, cnf="ADD", num_classes=10
    )
    functional.set_step_mode(net, step_mode)
    return net


def dvs_gesture_net() -> nn.Module:
    from spikingjelly.activation_based import functional, neuron, surrogate

    net = spikingjelly_model("parametric_lif_net").DVSGestureNet(
        32, neuron.ParametricLIFNode, surrogate_function=surrogate.ATan(), detach_reset=True
    )
    functional.set_step_mode(net, "m")
    return scaled(net, 4.0)


def scaled(net: nn.Module, factor: float) -> nn.Module:
    """A network whose weights are larger, so that its last neurons fire."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.mul_(factor)
    return net


@contextmanager
def wide_spikes(x: Tensor) -> Iterator[None]:
    """Within, spikes and states are as x is: those of some libraries are float32 in every dtype, which a Linear of
    float64 refuses."""
    narrow, default, wide = Tensor.float, torch.get_default_dtype(), torch.promote_types(x.dtype, torch.float32)
    Tensor.float = lambda self: self.to(wide)  # type: ignore[method-assign]
    torch.set_default_dtype(wide)
    try:
        yield
    finally:
        Tensor.float = narrow  # type: ignore[method-assign]
        torch.set_default_dtype(default)


class SnnTorchTutorial5(nn.Module):
    """Tutorial 5 of snnTorch: two layers of Leaky, and the loop over 25 steps of an image inside of the forward."""

    def __init__(self) -> None:
        import snntorch

        super().__init__()
        self.fc1, self.lif1 = nn.Linear(784, 1000), snntorch.Leaky(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(1000, 10), snntorch.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2, made = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        with wide_spikes(x):
            for _ in range(25):
                spk1, mem1 = self.lif1(self.fc1(x), mem1)
                spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
                made.append((spk2, mem2))
        spikes, potentials = zip(*made, strict=True)
        return torch.stack(spikes), torch.stack(potentials)


def snntorch_tutorial_6() -> nn.Module:
    """Tutorial 6 of snnTorch: a convolutional network of one step."""
    import snntorch
    from snntorch import surrogate

    leaky = {"beta": 0.5, "spike_grad": surrogate.fast_sigmoid(slope=25), "init_hidden": True}
    return nn.Sequential(
        nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), snntorch.Leaky(**leaky),
        nn.Conv2d(12, 64, 5), nn.MaxPool2d(2), snntorch.Leaky(**leaky),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 10), snntorch.Leaky(**leaky, output=True),
    )  # fmt: skip


def snntorch_forward_pass(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The loop of snnTorch's tutorials."""
    from snntorch import utils

    utils.reset(net)
    with wide_spikes(x):
        made = [net(step) for step in x]
    return [torch.stack(each) for each in zip(*made, strict=True)]


def norse_conv_net() -> nn.Module:
    """``norse.torch.models.conv.ConvNet``, whose forward loops over the steps."""
    from norse.torch.models.conv import ConvNet

    return scaled(ConvNet(), 4.0)


def norse_lifted() -> nn.Module:
    """The same layers over sequences, as Norse's tutorials lift them."""
    import norse.torch as norse

    return scaled(
        norse.SequentialState(
            norse.Lift(nn.Conv2d(1, 20, 5)), norse.LIF(), norse.Lift(nn.MaxPool2d(2)),
            norse.Lift(nn.Conv2d(20, 50, 5)), norse.LIF(), norse.Lift(nn.MaxPool2d(2)),
            nn.Flatten(2), norse.Lift(nn.Linear(800, 500)), norse.LIF(), norse.Lift(nn.Linear(500, 10)), norse.LI(),
        ),
        4.0,
    )  # fmt: skip


def in_its_type(net: nn.Module, x: Tensor) -> Tensor:
    """A network of sinabs or Rockpool, whose spikes are float32 by themselves, in the type of x."""
    with wide_spikes(x):
        made = net(x)
    return made[0] if isinstance(made, tuple) else made


def nmnist_quickstart() -> nn.Module:
    """The network of sinabs' quickstart, with the settings that have an equal here."""
    from sinabs import activation, layers

    iaf: dict[str, Any] = {"batch_size": 8, "spike_fn": activation.SingleSpike, "spike_threshold": torch.tensor(0.25)}
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), layers.IAFSqueeze(**iaf), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), layers.IAFSqueeze(**iaf), nn.AvgPool2d(2),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), layers.IAFSqueeze(**iaf),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 10, bias=False), layers.IAFSqueeze(**iaf),
    )  # fmt: skip


def synnet(threshold: float) -> nn.Module:
    from rockpool.nn.networks import SynNet

    return SynNet(
        10, 64, size_hidden_layers=[128, 128], time_constants_per_layer=[4, 4], max_spikes_per_dt=1,
        threshold=threshold,
    )  # fmt: skip


def spikformer() -> nn.Module:
    return spikingjelly_model("spikformer").Spikformer(
        img_size_h=32, img_size_w=32, patch_size=4, num_classes=10, embed_dims=192, num_heads=8, depths=2
    )


CASES = {
    "spikingjelly-sew-resnet18": Case(
        "spikingjelly", "`sew_resnet18`, IF, step mode m", lambda: sew_resnet18("m"), (4, 8, 3, 64, 64), 4.0
    ),
    "spikingjelly-sew-resnet18-s": Case(
        "spikingjelly", "`sew_resnet18`, IF, step mode s", lambda: sew_resnet18("s"), (4, 8, 3, 64, 64), 4.0, loop
    ),
    "spikingjelly-dvs-gesture": Case(
        "spikingjelly", "`DVSGestureNet`, 32 channels, PLIF", dvs_gesture_net, (8, 2, 2, 128, 128), 4.0, fuse=True
    ),
    "spikingjelly-spikformer": Case(
        "spikingjelly", "`Spikformer`, 192 channels, 2 blocks, LIF", spikformer, (4, 4, 3, 32, 32), 4.0
    ),
    "snntorch-tutorial-5": Case(
        "snntorch", "tutorial 5, `Leaky`, loop in the forward", lambda: scaled(SnnTorchTutorial5(), 2.0), (128, 784)
    ),
    "snntorch-tutorial-6": Case(
        "snntorch", "tutorial 6, convolutions, `Leaky`", lambda: scaled(snntorch_tutorial_6(), 2.0),
        (50, 64, 1, 28, 28), run=snntorch_forward_pass,
    ),
    "snntorch-over-time": Case(
        "snntorch", "the same through `over_time`", lambda: scaled(snntorch_tutorial_6(), 2.0),
        (50, 64, 1, 28, 28), run=snntorch_forward_pass, run_after=lambda net, x: interop.over_time(net)(x),
    ),
    "norse-conv-net": Case("norse", "`ConvNet`, loop in the forward", norse_conv_net, (32, 8, 1, 28, 28), 2.0),
    "norse-lifted": Case(
        "norse", "the same layers, `Lift`, `LIF`", norse_lifted, (32, 8, 1, 28, 28), 2.0, run=lambda net, x: net(x)[0]
    ),
    "sinabs-nmnist-quickstart": Case(
        "sinabs", "N-MNIST quickstart, IAFSqueeze, SingleSpike", nmnist_quickstart, (8 * 20, 2, 34, 34), 1.0,
        in_its_type,
    ),
    "rockpool-synnet-half": Case(
        "rockpool", "`SynNet`, one spike a step, threshold 0.5", lambda: synnet(0.5), (16, 100, 64), 1.0, in_its_type
    ),
}  # fmt: skip
"""By a name that begins with that of the library."""


def measured(name: str, case: Case) -> dict[str, Any]:
    """A row."""
    torch.manual_seed(0)
    before, report = case.make(), interop.ConvertReport()
    after = interop.convert(copy.deepcopy(before), report, fuse=case.fuse)
    options: dict[str, Any] = {"run": case.run, "run_after": case.run_after}
    if case.run is loop and case.run_after is None:
        after, options["run_after"] = interop.over_time(after), lambda net, x: net(x)
    x = case.scale * torch.rand(case.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = interop.check(copy.deepcopy(before).double(), copy.deepcopy(after).double(), x, **options)
    seconds = interop.check(before, after, x.float(), timed=True, **options).seconds
    assert seconds is not None
    origin = rows.origin(torch.device("cpu"))
    origin["versions"] += f", {case.library} {importlib.metadata.version(case.library)}"
    return origin | {
        "case": name,
        "shape": "x".join(map(str, case.shape)),
        "converted": len(report.converted),
        "left": len(report.left),
        "fused": 0 if report.norms is None else len(report.norms.fused),
        "outputs": f"{exact.outputs:.1e}",
        "gradients": f"{max(exact.gradients.values()):.1e}",
        "fired": round(exact.fired, 4),
        "before_ms": round(1e3 * seconds[0], 2),
        "after_ms": round(1e3 * seconds[1], 2),
        "command": f"python bench/migrate.py --only {name}",
    }


def table(found: list[dict[str, str]]) -> str:
    """The table of the page: the last row of each case."""
    last = {row["case"]: row for row in found}
    lines = [
        "| library | network | input | before | after | | outputs, gradients apart (float64) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        if name in last:
            row = last[name]
            times = float(row["before_ms"]), float(row["after_ms"])
            fused = ", BatchNorms fused" if case.fuse else ""
            lines.append(
                f"| {case.library} | {case.title}{fused} | {row['shape'].replace('x', ' x ')} | {times[0]:.0f} ms | "
                f"{times[1]:.0f} ms | {times[0] / times[1]:.1f} times | {row['outputs']}, {row['gradients']} |"
            )
    machines = sorted(
        {(last[name]["machine"], last[name]["versions"].split(", ")[1]) for name in CASES if name in last}
    )
    lines += ["", "Measured on " + "; ".join(f"{machine}, {torch_}" for machine, torch_ in machines) + "."]
    return "\n".join(lines)


def page(text: str, found: list[dict[str, str]]) -> str:
    """The page with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{rest.split(END)[1]}"


def read() -> list[dict[str, str]]:
    """The rows that there are."""
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the cases whose name starts so")
    parser.add_argument("--page", action="store_true", help="write the table of docs/migrate.md and measure nothing")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(PAGE.read_text(), read()))
        return 0
    keep_pages()
    for name, case in CASES.items():
        if not name.startswith(options.only) or importlib.util.find_spec(case.library) is None:
            continue
        row = measured(name, case)
        append([row], CSV)
        print(f"{name}: {row['before_ms']} ms, {row['after_ms']} ms; apart {row['outputs']}, {row['gradients']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
