"""From a teacher to text: converts, then continues a prompt with the ONNX student.

python examples/convert_and_generate.py embedded run "The old man"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tcal_compiler
from tcal_compiler import Config


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("teacher")
    p.add_argument("out", type=Path)
    p.add_argument("prompt")
    p.add_argument("--tokenizer", help='folder, or "bytes"')
    p.add_argument("--sequences", type=int, default=16, help="to calibrate on")
    p.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    p.add_argument("--steps", type=int, default=20, help="of alignment")
    args = p.parse_args()
    calib = {"sequences": args.sequences, "length": args.length}
    config = Config.model_validate({"policy": "uniform:25%", "calib": calib, "align": {"steps": args.steps}})
    run = tcal_compiler.convert(args.teacher, out=args.out, tokenizer=args.tokenizer, config=config)
    greedy = {"max_new_tokens": 32, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}
    print(args.prompt + "".join(tcal_compiler.generate_text(run, args.prompt, **greedy)))


if __name__ == "__main__":
    main()
