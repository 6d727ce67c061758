"""Which attention layers look things up: what the teacher loses on repeated and on fresh text without each of them.

    python examples/copying_layers.py embedded --length 256 --json copying.json

One site's attention is bypassed at a time, its output projection giving 0, as the policy `ar` does. In rows of which a
share repeats earlier stretches (runtime/repeats.py) a prediction counts as repeated when its token and the three
before it are copies, so that the stretch can be recognised, and as fresh when neither the token nor the one before it
is. KL(teacher || trial) is in nats per token, and so is what the negative log likelihood of repeated tokens rises by. A
layer whose KL on repeated text is far above that on fresh text carries copying.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcal_compiler.api import CALIBRATION_TEXT
from tcal_compiler.errors import DataError
from tcal_compiler.progress import Progress
from tcal_compiler.runtime import data
from tcal_compiler.runtime.logits import CHUNK, Losses, SplitModel, compare, split_model
from tcal_compiler.runtime.repeats import repeat_stretches
from tcal_compiler.runtime.score_sites import bypassed
from tcal_compiler.source import Source, open_source

KINDS = ("fresh", "repeated")


def counted(rows: Tensor, repeated: Tensor) -> dict[str, Tensor]:
    """Which predictions of rows [N, T] count as what, [N, T - 1] bool each; repeated: the rows with their copies."""
    copied = (rows != repeated)[:, 1:]
    before = [torch.nn.functional.pad(copied, (n, 0))[:, : copied.shape[1]] for n in (1, 2, 3)]
    return {"fresh": ~copied & ~before[0], "repeated": copied & before[0] & before[1] & before[2]}


def losses(model: SplitModel, teacher: SplitModel, batches: list[tuple[Any, ...]]) -> dict[str, dict[str, float]]:
    """Means per prediction, fresh and repeated; each batch: arguments, the teacher's hidden states, what counts."""
    sums: dict[str, list[Losses]] = {kind: [] for kind in KINDS}
    for args, reference, counts in batches:
        hidden = model.hidden(args)
        known = model.with_hidden(hidden), teacher.with_hidden(reference)
        for kind in KINDS:
            sums[kind].append(compare(*known, args, counts[kind], chunk=CHUNK))
    return {kind: sum(parts, Losses.none(hidden.device)).means() for kind, parts in sums.items()}


@torch.no_grad()
def measured(source: Source, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """The teacher's NLL on fresh and repeated tokens, and what each site's absence does to them."""
    tokenizer = source.tokenizer
    assert tokenizer is not None
    texts = data.read_text(options.calib)
    rows, _ = data.encode_rows(texts, tokenizer, tokenizer.eos_token_id, length=options.length)
    rows = rows[: options.sequences]
    ids = repeat_stretches(rows, options.share, behind=len(data.prompt_start(tokenizer)))
    teacher = split_model(source.capture.gm)
    batches = []
    for own, part in zip(rows.split(2), ids.split(2), strict=True):
        args = source.capture.inputs(part)
        batches.append((args, teacher.hidden(args), counted(own, part)))
    predictions = {kind: sum(int(c[kind].sum()) for *_, c in batches) for kind in KINDS}
    if not all(predictions.values()):
        what = f"{predictions} predictions in {len(rows)} rows of {options.length} tokens"
        raise DataError(str(options.calib), what, "longer rows, more of them, or another --share")
    base = {kind: means["nll"] for kind, means in losses(teacher, teacher, batches).items()}
    bar, sites = progress.bar("sites"), []
    for number, site in enumerate(source.scan.sites, start=1):
        found = losses(split_model(bypassed(source.capture.gm, site)), teacher, batches)
        row = {f"{kind}_kl": found[kind]["kl"] for kind in KINDS}
        sites.append({"site": site.index, **row, "repeated_nll": found["repeated"]["nll"] - base["repeated"]})
        bar(number, len(source.scan.sites))
    return {"copying": sites, "teacher_nll": base, "predictions": predictions}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("teacher")
    p.add_argument("--tokenizer")
    p.add_argument("--calib", type=Path, default=CALIBRATION_TEXT)
    p.add_argument("--sequences", type=int, default=8)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--share", type=float, default=0.3, help="of the tokens that are copies")
    p.add_argument("--json", type=Path)
    options = p.parse_args()
    progress = Progress()
    body = measured(open_source(options.teacher, tokenizer=options.tokenizer, progress=progress), options, progress)
    print("site  KL fresh  KL repeated  NLL repeated")
    for row in body["copying"]:
        print("{site:4}  {fresh_kl:8.4f}  {repeated_kl:11.4f}  {repeated_nll:+12.4f}".format(**row))
    if options.json:
        given = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"}
        given["teacher"] = Path(options.teacher).name
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        environment = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}
        environment |= {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}
        body |= {"arguments": given, "environment": environment}
        options.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
