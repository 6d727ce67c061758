"""Continues prompts with onnxruntime-genai, which reads the same folder as our own sessions.

    pip install -e ".[genai]"
    python examples/generate_genai.py run "The old man" "A" --max-new-tokens 20
    python examples/generate_genai.py run "The old man" "A" --compare --json out.json

onnxruntime-genai makes the mask of a batch itself: the pad tokens at the end of a row are padding, all others are not,
those on the left neither. So `continuations` pads on the right, with a token that none of its prompts ends with;
`unpadded` gives the prompts of a batch that was padded on any side. --compare counts the tokens that differ from those
of our own session, of each prompt alone and of all as one padded batch; exits with 1 when any does.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcal_compiler.errors import DataError
from tcal_compiler.runtime.run_folder import RunFolder
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.variants import model_file, require_variant, run_tokenizer


def unpadded(ids: NDArray[np.integer], mask: NDArray[np.integer]) -> list[list[int]]:
    """The prompts in ids [B, T] of a tokenizer that pads on any side: the tokens where mask [B, T] is not 0."""
    if ids.shape != mask.shape or ids.ndim != 2 or not mask.any(1).all():
        found = f"ids {ids.shape} with mask {mask.shape}, {[int(r.sum()) for r in mask]} tokens"
        raise DataError("batch", f"needs a mask of its shape and a token in every row; found {found}", "both [B, T]")
    return [row[real != 0].tolist() for row, real in zip(ids, mask, strict=True)]


def padding_token(vocabulary: int, prompts: Sequence[Sequence[int]]) -> int:
    """The last token that no prompt ends with; genai takes 32 prompts at most."""
    ends = {prompt[-1] for prompt in prompts}
    return next(i for i in reversed(range(vocabulary)) if i not in ends)


def continuations(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy continuations of prompts of any lengths, in one batch; a row ends behind the end token, which it keeps.

    Raises DataError where a student without an end token gives the token that pads, since genai ends the row there.
    """
    import onnxruntime_genai as genai

    given = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    pad, eos = padding_token(given["vocab_size"], prompts), given.get("eos_token_id")
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"pad_token_id": pad}}))
    model = genai.Model(config)
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=longest + count, do_sample=False, batch_size=len(prompts))
    generator = genai.Generator(model, options)
    generator.append_tokens(ids)
    tokens: list[list[int]] = [[] for _ in prompts]
    while not generator.is_done():
        generator.generate_next_token()
        for row, token in zip(tokens, generator.get_next_tokens(), strict=True):
            if eos is None or eos not in row:
                row.append(int(token))
    if eos is None and any(pad in row for row in tokens):
        raise DataError("onnxruntime-genai", f"ends a row at token {pad}, with which it pads", "tcal generate")
    return tokens


def compare(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> dict[str, Any]:
    """Tokens that differ from our own session's, which continues each prompt alone."""
    import onnxruntime
    import onnxruntime_genai as genai

    session = OnnxSession(folder, threads=1)
    expected = []
    for prompt in prompts:
        session.reset()
        expected.append(list(session.generate(prompt, count, eos=session.eos_token_id)))
    alone = [continuations(folder, [p], count)[0] for p in prompts]
    found = [*zip(alone, expected, strict=True), *zip(continuations(folder, prompts, count), expected, strict=True)]
    wrong = sum(sum(a != b for a, b in zip(got, own, strict=False)) + abs(len(got) - len(own)) for got, own in found)
    versions = f"{onnxruntime.__version__}, onnxruntime-genai {genai.__version__}"
    row = {"onnxruntime": versions, "tokens_that_differ": wrong, "passed": wrong == 0}
    return {
        "prompt_lengths": [len(p) for p in prompts],
        "tokens": 2 * sum(map(len, expected)),
        "distinct_tokens": len({token for tokens in expected for token in tokens}),
        "runtimes": [row],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("prompt", nargs="+")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--dtype", choices=["fp16", "int8", "int4"], help="which export; default float32")
    p.add_argument("--compare", action="store_true", help="with our own session's tokens")
    p.add_argument("--json", type=Path, help="of --compare")
    args = p.parse_args()
    with RunFolder.open_existing(args.run) as run:
        run.require("export")
        if args.dtype is not None:
            require_variant(run, args.dtype)
        tokenizer, folder = run_tokenizer(run), run.path / model_file(args.dtype).parent
        plan, profile = run.manifest.plan, run.record("export").evidence["profile"]
    prompts = [tokenizer.encode(text, special=True) for text in args.prompt]
    if not args.compare:
        for text, tokens in zip(args.prompt, continuations(folder, prompts, args.max_new_tokens), strict=True):
            print(text + tokenizer.decode(tokens))
        return
    found = compare(folder, prompts, args.max_new_tokens)
    print(found)
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        found |= {"layers_kept": len(plan["keep"]), "layers_converted": len(plan["convert"]), "profile": profile}
        body = {
            "environment": {"machine": platform.machine(), "commit": commit},
            "runtime_parity": {run.path.name: found},
        }
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    sys.exit(not found["runtimes"][0]["passed"])


if __name__ == "__main__":
    main()
