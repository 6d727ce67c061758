"""The exported student in a plain ONNX Runtime session: its state is passed by hand, nothing of this package is needed.

python examples/onnx_by_hand.py run/onnx --ids 84 104 101 --new-tokens 20
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

SIZES = {"batch": 1, "past_sequence": 0}  # of the state before the first token
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def empty_state(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Zeros for every input that remembers: caches without a slot, recurrent states."""
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    return {
        i.name: np.zeros([n if isinstance(n, int) else SIZES[n] for n in i.shape], dtype=TYPES[i.type]) for i in past
    }


def greedy(folder: Path, ids: Sequence[int], count: int) -> list[int]:
    """The likeliest continuation of ids, token by token: what comes out as present.* goes in as past_key_values.*."""
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    state, new, seen, tokens = empty_state(session), list(ids), 0, []
    for _ in range(count):
        seen += len(new)
        feed = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, seen), np.int64)}
        found = dict(zip(names, session.run(None, feed | state), strict=True))
        state = {name: found[name.replace("past_key_values", "present")] for name in state}
        new = [int(found["logits"][0, -1].argmax())]
        tokens += new
    return tokens


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="onnx folder of a run")
    p.add_argument("--ids", type=int, nargs="+", required=True, help="token ids of the prompt")
    p.add_argument("--new-tokens", type=int, default=20)
    args = p.parse_args()
    print(*greedy(args.folder, args.ids, args.new_tokens))


if __name__ == "__main__":
    main()
