"""Memory of each process of a small distillation, with all weights in each or with a part in each (distill.shard).

    torchrun --nproc-per-node 2 examples/measure_shards.py [--shard] [--checkpoint-activations]
    python examples/measure_shards.py --estimate 2 [--shard] [--checkpoint-activations]

A Llama with random weights, half of its layers converted, three steps on the CPU with gloo. Per process: the most
memory while it trained, what it had before, both models in it, and what docs/method.md says of it; with --estimate what
`tcal inspect --memory` says that the first of so many processes needs. Prints one line of JSON. With glibc set
MALLOC_MMAP_THRESHOLD_=262144, or memory that was given back still counts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tcal_compiler.config import Config
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.runtime.config import DistillConfig
from tcal_compiler.runtime.distill import distill
from tcal_compiler.runtime.live import capture_live
from tcal_compiler.runtime.meter import Peak
from tcal_compiler.runtime.parallel import SOLO, joined, launched
from tcal_compiler.runtime.student import make_student
from tcal_compiler.stage_memory import memory_needs

SIZES = dict(hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4, vocab_size=8192)
POLICY, TRAIN, HELD, LENGTH, CPU = "uniform:50%", 4, 4, 32, torch.device("cpu")
HERE = {"torch": torch.__version__, "commit": os.environ.get("TCAL_COMMIT", "?")}


def model(options: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=options.layers, tie_word_embeddings=True, **SIZES)


def distillation(options: argparse.Namespace) -> DistillConfig:
    again = options.checkpoint_activations
    return DistillConfig(steps=3, batch=4, shard=options.shard, checkpoint_activations=again, chunk=32)


def estimated(options: argparse.Namespace) -> dict[str, object]:
    calib = {"sequences": TRAIN, "holdout": HELD, "length": LENGTH, "batch": TRAIN}
    settings = {"policy": POLICY, "local_window": 0, "calib": calib, "distill": distillation(options).model_dump()}
    with tempfile.TemporaryDirectory() as folder:
        model(options).save_pretrained(folder)
        needs = memory_needs(folder, config=Config.model_validate(settings), processes=options.estimate)
    peak = next(s.peak_bytes for s in needs.stages if s.stage == "distill")
    return {"processes": options.estimate, "shard": options.shard, "estimated_mb": round(peak / 1e6)} | HERE


def measured(group, options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    capture = capture_live(LlamaForCausalLM(model(options)).eval())
    scan = find_attention(capture)
    student = make_student(capture, scan, choose(scan, POLICY))
    ids = torch.randint(SIZES["vocab_size"], (TRAIN + HELD, LENGTH), generator=torch.Generator().manual_seed(1))
    config = distillation(options)
    counts = torch.ones(TRAIN + HELD, LENGTH - 1, dtype=torch.bool)
    before = psutil.Process().memory_info().rss
    with Peak(CPU) as peak:
        _, curve = distill(student, ids, counts, train=TRAIN, config=config, seed=0, group=group)
    weights, teacher = (sum(p.numel() for p in gm.parameters()) for gm in (student.gm, capture.gm))
    models, state, parts = 4 * (weights + teacher), 4 * teacher + 20 * weights, group.size
    formula = max(state / parts, models * (1 + 1 / parts)) if options.shard else state
    return {
        "processes": group.size,
        "shard": options.shard,
        "student": weights,
        "teacher": teacher,
        "before_mb": [round(b / 1e6) for b in group.each(before, CPU)],
        "peak_mb": [round(b / 1e6) for b in group.each(peak.bytes, CPU)],
        "models_mb": round(models / 1e6),
        "formula_mb": round(formula / 1e6),
        "kl": curve[-1]["kl"],
    } | HERE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--estimate", type=int, metavar="PROCESSES", help="trains nothing")
    options = parser.parse_args()
    if options.estimate:
        print(json.dumps(estimated(options)))
        return
    if not launched():
        print(json.dumps(measured(SOLO, options)))
        return
    with joined(CPU) as group:
        found = measured(group, options)
        if group.rank == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
