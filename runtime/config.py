"""Options of the stages: strict, frozen, unknown keys refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tcal_compiler.passes.limits import MAX_PROBE

MOST = 1_000_000  # sequences
MOST_STEPS = 1_000_000_000
LocalWindow = Annotated[int, Field(ge=0, le=MAX_PROBE)]  # tokens; from a mask no longer window is read
LOCAL_WINDOW = 64  # the default


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class CalibConfig(StrictModel):
    """Calibration text. A sequence is `length` consecutive tokens of the tokenised text."""

    text: str | list[str] | None = Field(
        None,
        description="path of a .txt, .jsonl, .jsonl.zst or .parquet file, or datasets:NAME[,CONFIG]@SPLIT[:COLUMN], or "
        "a list of them, with :WEIGHT behind each where their shares are not the same; default: the text that ships",
    )
    sequences: int = Field(64, ge=1, le=MOST, description="number of sequences for statistics and training")
    length: int = Field(512, ge=8, le=1 << 20, description="tokens in a sequence")
    holdout: int = Field(8, ge=1, le=MOST, description="further sequences that only score: never trained on")
    batch: int = Field(8, ge=1, le=MOST, description="sequences in one teacher forward")
    init_sequences: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="how many of the sequences statistics and initialisation use, whose teacher values are then kept; "
        "alignment computes those of all sequences anew in each step, so that there can be any number; default: all",
    )

    repeats: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="share of each sequence's tokens that are copies of stretches from earlier in it, so that training "
        "rewards recall; of the held-out sequences too, whose scores compare at one share only; texts that are scored "
        "by eval stay as they are",
    )

    @model_validator(mode="after")
    def _at_most_all(self) -> CalibConfig:
        if self.init_sequences is not None and self.init_sequences > self.sequences:
            raise ValueError(f"init_sequences is {self.init_sequences}, more than the {self.sequences} sequences")
        return self

    @property
    def kept(self) -> int:
        """Sequences of training whose teacher values are kept."""
        return self.sequences if self.init_sequences is None else self.init_sequences

    @property
    def rows(self) -> int:
        """Sequences of training and, last, those that only score."""
        return self.sequences + self.holdout


class ScoreConfig(StrictModel):
    """What the policies kl, ar, greedy and forward measure."""

    sequences: int = Field(
        8, ge=1, le=MOST, description="calibration sequences, from the end, that each site is scored on"
    )
    align_steps: int = Field(
        200,
        ge=0,
        le=MOST_STEPS,
        description="steps that every site is aligned for before kl and forward measure sets of sites",
    )
    distill_steps: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="steps, with the batch and the rates of [distill], that each candidate set of kl is then distilled "
        "for before it is measured",
    )


InitName = Literal["closed-form", "taylor", "zero-gate", "naive"]
InitPart = Literal["decay", "write-gate", "value-scale", "output-gate", "local-window", "ridge"]
ALL_PARTS: tuple[InitPart, ...] = get_args(InitPart)
INIT_PARTS: dict[InitName, tuple[InitPart, ...]] = {"closed-form": ALL_PARTS, "taylor": ALL_PARTS[:-2]}


def check_parts(init: InitName, without: Sequence[str]) -> None:
    """Raises ValueError for a part that the initialisation does not have, or one that is named twice."""
    parts = INIT_PARTS.get(init, ())
    if missing := [p for p in without if p not in parts]:
        has = f"its parts are {', '.join(parts)}" if parts else f"only {' and '.join(INIT_PARTS)} have parts"
        raise ValueError(f"{init} has no {' or '.join(missing)}; {has}")
    if len(set(without)) < len(without):
        raise ValueError(f"{', '.join(without)} names a part twice")


DivergenceName = Literal["forward-kl", "reverse-kl", "js"]


# what a key of _LATER amounted to before it came, where that is not its default
_BEFORE = {"near_error": 0.0}
# keys of the training stages that came when run folders with such a stage were there already
_LATER = {"divergence", "hidden", "patience", "least_gain", "near_error", "compile", "short_length", "short_share"}


class TrainConfig(StrictModel):
    """What every stage that takes optimiser steps has."""

    steps: int = Field(ge=0, le=MOST_STEPS, description="optimiser steps; 0 skips the stage")
    batch: int = Field(ge=1, le=MOST, description="sequences in a step")
    warmup: int = Field(20, ge=0, le=MOST_STEPS, description="steps of linear warm-up")
    weight_decay: float = Field(ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    score_every: int = Field(50, ge=1, le=MOST_STEPS, description="steps between scores on the held-out slice")
    checkpoint_every: int = Field(
        50, ge=1, le=MOST_STEPS, description="steps between checkpoints that a stopped run resumes from"
    )

    def scores_after(self, steps: int) -> bool:
        """Whether a score is taken when so many steps are done."""
        return steps % self.score_every == 0 or steps == self.steps

    def saves_after(self, steps: int) -> bool:
        """Whether a checkpoint is written when so many steps are done."""
        return steps % self.checkpoint_every == 0 and steps < self.steps

    def settings(self) -> dict[str, object]:
        """What a run folder compares: a key of _LATER only where it is not as before it came, so that older folders
        stay valid."""
        return {
            k: v
            for k, v in self.model_dump().items()
            if k not in _LATER or v != _BEFORE.get(k, type(self).model_fields[k].default)
        }


class AlignConfig(TrainConfig):
    """Layerwise alignment: AdamW on every converted site at once."""

    steps: int = Field(300, ge=0, le=MOST_STEPS, description="optimiser steps; 0 skips the stage")
    batch: int = Field(8, ge=1, le=MOST, description="sequences in a step")
    lr_new: float = Field(
        2e-2, gt=0, description="peak learning rate of gates and norm; of the gates' matrices where x has rms 1/4"
    )
    lr_teacher: float = Field(
        8e-2, gt=0, description="peak learning rate of the teacher's q, k, v and output projections, over their rms"
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of the teacher's projections only")
    near_error: float = Field(
        1.0,
        ge=0,
        description="a site that starts with a held-out error E that is small takes a share of each step: "
        "sqrt(E / near_error), less where a step has few tokens for the numbers that are trained; 0: whole steps",
    )
    noise: float = Field(0.0, ge=0, description="noise on a site's input, as a share of each token's rms")
    clip: float = Field(1.0, gt=0, description="largest gradient norm of one site")
    patience: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="training stops early when the last so many scores together have lowered the mean held-out error "
        "of the weights that are kept by less than least_gain of it; default: never",
    )
    least_gain: float = Field(0.01, ge=0, lt=1, description="share of the error, with patience")


class DistillConfig(TrainConfig):
    """End-to-end distillation on the calibration text but its held-out slice: AdamW on the teacher's distribution."""

    steps: int = Field(0, ge=0, le=MOST_STEPS, description="optimiser steps; 0 skips the stage")
    tokens: int | None = Field(
        None, ge=1, le=1 << 50, description="tokens to train on, instead of steps: rounded up to whole steps"
    )
    batch: int = Field(16, ge=1, le=MOST, description="sequences in a step")
    train: Literal["all", "gdn", "attention"] = Field(
        "all",
        description="gdn: only converted sites with their projections; attention: only the kept softmax sites with "
        "theirs; all: every weight",
    )
    lr_gdn: float = Field(3e-4, gt=0, description="peak learning rate of converted sites with their projections")
    lr_other: float = Field(3e-5, gt=0, description="peak learning rate of every other weight")
    divergence: DivergenceName = Field(
        "forward-kl",
        description="from teacher p to student q: forward-kl is KL(p || q), reverse-kl KL(q || p) with a teacher's "
        "probability of at least e^-100, js half the KL of each to their mean",
    )
    temperature: float = Field(
        1.0, gt=0, description="of both distributions; the divergence is multiplied by its square"
    )
    cross_entropy: float = Field(0.0, ge=0, description="weight of the negative log likelihood beside the divergence")
    hidden: float = Field(
        0.0, ge=0, description="weight of the squared error of each converted site's output, over its mean square"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay of the teacher's matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    teacher_dtype: Literal["captured", "bfloat16"] = Field(
        "captured",
        description="bfloat16: in training steps the teacher's matrix products and attention but its last linear map "
        "run in it; scores are always against the teacher as captured",
    )
    student_dtype: Literal["captured", "bfloat16"] = Field(
        "captured", description="the same for the student's, forward and backward; weights and recurrences stay float32"
    )
    checkpoint_activations: bool = Field(
        False,
        description="keep little of the student's forward pass between attention sites and compute it again: "
        "less memory, more time, the same numbers",
    )
    compile: bool = Field(
        False,
        description="training steps run both models, up to their last linear maps, through torch.compile: faster on a "
        "GPU, after minutes of compiling; numbers within rounding",
    )
    shard: bool = Field(
        False,
        description="with several processes: each keeps its part of weights, masters and optimiser state (FSDP2), "
        "instead of all; less memory, the same numbers within rounding",
    )
    patience: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="scores in a row without a better one after which training stops early; default: never",
    )
    chunk: int = Field(1024, ge=1, le=1 << 30, description="predictions whose logits are in memory at once")
    short_length: int | None = Field(
        None,
        ge=8,
        le=1 << 20,
        description="in some steps the sequences are cut into pieces of so many tokens, each of which begins without "
        "context as a short prompt does; a divisor of calib.length; default: they are never cut",
    )
    short_share: float = Field(0.5, gt=0, le=1, description="share of the steps that cut them, with short_length")

    @model_validator(mode="after")
    def _one_length(self) -> DistillConfig:
        if self.steps and self.tokens:
            raise ValueError("both steps and tokens are given")
        if self.compile and self.checkpoint_activations:
            raise ValueError("both compile and checkpoint_activations are given")
        if self.shard and (self.compile or self.hidden):
            raise ValueError(f"both shard and {'compile' if self.compile else 'hidden'} are given")
        return self

    @property
    def active(self) -> bool:
        return bool(self.steps or self.tokens)

    def settings(self) -> dict[str, object]:
        """As of TrainConfig, but shard: like the number of processes, it may change when a stopped run goes on."""
        return {k: v for k, v in super().settings().items() if k != "shard"}

    def trial(self, steps: int) -> DistillConfig:
        """The same with a schedule for so few steps, of which a third at most is warm-up, scored at their ends alone.

        Nor is it compiled, which takes longer than the steps, or shared by processes.
        """
        own = {"steps": steps, "tokens": None, "warmup": min(self.warmup, steps // 3), "score_every": max(steps, 1)}
        return self.model_copy(update=own | {"patience": None, "compile": False, "shard": False})

    def cuts(self, step: int) -> bool:
        """Whether step `step`, from 0, cuts its sequences: evenly spread over the steps."""
        return self.short_length is not None and int((step + 1) * self.short_share) > int(step * self.short_share)

    def in_steps(self, length: int) -> DistillConfig:
        """The same with `tokens` turned into steps for sequences of `length` tokens."""
        if self.tokens is None:
            return self
        return self.model_copy(update={"steps": -(-self.tokens // (self.batch * length)), "tokens": None})


class ExportConfig(StrictModel):
    """Deployed form."""

    profile: Literal["ort", "standard", "cuda"] = Field(
        "ort",
        description="ort: com.microsoft operators, LinearAttention with a Scan function as fallback; standard: "
        "operators of ONNX itself alone; cuda: as ort, with float16 products and caches and float32 recurrent states",
    )
    opset: int = Field(21, ge=21, le=27, description="ONNX opset, 21 to 24; of profile standard always 27")
    float32_layers: int | None = Field(
        None,
        ge=0,
        le=100_000,
        description="of profile cuda: so many layers, from the first, stay float32, weights too, caches not; default: "
        "the fewest of none, a tenth, a fifth and two fifths with which the student's KL is within its bound",
    )
    max_length: int = Field(8192, ge=16, le=1 << 30, description="context length written into genai_config.json")
    bounded_windows: bool = Field(
        True, description="sliding-window layers keep their window alone; false: all positions, for onnxruntime-genai"
    )

    @model_validator(mode="before")
    @classmethod
    def _opset_of_standard(cls, values: object) -> object:
        standard = isinstance(values, dict) and values.get("profile") == "standard"
        return {"opset": 27} | values if standard else values  # type: ignore[operator]

    def float32_layer_counts(self, layers: int) -> tuple[int, ...]:
        """What to try of a student with so many layers, in this order, until it is within its bound."""
        if self.profile != "cuda" or self.float32_layers is not None:
            return (self.float32_layers or 0,)
        return tuple(dict.fromkeys(-(-layers * tenths // 10) for tenths in (0, 1, 2, 4)))

    @model_validator(mode="after")
    def _float32_layers_of_cuda(self) -> Self:
        if self.float32_layers is not None and self.profile != "cuda":
            raise ValueError("float32_layers are for profile cuda: the other profiles are float32 throughout")
        return self
