"""Triton's interpreter without what it repeats: at each launch, and at each call of a jit function within one, it looks
through the whole of ``triton.language`` for what it has to replace, and with each number that a kernel makes it works
out the type of a block once more: its shape, its name, numpy's type. Here that is done once a process, which saves
half of its time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

_NEW: list[tuple[object, str, object]] = []
"""What is replaced, and by what."""


class _Scope:
    """Ends with a launch; one within another has nothing to restore."""

    active = False

    def __init__(self, module) -> None:
        self.olds = []
        if not _Scope.active:
            for one, name, new in _NEW:
                self.olds.append((one, name, getattr(one, name, module._MISSING)))
                setattr(one, name, new)
            _Scope.active = True
        self.missing = module._MISSING

    def restore(self) -> None:
        for one, name, old in reversed(self.olds):
            if old is self.missing:
                delattr(one, name)
            else:
                setattr(one, name, old)
        if self.olds:
            _Scope.active = False
            self.olds = []


def quicken() -> None:
    """Once a process, before the first launch. A Triton that does this in another way is left as it is."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter as module

        whole = module._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        changed = [(one, name) for one, name, _ in whole._changes]
        _NEW.extend((one, name, getattr(one, name)) for one, name in dict.fromkeys(changed))
        whole.restore()
        module._MISSING  # noqa: B018
        numpy_type, _ = module._get_np_dtype, module.TritonSemantic.broadcast_impl_value
    except (ImportError, AttributeError):
        return
    module._patch_lang = lambda fn: _Scope(module)
    module._get_np_dtype = _once_a_type(numpy_type)
    tl.block_type.__init__ = _once_a_block(tl.block_type.__init__)
    tl.tensor.__init__ = _once_a_shape(tl.tensor.__init__)
    semantic = module.TritonSemantic
    semantic.broadcast_impl_value = _where_shapes_differ(semantic.broadcast_impl_value)


def _once_a_type(numpy_type: Callable) -> Callable:
    """numpy's type of one of Triton's."""
    known: dict[str, Any] = {}

    def remembered(dtype):
        if dtype.name not in known:
            known[dtype.name] = numpy_type(dtype)
        return known[dtype.name]

    return remembered


def _once_a_block(init: Callable) -> Callable:
    """The type of a block: nothing changes it, so two of one shape share all that is in them."""
    known: dict[tuple, dict[str, Any]] = {}

    def remembered(self, element_ty, shape):
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in known:
            init(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    return remembered


def _once_a_shape(init: Callable) -> Callable:
    """A tensor: all but its numbers follows from its type."""
    known: dict[str, dict[str, Any]] = {}

    def remembered(self, handle, type):
        if type.name not in known:
            init(self, handle, type)
            known[type.name] = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}
        vars(self).update(known[type.name], handle=handle, type=type)

    return remembered


def _where_shapes_differ(broadcast: Callable) -> Callable:
    """Two blocks of one shape, or two numbers, are what they are broadcast to."""

    def remembered(self, lhs, rhs):
        blocks = lhs.type.is_block(), rhs.type.is_block()
        if blocks == (False, False) or (all(blocks) and lhs.type.shape.values == rhs.type.shape.values):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return remembered
