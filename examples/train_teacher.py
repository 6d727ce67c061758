"""Trains the small Llama that ships as the embedded teacher, from scratch, with its own byte-level BPE tokenizer.

Two stages, so that the machine with the GPU need neither the text nor the time to tokenise it:

    python examples/train_teacher.py --text books.jsonl.zst --source standardebooks --out prepared --prepare-only
    python examples/train_teacher.py --tokens prepared/tokens.bin --out teacher --steps 4000 --batch 64

Without --prepare-only and --tokens both stages run, one after the other, in --out. The text files hold one JSON object
a line, {"text": ..., "source": ...}. A document's split (train, held-out or calibration) is a hash of its text, fixed
before anything is trained; a training document that shares a long paragraph with another split is dropped.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCAB = 4096
PERMILLE = {"heldout": 16, "calibration": 32}  # documents per thousand; the rest is for training
TEXT_BYTES = {"heldout": 300_000, "calibration": 700_000}  # size of the text files made of whole documents
SHARED_PARAGRAPH = 120  # characters from which a paragraph in two splits counts as leaked
INVISIBLE = str.maketrans({"\u200a": None, "\u2060": None, "\ufeff": None, "\u00a0": " "})
BOILERPLATE = ("standard ebooks", "project gutenberg", "uncopyright")
LICENCE = "CC0 1.0 productions of texts in the public domain in the United States"
NAMES = {"standardebooks": "Standard Ebooks, https://standardebooks.org"}
MAX_BYTES = 9_000_000
EVAL_LENGTH = 512  # tokens in a sequence of the held-out perplexity


@dataclass
class Splits:
    """Documents by split, in the order of their hashes."""

    train: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    calibration: list[str] = field(default_factory=list)
    dropped: int = 0

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of documents and of UTF-8 bytes in each split."""
        return {
            name: {"documents": len(docs), "bytes": sum(len(d.encode()) for d in docs)}
            for name, docs in (("train", self.train), ("heldout", self.heldout), ("calibration", self.calibration))
        }


# ---------------------------------------------------------------------------------------------- text, splits, tokens


def read_documents(paths: list[Path], source: str | None) -> Iterator[str]:
    """The texts of .jsonl or .jsonl.zst files; only those of `source` when it is given."""
    for path in paths:
        with path.open("rb") as raw:
            stream: Any = raw
            if path.suffix == ".zst":
                import zstandard

                stream = zstandard.ZstdDecompressor().stream_reader(raw)
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                record = json.loads(line)
                if source is None or record.get("source") == source:
                    yield record["text"]


def clean(text: str) -> str:
    """A document without invisible typesetting characters and without paragraphs about the edition itself."""
    paragraphs = text.translate(INVISIBLE).split("\n\n")
    kept = [p.strip() for p in paragraphs if not any(word in p.lower() for word in BOILERPLATE)]
    return "\n\n".join(p for p in kept if p)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def long_paragraphs(text: str) -> set[str]:
    return {p for p in text.split("\n") if len(p) >= SHARED_PARAGRAPH}


def split_documents(documents: Iterator[str]) -> Splits:
    """Splits by hash. Training documents sharing a long paragraph with another split are dropped."""
    by_hash = {digest(text): text for text in map(clean, documents) if text}
    splits = Splits()
    reserved: set[str] = set()
    candidates = []
    for key in sorted(by_hash):
        place = int(key[:12], 16) % 1000
        if place < PERMILLE["heldout"]:
            splits.heldout.append(by_hash[key])
        elif place < PERMILLE["heldout"] + PERMILLE["calibration"]:
            splits.calibration.append(by_hash[key])
        else:
            candidates.append(by_hash[key])
    for text in splits.heldout + splits.calibration:
        reserved |= long_paragraphs(text)
    splits.train = [text for text in candidates if not long_paragraphs(text) & reserved]
    splits.dropped = len(candidates) - len(splits.train)
    return splits


