"""End-to-end distillation: the whole student learns the teacher's next-token distribution.

N sequences, T tokens, P trained parameters. The teacher's logits are computed in each step, never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tcal_compiler.errors import StageError
from tcal_compiler.passes.rewrite_gdn import MIXERS
from tcal_compiler.passes.site_program import tap_graph
from tcal_compiler.passes.types import AttentionSite

from .config import DistillConfig
from .distill_checks import check_group, check_short, check_train
from .divergence import Objective
from .logits import SUMS, Losses, SplitModel, compare, compiled, in_bfloat16, split_model
from .parallel import SOLO, Gradients, Group
from .recompute import recompute_between
from .sharded import Shards
from .student import Student
from .training import Save, TrainState, batch_indices, learning_rate, products_for
from .weights import site_names

HINT = "lower distill.lr_gdn and distill.lr_other in --config FILE"


def cut(ids: Tensor, counts: Tensor, length: int, start: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Rows [N, T] and counts [N, T - 1] as N * T / length rows of so many tokens, each with `start` in its first ones.

    The prediction of a piece's first token, from the piece before, is no longer there.
    """
    pieces = ids.reshape(-1, length).clone()
    pieces[:, : len(start)] = torch.tensor(start, dtype=ids.dtype)
    return pieces, nn.functional.pad(counts, (0, 1)).reshape(-1, length)[:, :-1]


def _parameter_ids(student: Student, sites: Iterable[AttentionSite]) -> set[int]:
    """id() of every parameter between x and y of the sites."""
    names = site_names(student, sites)
    return {id(p) for n, p in student.gm.named_parameters(remove_duplicate=False) if n in names}


