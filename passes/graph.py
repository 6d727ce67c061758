"""Small questions about fx graphs of aten ops, shared by all passes."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

SHAPE_ONLY = {
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.empty_like.default,
    aten.new_empty.default,
}
LAYOUT = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
}
LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default}


def inputs(node: Node) -> list[Node]:
    """Nodes among the arguments, in order, with repeats."""
    return [a for a in torch.utils._pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, Node)]


def value(node: Node) -> Any:
    """The fake value that the exporter left on the node, or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def is_tensor(node: Node) -> bool:
    v = value(node)
    return isinstance(v, Tensor) or (isinstance(v, list | tuple) and any(isinstance(t, Tensor) for t in v))


def by_name(gm: GraphModule) -> dict[str, Node]:
    return {n.name: n for n in gm.graph.nodes}


def placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def output_node(gm: GraphModule) -> Node:
    return next(n for n in reversed(list(gm.graph.nodes)) if n.op == "output")


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument of a node by its name in the op's schema, or in the function's signature."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else inspect.signature(node.target).parameters  # type: ignore[arg-type]
    for i, known in enumerate(names):
        if known == name:
            if i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, default)
    return default


def taint(nodes: Iterable[Node], sources: Iterable[Node]) -> set[Node]:
    """Nodes whose tensor *data* depends on the sources; sizes and *_like tensors do not carry it."""
    out = set(sources)
    for n in nodes:
        if n.op in ("call_function", "call_module", "call_method") and n.target not in SHAPE_ONLY and is_tensor(n):
            if any(i in out for i in inputs(n)):
                out.add(n)
        elif n.target is operator.getitem and n.args[0] in out:
            out.add(n)
    return out


def backward_slice(target: Node, stop: Node, within: set[Node] | None = None) -> set[Node]:
    """Nodes that target is computed from, target included, not passing `stop` nor leaving `within`."""
    seen: set[Node] = set()
    stack = [target]
    while stack:
        n = stack.pop()
        if n in seen or n is stop or (within is not None and n not in within):
            continue
        seen.add(n)
        stack += inputs(n)
    return seen


def is_mutation(node: Node) -> bool:
    """An op that writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def is_effect(node: Node) -> bool:
    """What dead-code elimination must keep; SDPA counts as random and would otherwise never be removed."""
    return node.op in ("placeholder", "output") or is_mutation(node)


def fresh(root: nn.Module, graph: Graph) -> GraphModule:
    """A clean GraphModule that owns `graph`, without dead nodes; parameters are shared with `root`."""
    graph.eliminate_dead_code(is_impure_node=is_effect)
    graph.lint()
    return GraphModule(root, graph)


def copy_module(gm: GraphModule) -> GraphModule:
    """An independent GraphModule: own graph, parameters and submodules; ties, node names and meta kept."""
    root = nn.Module()
    called = sorted({str(n.target) for n in gm.graph.nodes if n.op == "call_module"})
    for path in called:
        set_module(root, path, copy.deepcopy(gm.get_submodule(path)))
    memo: dict[int, Any] = {}
    for name, tensor in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        if any(name.startswith(f"{path}.") for path in called):
            continue
        if id(tensor) not in memo:
            data = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        set_tensor(root, name, memo[id(tensor)])
    graph = Graph()
    out = graph.graph_copy(gm.graph, {})
    graph.output(out).meta = dict(output_node(gm).meta)
    for n in gm.graph.nodes:  # plain tensors that are neither parameters nor buffers
        if n.op == "get_attr" and not has_tensor(root, str(n.target)):
            set_tensor(root, str(n.target), get_tensor(gm, str(n.target)))
    return GraphModule(root, graph)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for p in parents:
        if not hasattr(root, p):
            root.add_module(p, nn.Module())
        root = root.get_submodule(p)
    root.add_module(last, module)


def set_tensor(root: nn.Module, path: str, tensor: Tensor) -> None:
    """Registers a parameter or buffer under a dotted path, making the modules between."""
    *parents, last = path.split(".")
    for p in parents:
        if not hasattr(root, p):
            root.add_module(p, nn.Module())
        root = root.get_submodule(p)
    if last in root._parameters:
        root._parameters[last] = tensor  # type: ignore[assignment]
    elif isinstance(tensor, nn.Parameter):
        root.register_parameter(last, tensor)
    else:
        root.register_buffer(last, tensor)


def get_tensor(root: nn.Module, path: str) -> Tensor:
    *parents, last = path.split(".")
    return getattr(root.get_submodule(".".join(parents)), last)


def has_tensor(root: nn.Module, path: str) -> bool:
    try:
        get_tensor(root, path)
    except AttributeError:
        return False
    return True


def _drop_guards_and_pytrees(gm: GraphModule) -> None:
    for n in list(gm.graph.nodes):
        if "_guards_fn" in str(n.target):
            gm.graph.erase_node(n)
    gm.graph.set_codegen(CodeGen())


def from_program(program: torch.export.ExportedProgram) -> GraphModule:
    """An exported program as a plain GraphModule: no guards, no pytrees, one tensor out, ties restored."""
    gm = program.module()
    assert isinstance(gm, GraphModule)
    _drop_guards_and_pytrees(gm)
    out = output_node(gm)
    result = torch.utils._pytree.tree_leaves(out.args[0])
    out.args = (result[0],) if len(result) == 1 else (tuple(result),)
    return retie(fresh(gm, gm.graph))


def retie(gm: GraphModule) -> GraphModule:
    """Parameters that share storage become one Parameter again (torch.export.load separates them)."""
    first: dict[tuple[Any, ...], nn.Parameter] = {}
    for module in gm.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.numel():
                key = (p.data_ptr(), p.shape, p.stride(), p.dtype)
                module._parameters[name] = first.setdefault(key, p)
    return gm


def module_path(node: Node) -> str:
    """The innermost module that the node was traced in, as a path without the exporter's wrapper."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [v[0] if isinstance(v, tuple) else str(v) for v in stack.values()]
    path = max(paths, key=len, default="")
    return path.removeprefix("L['self'].")


