"""What a pass is, and the runner that checks each pass's own claims."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from torch.fx import GraphModule

from tcal_compiler.errors import PassError, TcalError

from .graph import output_node, placeholders, value
from .types import Rejection

log = logging.getLogger("tcal")


@dataclass(frozen=True)
class PassResult:
    """changed: number of rewrites; 0 must mean that the graph is the very same."""

    changed: int
    rejected: tuple[Rejection, ...] = ()


class Pass(Protocol):
    """A frozen dataclass whose fields are its whole configuration; edits gm in place."""

    def run(self, gm: GraphModule) -> PassResult: ...

    def ensures(self, gm: GraphModule) -> None: ...


def border(gm: GraphModule) -> list[tuple[Any, str]]:
    """Dtype and shape of what goes in and comes out."""
    nodes = [*placeholders(gm), *output_node(gm).all_input_nodes]
    return [(getattr(value(n), "dtype", None), str(getattr(value(n), "shape", None))) for n in nodes]


def op_counts(gm: GraphModule) -> Counter[str]:
    return Counter(str(n.target) for n in gm.graph.nodes if n.op in ("call_function", "call_module"))


def run_passes(gm: GraphModule, passes: Sequence[Pass]) -> dict[str, PassResult]:
    """Runs the passes in order on gm.

    Raises PassError when a pass fails, moves the graph's border or says that it changed nothing and did.
    """
    done: dict[str, PassResult] = {}
    for p in passes:
        name, edge, text, ops, start = type(p).__name__, border(gm), str(gm.graph), op_counts(gm), perf_counter()
        try:
            result = done[name] = p.run(gm)
            gm.graph.lint()
            gm.recompile()
            p.ensures(gm)
        except TcalError:
            raise
        except Exception as e:
            raise PassError(f"{name} failed ({type(e).__name__}: {e}); passes so far: {list(done)}") from e
        if border(gm) != edge:
            raise PassError(f"{name} moved the graph's border: {edge} became {border(gm)}")
        if (result.changed == 0) != (str(gm.graph) == text):
            raise PassError(f"{name} miscounted: it says changed={result.changed}")
        after = op_counts(gm)
        diff = {k: after[k] - ops[k] for k in {*ops, *after} if after[k] != ops[k]}
        log.debug("%s %.2fs changed=%d %s", name, perf_counter() - start, result.changed, diff)
    return done
