"""A tensor whose memory is made when somebody computes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from trtkern._torch import undispatched

_making = RLock()
"""Held while a tensor is made: two threads that ask for it get the same one."""


class Lazy(Tensor):
    """A tensor of known shape, strides, type and place, whose numbers ``make()`` gives: once, to whoever asks first.

    To autograd and to every operator it is the tensor that ``make`` returns: an operator makes it, runs on what was
    made, and gives plain tensors. What is written to it, or to a view of it, is written there. Only shape, strides,
    type, place and what autograd knows of it are had without making it; so it can pass through a layer that has
    another form of its numbers.

    Args:
        make: the numbers, as a tensor in that shape, those strides and that type that nobody else writes to.
        shape, stride, dtype, device: of the tensor.
    """

    # Attributes and methods are those of any tensor: what matters comes to __torch_dispatch__, beneath autograd.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _numbers: _Numbers

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], Tensor],
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Lazy:
        return _wrapped(_Numbers(make), shape, stride, dtype, device)

    @property
    def made(self) -> Tensor:
        """The tensor with the numbers, which this one is from now on. To autograd it is another one."""
        return self._numbers.made()

    @property
    def is_made(self) -> bool:
        """Whether anybody has asked for the numbers."""
        return self._numbers.tensor is not None

    @property
    def is_exposed(self) -> bool:
        """Whether the memory was handed out (``data_ptr``, ``numpy``, ``data``, ...): it may be written to, unseen."""
        return self._numbers.exposed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            (old,) = args
            return _wrapped(old._numbers, old.shape, old.stride(), old.dtype, old.device)
        met: list[Lazy] = []
        given = {name: _opened(value, met) for name, value in (kwargs or {}).items()}
        made = func(*_opened(args, met), **given)
        if func._schema.is_mutable:
            _written(func._schema, args, kwargs or {})
        # What an operator writes to, it returns.
        if isinstance(made, Tensor):
            return _closed(made, met)
        return type(made)(_closed(each, met) for each in made) if type(made) in (tuple, list) else made

    def _follow(self) -> None:
        """Take over a shape that an operator changed in place."""
        made = self.made
        if made.shape != self.shape or made.stride() != self.stride():
            with undispatched():
                self.set_(made.untyped_storage(), made.storage_offset(), made.shape, made.stride())

    def _plain(self) -> Tensor:
        """The plain tensor of this memory."""
        return self.made.detach().requires_grad_(self.requires_grad)

    def _exposed(self) -> Tensor:
        """The same for whoever goes on with its memory."""
        self._numbers.exposed = True
        return self._plain()

    def __repr__(self) -> str:  # type: ignore[override]
        # What torch.compile puts in place of numbers prints itself.
        return super().__repr__() if type(self.made) is Tensor else repr(self.made)

    # What torch does without its dispatcher.

    def data_ptr(self) -> int:
        return self._exposed().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        if torch.compiler.is_compiling():  # which asks for what is flattened apart from this
            return super().untyped_storage()
        return self._exposed().untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        return self._exposed().numpy(force=force)

    def tolist(self) -> Any:
        return self.made.tolist()

    def __dlpack__(self, **settings: Any) -> Any:
        return self._exposed().__dlpack__(**settings)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._exposed().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            return super().__deepcopy__(memo)  # which refuses
        plain = self._plain()
        plain.grad = self.grad
        return copy.deepcopy(plain, memo)

    @property
    def data(self) -> Tensor:
        """As of any tensor: the same memory, to which writes are not counted."""
        return self._exposed().detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self._numbers = _Numbers(new.detach)
        self._numbers.exposed = True

    # torch.compile takes the numbers for its input.

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["made"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, shape: Any, stride: Any) -> Lazy:
        made = inner["made"]
        new = Lazy(lambda: made, made.shape, made.stride(), made.dtype, made.device)
        new._numbers.made()
        return new


def read(x: Any) -> Any:
    """x; of a lazy tensor the one that was made, or else a new one, which is not kept. Autograd sees neither."""
    return x._numbers.read() if isinstance(x, Lazy) else x


# torch prints a tensor behind the name of its class.
Lazy.__name__ = "tensor"


class _Numbers:
    """What a tensor and those that are detached from it share."""

    __slots__ = ("exposed", "make", "tensor")

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make: Callable[[], Tensor] | None = make
        self.tensor: Tensor | None = None
        self.exposed = False

    def made(self) -> Tensor:
        if self.tensor is None:
            with _making:
                if self.make is not None:
                    self.tensor, self.make = self.make(), None  # with all that it holds
        assert self.tensor is not None
        return self.tensor

    def read(self) -> Tensor:
        make = self.make
        return self.made() if make is None else make()


def _wrapped(
    numbers: _Numbers, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Lazy:
    lazy = Tensor._make_wrapper_subclass(Lazy, shape, strides=stride, dtype=dtype, device=device)
    torch._C._set_throw_on_mutable_data_ptr(lazy)  # to C++ that comes past the dispatcher it would be null
    lazy._numbers = numbers
    return lazy


def _opened(value: Any, met: list[Lazy]) -> Any:
    """An argument of an operator with what was made in place of each lazy tensor, which ``met`` then has."""
    if isinstance(value, Lazy):
        met.append(value)
        return value.made
    if type(value) in (tuple, list):
        return type(value)(_opened(each, met) for each in value)
    return value


def _written(schema: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """An operator has written to some of its arguments."""
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value: Any = args[i] if i < len(args) else kwargs.get(argument.name)
        several = type(value) in (tuple, list)
        for tensor in value if several else (value,):
            if isinstance(tensor, Lazy):
                tensor._follow()
                # Of a list torch counts the write to each within the operator: to what was made.
                if several and not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)


def _closed(value: Any, met: list[Lazy]) -> Any:
    """What an operator returned; the lazy tensor where it is what was made of it."""
    return next((lazy for lazy in met if lazy.made is value), value)
