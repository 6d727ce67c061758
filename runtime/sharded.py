"""Fully sharded data parallelism (FSDP2, torch.distributed.fsdp.fully_shard) of a graph that was split before its head.

Each process keeps one of n parts of every parameter, cut along its first dimension. What lies between two attention
sites is a unit: its parameters are put together when it runs and let go behind it, forward and backward; gradients are
summed into the parts. Parameters that more than one unit uses, or the head, stay together from the beginning of a
forward pass to the end of its backward pass: the head runs on a few tokens at a time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from tcal_compiler.errors import ConfigError
from tcal_compiler.passes.graph import get_tensor, placeholders

from .logits import SplitModel
from .parallel import Group
from .recompute import Recomputed, segments


class _Whole(nn.Module):
    """Body and head as one module: what no unit holds is put together when the body runs, and the head finds it."""

    def __init__(self, body: GraphModule, head: GraphModule | None) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, *args: Any) -> Any:
        return self.body(*args)


class Shards:
    """The parts of a model's parameters that this process holds, and the model that computes with them.

    Attributes:
        model: computes as `split` does; all processes have to run it equally often, with gradients or without.
        parts: name -> this process's rows of the parameter, by which the model computes: [ceil(R / n), ...] of
            [R, ...], fewer or none in the last processes. Changing them in place changes the model.
        shapes: name -> shape of the whole parameter.
    """

    def __init__(
        self,
        split: SplitModel,
        parameters: Mapping[str, nn.Parameter],
        *,
        cuts: Collection[str],
        group: Group,
        recompute: bool = False,
    ) -> None:
        """parameters: those of split's graph by name, which are empty from now on, until `restore`.

        cuts: nodes behind which a unit ends. recompute: as recompute_between.

        Raises ConfigError when a parameter cannot be cut, StageError where recompute_between does.
        """
        from torch.distributed.fsdp import fully_shard  # takes more than a second

        assert isinstance(split.body, GraphModule)
        body = segments(split.body, cuts, "shard")
        _own_parameters(body, split.head)
        names = body.meta["partition_names"]
        units = [n for n in names if next(body.get_submodule(n).parameters(), None) is not None]
        if recompute:
            for name in names:
                setattr(body, name, Recomputed(body.get_submodule(name)))
        whole = _Whole(body, split.head)
        places = {id(p): (m, n) for m in whole.modules() for n, p in m._parameters.items() if p is not None}
        self.group = group
        self._owners = {n: p for n, p in parameters.items() if id(p) in places}  # others take no part in the graph
        self.shapes = {n: p.shape for n, p in self._owners.items()}
        check_weights(self._owners)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # none is written into: `segments`
        mesh = _mesh(next(iter(self._owners.values())).device.type, group)
        modules = [fully_shard(body.get_submodule(n), mesh=mesh) for n in units]
        self._whole = fully_shard(whole, mesh=mesh, reshard_after_forward=False)
        for module in (*modules, self._whole):
            module.set_gradient_divide_factor(1.0)  # sums: losses are divided by the predictions of all processes
            module.set_force_sum_reduction_for_comms(True)
        self._sharded: dict[str, nn.Parameter] = {}
        for name, p in self._owners.items():
            owner, attribute = places[id(p)]
            self._sharded[name] = owner.get_parameter(attribute)
            p.data = p.data.new_empty(0)
        self.parts = {n: p.detach().to_local() for n, p in self._sharded.items()}  # type: ignore[attr-defined]
        self.model = SplitModel(whole, split.head)

    def reset(self) -> None:
        """Lets go what a forward pass has put together. Every forward pass without a backward pass needs it."""
        self._whole.reshard()

    def take(self) -> dict[str, Tensor | None]:
        """Gradients of `parts`, summed over the processes, once; None where no loss reached the parameter."""
        found = {}
        for name, p in self._sharded.items():
            found[name] = None if p.grad is None else p.grad.to_local()  # type: ignore[attr-defined]
            p.grad = None
        return found

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's rows of a tensor that has the shape of parameter `name`."""
        rows = -(-self.shapes[name][0] // self.group.size)
        return whole[self.group.rank * rows : (self.group.rank + 1) * rows]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The tensor of which every process has such a part. All processes have to call it."""
        return self.group.gather(part, self.shapes[name][0])

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the parameters that this was made of the values of the parts. All processes have to call it."""
        for name, p in self._owners.items():
            p.data = self.whole(name, self.parts[name])


def _mesh(device_type: str, group: Group) -> Any:
    """Of all processes. It computes with numbers, also where tensors have no values."""
    from torch.distributed.device_mesh import init_device_mesh

    with _disable_current_modes():
        return init_device_mesh(device_type, (group.size,))


def check_weights(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ConfigError for parameters that cannot be cut, or whose parts would not do as float32 masters."""
    for name, p in parameters.items():
        what = None
        if p.dim() == 0:
            what = "is a single number"
        elif not p.is_contiguous():
            what = f"is not contiguous, with strides {p.stride()}"
        elif p.requires_grad and p.dtype != torch.float32:
            what = f"is {p.dtype}, and sharded training takes float32"
        if what:
            raise ConfigError("distill.shard", f"{name} {what}", "distill.shard = false")


def _own_parameters(body: GraphModule, head: GraphModule | None) -> None:
    """Gives each segment the parameters that it alone uses, in place of handing them to it; and modules of its own.

    Parameter objects stay those of the graph that was split.
    """
    gets = [n for n in body.graph.nodes if n.op == "get_attr" and isinstance(get_tensor(body, n.target), nn.Parameter)]
    users: dict[int, set[str]] = {}
    for get in gets:
        users.setdefault(id(get_tensor(body, get.target)), set()).update(str(u.target) for u in get.users)
    for p in head.parameters() if head else ():
        users.setdefault(id(p), set()).add("head")
    for get in gets:
        names = users[id(get_tensor(body, get.target))]
        if len(names) == 1 and names <= body.meta["partition_names"]:
            for call in list(get.users):
                _hand_over(body, get, call)
    _renew(body)
    for name in body.meta["partition_names"]:
        segment = _renew(body.get_submodule(name))
        for n in [n for n in segment.graph.nodes if n.op == "call_module"]:
            shared = segment.get_submodule(str(n.target))
            setattr(segment, str(n.target), copy.deepcopy(shared, {id(p): p for p in shared.parameters()}))


def _renew(gm: nn.Module) -> GraphModule:
    assert isinstance(gm, GraphModule)
    gm.graph.lint()
    gm.recompile()
    return gm


def _hand_over(body: GraphModule, get: Node, call: Node) -> None:
    """Makes the parameter that body hands to a segment an attribute of the segment."""
    segment = body.get_submodule(str(call.target))
    assert isinstance(segment, GraphModule)
    name = str(get.target).replace(".", "_")
    setattr(segment, name, get_tensor(body, str(get.target)))
    slot, holes = call.args.index(get), placeholders(segment)
    with segment.graph.inserting_after(holes[-1]):
        own = segment.graph.get_attr(name)
    own.meta = dict(holes[slot].meta)
    holes[slot].replace_all_uses_with(own)
    segment.graph.erase_node(holes[slot])
    call.args = (*call.args[:slot], *call.args[slot + 1 :])
    if not get.users:
        body.graph.erase_node(get)
        *parents, last = str(get.target).split(".")
        body.get_submodule(".".join(parents))._parameters.pop(last, None)
