"""The rows that a calibration text becomes, kept so that a large text is tokenised once.

A file is named after the sha256 of all that decides the rows: every text file's sha256 and weight, the tokenizer's
fingerprint and the length. It holds the sha256 of what is in it, and only tensors. One that is damaged, or holds what
cannot be rows of this tokenizer, is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tcal_compiler.errors import RunFolderError

from .data import Bar
from .durable import remove_tree
from .hashed_tensors import load_hashed, save_hashed
from .run_files import cache_folder
from .sources import CalibrationText
from .tokenizer import TokenizerLike

_FORMAT = 3  # of the file and of how rows are cut


def cached_rows(
    text: CalibrationText,
    tokenizer: TokenizerLike,
    *,
    length: int,
    run: Path,
    say: Callable[[str], None],
    progress: Bar | None = None,
) -> tuple[Tensor, Tensor]:
    """text.rows, from the run folder `run` when it has them; see there for what is returned and raised.

    say: is told when a file that is there cannot be used. A tokenizer without fingerprint is asked anew each time.
    """
    mark = tokenizer.fingerprint()
    if mark is None:
        return text.rows(tokenizer, length=length, progress=progress)
    key = hashlib.sha256(json.dumps([_FORMAT, text.identity(), mark, length]).encode()).hexdigest()
    file = cache_folder(run, "tokens") / f"{key[:32]}.safetensors"
    try:
        if file.is_file() and not file.is_symlink():
            return _checked(file, key, length, tokenizer.num_tokens)
    except RunFolderError as e:
        say(f"{e.where} {e.what}; the text is tokenised again")
    ids, counts = text.rows(tokenizer, length=length, progress=progress)
    remove_tree(file.parent)  # rows of another text, tokenizer or length
    cache_folder(run, file.parent.name)
    save_hashed(file, {"ids": ids.to(torch.int32), "counts": counts}, key)
    return ids, counts


def _checked(file: Path, key: str, length: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The rows in a file. Raises RunFolderError when they are not those of `key`, or no rows."""
    tensors, note = load_hashed(file, hint="delete it")
    ids, counts = tensors.get("ids"), tensors.get("counts")
    if note != key or ids is None or counts is None or len(tensors) != 2:
        raise RunFolderError(str(file), "holds other rows than its name says", "delete it")
    kinds = ids.dtype == torch.int32 and counts.dtype == torch.bool
    shapes = ids.dim() == 2 and ids.shape[1] == length and counts.shape == (len(ids), length - 1) and len(ids) > 0
    if not (kinds and shapes and int(ids.min()) >= 0 and int(ids.max()) < num_tokens):
        what = f"holds no rows of {length} tokens below {num_tokens}: {ids.dtype} {tuple(ids.shape)}"
        raise RunFolderError(str(file), what, "delete it")
    return ids.long(), counts
