"""Estimates memory and time of converting a large teacher on one GPU, from what a small one was measured to take.

    tcal inspect FOLDER --memory --json --policy uniform:7 --config big.toml > memory.json
    python examples/estimate_conversion.py FOLDER/config.json --memory memory.json --config big.toml \
        --name "a 1.5B teacher" --json docs/results/estimate-1.5b.json

Memory is what tcal inspect counts. Times are those of docs/results (MEASURED says which), times the operations of the
stage for the large teacher over those for SmolLM2-135M: at the same utilisation, which larger matrices seldom fall
below. Only teachers built as Llama and Qwen are, whose config.json has their sizes, and only students as were measured,
without attention beside their states: local_window = 0 in big.toml.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tcal_compiler.config import load_config

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MEASURED = {"gpu": "smollm2-h100-bfloat16", "starts": "smollm2-h100", "cpu": "dry-run-smollm2"}


@dataclass(frozen=True)
class Sizes:
    """Of a decoder whose layers have q, k, v and output projections and a gated MLP; tied: one matrix is both ends."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
        )

    @property
    def projections(self) -> int:
        """Weights of q, k, v and output of one layer."""
        return 2 * self.width * self.head_dim * (self.heads + self.kv_heads)

    @property
    def weights(self) -> int:
        return self.layers * (self.projections + 3 * self.width * self.inner) + self.width * self.vocab

    def site(self, length: int) -> float:
        """Operations of one token at a converted site, forward: matrices, gates and delta rule. No attention."""
        gates = self.width * self.heads * (2 + self.head_dim)
        return 2 * (self.projections + gates) + 6 * self.heads * self.head_dim**2

    def teacher(self, length: int, *, head: bool = True) -> float:
        attention = 4 * length * self.heads * self.head_dim
        return 2 * (self.weights - (0 if head else self.width * self.vocab)) + self.layers * attention

    def student(self, length: int, sites: int) -> float:
        attention = 4 * length * self.heads * self.head_dim
        return self.teacher(length) + sites * (self.site(length) - 2 * self.projections - attention)

    def start(self, length: int) -> float:
        """Of one token at one site: its values, the statistics of attention, and the sums of the ridge regression."""
        return self.site(length) + 4 * length * self.heads * self.head_dim + 2 * (self.heads * self.head_dim) ** 2

    def step(self, length: int, sites: int) -> float:
        """Of one token in a step of alignment, the pass of the teacher included."""
        return 3 * sites * self.site(length) + self.teacher(length, head=False)

    def distilled(self, length: int, sites: int) -> float:
        return self.teacher(length) + 3 * self.student(length, sites)


SMOL = Sizes(layers=30, width=576, inner=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152)


def measured(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{MEASURED[name]}.json").read_text(encoding="utf-8"))
    return found


def rates() -> dict[str, dict[str, Any]]:
    """Operations a second of each stage on SmolLM2: 22 sites, and 400 sequences of 512 tokens to start from."""
    gpu, starts, cpu = measured("gpu"), measured("starts"), measured("cpu")
    tokens = (gpu["arguments"]["init_sequences"] + gpu["arguments"]["holdout"]) * 512
    few, many = (gpu["seconds"][f"distil aligned-1000-distilled-{n}"] for n in (61, 305))
    align = gpu["seconds"]["align from closed-form 1000 steps, lr 0.02 and 0.08"]
    export = cpu["dry_runs"]["SmolLM2"]["stages"]["export"]["seconds"][1]
    taps = gpu["seconds"]["teacher over the calibration text"]
    start = starts["seconds"]["init closed-form"]
    return {
        "taps": {"rate": tokens * SMOL.teacher(512, head=False) / taps, "seconds": taps, "from": MEASURED["gpu"]},
        "initialisation": {
            "rate": 384 * 512 * 22 * SMOL.start(512) / start,
            "seconds": start,
            "from": MEASURED["starts"],
        },
        "alignment": {
            "rate": 1000 * 8 * 512 * SMOL.step(512, 22) / align,
            "seconds": align,
            "from": MEASURED["gpu"],
        },
        "distillation": {
            "rate": (305 - 61) * 32 * 512 * SMOL.distilled(512, 22) / (many - few),
            "seconds": round(many - few, 2),
            "from": MEASURED["gpu"],
        },
        "export": {"rate": SMOL.weights / export, "seconds": export, "from": MEASURED["cpu"]},
        "compiling kernels": {"rate": None, "seconds": starts["seconds"]["init naive"], "from": MEASURED["starts"]},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config_json", type=Path)
    p.add_argument("--memory", type=Path, required=True, help="what tcal inspect --memory --json printed")
    p.add_argument("--config", type=Path, required=True, help="settings that it was given")
    p.add_argument("--name", required=True)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    sizes = Sizes.of(json.loads(args.config_json.read_text(encoding="utf-8")))
    needs, config = json.loads(args.memory.read_text(encoding="utf-8")), load_config(args.config, {})
    if config.local_window:
        raise SystemExit(
            "the rates are of students without attention beside their states: local_window = 0 in --config"
        )
    calib, align, distill = config.calib, config.align, config.distill.in_steps(config.calib.length)
    sites, length = needs["converted"], calib.length
    again = sizes.student(length, sites) if distill.checkpoint_activations else 0
    operations = {
        "taps": (calib.kept + calib.holdout) * length * sizes.teacher(length, head=False),
        "initialisation": calib.kept * length * sites * sizes.start(length),
        "alignment": align.steps * align.batch * length * sizes.step(length, sites),
        "distillation": distill.steps * distill.batch * length * (sizes.distilled(length, sites) + again),
        "export": sizes.weights,
    }
    stages = {}
    for stage, found in rates().items():
        rate = found["rate"]
        seconds = found["seconds"] if rate is None else operations[stage] / rate
        stages[stage] = {"seconds": round(seconds), "measured_seconds": found["seconds"], "from": found["from"]}
        print(f"{stage}: {seconds:.0f} s, from {found['seconds']} s in {found['from']}")
    given = {
        "converted": sites,
        "kept": needs["kept"],
        "parameters": needs["parameters"],
        "sizes": asdict(sizes),
        "calib": calib.model_dump(include={"sequences", "length", "init_sequences", "holdout"}),
        "align": align.model_dump(include={"steps", "batch"}),
        "distill": distill.model_dump(include={"steps", "batch", "checkpoint_activations"}),
        "value_bytes": needs["value_bytes"],
    }
    memory = {s["stage"]: s["peak_bytes"] for s in needs["stages"]}
    if args.json:
        body = {"estimate": args.name, **given, "memory": memory, "stages": stages}
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
