"""Looking at a model and leaving no trace in it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what torch.compile compiled runs as it was: it would compile the hooks as well."""
    # Where nobody has the compiler, this would import it, which takes seconds.
    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with stance, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*there are global hooks on modules")
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, torch.profiler does not announce each start and stop on stderr, unless the user wants that."""
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = "6"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]


@contextmanager
def unchanged(model: nn.Module, *devices: torch.device) -> Iterator[None]:
    """Afterwards mode, attributes, buffers and random state, of the model's devices and ``devices``, are as before."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    values = [(b, b.detach().clone()) for held in buffers for b in held.values() if b is not None]
    places = {*devices, *(t.device for t in (*model.parameters(), *model.buffers()))}
    with torch.random.fork_rng(devices=[place for place in places if place.type == "cuda"]):
        try:
            yield
        finally:
            for module, had, held in zip(modules, attributes, buffers, strict=True):
                vars(module).clear()
                vars(module).update(had)
                module._buffers.clear()
                module._buffers.update(held)
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.data.copy_(value)  # no new version: a graph made before stays valid
            torch.clear_autocast_cache()  # of the weights as they are now
