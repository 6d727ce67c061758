"""A student as a folder of the Hugging Face kind: weights as safetensors, the graph as a program without weights."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from tcal_compiler.errors import RunFolderError
from tcal_compiler.passes.capture import capture_program
from tcal_compiler.passes.json_text import read_json
from tcal_compiler.passes.types import Capture

from .durable import remove_tree
from .hashed_tensors import load_hashed, save_hashed
from .manifest import hash_file
from .program_file import load_program, save_program
from .run_files import make_folders, remove_empty

GRAPH_FILE, WEIGHTS_FILE = "graph.pt2", "model.safetensors"
AGAIN = "save_pretrained writes such a folder"


@dataclass(frozen=True)
class OpenStudent:
    """A student's program, ready to run and to be saved.

    capture: the graph with its weights, checked against the program. program: the same without them: `hollow`.
    ties: names of every weight, those of one tensor together. rest: weights that the graph does not use.
    """

    capture: Capture
    program: ExportedProgram
    ties: tuple[tuple[str, ...], ...]
    rest: dict[str, Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenStudent:
        """The program is never changed, and a copy of its weights would be as large as real ones."""
        capture, rest = copy.deepcopy((self.capture, self.rest), memo)
        return replace(self, capture=capture, rest=rest)

    def weights(self) -> dict[str, Tensor]:
        """Every weight as it now is, once, under the first of its names."""
        now = self.rest | _named(self.capture.gm)
        return {names[0]: next(now[n] for n in names if n in now) for names in self.ties}


def open_program(program: ExportedProgram) -> OpenStudent:
    """Captures a program; its weights are then the capture's alone. Parameters get gradients.

    Raises UnsupportedModelError when the captured graph does not equal it.
    """
    module = program.module()
    capture = capture_program(program, teacher=module, implementation="student", shapes=((1, 8),))
    ties, state = _ties(program.state_dict), program.state_dict
    used = _named(capture.gm)
    rest = {names[0]: state[names[0]] for names in ties if not set(names) & set(used)}
    hollow(program, ties)
    for p in capture.gm.parameters():
        p.requires_grad_(p.is_floating_point())
    return OpenStudent(capture, program, ties, rest)


def _named(gm: GraphModule) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    return dict([*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)])


def _ties(state: dict[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    groups: dict[object, list[str]] = defaultdict(list)
    for name, t in state.items():
        groups[(t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else name].append(name)
    return tuple(map(tuple, groups.values()))


def hollow(program: ExportedProgram, ties: tuple[tuple[str, ...], ...]) -> None:
    """Puts zeros in place of a program's weights, in place: views of one buffer, so that a file of it is small.

    Every tied group is a view of its own, so that the file still says what is tied.
    """
    state = program.state_dict
    by_dtype: dict[torch.dtype, list[tuple[str, ...]]] = defaultdict(list)
    for names in ties:
        by_dtype[state[names[0]].dtype].append(names)
    for dtype, groups in by_dtype.items():
        zeros = torch.zeros(len(groups) + max(state[names[0]].numel() for names in groups), dtype=dtype)
        for i, names in enumerate(groups):
            view = zeros[i : i + state[names[0]].numel()].view(state[names[0]].shape)
            for name in names:
                is_parameter = isinstance(state[name], nn.Parameter)
                state[name] = nn.Parameter(view, requires_grad=False) if is_parameter else view


@contextlib.contextmanager
def new_files_of(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`; what is written there takes its place once the block ends well.

    Names and links that are there already are replaced. Nothing is left of a block that fails, nor of a folder that
    was not there before.
    """
    made = make_folders(folder)
    new = folder / ".saving"
    try:
        remove_tree(new)
        new.mkdir()
        yield new
        for file in sorted(new.iterdir()):
            os.replace(file, folder / file.name)
    except BaseException:
        remove_tree(new)
        remove_empty(made)
        raise
    remove_tree(new)


def save_student(student: OpenStudent, folder: Path, *, context: int) -> None:
    """Writes graph and weights into an empty folder. context: tokens of the longest sequence. Raises OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")  # all are views
        save_program(student.program, folder / GRAPH_FILE)
    note = {"graph": hash_file(folder / GRAPH_FILE), "context": context}
    save_hashed(folder / WEIGHTS_FILE, student.weights(), json.dumps(note))


def load_student(folder: Path, *, context: int) -> OpenStudent:
    """What save_student wrote with this context; nothing in it is unpickled or run as code.

    Raises RunFolderError when a file is missing, damaged or of another student than the other file, and TeacherError
    when torch cannot load the graph.
    """
    weights, graph = folder / WEIGHTS_FILE, folder / GRAPH_FILE
    for file in (weights, graph):
        if not file.is_file():
            raise RunFolderError(str(file), "is missing", AGAIN)
    tensors, note = load_hashed(weights, hint=AGAIN)
    try:
        noted = read_json(note)
        known, longest = noted["graph"], noted["context"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise RunFolderError(str(weights), f"was not written with a graph: {type(e).__name__}", AGAIN) from e
    if hash_file(graph) != known:
        raise RunFolderError(str(graph), f"is damaged, or of another student than {WEIGHTS_FILE}", AGAIN)
    if longest != context:
        what = f"max_position_embeddings is {context} in its config.json, and was {longest} when it was saved"
        raise RunFolderError(str(folder), what, AGAIN)
    program, _ = load_program(graph, allow_pickle=False)
    _fill(program, tensors, weights)
    return open_program(program)


def _fill(program: ExportedProgram, tensors: dict[str, Tensor], where: Path) -> None:
    state = program.state_dict
    ties = _ties(state)
    if extra := sorted(set(tensors) - {names[0] for names in ties}):
        raise RunFolderError(str(where), f"holds weights that the graph does not have: {extra[:3]}", AGAIN)
    for first, *others in ties:
        old, new = state[first], tensors.get(first)
        if new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
            seen = "missing" if new is None else f"{new.dtype} {list(new.shape)}"
            raise RunFolderError(str(where), f"{first} is {seen}; want {old.dtype} {list(old.shape)}", AGAIN)
        one = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        for name in (first, *others):
            state[name] = one
