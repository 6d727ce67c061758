"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .runtime.config import LOCAL_WINDOW

# typer reads annotations at run time, where `X | None` inside Annotated is fine but needs these names
TeacherArg = Annotated[
    str, typer.Argument(help="exported program, transformers folder, .gguf, module:factory, or embedded")
]
RunArg = Annotated[Path, typer.Argument(help="run folder")]
Out = Annotated[Path, typer.Option("-o", "--out", help="run folder to make or to go on with")]
Policy = Annotated[
    str | None,
    typer.Option(
        help="uniform, kl, ar, greedy or forward with a budget: uniform:8 sites, kl:25%, forward:2MB@8192 of states "
        "and caches behind 8192 tokens, kl:12ms@8192 for the cores in the step behind them, forward:0.05nats of KL at "
        "most; keep=0,4,8; none (convert all); all (convert nothing)"
    ),
]
PlanFile = Annotated[Optional[Path], typer.Option("--plan", help="plan.toml to follow instead of a policy")]  # noqa: UP045
ConfigFile = Annotated[Optional[Path], typer.Option("--config", help="TOML file with any configuration key")]  # noqa: UP045
Init = Annotated[Optional[str], typer.Option(help="closed-form, taylor, zero-gate or naive")]  # noqa: UP045
LocalWindow = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--local-window",
        help=f"tokens of softmax attention beside each converted layer's state, {LOCAL_WINDOW} by default; 0: none",
    ),
]
Calib = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="calibration text: .txt, .jsonl, .jsonl.zst or .parquet, or datasets:NAME[,CONFIG]@SPLIT[:COLUMN]; again "
        "for more, as in a.jsonl:0.7"
    ),
]
Sequences = Annotated[Optional[int], typer.Option("--calib-sequences", help="sequences to calibrate on")]  # noqa: UP045
Length = Annotated[Optional[int], typer.Option("--calib-length", help="tokens in a sequence")]  # noqa: UP045
Steps = Annotated[Optional[int], typer.Option("--align-steps", help="alignment steps; 0 for the initialisation alone")]  # noqa: UP045
DistillSteps = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--distill-steps", help="end-to-end distillation steps after alignment; 0, the default, for none"),
]
DistillTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--distill-tokens", help="distillation by tokens instead of steps"),
]
Batch = Annotated[Optional[int], typer.Option("--batch", help="sequences in an alignment step")]  # noqa: UP045
Profile = Annotated[Optional[str], typer.Option(help="exported model: ort, standard or cuda")]  # noqa: UP045
Opset = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="ONNX opset of the exported model, 21 to 24; of profile standard always 27"),
]
Seed = Annotated[Optional[int], typer.Option(help="seed of everything random")]  # noqa: UP045
Tokenizer = Annotated[Optional[str], typer.Option(help='folder with tokenizer files, or "bytes"')]  # noqa: UP045
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="load a pickled model: runs whatever code its author put in")
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Again = Annotated[bool, typer.Option("--restart", help="run every stage anew")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress on stderr")]
Verbose = Annotated[bool, typer.Option("--verbose", help="progress as a line for every step, with the time")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say plan, time, memory and disk of every stage, and write nothing")
]
Json = Annotated[bool, typer.Option("--json", help="results as JSON on stdout")]
Dtype = Annotated[Optional[str], typer.Option(help="weights of the variant: fp16, int8, int8-caches or int4")]  # noqa: UP045
MaxKl = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--max-kl", help="largest KL to float32, nats per token; 1e-4 fp16, 1e-2 int8, int8-caches, 0.1 int4"),
]
Force = Annotated[bool, typer.Option("--force", help="keep a variant beyond the bound")]
TeacherAgain = Annotated[Optional[str], typer.Option("--teacher", help="where the teacher is now, if it moved")]  # noqa: UP045
