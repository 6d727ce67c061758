"""Retrieval from a long context: facts hidden in filler text, one of them asked for at the end.

An example of T tokens is filler with facts between its sentences, the question, and the answer:

    ... filler. The code for the red lamp is 4071. filler ...

    The code for the red lamp is 4071

`needle` has one fact; `recall` has eight, one of which is asked for, like the single and multi-key needles of RULER
(arXiv:2404.06654). Everything follows from text, tokenizer, length and seed; example i is the same whatever the number
of examples. The needle of example i lies at the fraction (i + 1) / golden ratio (mod 1) of the filler, those of a
recall at random places. Codes differ from one another and occur nowhere else in the example.

Metrics: `exact`, the share of examples whose answer greedy decoding would give whole, and `nll`, nats per token of the
answer, each token behind the right ones. Guessing gets 10^-4 exact; naming any code that was seen gets 1/8 in `recall`.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence

from tcal_compiler.errors import ConfigError, DataError

from .tasks import Answer, Request, Task, encode_request
from .tokenizer import TokenizerLike, encode_each, prompt_start

NUM_FACTS = {"needle": 1, "recall": 8}
NUM_EXAMPLES = 100  # when nothing else is asked for
MOST_EXAMPLES = 10_000
SHORTEST = 256  # tokens; eight facts take some 130
_DIGITS = 4
_PIECE_WORDS = 60  # a longer sentence is cut, so that facts have places
_SLACK = 8  # tokens that pieces have more when they are encoded one by one
_TRIALS = 20
_COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "orange", "purple", "silver"]
_THINGS = ["lamp", "boat", "chair", "door", "coat", "tower", "garden", "piano", "barrel", "wagon", "mirror", "kettle"]


def check_sizes(kind: str, lengths: Sequence[int], examples: int) -> None:
    """Raises ConfigError for a length below SHORTEST, no examples or more than MOST_EXAMPLES."""
    if lengths and not (1 <= examples <= MOST_EXAMPLES and min(lengths) >= SHORTEST):
        what = f"{examples} examples of {', '.join(map(str, lengths))} tokens"
        raise ConfigError(f"--{kind}", what, f"--limit 1 to {MOST_EXAMPLES}, lengths of at least {SHORTEST} tokens")


def retrieval_tasks(
    docs: Sequence[str],
    tokenizer: TokenizerLike,
    *,
    kind: str,
    lengths: Sequence[int],
    examples: int = NUM_EXAMPLES,
    seed: int = 0,
) -> list[Task]:
    """One task for each length in tokens; kind is a key of NUM_FACTS, docs are the filler's documents.

    Raises:
        ConfigError: see check_sizes.
        DataError: the filler has fewer than twice as many tokens as an example.
    """
    check_sizes(kind, lengths, examples)
    filler = Filler(docs, tokenizer)
    tasks = []
    for length in lengths:
        if filler.tokens < 2 * length:
            what = f"the filler has {filler.tokens} tokens, too few for examples of {length}"
            raise DataError(f"--{kind}", what, f"a text of at least {2 * length} tokens, or a smaller length")
        made = [_example(filler, kind, length, i, seed) for i in range(examples)]
        tasks.append(Task(f"{kind} {length}", [[r] for r in made], _measure(made), {"exact": 10.0**-_DIGITS}))
    return tasks


def _measure(requests: Sequence[Request]) -> Callable[[int, Sequence[Answer]], dict[str, float]]:
    def measure(i: int, answers: Sequence[Answer]) -> dict[str, float]:
        (answer,) = answers
        nll = -answer.log_likelihood / len(requests[i].continuation)
        return {"exact": float(answer.greedy), "nll": nll}

    return measure


class Filler:
    """Sentences of the documents, in order, with the number of tokens of each and of all."""

    def __init__(self, docs: Sequence[str], tokenizer: TokenizerLike) -> None:
        self.tokenizer = tokenizer
        self.pieces = [p for doc in docs for p in _pieces(doc)]
        self.sizes = [len(ids) for ids in encode_each(tokenizer, [f" {p}" for p in self.pieces])]
        self.tokens = sum(self.sizes)

    def stretch(self, tokens: int, rng: random.Random) -> list[str]:
        """Consecutive pieces, in a circle, up to a random one: as few as have so many tokens."""
        end, total, found = rng.randrange(len(self.pieces)), 0, list[str]()
        while total < tokens:
            i = (end - len(found)) % len(self.pieces)
            found.append(self.pieces[i])
            total += self.sizes[i]
        return found[::-1]


def _pieces(doc: str) -> list[str]:
    """Sentences, in pieces of at most _PIECE_WORDS words, white space normalised."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", doc):
        words = sentence.split()
        found += [" ".join(words[i : i + _PIECE_WORDS]) for i in range(0, len(words), _PIECE_WORDS)]
    return found


def _example(filler: Filler, kind: str, length: int, number: int, seed: int) -> Request:
    """A request of exactly `length` tokens: what filler is too much is dropped at the start, where no fact is."""
    rng = random.Random(f"{seed} {kind} {length} {number}")
    tokenizer, count = filler.tokenizer, NUM_FACTS[kind]
    start = prompt_start(tokenizer)
    for _ in range(_TRIALS):
        keys = rng.sample(list(itertools.product(_COLOURS, _THINGS)), count)
        codes = [f"{c:0{_DIGITS}}" for c in rng.sample(range(10**_DIGITS), count)]
        facts = [f"The code for the {colour} {thing} is {c}." for (colour, thing), c in zip(keys, codes, strict=True)]
        asked = facts[rng.randrange(count)].removesuffix(".").rpartition(" ")
        added = sum(len(tokenizer.encode(t)) for t in [*(f" {f}" for f in facts), "\n\n", "".join(asked)])
        pieces = filler.stretch(length - added + _SLACK, rng)
        if not pieces:
            break  # the facts alone are too long
        even = math.fmod((number + 1) * 2 / (1 + math.sqrt(5)), 1.0)
        depths = [even] if count == 1 else [rng.random() for _ in facts]
        text = _insert(pieces, facts, depths)
        request = encode_request(tokenizer, f"{text}\n\n{asked[0]}", f" {asked[2]}")
        room = length - len(request.continuation) - len(start)
        kept = request.context[len(start) :][-room:]
        whole = all(f in tokenizer.decode(kept) for f in facts)
        if whole and len(kept) == room and not any(c in p for p in pieces for c in codes):
            return Request(start + kept, request.continuation)
    what = f"example {number} of {length} tokens cannot be made: too short for the facts, or the text holds every code"
    raise DataError(f"--{kind}", what, "prose as --text, or a larger length")


def _insert(pieces: list[str], facts: list[str], depths: list[float]) -> str:
    """Each fact behind a piece: the first for depth 0, the last for depth 1."""
    behind: list[list[str]] = [[p] for p in pieces]
    for fact, depth in zip(facts, depths, strict=True):
        behind[round(depth * (len(pieces) - 1))].append(fact)
    return " ".join(itertools.chain.from_iterable(behind))