def text_file(documents: list[str], limit: int) -> str:
    """Whole documents joined by blank lines, as many as fit in `limit` bytes (the first one always)."""
    chosen: list[str] = []
    size = 0
    for text in documents:
        size += len(text.encode()) + 2
        if chosen and size > limit:
            break
        chosen.append(text)
    return "\n\n".join(chosen) + "\n"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB tokens that adds no special tokens by itself."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def prepare(args: argparse.Namespace) -> Path:
    """Splits, trains the tokenizer and writes tokens.bin, the tokenizer, the two text files and prepared.json."""
    args.out.mkdir(parents=True, exist_ok=True)
    splits = split_documents(read_documents(args.text, args.source))
    if not splits.train or not splits.heldout or not splits.calibration:
        sys.exit(f"--text: a split is empty: {splits.counts()}\n  Try: more documents")
    print(f"splits: {splits.counts()}, {splits.dropped} dropped", flush=True)
    tokenizer = train_tokenizer(splits.train)
    tokenizer.save_pretrained(args.out)
    end = tokenizer.convert_tokens_to_ids(END)
    parts = [np.array([end], dtype=np.uint16)]
    for start in range(0, len(splits.train), 64):
        for encoding in tokenizer(splits.train[start : start + 64]).input_ids:
            parts.append(np.array([*encoding, end], dtype=np.uint16))
    tokens = np.concatenate(parts)
    tokens.tofile(args.out / "tokens.bin")
    for name in ("heldout", "calibration"):
        text = text_file(getattr(splits, name), TEXT_BYTES[name])
        (args.out / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    record = {
        "source": NAMES.get(args.source, args.source or "all documents of the text files"),
        "licence": LICENCE if args.source == "standardebooks" else "that of the text files",
        "splits": splits.counts(),
        "dropped_from_train": splits.dropped,
        "train_tokens": len(tokens),
        "prepare_command": command_line(),
        "train_sha256": sorted(digest(text)[:16] for text in splits.train),
    }
    (args.out / "prepared.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"prepared: {len(tokens):,} training tokens", flush=True)
    return args.out / "tokens.bin"


def command_line() -> str:
    """This process's command, with every path reduced to its last component."""
    return " ".join(["python", *(Path(a).name if "/" in a else a for a in sys.argv)])


# ------------------------------------------------------------------------------------------------------------ training


def build_model(end: int, tiny: bool = False) -> LlamaForCausalLM:
    """The untrained teacher; `tiny` keeps two layers, to try the script out."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2 if tiny else 8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=True,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).float()
    for name, weight in model.named_parameters():  # smaller steps into the residual stream, as GPT-2 does
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            with torch.no_grad():
                weight.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def batches(tokens: torch.Tensor, batch: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless [batch, length + 1] windows: every epoch cuts the stream at another offset and shuffles the pieces."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(length + 1, device=tokens.device)
    while True:
        shift = int(torch.randint(length, (1,), generator=generator))
        pieces = (len(tokens) - shift - 1) // length
        if pieces < batch:
            sys.exit(f"--batch {batch}: the text has only {pieces} pieces of {length} tokens\n  Try: a smaller batch")
        order = torch.randperm(pieces, generator=generator)
        starts = (shift + order * length).to(tokens.device)
        for row in range(0, pieces - batch + 1, batch):
            yield tokens[starts[row : row + batch, None] + span].long()


def optimizer_for(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Trains in place.

    The cosine follows whichever is further on, the steps or the minutes, so that it ends at zero either way.
    """
    optimizer, device = optimizer_for(model, args.lr), tokens.device
    source = batches(tokens, args.batch, args.length, args.seed)
    began, step = time.perf_counter(), 0
    recent: list[torch.Tensor] = []
    limit = args.max_minutes * 60 if args.max_minutes else math.inf
    model.train()
    while True:
        elapsed = time.perf_counter() - began
        done = max(step / args.steps, elapsed / limit)
        if done >= 1:
            break
        rate = args.lr * min(1.0, (step + 1) / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        window = next(source)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent = [*recent[-99:], loss.detach()]
        if step % args.log_every == 0:
            mean = torch.stack(recent).mean().item()  # waits for the device, which keeps the clock honest
            elapsed = time.perf_counter() - began
            left = elapsed * (1 / max(step / args.steps, elapsed / limit) - 1)
            speed = step * args.batch * args.length / elapsed
            print(f"step {step}/{args.steps}  loss {mean:.4f}  lr {rate:.1e}  {speed:,.0f} tok/s  {left:.0f} s left")
            sys.stdout.flush()
    seconds = time.perf_counter() - began
    mean = torch.stack(recent).mean().item()
    if not math.isfinite(mean):
        sys.exit(f"train: the loss is {mean} after {step} steps\n  Try: a smaller --lr")
    return {"steps": step, "train_loss_last_100_steps": round(mean, 4), "train_seconds": round(seconds, 1)}


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor, length: int = EVAL_LENGTH, batch: int = 16) -> float:
    """exp of the mean loss over consecutive sequences of `length` tokens, each scored alone (length - 1 targets)."""
    rows = ids[: len(ids) // length * length].view(-1, length)
    if not len(rows):
        sys.exit(f"held-out text: {len(ids)} tokens, fewer than one sequence of {length}\n  Try: more text")
    total = 0.0
    for chunk in rows.split(batch):
        logits = model(chunk).logits.float()
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(rows) * (length - 1)))


def save(model: LlamaForCausalLM, prepared: Path, out: Path) -> None:
    """Writes float16 safetensors, the configuration and the tokenizer; refuses more than MAX_BYTES."""
    out.mkdir(parents=True, exist_ok=True)
    model.cpu().half().save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if prepared.resolve() != out.resolve():
            shutil.copyfile(prepared / name, out / name)
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    size = sum((out / name).stat().st_size for name in names if (out / name).exists())
    if size > MAX_BYTES:
        sys.exit(f"--out: the teacher takes {size} bytes, more than {MAX_BYTES}\n  Try: a smaller model")


def evaluate(out: Path, prepared: Path, device: torch.device) -> dict[str, Any]:
    """Held-out perplexity of the saved float16 weights, loaded in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model = model.to(device).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    text = (prepared / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text).ids, device=device)
    rows, length = min(16, len(ids) // EVAL_LENGTH), EVAL_LENGTH
    return {
        "heldout_perplexity": round(perplexity(model, ids), 4),
        f"heldout_first{rows}_perplexity": round(perplexity(model, ids[: rows * length]), 4),
        "heldout_sequences": len(ids) // length,
        "heldout_measure": (
            f"exp of the mean next-token loss on heldout.txt, tokenised whole without special tokens, in consecutive "
            f"sequences of {length} tokens scored alone ({length - 1} targets each); saved float16 weights in float32"
        ),
    }


def run(args: argparse.Namespace) -> None:
    """Trains on prepared tokens, saves, evaluates and records what was done in training.json."""
    torch.manual_seed(args.seed)
    prepared = args.tokens.parent
    facts = json.loads((prepared / "prepared.json").read_text())
    facts.pop("train_sha256", None)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stream = np.fromfile(args.tokens, dtype=np.uint16).astype(np.int32)
    tokens = torch.from_numpy(stream).to(device)
    model: Any = build_model(int(stream[0]), args.tiny)  # the stream begins with END
    model = model.to(device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(tokens):,} tokens, {device}", flush=True)
    result = train(model, tokens, args)
    save(model, prepared, args.out)
    seen = result["steps"] * args.batch * args.length
    record = {
        "command": command_line(),
        "seed": args.seed,
        "parameters": count,
        **result,
        "batch": args.batch,
        "length": args.length,
        "tokens_seen": seen,
        "epochs": round(seen / len(tokens), 2),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data": facts,
        **evaluate(args.out, prepared, device),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k.startswith("heldout")}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help=".jsonl or .jsonl.zst files")
    parser.add_argument("--source", help="keep only documents of this source, such as standardebooks")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=Path, help="tokens.bin of a folder made with --prepare-only")
    parser.add_argument("--prepare-only", action="store_true", help="stop before training")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--max-minutes", type=float, help="end training by then, the cosine included")
    parser.add_argument("--batch", type=int, default=64, help="sequences in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--log-every", type=int, default=100, help="steps between lines of progress")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--tiny", action="store_true", help="two layers only, to try the script out")
    args = parser.parse_args()
    if bool(args.text) == bool(args.tokens):
        parser.error("give either --text or --tokens")
    return args


def main() -> None:
    args = parse()
    if args.text:
        args.tokens = prepare(args)
    if not args.prepare_only:
        run(args)


if __name__ == "__main__":
    main()
