"""The spiking transformers beside the code that their papers published, with its weights.

    python bench/published.py --spikformer DIR --sdt DIR    DIR: the code as it is on GitHub, ZK-Zhou/spikformer and
                                                            BICLab/Spike-Driven-Transformer

That code imports an old SpikingJelly (0.0.0.0.12) and timm. In their places stand the LIFNode of the SpikingJelly that
is installed, with the settings of the old one, and the few functions of timm that are called. The networks are made
with scales and shifts of BatchNorm that differ from channel to channel, and are compared in training: numbers of
parameters, logits, gradients and running statistics, in float64 on the reference. In float32 the logits alone are: a
current that is rounded otherwise moves a spike, which is carried on. Beside them stands how far the published code in
float32 is from itself in float64.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.models import SpikeDrivenTransformer, Spikformer, SpikingNetwork, load_reference_weights, reference_keys

SPIKFORMER = {"mlp_ratios": 4, "qkv_bias": False, "sr_ratios": 1}
SDT = {"pooling_stat": "0011", "num_heads": 8, "sr_ratios": 1}


class Pair(NamedTuple):
    """A network of the published code, and the same one here."""

    name: str
    theirs: Callable[[], nn.Module]
    ours: Callable[..., SpikingNetwork]
    side: int


def stand_ins() -> None:
    """What the published code imports and is not installed in that form."""
    from spikingjelly.activation_based import neuron

    def multi_step(tau: float = 2.0, v_threshold: float = 1.0, detach_reset: bool = False, **_: Any) -> nn.Module:
        return neuron.LIFNode(tau, True, v_threshold, 0.0, detach_reset=detach_reset, step_mode="m")

    made: dict[str, dict[str, Any]] = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {
            "to_2tuple": lambda side: (side, side),
            "trunc_normal_": nn.init.trunc_normal_,
            "DropPath": nn.Identity,
        },
        "timm.models.registry": {"register_model": lambda function: function},
        "timm.models.vision_transformer": {"_cfg": dict},
        "spikingjelly.clock_driven": {},
        "spikingjelly.clock_driven.neuron": {
            "MultiStepLIFNode": multi_step,
            "MultiStepParametricLIFNode": multi_step,
        },
    }
    for name, held in made.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(held)


def imported(folder: Path, name: str) -> Any:
    """A module of the published code, whatever of that name was imported before."""
    for known in [known for known in sys.modules if known.split(".")[0] in ("model", "module")]:
        del sys.modules[known]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def pairs(spikformer: Path | None, sdt: Path | None, least: int) -> list[Pair]:
    """The networks of the folders that were given; in ImageNet's the images have ``least`` pixels a side."""
    found = []
    if spikformer is not None:
        cifar = imported(spikformer / "cifar10", "model").Spikformer
        size = {"in_channels": 3, "embed_dims": 384, "num_heads": 12, "depths": 4, "T": 4, **SPIKFORMER}
        for classes in (10, 100):
            given = {"img_size_h": 32, "img_size_w": 32, "patch_size": 4, "num_classes": classes, **size}
            found.append(
                Pair(
                    f"Spikformer-4-384, {classes} classes",
                    lambda given=given: cifar(**given),
                    lambda classes=classes, **options: Spikformer(classes, **options),
                    32,
                )
            )
        imagenet = imported(spikformer / "imagenet", "model").spikformer
        found.append(
            Pair(
                "Spikformer-8-512 for ImageNet",
                imagenet,
                lambda **options: Spikformer(
                    1000, shape=(3, 224, 224), dim=512, depth=8, heads=8, patch=16, qkv_bias=False, **options
                ),
                least,
            )
        )
    if sdt is not None:
        made = imported(sdt, "model.spikeformer").SpikeDrivenTransformer
        for classes in (10, 100):
            size = {"img_size_h": 32, "img_size_w": 32, "patch_size": 4, "in_channels": 3, "num_classes": classes}
            found.append(
                Pair(
                    f"SDT-2-512, {classes} classes",
                    lambda size=size: made(**size, embed_dims=512, depths=2, T=4, **SDT),
                    lambda classes=classes, **options: SpikeDrivenTransformer(classes, **options),
                    32,
                )
            )
        for depth, dim in ((8, 384), (8, 768)):
            size = {"img_size_h": 224, "img_size_w": 224, "in_channels": 3, "num_classes": 1000, "num_heads": 8}
            found.append(
                Pair(
                    f"SDT-{depth}-{dim} for ImageNet",
                    lambda size=size, depth=depth, dim=dim: made(
                        **size, embed_dims=dim, depths=depth, sr_ratios=1, T=4
                    ),
                    lambda depth=depth, dim=dim, **options: SpikeDrivenTransformer(
                        1000, shape=(3, 224, 224), dim=dim, depth=depth, patch=16, **options
                    ),
                    least,
                )
            )
    return found


