"""Alignment that is stopped and goes on, then a distillation that several processes share.

python examples/stop_and_share.py run --processes 2
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = """
policy = "keep=0"
[calib]
sequences = 8
length = 96
[align]
steps = 200
batch = 4
checkpoint_every = 5
[distill]
batch = 4
score_every = 2
"""
MODULE = "tcal_compiler.cli"  # what the command `tcal` runs


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--teacher", default="examples.tiny_torch_teacher:factory")
    p.add_argument("--processes", type=int, default=2)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config, run = args.out / "tcal.toml", args.out / "run"
    config.write_text(SETTINGS)
    align = [sys.executable, "-m", MODULE, "align", args.teacher, "--tokenizer", "bytes"]
    align += ["--config", str(config), "-o", str(run)]

    child = subprocess.Popen(align)
    while child.poll() is None and not list(run.glob(".scratch/align/*/align.safetensors")):
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)  # Ctrl-C
    print(f"stopped with exit status {child.wait()}", flush=True)
    subprocess.run(align, check=True)  # the same command goes on from the checkpoint

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    distill = ["-m", MODULE, "distill", str(run), "--teacher", args.teacher, "--steps", "4", "--no-export"]
    subprocess.run([*torchrun, *distill], check=True)


if __name__ == "__main__":
    main()