class Distiller:
    """Float32 masters of the trained parameters, optimiser, and the best weights so far."""

    def __init__(
        self,
        student: Student,
        ids: Tensor,
        counts: Tensor,
        *,
        train: int,
        config: DistillConfig,
        group: Group = SOLO,
        start: Sequence[int] = (),
    ) -> None:
        self.student, self.ids, self.counts, self.train, self.config = student, ids, counts, train, config
        self.group, self.start = group, start
        self.device = next(student.gm.parameters()).device
        taps = [s.y for s in student.converted] if config.hidden else []
        self.scored = split_model(student.gm, taps), split_model(student.capture.gm, taps)
        check_train(config, student.plan)
        check_short(config, ids.shape[1])
        check_group(group, config, train)
        sites = _parameter_ids(student, student.converted)
        part = {"all": None, "gdn": sites, "attention": _parameter_ids(student, student.kept)}[config.train]
        self.params: dict[str, nn.Parameter] = {}
        for name, p in student.gm.named_parameters():  # tied ones once
            chosen = p.is_floating_point() and (part is None or id(p) in part)
            if chosen:
                self.params[name] = p
            p.requires_grad_(chosen).grad = None
        group.follow_(p.detach() for p in student.gm.parameters())
        kinds = self._kinds(sites)
        self.shards = self._shards() if config.shard else None
        self.trained = self._training_models()
        parts = self.shards[0].parts if self.shards else {}
        self.held = {n: parts.get(n, p.detach()) for n, p in self.params.items()}  # what the student computes with
        self.masters = {n: t.float() for n, t in self.held.items()}  # of a float32 one: its own memory
        self.rounded = any(t.dtype != torch.float32 for t in self.held.values())
        head = self.scored[0].head
        late = () if head is None else head.parameters()
        self.gradients = self.shards[0] if self.shards else Gradients(self.params, group, late=late)
        self.best = {n: m.clone() for n, m in self.masters.items()}
        self.best_score, self.predictions = math.inf, 0
        groups = [
            {"params": [self.masters[n] for n in names], "lr": rate, "weight_decay": decay}
            for (rate, decay), names in kinds.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type == "cuda")
        self.peaks = [g["lr"] for g in self.optimizer.param_groups]

    def _training_models(self) -> tuple[SplitModel, SplitModel]:
        """Student and teacher as training steps run them."""
        (student, teacher), c = self.scored, self.config
        if c.checkpoint_activations and not self.shards:
            assert isinstance(student.body, GraphModule)
            student = replace(student, body=recompute_between(student.body, [s.y for s in self.student.sites]))
        if c.compile:
            student, teacher = compiled(student, "student"), compiled(teacher, "teacher")
        if c.student_dtype == "bfloat16":
            student = in_bfloat16(student, "student")
        return student, in_bfloat16(teacher, "teacher") if c.teacher_dtype == "bfloat16" else teacher

    def _shards(self) -> tuple[Shards, Shards]:
        """Student and teacher in parts; their graphs have no weights from now on, until `finish`."""
        graphs, cuts = (self.student.gm, self.student.capture.gm), [s.y for s in self.student.sites]
        again = (self.config.checkpoint_activations, False)
        student, teacher = (
            Shards(split, dict(gm.named_parameters()), cuts=cuts, group=self.group, recompute=r)
            for split, gm, r in zip(self.scored, graphs, again, strict=True)
        )
        self.scored = student.model, teacher.model
        return student, teacher

    def _kinds(self, sites: set[int]) -> dict[tuple[float, float], list[str]]:
        """Parameters by learning rate and weight decay: only the teacher's matrices decay."""
        kinds: dict[tuple[float, float], list[str]] = {}
        for n, p in self.params.items():
            rate = self.config.lr_gdn if id(p) in sites else self.config.lr_other
            decay = self.config.weight_decay if p.dim() > 1 and not n.startswith(f"{MIXERS}.") else 0.0
            kinds.setdefault((rate, decay), []).append(n)
        return kinds

    def _rows(self, index: Tensor, short: bool) -> tuple[Tensor, Tensor]:
        """Sequences `index` and their counts, or the pieces that a short step cuts them into."""
        rows = self.ids[index], self.counts[index]
        if not short:
            return rows
        assert self.config.short_length is not None
        return cut(*rows, self.config.short_length, self.start)

    def _compare(self, index: Tensor, *, train: bool = False, short: bool = False) -> Losses:
        """Losses of sequences `index`: with gradients at the training temperature, or at temperature 1.

        Of several processes each computes its share; losses are summed, gradients are those of the share.
        """
        if self.group.size == 1:
            return self._compare_own(self._rows(index, short), train, None)
        total, mine = int(self._rows(index, short)[1].sum()), self.group.part(index)
        ids, counts = self._rows(mine if len(mine) else index[:1], short)  # all have to run a model that is sharded
        losses = self._compare_own((ids, counts if len(mine) else torch.zeros_like(counts)), train, total)
        sums = torch.stack([getattr(losses, n).double() for n in SUMS])
        self.group.sum_([sums])
        return Losses(**dict(zip(SUMS, sums, strict=True)), count=total)

    def _compare_own(self, rows: tuple[Tensor, Tensor], train: bool, total: int | None) -> Losses:
        (ids, counts), c = (r.to(self.device) for r in rows), self.config
        losses = compare(
            *(self.trained if train else self.scored),
            self.student.capture.inputs(ids),
            counts,
            chunk=c.chunk,
            objective=Objective(c.divergence, c.temperature if train else 1.0, c.cross_entropy, c.hidden),
            backward=train,
            total=total,
        )
        for shards in self.shards or ():
            shards.reset()
        return losses

    def step(self, step: int, index: Tensor) -> float:
        """One optimiser step; returns the mean divergence before it, at the training temperature.

        Raises StageError when loss or gradient is not finite; then no weight has changed.
        """
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * learning_rate(step, self.config)
        losses = self._compare(index, train=True, short=self.config.cuts(step))
        for n, gradient in self.gradients.take().items():
            if n in self.masters:
                self.masters[n].grad = gradient
        norm = self._clip()
        loss = losses.means()["divergence"]
        if not math.isfinite(loss) or not bool(norm.isfinite()):
            what = f"step {step + 1}: {self.config.divergence} {loss:.4g}, gradient norm {norm.item():.4g}: not finite"
            raise StageError(self._place(index), what, HINT)
        self.optimizer.step()
        self.optimizer.zero_grad()  # frees the memory for the next backward pass
        self.write(self.masters)
        self.predictions += losses.count
        return loss

    @torch.no_grad()
    def _clip(self) -> Tensor:
        """Scales all gradients alike so that their norm is config.clip at most; returns the norm before."""
        norm = nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])
        if self.shards:
            square = norm.square()
            self.group.sum_([square])
            norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.clip, norm)
        return norm

    @torch.no_grad()
    def _place(self, index: Tensor) -> str:
        """The stage, and the first attention site whose output for one of the sequences is not finite, if any."""
        self.restore()
        sites = sorted(self.student.sites, key=lambda s: s.index)
        taps = tap_graph(self.student.gm, [s.y for s in sites])
        for i in index:
            outputs = taps(*self.student.capture.inputs(self.ids[i][None].to(self.device)))
            for s, y in zip(sites, outputs, strict=True):
                if not bool(y.isfinite().all()):
                    return f"distill, {s.layer or s.anchor}"
        return "distill"

    def score(self) -> dict[str, float]:
        """Mean losses at temperature 1 of the present weights on the held-out sequences; keeps the best weights.

        held_out is the objective; kl (forward) and nll are always there, other terms where the objective has them.
        """
        held, c = torch.arange(self.train, len(self.ids)).split(self.config.batch), self.config
        first, *rest = (self._compare(h) for h in held)
        means = sum(rest, first).means()
        score = means["divergence"] + c.cross_entropy * means["nll"] + c.hidden * means["hidden"]
        if score < self.best_score:  # False for NaN
            self.best_score, self.best = score, {n: m.clone() for n, m in self.masters.items()}
        if not math.isfinite(score):
            what = f"the held-out score is not finite: {', '.join(f'{n} {v:.4g}' for n, v in means.items())}"
            raise StageError(self._place(torch.cat(held)), what, HINT)
        shown = {"kl": True, "nll": True, "divergence": c.divergence != "forward-kl", "hidden": c.hidden > 0}
        return {"held_out": score} | {n: means[n] for n, there in shown.items() if there}

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        """Sets the weights that the student computes with, in the dtype that they have."""
        if values is self.masters and not self.rounded:
            return  # it computes with them
        for n, t in self.held.items():
            t.copy_(values[n])

    def restore(self) -> None:
        """Puts sharded weights together again, in the graphs of student and teacher. All processes have to call it."""
        for shards in self.shards or ():
            shards.restore()

    def finish(self) -> None:
        """Leaves the best weights in the student. It cannot be trained on."""
        self.write(self.best)
        self.optimizer.state.clear()
        self.best.clear()  # before the whole weights need the room
        self.restore()

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """A master, or what has its shape, as the first process writes it; sharded ones are in its memory alone."""
        if not self.shards or name not in self.shards[0].parts:
            return part
        whole = self.shards[0].whole(name, part)
        return whole.cpu() if self.group.rank == 0 else whole[:0].clone()

    def state(self) -> dict[str, Tensor]:
        """Everything that decides later steps, as plain tensors; of sharded weights in the first process alone.

        All processes have to call it. Raises StageError when a weight is not finite.
        """
        bad = torch.stack([m.isfinite().logical_not().any() for m in self.masters.values()]).float()
        self.group.sum_([bad])
        for n, there in zip(self.masters, bad.tolist(), strict=True):
            if there >= 1:
                raise StageError("distill", f"{n} is not finite", HINT)
        out: dict[str, Tensor] = {}
        for n, m in self.masters.items():
            out[f"param.{n}"], out[f"best.{n}"] = self._whole(n, m), self._whole(n, self.best[n])
            for k, v in self.optimizer.state.get(m, {}).items():
                out[f"optimizer.{k}.{n}"] = self._whole(n, v) if v.dim() else v
        out["best_score"] = torch.tensor(self.best_score, dtype=torch.float64)
        out["predictions"] = torch.tensor(self.predictions)
        return out

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Of `state`. Raises KeyError or ValueError for tensors that are missing or of another shape."""

        def take(name: str, shape: torch.Size) -> Tensor:
            if tensors[name].shape != shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}")
            return tensors[name]

        def part(kind: str, name: str) -> Tensor:
            if not self.shards or name not in self.shards[0].parts:
                return take(f"{kind}.{name}", self.masters[name].shape)
            return self.shards[0].part(name, take(f"{kind}.{name}", self.shards[0].shapes[name]))

        none = torch.Size()
        self.best_score, self.predictions = take("best_score", none).item(), int(take("predictions", none).item())
        for n, m in self.masters.items():
            m.copy_(part("param", n))
            self.best[n].copy_(part("best", n))
            if f"optimizer.step.{n}" in tensors:
                slots = {"step": take(f"optimizer.step.{n}", none)}
                slots |= {k: part(f"optimizer.{k}", n) for k in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[m] = {k: v.to(self.device, copy=True) for k, v in slots.items()}
        self.write(self.masters)


def stopped_at(curve: Sequence[Mapping[str, Any]], config: DistillConfig) -> int | None:
    """The step of the curve's last score, if config.patience ended the training there; else None.

    It is a function of the curve, which a checkpoint holds: a resumed run stops where the whole one does.
    """
    if config.patience is None or curve[-1]["step"] == config.steps:
        return None
    best = min(range(len(curve)), key=lambda i: curve[i]["held_out"])  # the first of equals, as Distiller.score keeps
    return curve[-1]["step"] if len(curve) - 1 - best >= config.patience else None


def distill(
    student: Student,
    ids: Tensor,
    counts: Tensor,
    *,
    train: int,
    config: DistillConfig,
    seed: int,
    resume: TrainState | None = None,
    save: Save | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    group: Group = SOLO,
    start: Sequence[int] = (),
) -> tuple[Student, list[dict[str, object]]]:
    """Trains the student on sequences [0, train) of ids [N, T], scores on the rest, leaves the best weights in it.

    counts [N, T - 1] bool: predictions that count, as in `compare`. A score is taken after a step, on the weights that
    are then kept; the starting weights take part, so the student never ends worse than it began. A step's sequences
    depend on seed and step only: a run resumed from `save`'s state gives the same numbers. Returns the student and the
    curve: divergence on the step's sequences before it, and held-out score, KL and NLL; config.patience may end it
    early (`stopped_at`). group: processes that call this alike and share each step's sequences; all end with the same.
    start: the tokens that every sequence begins with (tokenizer.prompt_start), which a cut one's pieces then do too.

    Raises StageError when a loss, a score or a weight to be saved is not finite: the state last saved stays usable; and
    when no held-out prediction counts.
    """
    if not bool(counts[train:].any()):
        what = f"none of the {len(ids) - train} held-out sequences has a prediction that counts"
        raise StageError("distill", what, "a larger calib.holdout, or a longer calibration text")
    trainer = Distiller(student, ids, counts, train=train, config=config, group=group, start=start)
    with products_for(trainer.device):
        try:
            curve = _run(trainer, seed, resume, save, progress)
        finally:
            if isinstance(trainer.gradients, Gradients):
                trainer.gradients.close()
    return replace(student, stage="distilled"), curve


def _run(
    trainer: Distiller,
    seed: int,
    resume: TrainState | None,
    save: Save | None,
    progress: Callable[[int, int, float], None] | None,
) -> list[dict[str, object]]:
    train, config = trainer.train, trainer.config
    state = resume or TrainState(0)
    if resume:
        try:
            trainer.load_state(resume.tensors)
            if not all(isinstance(p.get("held_out"), float) for p in resume.curve):
                raise ValueError("its curve lacks scores")
        except (KeyError, ValueError) as e:  # of another version of this program, or of another model
            what = f"the checkpoint of step {resume.step} does not fit: {e}"
            raise StageError("distill", what, "--restart, which runs every stage anew") from e
    else:
        state.curve.append({"step": 0, "train": None, "predictions": 0, **trainer.score()})
    for step in range(state.step, config.steps):
        if stopped_at(state.curve, config) is not None:
            break
        loss = trainer.step(step, batch_indices(step, sequences=train, batch=config.batch, seed=seed))
        done = step + 1
        if config.scores_after(done):
            state.curve.append({"step": done, "train": loss, "predictions": trainer.predictions, **trainer.score()})
        state.step = done
        if save and config.saves_after(done):
            state.tensors = trainer.state()
            if trainer.group.rank == 0:
                save(state)
        if progress:
            progress(done, config.steps, loss)
    trainer.finish()
    return state.curve
