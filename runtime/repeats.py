"""Rows of text in which stretches come again, so that training on them rewards looking things up.

In running text few predictions hang on a token that was read hundreds of tokens before, so that distillation on it
teaches a student the common before the rare. In a stretch that is said twice the teacher, once it has recognised the
stretch, predicts from its first copy (induction, arXiv:2209.11895), and its distribution asks the same of the student.
"""

from __future__ import annotations

import random

from torch import Tensor

SHORTEST, LONGEST = 8, 64  # tokens of a stretch


def repeat_stretches(rows: Tensor, share: float, *, behind: int = 0) -> Tensor:
    """Rows [N, T] in each of which about `share` of the tokens are copies of earlier ones, in stretches.

    A stretch has SHORTEST to LONGEST tokens, at most half a row (the last of a row also fewer), and may be copied to
    any place behind itself; later stretches are made later and may copy copies. Each row depends on its tokens and its
    number alone; one that ends in padding, a negative id, stays as it is.

    Args:
        rows: int64 token ids.
        share: 0 to 1; what overlapping copies take from each other is not made up for.
        behind: first tokens of a row that are neither copied nor replaced.
    """
    length = rows.shape[1]
    most = min(LONGEST, (length - behind) // 2)
    least = min(SHORTEST, most)
    if share == 0 or most <= 0:
        return rows
    out = rows.clone()
    for number, row in enumerate(out):
        if row[-1] < 0:
            continue
        rng = random.Random(number)
        sizes, left = list[int](), round(share * length)
        while left > 0:
            sizes.append(min(left, rng.randint(least, most)))
            left -= sizes[-1]
        for to, size in sorted((rng.randint(behind + n, length - n), n) for n in sizes):
            at = rng.randint(behind, to - size)
            row[to : to + size] = row[at : at + size].clone()
    return out
