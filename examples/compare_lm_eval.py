"""Compares runtime/zero_shot.py with lm-evaluation-harness on the same model and files, example by example.

    pip install "lm-eval[hf]"
    python examples/compare_lm_eval.py MODEL_FOLDER TASK_FILES --limit 50 --out comparison.json

MODEL_FOLDER is what transformers' save_pretrained wrote. Both see the same rows; nothing is downloaded. For every task
it prints the largest difference of a log likelihood in nats, and how many examples differ in what was scored.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tcal_compiler.runtime.data import read_rows
from tcal_compiler.runtime.tasks import score_requests
from tcal_compiler.runtime.tokenizer import read_tokenizer
from tcal_compiler.runtime.zero_shot import TASKS, read_examples, task_file, zero_shot_task


def published_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the fields that lm-eval's task reads."""
    if name == "boolq" and "answer" in row:
        return row | {"label": int(row["answer"])}
    if name == "lambada_openai" and "text" not in row:
        return {"text": f"{row['context']} {row['continuation']}"}
    return row


def lm_eval_task(name: str, defined: Path, path: Path, limit: int, folder: Path) -> str:
    """A file that includes lm-eval's own definition of the task, and has the data of a local file."""
    copy, task = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    rows = [json.dumps(published_row(name, row)) for _, row in read_rows(path)[:limit]]
    copy.write_text("\n".join(rows) + "\n", encoding="utf-8")
    split = "test" if name == "lambada_openai" else "validation"
    source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: str(copy)}}}
    splits = dict.fromkeys(("training_split", "validation_split", "test_split")) | {f"{split}_split": split}
    task.write_text(json.dumps({"include": str(defined), "task": name, **source, **splits}), encoding="utf-8")
    return str(task)


def compare(model_folder: Path, task_files: Path, names: list[str], limit: int) -> dict[str, dict[str, Any]]:
    """Task -> examples, largest difference of a log likelihood, examples whose metrics differ, and both means."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(model_folder), dtype="float32", device="cpu", batch_size=8)
    tokenizer = read_tokenizer(model_folder)
    with tempfile.TemporaryDirectory() as folder:
        known = TaskManager().task_index
        defined = {n: known[n].yaml_path for n in names}
        tasks: list[Any] = [lm_eval_task(n, defined[n], task_file(task_files, n), limit, Path(folder)) for n in names]
        theirs = lm_eval.simple_evaluate(model=lm, tasks=tasks, bootstrap_iters=0, log_samples=True)
    assert theirs is not None
    found = {}
    for name in names:
        task = zero_shot_task(name, read_examples(task_file(task_files, name), name, limit=limit), tokenizer)
        answers = iter(
            score_requests(
                [r for example in task.examples for r in example],
                lambda ids: lm.model(ids, use_cache=False).logits,
                device=torch.device("cpu"),
                context_length=lm.max_length,
            )
        )
        found[name] = compared(task, answers, sorted(theirs["samples"][name], key=lambda s: s["doc_id"]))
    return found


def compared(task: Any, answers: Any, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """answers: ours, in order. samples: lm-eval's, one an example."""
    largest, differing, ours, theirs = 0.0, 0, [], []
    for i, (example, sample) in enumerate(zip(task.examples, samples, strict=True)):
        mine = [next(answers) for _ in example]
        for answer, (log_likelihood, greedy) in zip(mine, (r[0] for r in sample["resps"]), strict=True):
            largest = max(largest, abs(answer.log_likelihood - float(log_likelihood)))
            differing += answer.greedy != (str(greedy) == "True")
        metrics = task.measure(i, mine)
        shared = [m for m in ("acc", "acc_norm") if m in sample]
        assert shared and set(shared) == set(metrics) - {"nll"}, (sorted(sample), sorted(metrics))
        differing += any(metrics[m] != float(sample[m]) for m in shared)
        ours.append([metrics[m] for m in shared])
        theirs.append([float(sample[m]) for m in shared])
    means = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in (ours, theirs)]
    return {
        "examples": len(samples),
        "largest_difference": largest,
        "differing": differing,
        "metrics": shared,
        "ours": means[0],
        "lm_eval": means[1],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("task_files", type=Path)
    p.add_argument("--tasks", default=",".join(TASKS))
    p.add_argument("--limit", type=int, default=50)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    found = compare(args.model, args.task_files, args.tasks.split(","), args.limit)
    for name, r in found.items():
        print(f"{name:16} {r['examples']} examples, largest difference {r['largest_difference']:.2e} nats, ", end="")
        print(f"{r['differing']} differ; {', '.join(r['metrics'])} {r['ours']} here, {r['lm_eval']} in lm-eval")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if any(r["differing"] for r in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
