"""Programs cut out of a graph: what belongs to a site, and what comes from outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcal_compiler.passes.graph import from_program
from tcal_compiler.passes.site_program import cut_program, tap_graph


class Norms(nn.Module):
    """Two layers with norms scaled by 1 + w, and a table that is the same for both."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.randn(8) for _ in range(2))
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        for w in self.scales:
            x = (x.tanh() * (1 + w)).sin() * self.table.cos()
        return x


def test_values_of_parameters_alone_are_made_inside_so_that_like_layers_have_like_programs():
    model = Norms().eval()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gm = from_program(torch.export.export(model, (x,)))
    starts = [n.name for n in gm.graph.nodes if n.target is torch.ops.aten.tanh.default]
    ends = [n.name for n in gm.graph.nodes if n.target is torch.ops.aten.sin.default]
    parts = [cut_program(gm, inputs_from=[a], outputs=[b]) for a, b in zip(starts, ends, strict=True)]
    assert [list(p.params.values()) for p in parts] == [["scales.0"], ["scales.1"]]
    assert parts[0].same_as(parts[1]) and not any(p.outside for p in parts)
    inputs = tap_graph(gm, starts)(x)
    wanted = tap_graph(gm, ends)(x)
    for part, a, b in zip(parts, inputs, wanted, strict=True):
        assert torch.equal(part.gm(a), b)
    parts[0].gm.get_parameter("w0").sum().backward()
    assert gm.get_parameter("scales.0").grad is not None