def varied(net: nn.Module) -> None:
    """Scales and shifts of BatchNorm that differ from channel to channel."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.uniform_(0.8, 2.0)
                module.bias.uniform_(-0.2, 0.8)


def without_gradient(net: nn.Module) -> int:
    """Parameters that the loss does not depend on."""
    return sum(p.numel() for p in net.parameters() if p.grad is None)


def compared(pair: Pair, batch: int) -> None:
    """Print how far the two are apart."""
    torch.manual_seed(0)
    theirs = pair.theirs()
    varied(theirs)
    weights = {name: value.clone() for name, value in theirs.state_dict().items()}
    exact, ours = theirs.double(), pair.ours(backend="reference").double()
    load_reference_weights(ours, weights)
    fast, plain = pair.ours(), pair.theirs()
    load_reference_weights(fast, weights)
    plain.load_state_dict(weights)
    x = torch.rand(batch, 3, pair.side, pair.side)
    target = torch.randn(batch, 1)
    found, wanted = mean_logits(ours, x.double()), mean_logits(exact, x.double())
    for logits in (found, wanted):
        (logits * target).square().mean().backward()
    keys, named, held = reference_keys(ours), dict(exact.named_parameters()), dict(exact.named_buffers())
    gradients = {
        name: apart(p.grad, named[keys[name]].grad.reshape(p.shape))
        for name, p in ours.named_parameters()
        if not in_front_of_norm(name)
    }
    worst = max(gradients, key=gradients.__getitem__)
    statistics = max(apart(b, held[keys[name]]) for name, b in ours.named_buffers() if "running" in name)
    counts = [sum(p.numel() for p in net.parameters()) for net in (ours, exact)]
    with torch.no_grad():
        rounded, also = mean_logits(fast, x), mean_logits(plain, x)
    print(
        f"{pair.name}: {counts[0]:,} parameters, published {counts[1]:,}, of them {without_gradient(exact):,} in no sum"
        f"\n  float64: logits, up to {wanted.abs().max():.2f}, apart by {(found - wanted).abs().max():.1e}; gradients "
        f"by {gradients[worst]:.1e} of the largest ({worst}); running statistics by {statistics:.1e}"
        f"\n  float32: logits apart from float64 by {(rounded - wanted).abs().max():.1e}, the published code's by "
        f"{(also - wanted).abs().max():.1e}",
        flush=True,
    )


def mean_logits(net: nn.Module, x: Tensor) -> Tensor:
    """[B, classes], the mean over the steps."""
    if isinstance(net, SpikingNetwork):
        return net(x).mean(0)
    from spikingjelly.activation_based import functional

    functional.reset_net(net)
    logits = net(x)
    return logits[0] if isinstance(logits, tuple) else logits


def in_front_of_norm(name: str) -> bool:
    """A bias in front of a BatchNorm, whose gradient is 0 but for what is rounded."""
    return name.endswith("conv.bias")


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spikformer", type=Path, help="the folder of ZK-Zhou/spikformer")
    parser.add_argument("--sdt", type=Path, help="the folder of BICLab/Spike-Driven-Transformer")
    parser.add_argument("--only", default="", help="networks whose names have this in them")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=64, help="of the images for ImageNet's networks")
    given = parser.parse_args()
    if given.spikformer is None and given.sdt is None:
        parser.error("expected --spikformer DIR or --sdt DIR, got neither")
    stand_ins()
    for pair in pairs(given.spikformer, given.sdt, given.side):
        if given.only in pair.name:
            compared(pair, given.batch)


if __name__ == "__main__":
    main()
