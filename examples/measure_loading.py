"""Peak memory of loading a transformers folder as it is and split into several files, in float32 and in bfloat16.

python examples/measure_loading.py path/to/model --shard 100MB --json docs/results/loading.json

Each load runs in a process of its own. Pages of the weight files that are mapped count as resident memory; the system
takes them back when it needs them, so they are also given on their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__:
    from .measure_dry_run import environment
else:
    from measure_dry_run import environment


def load(folder: str) -> dict[str, int]:
    """Bytes of the weights, of the process before, at most and after, and of mapped files at most."""
    import psutil
    import torch  # noqa: F401  counted before
    import transformers  # noqa: F401

    from tcal_compiler.runtime.meter import Meter
    from tcal_compiler.runtime.teacher import load_teacher

    load_teacher("embedded")  # what loading imports
    before = psutil.Process().memory_info()
    with Meter() as m:
        module = load_teacher(folder).module
    assert module is not None
    after = psutil.Process().memory_info()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    mapped = after.shared - before.shared
    return {"weights": weights, "peak": m.peak - before.rss, "after": after.rss - before.rss, "mapped": mapped}


def reshard(source: str, target: Path, dtype: str, shard: str) -> int:
    """Saves the model in files of at most `shard`; returns how many."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=True)
    model.save_pretrained(target, max_shard_size=shard)
    return len(list(target.glob("*.safetensors")))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--shard", default="100MB", help="largest file, as transformers writes it")
    p.add_argument("--json", type=Path)
    p.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.load:
        print(json.dumps(load(args.folder)))
        return
    body: dict[str, Any] = {"environment": environment(), "loading": {}}
    with tempfile.TemporaryDirectory(prefix="tcal-loading-") as place:
        folders = {"as it is": (args.folder, len(list(Path(args.folder).glob("*.safetensors"))))}
        for dtype in ("float32", "bfloat16"):
            for shard in (args.shard, "100GB"):
                target = Path(place) / f"{dtype}-{shard}"
                count = reshard(args.folder, target, dtype, shard)
                folders[f"{dtype}, {count} files" if count > 1 else f"{dtype}, 1 file"] = (str(target), count)
        for name, (folder, count) in folders.items():
            child = [sys.executable, __file__, folder, "--load"]
            found = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
            body["loading"][name] = found | {"files": count}
            print(name, found, flush=True)
    if args.json:
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
