"""Times the steps of a stacked alignment: all sites of a model of SmolLM2-135M's sizes and random weights at once.

    python examples/time_alignment.py [--layers 22] [--steps 300] [--batch 8] [--length 512] [--device cuda]
                                      [--kernels 16] [--json FILE]

Every layer is converted, so that --layers are the sites. The teacher's values are computed once, before the clock runs.
--kernels N: after that, the N kernels that take most of five more steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import move_to
from tcal_compiler.runtime.align import GroupTrainer
from tcal_compiler.runtime.calibrate import initialise
from tcal_compiler.runtime.config import AlignConfig
from tcal_compiler.runtime.live import capture_live
from tcal_compiler.runtime.student import make_student
from tcal_compiler.runtime.taps import collect_taps, stored_pairs
from tcal_compiler.runtime.training import batch_indices, products_for

SIZES = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=2048)
HELD_OUT = 8


def trainers(options: argparse.Namespace) -> tuple[list[GroupTrainer], Callable[[int], None]]:
    """The groups of sites, and one step of all of them."""
    torch.manual_seed(0)
    sizes = SIZES if options.hidden == 576 else SIZES | dict(hidden_size=options.hidden, intermediate_size=64)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=options.layers, **sizes)).eval()
    capture = capture_live(model)
    scan = find_attention(capture)
    student = make_student(capture, scan, choose(scan, "none"))
    for gm in (student.capture.gm, student.gm):
        move_to(gm, torch.device(options.device))
    train = 2 * options.batch
    ids = torch.randint(SIZES["vocab_size"], (train + HELD_OUT, options.length))
    groups = collect_taps(student, student.capture.gm, ids, batch=options.batch)
    initialise(student, groups, init="naive", seed=0, batch=options.batch)
    config = AlignConfig(steps=options.steps, batch=options.batch)
    found = [GroupTrainer(student, group, train, config) for group in groups]
    pairs = stored_pairs(groups)

    def step(number: int) -> None:
        values = pairs(batch_indices(number, sequences=train, batch=options.batch, seed=0))
        for trainer, (x, y) in zip(found, values, strict=True):
            trainer.step(number, x, y, 0)

    return found, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 22), ("steps", 300), ("batch", 8), ("length", 512), ("hidden", 576)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", type=int, default=16)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{where} | torch {torch.__version__} | commit {os.environ.get('TCAL_COMMIT', '?')}", flush=True)
    found, step = trainers(options)
    sites = sum(len(t.group.sites) for t in found)
    with products_for(torch.device(options.device)):
        for i in range(3):
            step(i)
        wait()
        begin = time.perf_counter()
        for i in range(options.steps):
            step(i)
        wait()
        seconds = time.perf_counter() - begin
        shape = f"{sites} sites, {options.batch} x {options.length} tokens"
        print(
            f"{shape}: {options.steps} steps in {seconds:.2f} s, {seconds / options.steps * 1e3:.2f} ms each",
            flush=True,
        )
        if cuda and options.kernels:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for i in range(5):
                    step(i)
                wait()
            print(
                profile.key_averages().table(
                    sort_by="cuda_time_total", row_limit=options.kernels, max_name_column_width=70
                )
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(vars(options) | {"device": where, "sites": sites, "seconds": seconds}, file, indent=1)


if __name__ == "__main__":
    main()
