"""The networks of six papers as their authors published them, out of a folder that the reader has fetched.

    git clone https://github.com/ZK-Zhou/spikformer FOLDER/ZK-Zhou+spikformer    # and the others of ``NETWORKS``

SpikingJelly's own repository is among them: its release 0.0.0.0.12, which papers' code imports, is taken out of its
history, with the backend torch in place of cupy. What else is missing (bits of timm, einops, neurons in CUDA) is here.
"""

import importlib
import io
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

LIBRARY = "fangwei123456+spikingjelly"
RELEASE = "1171f524"
"""The commit of 0.0.0.0.12."""
SEW, SPIKFORMER = "fangwei123456+Spike-Element-Wise-ResNet", "ZK-Zhou+spikformer"
SDT, QKFORMER = "BICLab+Spike-Driven-Transformer", "zhouchenlin2096+QKFormer"
TET, TRT = "Gus-Lab+temporal_efficient_training", "ZBX05+Temporal-Regularization-Training"


class Anything(ModuleType):
    """A module that is not there: whatever is imported from it is a function that returns what it is given."""

    __path__ = ()
    __all__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *given, **_: given[0] if given else None


class DropPath(nn.Identity):
    """timm's, with a rate of 0."""

    def __init__(self, rate=0.0):
        super().__init__()
        assert rate == 0


def stand_ins():
    """timm, einops and what only training needs, by name."""
    models = ("layers", "registry", "vision_transformer", "helpers")
    names = ["timm", "timm.models", *(f"timm.models.{name}" for name in models), "einops", "einops.layers"]
    names += ["einops.layers.torch", "torchinfo", "tqdm", "tensorboardX"]
    made = {name: Anything(name) for name in names}
    layers = made["timm.models.layers"]
    layers.to_2tuple = lambda x: (x, x)
    layers.trunc_normal_, layers.DropPath = nn.init.trunc_normal_, DropPath
    return made


@contextmanager
def imports(folder, paths):
    """Modules from ``paths`` and the old library, as if this were a process of their own."""
    before = dict(sys.modules)
    ours = [name for name in before if name.partition(".")[0] == "spikingjelly"]
    for name in ours:
        del sys.modules[name]
    sys.modules.update(stand_ins())
    sys.path[:0] = [str(folder), *map(str, paths)]
    try:
        yield
    finally:
        del sys.path[: 1 + len(paths)]
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


