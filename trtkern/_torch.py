"""Every private or version-bound name of torch and Triton that this project uses, and what goes around one of them.

``tests/test_torch_names.py`` reads the sources and fails, on any version of torch, for such a name that has no row in
``NAMES``. ``make test-torch TORCH=2.11.0`` tries the rows on another version, with everything else.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

TRIED = ("2.11.0", "2.13.0", "2.14.1")
"""Versions of torch (with Triton 3.6.0 and 3.8.0) that the names were tried on."""


TWO = ("2.11.0", "2.13.0")


class Use(NamedTuple):
    """Why a name is used, the versions of torch on which it was tried, and the one file that may use it, if one."""

    why: str
    tried: tuple[str, ...] = TRIED
    only: str = ""


NAMES: dict[str, Use] = {
    # Functions and classes, by their whole path.
    "torch._C._DisableTorchDispatch": Use(
        "an operator on a subclass itself; see undispatched()", TWO, only="trtkern/_torch.py"
    ),
    "torch.Tensor._make_wrapper_subclass": Use("a tensor whose memory is made when its numbers are wanted", TWO),
    "torch._C._FunctionBase": Use("the apply of a Function, without what is there for transforms", TWO),
    "torch._C._are_functorch_transforms_active": Use(
        "whether torch.func or torch.vmap is active, which shows nowhere else"
    ),
    "torch._C._autograd._get_sequence_nr": Use("the number of the next node: whose layer a node of the graph is"),
    "torch._C._autograd._top_saved_tensors_default_hooks": Use(
        "whether hooks see what is saved for a backward pass: a checkpoint counts it (of 2.11.0 the stub was read)", TWO
    ),
    "torch._C._current_autograd_node": Use("the node whose gradient is being computed"),
    "torch._C._current_graph_task_id": Use("whether a backward pass is running: a checkpoint runs its layers again"),
    "torch._C._disabled_torch_function_impl": Use("a subclass whose methods are those of any tensor", TWO),
    "torch._C._dispatch_key_parse": Use("the key of torch's older vmap, which has no name in Python", TWO),
    "torch._C._dispatch_tls_is_dispatch_key_included": Use("whether that vmap is active (is_grads_batched)", TWO),
    "torch._C._functorch.is_functorch_wrapped_tensor": Use("whether a transform left the tensor behind", TWO),
    "torch._C._is_tracing": Use("torch.jit.is_tracing without its detour, in every call", TWO),
    "torch._C._len_torch_dispatch_stack": Use("whether a TorchDispatchMode wants to see the ops", TWO),
    "torch._C._profiler._ExtraFields_Allocation": Use("the allocations of a profile, for the peak of a step"),
    "torch._C._set_throw_on_mutable_data_ptr": Use("no address of a tensor without memory, but an error", TWO),
    "torch._dynamo.reset": Use("what torch.compiler.reset calls, which imports Dynamo where nothing was compiled"),
    "torch._functorch.eager_transforms": Use(
        "how many torch.func.jvp stand around; see outside()", only="trtkern/_torch.py"
    ),
    "torch.autograd._profiler_enabled": Use("whether a profile wants to see the ops by name", TWO),
    "torch.autograd.Variable._execution_engine": Use("calls what averages gradients behind a backward pass", TWO),
    "torch.autograd.forward_ad._current_level": Use("whether a forward mode is active; in every call", TWO),
    "torch.autograd.forward_ad._set_fwd_grad_enabled": Use(
        "forward mode in the jvp of a Function; see within()", only="trtkern/_torch.py"
    ),
    "torch.compiler._is_exporting_flag": Use("what is_exporting() returns; see exporting()", only="trtkern/_torch.py"),
    "torch.multiprocessing.reductions.StorageWeakRef": Use("whether a storage is still there, without keeping it"),
    "torch.nn.modules.batchnorm._BatchNorm": Use("what every BatchNorm is"),
    "torch.nn.modules.batchnorm._NormBase": Use("what every BatchNorm and InstanceNorm is"),
    "torch.nn.modules.conv._ConvNd": Use("what every convolution is"),
    "torch.nn.modules.module._global_forward_hooks_always_called": Use("a handle's remove() forgets its entry there"),
    "torch.nn.modules.module._global_forward_hooks_with_kwargs": Use("a handle's remove() forgets its entry there"),
    "torch.nn.modules.module._has_any_global_hook": Use(
        "whether there is a hook of all modules, which a step past Module.__call__ would miss", TWO
    ),
    "torch.utils._python_dispatch.TorchDispatchMode": Use("sees every operator, to count what it computes"),
    "torch.utils._pytree.tree_leaves": Use("the tensors in whatever a model takes and gives"),
    "triton.backends.compiler.GPUTarget": Use("what Triton compiles for"),
    "triton.runtime.driver._active": Use("put back after compiling for a GPU that is not here"),
    "triton.runtime.driver.active": Use("the GPU that Triton compiles for"),
    "triton.runtime.driver.set_active": Use("compiles for a GPU that is not here"),
    # Attributes, by what has them.
    "Forward._current_level": Use("whether a forward mode is active, at a tenth of the price of unpack_dual"),
    "Function._dynamo_marked_constant": Use("torch.compiler.assume_constant_result without its import of Dynamo"),
    "Module._apply": Use("what to(), half() and to_empty() call: the flag of a neuron keeps its value through them"),
    "Module._backward_hooks": Use("whether a layer has hooks, which fusing would lose"),
    "Module._backward_pre_hooks": Use("whether a layer has hooks, which fusing would lose"),
    "Module._buffers": Use("a module's own buffers, None among them"),
    "Module._compiled_call_impl": Use("whether Module.compile() compiled it", TWO),
    "Module._forward_hooks": Use("whether a layer has hooks, which fusing would lose"),
    "Module._forward_pre_hooks": Use("whether a layer has hooks, which fusing would lose"),
    "Module._modules": Use("a container's layers by name, to put others in their places"),
    "Module._parameters": Use("a module's own parameters, None among them"),
    "Node._raw_saved_self": Use("the input that average pooling keeps: are these words of spikes?"),
    "Node._saved_*": Use("the settings of that pooling"),
    "Node._sequence_nr": Use("the number of a node: whose layer it is"),
    "Node.next_functions": Use("the graph behind a node; see nodes()", only="trtkern/_torch.py"),
    "OpOverload._schema": Use("which of its arguments an operator writes to", TWO),
    "OpOverload._overloadpacket": Use("the operator whose floating-point operations torch's table counts"),
    "StateDict._metadata": Use("the versions of the modules in a state dict"),
    "Tensor._base": Use("what a tensor is a view of"),
    "Tensor._is_view": Use("whether it is one"),
    "Tensor._version": Use("whether a tensor was changed in place"),
    "UntypedStorage._cdata": Use("which storage it is, also one without memory"),
}
"""Each name with why it is used. An attribute of a function of torch.compile's, of a module, a node of autograd's
graph, an operator, a state dict, a tensor or its storage is named after what has it; ``*`` stands for more than one."""


def exporting() -> bool:
    """Whether torch.export records what happens.

    Not ``torch.compiler.is_exporting()``: Dynamo of torch 2.11 takes that for true in whatever torch.compile traces.
    """
    return torch.compiler._is_exporting_flag


def recording() -> bool:
    """Whether torch.export or torch.jit.trace records what happens, for inputs whose strides will be their own.

    torch.compile is not meant: it looks at the strides of each input, and compiles again for others.
    """
    return exporting() or torch.jit.is_tracing()


@contextmanager
def undispatched() -> Iterator[None]:
    """An operator within sees a subclass with ``__torch_dispatch__`` as the tensor that it is to C++."""
    guard = torch._C._DisableTorchDispatch()
    try:
        yield
    finally:
        del guard


def outside() -> bool:
    """Whether a torch.func.jvp stands around another one."""
    return eager_transforms.JVP_NESTING > 1


@contextmanager
def within(saved: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The saved tensors of a Function as its ``jvp`` computes with them, so that an outer torch.func.jvp sees it.

    torch calls ``jvp`` with forward mode off, by which an outer one would lose its tangents and be silently wrong.
    """
    if not outside():
        yield tuple(saved)
        return
    with forward_ad._set_fwd_grad_enabled(True):
        try:
            # Without the tangents of the inner one: ``jvp`` is handed those.
            primals = tuple(t if t is None else forward_ad.unpack_dual(t).primal for t in saved)
        except RuntimeError as error:  # torch has no batching rule for it
            raise RuntimeError(
                "expected no torch.vmap within two forward modes, got one; take torch.func.grad or jacrev for one of "
                "the two"
            ) from error
        yield primals


def nodes(edges: Iterable[GradientEdge], until: Container[Any] = ()) -> Iterator[Any]:
    """Every node of autograd's graph behind the edges, each once; ``until`` some, behind which none is looked for.

    Edges (``torch.autograd.graph.get_gradient_edge``) and not ``grad_fn``: up to torch 2.11 the ``grad_fn`` of a custom
    Function does not keep the graph, and refuses ``next_functions`` once the tensor that it was taken from is gone.
    """
    todo = [edge.node for edge in edges]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        if node in until:
            continue
        behind = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= behind
        todo += behind
