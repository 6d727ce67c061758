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

from tcal_compiler.errors import ConfigError, StageError
from tcal_compiler.passes.rewrite_gdn import MIXERS
from tcal_compiler.passes.site_program import tap_graph
from tcal_compiler.passes.types import AttentionSite, Plan

from .config import DistillConfig
from .divergence import Objective
from .logits import SUMS, Losses, SplitModel, compare, compiled, in_bfloat16, split_model
from .parallel import SOLO, Group
from .recompute import recompute_between
from .student import Student
from .training import Save, TrainState, batch_indices, learning_rate, products_for
from .weights import site_names

HINT = "lower distill.lr_gdn and distill.lr_other in --config FILE"


def check_train(config: DistillConfig, plan: Plan) -> None:
    """Raises ConfigError when the part to train is empty."""
    if config.active and config.train == "attention" and not plan.keep:
        what = f'is "attention", but the plan keeps no softmax site: {len(plan.convert)} are converted'
        raise ConfigError("distill.train", what, '"all" or "gdn", or a policy that keeps some')


def check_group(group: Group, config: DistillConfig, train: int) -> None:
    """Raises ConfigError when the steps cannot be shared by the processes."""
    if group.size == 1:
        return
    if min(config.batch, train) < group.size:
        what = f"a step of {min(config.batch, train)} sequences cannot be shared by {group.size} processes"
        raise ConfigError("distill.batch", what, "a larger distill.batch, or fewer processes")
    if config.hidden:
        what = f"is {config.hidden:g}, but with {group.size} processes there is no such term"
        raise ConfigError("distill.hidden", what, "0, or one process")