def old_library(papers, folder):
    """Release 0.0.0.0.12 in a folder; its neurons take backend='cupy' for torch, and cext has no CUDA."""
    git = ["git", "-C", str(papers / LIBRARY), "archive", RELEASE]
    parts = [f"spikingjelly/{name}" for name in ("__init__.py", "configure.py", "clock_driven")]
    archive = subprocess.run([*git, *parts], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(folder, filter="data")
    (folder / "spikingjelly" / "cext").mkdir()
    (folder / "spikingjelly" / "cext" / "__init__.py").write_text("")
    (folder / "spikingjelly" / "cext" / "neuron.py").write_text(
        "from ..clock_driven import neuron, surrogate\n"
        "class MultiStepIFNode(neuron.MultiStepIFNode):\n"
        "    def __init__(self, **kwargs):\n"
        "        super().__init__(surrogate_function=surrogate.ATan(2.0), **kwargs)\n"
        "class MultiStepParametricLIFNode(neuron.MultiStepParametricLIFNode):\n"
        "    def __init__(self, **kwargs):\n"
        "        super().__init__(surrogate_function=surrogate.ATan(2.0), **kwargs)\n"
    )


def made(papers, folder, repository, place, module, make):
    """make(module) of a file of a paper's repository, in float64."""
    with imports(folder, [papers / repository / place]):
        neuron = importlib.import_module("spikingjelly.clock_driven.neuron")
        neuron.check_backend = lambda backend: None
        torch.manual_seed(0)
        net = make(importlib.import_module(module))
    for layer in net.modules():
        if getattr(layer, "backend", None) == "cupy":
            layer.backend = "torch"
    return net.double()


SMALL = {"embed_dims": 64, "mlp_ratios": 2, "num_classes": 10, "depths": 2, "sr_ratios": 1}
IMAGES = SMALL | {"img_size_h": 32, "img_size_w": 32, "patch_size": 4, "in_channels": 3, "T": 4}
EVENTS = SMALL | {"img_size_h": 128, "img_size_w": 128, "patch_size": 16, "in_channels": 2}
LARGE = SMALL | {"img_size_h": 64, "img_size_w": 64, "patch_size": 16, "in_channels": 3}
TOPOLOGY = (
    "CONV-8-3-1-1_CONVNP-8-3-1-1_CONVAP-8-3-1-1_RES-16-3=3-2=1-1=1_SEWRES~ADD-16-3=3-1=1-1=1_"
    "SEWRES~IAND-16-3=3-1=1-1=1_FC-32_L-10"
)


def trt(module, v_reset=0.0, surrogate="triangle"):
    return module.SNN(TOPOLOGY, 4, (3, 32, 32), 0.0, "tdBN", 1.0, v_reset, 2.0, surrogate, 1.0, True, True)


def sew(module, block="ADD"):
    net = module.SEWResNet(block)
    for layer in net.modules():  # weights at which every layer fires
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.constant_(layer.weight, 2.0)
    return net


def sdt(module, spike_mode):
    return module.SpikeDrivenTransformer(num_heads=4, pooling_stat="0011", spike_mode=spike_mode, **IMAGES)


def qkformer(module):
    return module.spiking_transformer(**IMAGES)


NETWORKS = {
    "TET VGGSNN": (TET, ".", "models.VGG_models", lambda m: m.VGGSNN(), (2, 3, 2, 48, 48)),
    "TET ResNet-19": (TET, ".", "models.resnet_models", lambda m: three_steps(m.resnet19()), (1, 3, 32, 32)),
    "TRT, hard reset": (TRT, ".", "model", trt, (3, 3, 32, 32)),
    "TRT, soft reset": (TRT, ".", "model", lambda m: trt(m, None, "sigmoid"), (3, 3, 32, 32)),
    "SEW, CIFAR10-DVS": (SEW, "cifar10dvs", "smodels", sew, (2, 4, 2, 128, 128)),
    "SEW, DVS Gesture": (SEW, "dvsgesture", "smodels", partial(sew, block="IAND"), (2, 4, 2, 128, 128)),
    "SEW-ResNet-18": (SEW, "imagenet", "sew_resnet", lambda m: m.sew_resnet18(connect_f="ADD"), (2, 3, 64, 64)),
    "Spiking ResNet-18": (SEW, "imagenet", "spiking_resnet", lambda m: m.spiking_resnet18(), (2, 3, 64, 64)),
    "Spikformer, CIFAR10": (
        SPIKFORMER, "cifar10", "model", lambda m: m.Spikformer(num_heads=4, **IMAGES), (2, 3, 32, 32)
    ),
    "Spikformer, CIFAR10-DVS": (
        SPIKFORMER, "cifar10dvs", "model", lambda m: m.Spikformer(num_heads=4, **EVENTS), (2, 4, 2, 128, 128)
    ),
    "Spikformer, ImageNet": (
        SPIKFORMER, "imagenet", "model", lambda m: m.Spikformer(num_heads=4, **LARGE), (2, 3, 64, 64)
    ),
    "SDT": (SDT, ".", "model.spikeformer", partial(sdt, spike_mode="lif"), (2, 3, 32, 32)),
    "SDT, learned decay": (SDT, ".", "model.spikeformer", partial(sdt, spike_mode="plif"), (2, 3, 32, 32)),
    "QKFormer, CIFAR10": (QKFORMER, "cifar10", "model", qkformer, (2, 3, 32, 32)),
    "QKFormer, CIFAR100": (QKFORMER, "cifar100", "model", qkformer, (2, 3, 32, 32)),
    "QKFormer, CIFAR10-DVS": (
        QKFORMER, "cifar10-dvs", "model", lambda m: m.vit_snn(num_heads=8, **EVENTS), (2, 4, 2, 128, 128)
    ),
    "QKFormer, DVS Gesture": (
        QKFORMER, "dvs128-gesture", "model", lambda m: m.vit_snn(num_heads=8, **EVENTS), (2, 4, 2, 128, 128)
    ),
    "QKFormer, ImageNet": (QKFORMER, "imagenet", "qkformer", lambda m: m.QKFormer_10_384(T=2), (1, 3, 224, 224)),
}  # fmt: skip


def three_steps(net):
    net.T = 3  # which TET's training sets
    return net


def folder_of(environment):
    """Where the papers are, or None."""
    named = environment.get("TRTKERN_PAPERS")
    return Path(named) if named else None
