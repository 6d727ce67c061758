"""Continues prompts with onnxruntime-genai, which reads the same folder as our own sessions.

    pip install -e ".[genai]"
    python examples/generate_genai.py run "The old man" "A" --max-new-tokens 20

onnxruntime-genai takes padding on the right of a batch for padding, and nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tcal_compiler.runtime.run_folder import RunFolder
from tcal_compiler.variants import model_file, require_variant, run_tokenizer


def continuations(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy continuations of prompts of any lengths, in one batch; a row ends behind the end token, which it keeps."""
    import onnxruntime_genai as genai

    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    eos, pad = config.get("eos_token_id"), config.get("pad_token_id", 0)
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    model = genai.Model(str(folder))
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
    return tokens


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("prompt", nargs="+")
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--dtype", choices=["fp16", "int8", "int4"], help="which export; default float32")
    args = p.parse_args()
    with RunFolder.open_existing(args.run) as run:
        run.require("export")
        if args.dtype is not None:
            require_variant(run, args.dtype)
        tokenizer, folder = run_tokenizer(run), run.path / model_file(args.dtype).parent
    prompts = [tokenizer.encode(text, special=True) for text in args.prompt]
    for text, tokens in zip(args.prompt, continuations(folder, prompts, args.max_new_tokens), strict=True):
        print(text + tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
