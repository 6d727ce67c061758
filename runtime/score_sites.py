"""How much each attention site matters on its own: what ar and greedy rank by, and kl takes candidates from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tcal_compiler.errors import RunFolderError, StageError
from tcal_compiler.passes.files import read_small
from tcal_compiler.passes.graph import aten, by_name, fresh, move_to, output_node
from tcal_compiler.passes.json_text import read_json
from tcal_compiler.passes.types import AttentionSite, Capture, Plan, SiteScan

from .calibrate import initialise
from .config import InitName, InitPart
from .durable import write_atomic
from .logits import Losses, SplitModel, compare_all, split_model
from .student import Student, make_student
from .taps import Progress, collect_taps
from .weights import changed_names, load_weights, save_weights


@dataclass(frozen=True)
class SiteScore:
    """What one site's trial model scored; the policies keep the sites with the largest values.

    kl: mean KL(teacher || model), nll: mean negative log likelihood of the model, nats per token.
    """

    index: int
    value: float
    kl: float
    nll: float


def bypassed(gm: GraphModule, site: AttentionSite) -> GraphModule:
    """The teacher without one site's attention: its output projection's result is 0. Parameters are shared."""
    graph, mapped = Graph(), dict[Node, Node]()
    out = graph.graph_copy(gm.graph, mapped)
    graph.output(out).meta = dict(output_node(gm).meta)
    y = mapped[by_name(gm)[site.y]]
    with graph.inserting_after(y):
        zero = graph.call_function(aten.zeros_like.default, (y,))
    y.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)
    return fresh(gm, graph)


@dataclass(frozen=True)
class Trials:
    """Builds the trial model of each site. initial: every site converted and initialised; None where none is needed."""

    capture: Capture
    scan: SiteScan
    policy: str
    initial: Student | None

    def model(self, site: AttentionSite) -> GraphModule:
        """kl: only this site is converted. greedy: every other one is. ar: this site's attention adds nothing."""
        if self.initial is None:
            return bypassed(self.capture.gm, site)
        others = tuple(s.index for s in self.scan.sites if s is not site)
        one = (site.index,)
        plan = Plan(others, one, self.policy) if self.policy == "kl" else Plan(one, others, self.policy)
        return planned_student(self.initial, self.scan, plan).gm


@torch.no_grad()
def planned_student(initial: Student, scan: SiteScan, plan: Plan) -> Student:
    """The initialised student of a plan, with the values that `initial`, where every site is converted, has."""
    student = make_student(initial.capture, scan, plan)
    move_to(student.gm, next(initial.gm.parameters()).device)
    source, target = initial.state_dict(), student.state_dict()
    for name in changed_names(student):
        target[name].copy_(source[name])
    return replace(student, stage="initialised")


def initial_student(
    capture: Capture,
    scan: SiteScan,
    ids: Tensor,
    *,
    init: InitName,
    without: Sequence[InitPart] = (),
    seed: int,
    batch: int,
    cache: Path,
    progress: Callable[[str], Progress],
) -> Student:
    """Every site converted and initialised from ids [N, T], or as `cache` has it; then it is written there.

    A site's initial values depend on the teacher's x and y alone, so they are those that the site gets in any plan.
    """
    student = make_student(capture, scan, Plan((), tuple(s.index for s in scan.sites), "none"))
    device = next(capture.gm.parameters()).device
    move_to(student.gm, device)
    if cache.is_file():
        load_weights(student, cache)
        return student
    groups = collect_taps(
        student,
        capture.gm,
        ids,
        batch=batch,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        spill=cache.parent,
        progress=progress("scores: teacher over the calibration text"),
    )
    bar = progress(f"scores: {init} init of every site")
    student, _ = initialise(student, groups, init=init, without=without, seed=seed, batch=batch, progress=bar)
    unfinished = cache.with_suffix(".new")
    save_weights(student, unfinished, only=changed_names(student))
    unfinished.replace(cache)
    return student


def _read(cache: Path) -> dict[int, SiteScore]:
    if not cache.is_file():
        return {}
    try:
        return {row["index"]: SiteScore(**row) for row in read_json(read_small(cache))}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise RunFolderError(str(cache), f"cannot be read: {e}", "delete it: the sites are then measured again") from e


@torch.no_grad()
def score_sites(
    trials: Trials,
    ids: Tensor,
    *,
    batch: int,
    cache: Path,
    progress: Progress | None = None,
) -> list[SiteScore]:
    """Scores every site's trial model on ids [N, T]; those that `cache` has are not measured again.

    value: KL(teacher || trial model) for kl and ar, which keep the sites that hurt most when they are gone; minus the
    trial model's log perplexity for greedy (GA-S2, arXiv:2606.16429), which keeps those that serve best alone.

    Raises StageError when a score is not finite.
    """
    device = next(trials.capture.gm.parameters()).device
    teacher = split_model(trials.capture.gm)
    parts = [trials.capture.inputs(p.to(device)) for p in ids.split(batch)]
    hidden = [teacher.hidden(p) for p in parts]
    done = _read(cache)
    for number, site in enumerate(trials.scan.sites, start=1):
        if site.index not in done:
            total = sum_losses(split_model(trials.model(site)), teacher, parts, hidden)
            kl, nll = total.kl.item() / total.count, total.nll.item() / total.count
            value = -nll if trials.policy == "greedy" else kl
            done[site.index] = SiteScore(site.index, value, kl, nll)
            if not torch.tensor([kl, nll]).isfinite().all():
                what = f"KL {kl:.4g} and NLL {nll:.4g} of its trial model are not finite"
                raise StageError(f"score, {site.layer or site.anchor}", what, "uniform:N or keep=I,J,...")
            write_atomic(cache, json.dumps([asdict(s) for s in done.values()]).encode())
        if progress:
            progress(number, len(trials.scan.sites))
    return [done[s.index] for s in trials.scan.sites]


def sum_losses(model: SplitModel, teacher: SplitModel, parts: list[tuple[Tensor, ...]], hidden: list[Tensor]) -> Losses:
    """Losses of all predictions; the teacher's hidden states are those given."""
    each = zip(parts, hidden, strict=True)
    first, *rest = (compare_all(model, teacher.with_hidden(h), args) for args, h in each)
    return sum(rest, first)
