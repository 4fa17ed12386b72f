"""Private and version-bound names of torch and Triton: all of them stand in one table, and exist on this version."""

import ast
import re
from collections import OrderedDict
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from trtkern._torch import NAMES, TRIED, nodes

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for where in ("trtkern/**/*.py", "kernels/*.py", "bench/*.py") for path in ROOT.glob(where))
PLACES = re.compile(
    r"(torch\.multiprocessing\.reductions|torch\.distributed\.nn|triton\.(backends|runtime|compiler))\b"
)
"""Modules without documentation, whose public names are nobody's promise."""
PYTHON = {"_asdict", "_exit", "_fields", "_make", "_replace"}
OTHERS = ("trtkern/bench/peers/", "trtkern/interop/rockpool.py")
"""Talk to other libraries, with private names of theirs."""
CURE = (
    "use a public name that the lowest torch of pyproject.toml has too; if there is none, add a row to NAMES in "
    "trtkern/_torch.py with the reason and the versions on which `make test-torch TORCH=...` has run it"
)


def holders():
    """Something that has the attributes, for each kind of it in the table."""
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    return {
        "Forward": torch.autograd.forward_ad,
        "Function": torch.compiler.assume_constant_result(lambda: None),
        "Module": nn.Module(),
        "Node": nn.functional.avg_pool2d(x, 2).grad_fn,
        "OpOverload": torch.ops.aten.add.Tensor,
        "StateDict": nn.Linear(1, 1).state_dict(),
        "Tensor": x,
        "UntypedStorage": x.untyped_storage(),
    }


THEIRS = set().union(*(dir(kind) for kind in holders().values())) - set(dir(OrderedDict()))


def exists(name):
    """Whether torch or Triton have what a row stands for."""
    first, *rest = name.split(".")
    if first not in ("torch", "triton"):
        return any(re.fullmatch(rest[0].replace("*", ".*"), found) for found in dir(holders()[first]))
    value, path = import_module(first), first
    for part in rest[:-1]:
        path += "." + part
        value = getattr(value, part) if hasattr(value, part) else import_module(path)
    return rest[-1] in dir(value)  # and is not looked at: Triton's active driver looks for a GPU


class Reader(ast.NodeVisitor):
    """The private and version-bound names of one file, with their lines."""

    def __init__(self, own):
        self.own, self.found, self.paths = own, [], {}

    def note(self, name, node):
        self.found.append((name, node.lineno))

    def visit_Import(self, node):
        for alias in node.names:
            first = alias.name.split(".")[0]
            self.paths[alias.asname or first] = alias.name if alias.asname else first
            self.path(alias.name, node)

    def visit_ImportFrom(self, node):
        for alias in node.names:
            if node.module and not node.level:
                path = f"{node.module}.{alias.name}"
                self.paths[alias.asname or alias.name] = path
                self.path(path, node)

    def path(self, path, node):
        """A dotted path, which is noted where it is one of torch's or Triton's and private."""
        if path.split(".")[0] in ("torch", "triton") and (re.search(r"\._[a-z]", path, re.I) or PLACES.match(path)):
            self.note(path, node)
            return True
        return False

    def visit_Attribute(self, node):
        parts, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            parts.append(value.attr)
            value = value.value
        first = self.paths.get(value.id, value.id) if isinstance(value, ast.Name) else "?"
        if not self.path(".".join([first, *reversed(parts)]), node):
            self.attribute(node.attr, node, own=first == "self" and node.attr in self.own)
            self.visit(node.value)

    def attribute(self, name, node, own=False):
        own = own or name in PYTHON or (name in self.own and name not in THEIRS)
        if (re.match(r"_[a-z]", name, re.I) and not own) or name == "next_functions":
            self.note(f"?.{name}", node)

    def visit_Call(self, node):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("getattr", "hasattr", "setattr"):
            name = node.args[1].values[0] if isinstance(node.args[1], ast.JoinedStr) else node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.attribute(name.value, node)
        if re.fullmatch(r"_?(Sync)?BatchNorm(\dd)?", called) and "bias" in [word.arg for word in node.keywords]:
            self.note("BatchNorm(bias=...)", node)
        self.generic_visit(node)


