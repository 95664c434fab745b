"""Which linear layers does a model compute with without calling them? An adapter there would have no effect.

Mamba's fused kernels take ``self.out_proj.weight``, for example. The models' own code says so: an expression
``self.name.weight`` in a method of a module is such a read, unless it asks for no more than dtype, device or shape, or
stands in a branch that the module's attributes rule out (``if self.pretraining_tp > 1``). Methods that initialise or
load weights do not count. Code without source is taken to call its layers, and a weight that is read under another name
(``proj = self.proj``) is not seen. torch.nn's own classes are left out: check_base_layer and never_bypass know them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
import textwrap
from collections.abc import Iterable, Iterator
from types import CodeType

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from goat_kernels.peft.base_layer import modules_outside_adapters

#: What may be asked of a weight without computing with it.
_DESCRIPTIONS = {
    *("dtype", "device", "layout", "shape", "size", "stride", "ndim", "dim", "numel", "element_size", "requires_grad"),
    *("is_meta", "is_cuda", "is_floating_point", "data_ptr", "new_empty", "new_zeros", "new_ones", "new_full"),
    "new_tensor",
}
_ASKING = {
    *("isinstance", "hasattr", "getattr", "len", "id", "to", "type_as", "is_tensor", "is_floating_point"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
}
_NOT_FORWARD = re.compile(r"init|reset|load|save|tie|resize|quanti|convert|prune|__")

#: Classes with no forward of a model, and many methods to read.
_NO_MODELS = ("torch.", "transformers.modeling_utils", "transformers.generation.")

#: Reads in code that nothing reaches, which no attribute tells: (class, layer).
_NEVER_REACHED = {("DisentangledSelfAttention", "in_proj")}  # DeBERTa: query_states is None in all of its models


#: ``self.<path>.weight`` in a method, ``[]`` in the path being an index; and the tests around it, with how they must
#: come out for it to be reached.
_Read = tuple[tuple[str, ...], tuple[tuple[ast.expr, bool], ...]]


def weight_readers(model: nn.Module, layers: Iterable[nn.Module]) -> dict[int, tuple[str, bool]]:
    """id of a layer -> where ``model`` reads its weight, such as ``"MambaMixer.forward"``, and whether that is certain.

    Of ``layers`` alone, which are in it and may be adapted. It is certain in transformers' code, on whose models the
    analysis was checked; in other code the method may never run, or the value may not reach the output.
    """
    wanted = {id(layer) for layer in layers}
    found: dict[int, tuple[str, bool]] = {}
    for _, module in modules_outside_adapters(model):
        if isinstance(module, BaseTunerLayer):
            continue
        certain = type(module).__module__.startswith("transformers.")
        for method, reads in _methods(module):
            for path, conditions in reads:
                if (type(module).__name__, path[-1]) in _NEVER_REACHED:
                    continue
                if any(_truth(test, module) is (not outcome) for test, outcome in conditions):
                    continue
                for layer in _resolve(module, path):
                    if id(layer) in wanted:
                        found.setdefault(id(layer), (f"{type(module).__name__}.{method}", certain))
    return found


def _methods(module: nn.Module) -> Iterator[tuple[str, list[_Read]]]:
    """(name, reads) of the methods that ``module`` has, the inherited ones that super() may call included."""
    overridden = set()
    own = vars(module).get("forward")  # a forward that somebody put into this one module
    classes = [{"forward": inspect.unwrap(own)}] if callable(own) else []
    classes += [vars(c) for c in type(module).__mro__ if not c.__module__.startswith(_NO_MODELS)]
    for attributes in classes:
        for name, function in attributes.items():
            function = getattr(function, "__func__", function)
            if name in overridden or not inspect.isfunction(function) or _NOT_FORWARD.search(name):
                continue
            reads, calls_super = _reads(inspect.unwrap(function).__code__)
            if not calls_super:
                overridden.add(name)
            if reads:
                yield name, reads


@functools.lru_cache(maxsize=4096)
def _reads(code: CodeType) -> tuple[list[_Read], bool]:
    """The weights that a function reads of its first argument's children, and whether it mentions super().

    Takes its code: the function itself may hold a model, which the cache would keep.
    """
    try:
        source = textwrap.dedent(inspect.getsource(code))
        definition = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return [], False
    if not isinstance(definition, ast.FunctionDef) or not code.co_argcount:
        return [], False
    found: list[_Read] = []
    _collect(definition, code.co_varnames[0], (), found)
    return found, "super()" in source


def _collect(node: ast.AST, self_name: str, conditions: tuple, found: list[_Read]) -> None:
    if isinstance(node, ast.If | ast.IfExp):
        _collect(node.test, self_name, conditions, found)
        for branch, outcome in ((node.body, True), (node.orelse, False)):
            for child in branch if isinstance(branch, list) else [branch]:
                _collect(child, self_name, (*conditions, (node.test, outcome)), found)
        return
    if isinstance(node, ast.Attribute) and node.attr in _DESCRIPTIONS:
        return
    if isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        return
    if isinstance(node, ast.Call) and _name(node.func) in _ASKING:
        node = node.func  # its arguments are asked about; what a method is called on may be computed with
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _name(node.value.func).endswith("_"):
        return  # changed in place, as Gemma 3n clamps a weight before it calls the layer
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
        path = _path(node.value, self_name)
        if path:
            found.append((path, conditions))
            return
    for child in ast.iter_child_nodes(node):
        _collect(child, self_name, conditions, found)


def _name(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


def _path(node: ast.expr, self_name: str) -> tuple[str, ...]:
    """("a", "[]", "b") of ``self.a[i].b``; empty where the expression is another."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        parts.append(node.attr if isinstance(node, ast.Attribute) else "[]")
        node = node.value
    return tuple(reversed(parts)) if isinstance(node, ast.Name) and node.id == self_name else ()


def _resolve(module: nn.Module, path: tuple[str, ...]) -> list[nn.Module]:
    modules = [module]
    for part in path:
        if part == "[]":
            modules = [child for parent in modules for child in parent.children()]
        else:
            modules = [parent._modules[part] for parent in modules if parent._modules.get(part) is not None]
    return modules


def _truth(test: ast.expr, module: nn.Module) -> bool | None:
    """What ``test`` comes to where ``module``'s attributes and constants decide it; None where they do not."""
    if isinstance(test, ast.BoolOp):
        decides = isinstance(test.op, ast.Or)  # one true part decides an "or", one false part an "and"
        parts = [_truth(part, module) for part in test.values]
        if decides in parts:
            return decides
        return None if None in parts else not decides
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _truth(test.operand, module)
        return None if inner is None else not inner
    try:
        return bool(_value(test, module))
    except Exception:  # whatever a module's attribute does when it is asked
        return None


_COMPARE = {"Eq": "eq", "NotEq": "ne", "Gt": "gt", "GtE": "ge", "Lt": "lt", "LtE": "le", "Is": "is_", "IsNot": "is_not"}


def _value(node: ast.expr, module: nn.Module):
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        compare = getattr(operator, _COMPARE[type(node.ops[0]).__name__])
        return compare(_value(node.left, module), _value(node.comparators[0], module))
    path = _path(node, "self")
    if not path or "[]" in path or "training" in path or "gradient_checkpointing" in path:
        raise LookupError("not decided by the module's attributes")
    value = module
    for part in path:
        if isinstance(inspect.getattr_static(type(value), part, None), property):
            raise LookupError("nothing of the user's is run")
        value = getattr(value, part)
        if isinstance(value, Tensor):
            raise LookupError("no tensor is read")
    return value
