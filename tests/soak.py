"""Hours of serving in miniature: `python tests/soak.py RUN/onnx --calls 10000 --sessions 500`.

Sessions of one loaded model are made, forked, restored from snapshots in memory and on disk, and dropped, a dozen alive
at a time. They answer prompts of mixed lengths, up to three at once token by token, and in padded batches, greedily or
sampled. Every answer is compared with the one that its prompt got alone, in a session that had seen nothing else.

Twenty times all sessions are dropped and resident memory is read; behind the warm-up, the first fifth, it must stay
flat. Exit 1 when an answer is wrong or memory grew by more than 8 MiB. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.session_state import SessionState

TEXT = Path(__file__).parents[1] / "tcal_compiler/assets/text/heldout.txt"
BOUND = 8 << 20  # bytes that resident memory may grow behind the warm-up
ALIVE = 12  # sessions at a time
LEAST_MARGIN = 1e-3  # between the best and the second logit, so that rounding cannot choose another token
PREFIX = 120  # tokens of the shared prefix
LARGEST_BATCH = 5


@dataclass(frozen=True)
class Request:
    """A prompt with the tokens that it gets alone. rest: the prompt behind the shared prefix, where it has that."""

    prompt: list[int]
    rest: list[int] | None
    options: dict[str, Any]
    answer: list[int]


@dataclass
class Soak:
    """What was done and seen. memory: bytes resident, after equal shares of the calls."""

    calls: int = 0
    tokens: int = 0
    sessions: int = 0
    forks: int = 0
    restored: int = 0
    from_disk: int = 0
    in_batches: int = 0
    least_margin: float = np.inf
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def levels(self) -> tuple[int, int]:
        """Resident bytes in the fifth of the run behind the warm-up, and in its last fifth."""
        fifth = max(1, len(self.memory) // 5)
        return round(median(self.memory[fifth : 2 * fifth])), round(median(self.memory[-fifth:]))

    def grown(self) -> int:
        first, last = self.levels()
        return last - first


def alone(folder: Path, prompt: list[int], count: int, options: dict[str, Any]) -> tuple[list[int], float]:
    """The answer in a new session, and for greedy ones the least margin of its tokens, found without `generate`."""
    session = OnnxSession(folder, threads=1)
    if options:
        return list(session.generate(prompt, count, **options)), np.inf
    logits, tokens, margin = session.prefill(prompt), list[int](), np.inf
    for _ in range(count):
        second, best = np.sort(logits)[-2:]
        margin = min(margin, float(best - second))
        tokens.append(int(logits.argmax()))
        logits = session.step(tokens[-1])
    return tokens, margin


def make_requests(folder: Path, rng: Random, count: int, soak: Soak) -> tuple[list[int], list[Request]]:
    """The shared prefix, and requests with their answers: a third behind the prefix, a quarter sampled."""
    text = TEXT.read_bytes()
    prefix, found = list(text[:PREFIX]), list[Request]()
    while len(found) < count:
        at, length = rng.randrange(len(text) - 400), rng.choice([1, 2, 7, 16, 31, 64, 65, 130, 300])
        rest = list(text[at : at + length])
        shared, sampled = rng.random() < 0.33, rng.random() < 0.25
        options = {"temperature": 0.9, "top_k": 20, "seed": rng.randrange(1 << 30)} if sampled and not shared else {}
        prompt = prefix + rest if shared else rest
        answer, margin = alone(folder, prompt, rng.randint(1, 12), options)
        if margin > LEAST_MARGIN:
            soak.least_margin = min(soak.least_margin, margin)
            found.append(Request(prompt, rest if shared else None, options, answer))
    return prefix, found


class Server:
    """A dozen sessions of one model, and what they are asked."""

    def __init__(self, folder: Path, rng: Random, requests: int, work: Path) -> None:
        self.rng, self.work, self.soak = rng, work, Soak()
        self.prefix, self.requests = make_requests(folder, rng, requests, self.soak)
        self.greedy = [r for r in self.requests if not r.options]
        self.model = OnnxSession(folder, threads=1)
        self.model.prefill(self.prefix)
        self.kept = self.model.snapshot()
        self.alive: list[OnnxSession] = []

    def warm_up(self) -> None:
        """The largest batch that may come, padded on either side: the runtime keeps memory for the largest it has seen.

        Without this, a short run grows when that batch comes late.
        """
        longest = max((r.prompt for r in self.greedy), key=len)
        for side in ("left", "right"):
            self.model.fork().generate_batch([longest] * LARGEST_BATCH, 1, padding=side)

    def new_session(self) -> None:
        """A fork of the model or of another session; the oldest of a dozen is dropped."""
        parent = self.rng.choice([self.model, *self.alive])
        self.alive.append(parent.fork())
        self.soak.sessions, self.soak.forks = self.soak.sessions + 1, self.soak.forks + (parent is not self.model)
        if len(self.alive) > ALIVE:
            self.alive.pop(0)

    def _restore(self, session: OnnxSession) -> None:
        if self.rng.random() < 0.2:
            self.kept.save(self.work / "state.npz")
            session.restore(SessionState.load(self.work / "state.npz"))
            self.soak.from_disk += 1
        else:
            session.restore(self.kept)
        self.soak.restored += 1
        if self.rng.random() < 0.2:
            self.kept = session.snapshot()

    def _batch(self) -> None:
        asked = self.rng.choices(self.greedy, k=self.rng.randint(2, LARGEST_BATCH))
        count, side = min(len(r.answer) for r in asked), self.rng.choice(["left", "right"])
        answers = self.rng.choice(self.alive).generate_batch([r.prompt for r in asked], count, padding=side)
        self.soak.calls, self.soak.in_batches = self.soak.calls + 1, self.soak.in_batches + len(asked)
        self._compare(answers, [r.answer[:count] for r in asked])

    def _singles(self) -> None:
        """Up to three sessions at once, token by token in any order."""
        asked, streams = list[Request](), list[Iterator[int]]()
        for session in self.rng.sample(self.alive, min(len(self.alive), self.rng.randint(1, 3))):
            request = self.rng.choice(self.requests)
            if request.rest is None:
                session.reset()
            else:
                self._restore(session)
            asked.append(request)
            streams.append(session.generate(request.rest or request.prompt, len(request.answer), **request.options))
        self.soak.calls += len(asked)
        answers, going = [list[int]() for _ in asked], list(range(len(asked)))
        while going:
            i = self.rng.choice(going)
            if (token := next(streams[i], None)) is None:
                going.remove(i)
            else:
                answers[i].append(token)
        self._compare(answers, [r.answer for r in asked])

    def _compare(self, answers: list[list[int]], wanted: list[list[int]]) -> None:
        self.soak.tokens += sum(map(len, answers))
        if answers != wanted:
            self.soak.wrong.append(f"call {self.soak.calls}: {answers} and not {wanted}")

    def call(self) -> None:
        """A batch of greedy requests, or single ones."""
        (self._batch if self.rng.random() < 0.2 else self._singles)()


def run(folder: Path, *, calls: int, sessions: int, seed: int, requests: int = 60, samples: int = 20) -> Soak:
    """Sessions are made at even distances over the calls. Memory is read when none of them is alive."""
    process, trim = psutil.Process(), partial(ctypes.CDLL(None).malloc_trim, 0)
    with TemporaryDirectory() as work:
        server = Server(folder, Random(seed), requests, Path(work))
        server.warm_up()
        soak, started = server.soak, time.monotonic()
        while soak.calls < calls:
            while soak.sessions * calls <= soak.calls * sessions and soak.sessions < sessions:
                server.new_session()
            server.call()
            if len(soak.memory) * calls < samples * soak.calls:
                server.alive.clear()
                gc.collect()
                trim()
                soak.memory.append(process.memory_info().rss)
                server.new_session()
        soak.seconds = time.monotonic() - started
    return soak


def main(write: Callable[[str], object] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the onnx folder of a run whose tokenizer is bytes")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    soak = run(args.folder, calls=args.calls, sessions=args.sessions, seed=args.seed)
    first, last = soak.levels()
    seen = asdict(soak) | {
        "memory": [round(m / (1 << 20), 1) for m in soak.memory],
        "MiB behind the warm-up": round(first / (1 << 20), 2),
        "MiB at the end": round(last / (1 << 20), 2),
    }
    write(json.dumps(seen))
    sys.exit(bool(soak.wrong) or soak.grown() > BOUND)


if __name__ == "__main__":
    main()