def check_short(config: DistillConfig, length: int) -> None:
    """Raises ConfigError when sequences of so many tokens cannot be cut into pieces of distill.short_length."""
    short = config.short_length
    if not config.active or short is None or (short < length and length % short == 0):
        return
    fit = [n for n in range(8, length // 2 + 1) if length % n == 0]
    near = f"{min(fit, key=lambda n: abs(n - short))}, or " if fit else ""
    what = f"is {short}, which does not cut sequences of {length} tokens (calib.length) into equal pieces"
    raise ConfigError("distill.short_length", what, f"{near}a calib.length that is a multiple of it")


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
        self.trained = self._training_models()
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
            p.requires_grad_(chosen)
        group.follow_(p.detach() for p in student.gm.parameters())
        self.masters = {n: p.detach().float() for n, p in self.params.items()}  # of a float32 one: its own memory
        self.best = {n: m.clone() for n, m in self.masters.items()}
        self.best_score, self.predictions = math.inf, 0
        self.optimizer = torch.optim.AdamW(self._groups(sites), fused=self.device.type == "cuda")
        self.peaks = [g["lr"] for g in self.optimizer.param_groups]

    def _training_models(self) -> tuple[SplitModel, SplitModel]:
        """Student and teacher as training steps run them."""
        (student, teacher), c = self.scored, self.config
        if c.checkpoint_activations:
            assert isinstance(student.body, GraphModule)
            student = replace(student, body=recompute_between(student.body, [s.y for s in self.student.sites]))
        if c.compile:
            student, teacher = compiled(student, "student"), compiled(teacher, "teacher")
        if c.student_dtype == "bfloat16":
            student = in_bfloat16(student, "student")
        return student, in_bfloat16(teacher, "teacher") if c.teacher_dtype == "bfloat16" else teacher

    def _groups(self, sites: set[int]) -> list[dict[str, object]]:
        """Parameters by learning rate and weight decay: only the teacher's matrices decay."""
        kinds: dict[tuple[float, float], list[Tensor]] = {}
        for n, p in self.params.items():
            rate = self.config.lr_gdn if id(p) in sites else self.config.lr_other
            decay = self.config.weight_decay if p.dim() > 1 and not n.startswith(f"{MIXERS}.") else 0.0
            kinds.setdefault((rate, decay), []).append(self.masters[n])
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in kinds.items()]

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
        mine, total = self.group.part(index), int(self._rows(index, short)[1].sum())
        losses = self._compare_own(self._rows(mine, short), train, total) if len(mine) else Losses.none(self.device)
        count = torch.tensor(losses.count, device=self.device)
        sums = torch.stack([*(getattr(losses, n).double() for n in SUMS), count.double()])
        self.group.sum_([sums])
        return Losses(**dict(zip(SUMS, sums, strict=False)), count=int(sums[-1]))

    def _compare_own(self, rows: tuple[Tensor, Tensor], train: bool, total: int | None) -> Losses:
        (ids, counts), c = (r.to(self.device) for r in rows), self.config
        return compare(
            *(self.trained if train else self.scored),
            self.student.capture.inputs(ids),
            counts,
            chunk=c.chunk,
            objective=Objective(c.divergence, c.temperature if train else 1.0, c.cross_entropy, c.hidden),
            backward=train,
            total=total,
        )

    def step(self, step: int, index: Tensor) -> float:
        """One optimiser step; returns the mean divergence before it, at the training temperature.

        Raises StageError when loss or gradient is not finite; then no weight has changed.
        """
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * learning_rate(step, self.config)
        for p in self.params.values():
            p.grad = None
        losses = self._compare(index, train=True, short=self.config.cuts(step))
        missing = torch.tensor([p.grad is None for p in self.params.values()], dtype=torch.int64, device=self.device)
        self.group.sum_([missing])
        for (n, p), absent in zip(self.params.items(), missing.tolist(), strict=True):
            here = torch.zeros_like(p) if p.grad is None else p.grad
            self.masters[n].grad = None if absent == self.group.size else here.float()
            p.grad = None
        self.group.sum_(m.grad for m in self.masters.values() if m.grad is not None)
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.config.clip)
        loss = losses.means()["divergence"]
        if not math.isfinite(loss) or not bool(norm.isfinite()):
            what = f"step {step + 1}: {self.config.divergence} {loss:.4g}, gradient norm {norm.item():.4g}: not finite"
            raise StageError(self._place(index), what, HINT)
        self.optimizer.step()
        self.write(self.masters)
        self.predictions += losses.count
        return loss

    @torch.no_grad()
    def _place(self, index: Tensor) -> str:
        """The stage, and the first attention site whose output for one of the sequences is not finite, if any."""
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
        """Sets the student's parameters, in the dtype that they have."""
        for n, p in self.params.items():
            p.copy_(values[n])

    def state(self) -> dict[str, Tensor]:
        """Everything that decides later steps, as plain tensors. Raises StageError when a weight is not finite."""
        for n, m in self.masters.items():
            if not bool(m.isfinite().all()):
                raise StageError("distill", f"{n} is not finite", HINT)
        out = {f"param.{n}": m for n, m in self.masters.items()} | {f"best.{n}": b for n, b in self.best.items()}
        out["best_score"] = torch.tensor(self.best_score, dtype=torch.float64)
        out["predictions"] = torch.tensor(self.predictions)
        for n, m in self.masters.items():
            out |= {f"optimizer.{k}.{n}": v for k, v in self.optimizer.state.get(m, {}).items()}
        return out

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Of `state`. Raises KeyError or ValueError for tensors that are missing or of another shape."""

        def take(name: str, shape: torch.Size) -> Tensor:
            if tensors[name].shape != shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}")
            return tensors[name]

        none = torch.Size()
        self.best_score, self.predictions = take("best_score", none).item(), int(take("predictions", none).item())
        for n, m in self.masters.items():
            m.copy_(take(f"param.{n}", m.shape))
            self.best[n].copy_(take(f"best.{n}", m.shape))
            if f"optimizer.step.{n}" in tensors:
                shapes = {"step": none, "exp_avg": m.shape, "exp_avg_sq": m.shape}
                slots = {k: take(f"optimizer.{k}.{n}", shape) for k, shape in shapes.items()}
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
        curve = _run(trainer, seed, resume, save, progress)
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
            save(state)
        if progress:
            progress(done, config.steps, loss)
    trainer.write(trainer.best)
    return state.curve