def own_names(trees):
    """Private names that the project itself gives, anywhere: of functions, classes, variables, attributes, modules."""
    own = {path.stem for path in FILES}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
    return own


def row_of(name):
    """The row of the table that allows a name that was found, or None."""
    if not name.startswith("?."):
        return next((row for row in NAMES if (name + ".").startswith(row + ".")), None)
    attributes = ((row, row.split(".")[1].replace("*", ".*")) for row in NAMES if row.count(".") == 1)
    return next((row for row, pattern in attributes if re.fullmatch(pattern, name.removeprefix("?."))), None)


def read(sources):
    """(file, line, name) of all that is private or version-bound in sources by file."""
    trees = {file: ast.parse(text) for file, text in sources.items()}
    own = own_names(trees.values())
    for file, tree in trees.items():
        reader = Reader(own)
        reader.visit(tree)
        yield from ((file, line, name) for name, line in reader.found)


def objections(found):
    """What is wrong with names that were read, in words."""
    for file, line, name in found:
        row = row_of(name)
        if row is None and not (file.startswith(OTHERS) and name.startswith("?.")):
            yield f"{file}:{line}: {name.removeprefix('?.')} is private or bound to versions of torch or Triton; {CURE}"
        elif row is not None and NAMES[row].only not in ("", file):
            yield f"{file}:{line}: {name.removeprefix('?.')} belongs into {NAMES[row].only}: {NAMES[row].why}"


SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}


def test_every_such_name_has_a_row_and_every_row_is_used():
    found = list(read(SOURCES))
    assert not (wrong := list(objections(found))), "\n".join(wrong)
    idle = set(NAMES) - {row_of(name) for _, _, name in found}
    assert not idle, f"no longer used, so take them out of trtkern/_torch.py: {sorted(idle)}"


def test_every_row_exists_on_this_version():
    gone = [f"{name} ({use.why})" for name, use in NAMES.items() if not exists(name)]
    assert not gone, f"torch {torch.__version__} has no longer: {'; '.join(gone)}"


def test_the_lowest_and_the_pinned_version_were_tried():
    lowest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    for name, use in NAMES.items():
        assert any((tried + ".").startswith(lowest + ".") for tried in use.tried) and pinned in use.tried, name
        assert set(use.tried) <= set(TRIED), name


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._C._hidden()",
        "from torch import _C",
        "import torch._inductor.config",
        "from torch.nn.modules.batchnorm import _LazyNormBase",
        "import torch.nn.modules.batchnorm as norms\nnorms._LazyNormBase",
        "from torch import nn\nnn.modules.pooling._AvgPoolNd",
        "from torch.distributed.nn import functional",
        "import torch\ntorch.distributed.nn.functional.all_reduce",
        "import triton\ntriton.runtime.jit.JITFunction",
        "from torch import nn\nnn.BatchNorm2d(3, bias=False)",
        "def f(node): return node.next_functions",
        "def f(tensor): return tensor._backward_hooks_of_mine",
        "def f(node): return node._raw_saved_other",
        "def f(node): return getattr(node, '_raw_saved_other')",
        "def f(tensor, key): return getattr(tensor, f'_typed_{key}')",
        "class A:\n  def __init__(self): self._is_zerotensor = 1\ndef f(tensor): return tensor._is_zerotensor()",
    ],
)
def test_one_without_a_row_is_found(code):
    assert len(list(objections(read({"trtkern/new.py": code})))) == 1


def test_names_of_our_own_and_of_python_need_none():
    code = (
        "class A:\n  _mine = 1\n  def f(self, b): return self._mine, b._mine, b._replace(c=1), b.__dict__, self._base"
    )
    assert not list(objections(read({"trtkern/new.py": code})))


def test_the_graph_is_walked_when_the_tensor_is_gone():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    def edge():
        x = torch.ones(2, requires_grad=True).exp()
        return torch.autograd.graph.get_gradient_edge(Double.apply(x + Double.apply(x)))

    names = sorted(node.name() for node in nodes([edge(), edge()]))
    assert names == sorted(
        2 * ["DoubleBackward", "DoubleBackward", "AddBackward0", "ExpBackward0", "torch::autograd::AccumulateGrad"]
    )