def iter_targets(gm: GraphModule, *targets: Any) -> Iterator[Node]:
    return (n for n in gm.graph.nodes if n.op == "call_function" and n.target in targets)


def _rewrite_literals(gm: GraphModule, swap: Callable[[Any], Any]) -> None:
    for n in gm.graph.nodes:
        n.args = torch.fx.node.map_aggregate(n.args, swap)
        n.kwargs = torch.fx.node.map_aggregate(n.kwargs, swap)
    gm.recompile()


def widen_to_float64(gm: GraphModule) -> GraphModule:
    """A copy that computes in float64 throughout, also where the graph names another float (norms do)."""
    wide = copy_module(gm)
    for n in wide.graph.nodes:  # zeros(..), full(..): made in the default dtype, which no literal names
        schema = getattr(n.target, "_schema", None)
        makes = n.op == "call_function" and schema is not None and any(a.name == "dtype" for a in schema.arguments)
        if makes and not any(is_tensor(i) for i in inputs(n)) and getattr(value(n), "dtype", None) in _FLOATS:
            n.kwargs = n.kwargs | {"dtype": torch.float64}
        elif n.op == "call_function" and schema is not None and not makes:
            _widen_numbers(wide.graph, n)
    _rewrite_literals(wide, lambda a: torch.float64 if isinstance(a, torch.dtype) and a in _FLOATS else a)
    return wide.double()


def _widen_numbers(graph: Graph, n: Node) -> None:
    """Whole numbers and Python's floats make the default dtype, as in steps * -0.5 or where(seen, 0.0, -inf)."""
    given = [i for i in inputs(n) if is_tensor(i)]
    if not given or getattr(value(n), "dtype", None) not in _FLOATS or any(value(i).is_floating_point() for i in given):
        return
    with graph.inserting_before(n):
        for i in given:
            if value(i).dtype != torch.bool:
                n.replace_input_with(i, graph.call_function(aten.to.dtype, (i, torch.float64)))
    with graph.inserting_after(n):
        wide = graph.call_function(aten.to.dtype, (n, torch.float64))
    wide.meta = n.meta | {"val": value(n).double()}
    n.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def move_to(gm: GraphModule, device: torch.device) -> GraphModule:
    """Moves parameters, and the devices that the graph names, in place."""
    _rewrite_literals(gm, lambda a: device if isinstance(a, torch.device) else a)
    return gm.to(device)
