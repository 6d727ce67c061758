"""The gated delta rule by chunks (WY form) on any device: T / C dependent steps of matrix products instead of T.

Within a chunk of C tokens that starts from state S, with c_t the running sum of g and L_ts = exp(c_t - c_s) for s <= t,

    B = strictly lower(beta k k^T)      X = (I + B)^-1      T = X * L      P = lower(q k^T) * L
    R = beta v - (beta k exp(c)) S      V' = T R
    O = (q exp(c)) S + P V'             S <- exp(c_C) S + (k exp(c_C - c))^T V'

The form is arXiv:2406.06484's; there T is the inverse of I + B * L, which is the same matrix: B * L = D B D^-1 with
D = diag(exp(c)). Inverting before the decay is applied keeps tiny numbers out of the products, which on CPUs are slow
(denormals); for the same reason a decay below FLOOR is taken as exactly zero. Only differences c_t - c_s <= 0 are
exponentiated, so nothing overflows. Work goes through slices that are small beside memory and, forward, near the
size of a cache. C = D = 64, in products of C^3: forward 8.7, backward 19.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
FLOOR = {torch.float32: -70.0, torch.float64: -600.0}  # exp below it is no part of any sum at this precision
# Chunks times heads that the forward handles at once: on a CPU a few MiB, which its last-level cache holds.
FORWARD_MATRICES = {"cpu": 96, "cuda": 1 << 14}
# The backward keeps a slice's matrices for all chunks; a slice is one group of heads at least.
BACKWARD_BYTES = {"cpu": 96 << 20, "cuda": 4 << 30}


def _exp(x: Tensor) -> Tensor:
    """exp in place, zero below FLOOR."""
    return F.threshold(x, FLOOR[x.dtype], float("-inf"), inplace=True).exp_()


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 for the strictly lower part of a [M, C, C], C a power of two, by products of matrices only.

    Blocks of 8 by the finite series (I - a)(I + a^2)(I + a^4): a^8 = 0, and its terms stay small at this size. Then
    blocks double: the inverse of [[P, 0], [L, Q]] is [[P^-1, 0], [-Q^-1 L P^-1, Q^-1]].
    """
    size = a.shape[-1]
    block = min(8, size)
    parts = size // block
    diag = a.view(-1, parts, block, parts, block).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    diag = diag.tril(-1).reshape(-1, block, block)
    square = diag @ diag
    small = torch.eye(block, dtype=a.dtype, device=a.device) - diag
    small = torch.baddbmm(small, small, square)
    small = torch.baddbmm(small, small, square @ square)
    inverse = torch.zeros_like(a)
    inverse.view(-1, parts, block, parts, block).diagonal(dim1=1, dim2=3).copy_(
        small.view(-1, parts, block, block).permute(0, 2, 3, 1)
    )
    while block < size:
        for start in range(0, size, 2 * block):
            first, second = slice(start, start + block), slice(start + block, start + 2 * block)
            low = torch.bmm(a[:, second, first], inverse[:, first, first])
            torch.neg(torch.bmm(inverse[:, second, second], low), out=inverse[:, second, first])
        block *= 2
    return inverse


@dataclass(frozen=True)
class _Within:
    """What a run of chunks needs besides the state. N chunks, M rows (batch times heads), C tokens."""

    queries: Tensor  # [N, M, 2C, Dk]: scale q, then beta k
    keys: Tensor  # [N, M, C, Dk]
    products: Tensor  # [N, M, 2C, C]: P, then B * L
    solve: Tensor  # [N, M, C, C]: T
    decay: Tensor  # [N, M, C, C]: L, zero above the diagonal
    into: Tensor  # [N, M, C, 1]: exp(c_t), what is left at t of the state at the start
    leave: Tensor  # [N, M, C, 1]: exp(c_C - c_t), what is left at the end of token t
    shrink: Tensor  # [N, M, 1, 1]: exp(c_C)


def _rows(x: Tensor, chunk: int, group: int) -> Tensor:
    """[B, T, K, ...] -> a view [N, B, K, group, C, ...] (T padded with zeros to N C); group repeats heads, free."""
    pad = -x.shape[1] % chunk
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    x = x.unflatten(1, (-1, chunk)).movedim(0, 1).movedim(3, 2)  # [N, B, K, C, ...]
    return x.unsqueeze(3).expand(*x.shape[:3], group, *x.shape[3:])


def _gather(x: Tensor, chunk: int, acc: torch.dtype, group: int = 1) -> Tensor:
    """`_rows` as one contiguous copy [N, M, C, ...] in the accumulator's type."""
    rows = _rows(x, chunk, group)
    return torch.empty(rows.shape, dtype=acc, device=x.device).copy_(rows).flatten(1, 3)


def _scatter(out: Tensor, rows: Tensor) -> None:
    """[N, M, C, ...] into out [B, T, H, ...], without the padding."""
    count, _, chunk = rows.shape[:3]
    rows = rows.unflatten(1, (out.shape[0], out.shape[2])).movedim(2, 3).movedim(0, 1)  # [B, N, C, H, ...]
    whole = out.shape[1] // chunk
    out[:, : whole * chunk].unflatten(1, (whole, chunk)).copy_(rows[:, :whole])
    if whole < count:
        out[:, whole * chunk :].copy_(rows[:, whole, : out.shape[1] - whole * chunk])


def _within(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, *, scale: float, chunk: int, acc: torch.dtype) -> _Within:
    """q [B, T, H, Dk], k [B, T, K, Dk], g [B, T, H]; beta as rows [N, M, C, 1]."""
    keys = _gather(k, chunk, acc, q.shape[2] // k.shape[2])
    queries = keys.new_empty(*keys.shape[:2], 2 * chunk, keys.shape[-1])
    queries[:, :, :chunk].copy_(_rows(q, chunk, 1).flatten(1, 3)).mul_(scale)  # scaled after it is widened
    torch.mul(keys, beta, out=queries[:, :, chunk:])
    # Sums of g in float64, because differences of large sums are small; a clamped g has decayed everything anyway.
    total = _gather(g, chunk, torch.float64).clamp_(min=FLOOR[acc]).cumsum(-1)
    decay = total.unsqueeze(-1) - total.unsqueeze(-2)
    decay = _exp(decay.to(acc)).tril_()
    products = _product(queries, keys.transpose(-1, -2))
    solve = unit_lower_inverse(products[:, :, chunk:].flatten(0, 1)).view(decay.shape).mul_(decay)
    products.unflatten(2, (2, chunk)).mul_(decay.unsqueeze(2))
    products[:, :, chunk:].diagonal(dim1=-2, dim2=-1).zero_()
    last = total[..., -1:]
    into, leave, shrink = (_exp(x.to(acc, copy=True)).unsqueeze(-1) for x in (total, last - total, last))
    return _Within(queries, keys, products, solve, decay, into, leave, shrink)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b over two leading dimensions, as one batched product."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence for T = 1 in few operations: at batch 1 their number is the cost."""
    acc, group, rows = state.dtype, q.shape[2] // k.shape[2], state.flatten(0, 1)
    if group > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    query, key, value = (x.to(acc).reshape(rows.shape[0], 1, -1) for x in (q, k, v))
    keep = _exp(g.to(acc, copy=True)).reshape(-1, 1, 1)
    write = torch.addcmul(value, keep, torch.bmm(key, rows), value=-1).mul_(beta.to(acc).reshape(-1, 1, 1))
    new = (rows * keep).addcmul_(key.transpose(1, 2), write)
    out = torch.bmm(query, new).mul_(scale)
    return out.view(state.shape[0], 1, state.shape[1], -1), new.view(state.shape)


def _slices(batch: int, kv_heads: int, group: int, most_rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of batch, key/value heads and query heads with at most `most_rows` rows, but at least one group."""
    heads = kv_heads * group
    batches = max(1, most_rows // heads)
    some = kv_heads if most_rows >= heads else max(1, most_rows // group)
    for b in range(0, batch, batches):
        for h in range(0, kv_heads, some):
            yield slice(b, b + batches), slice(h, h + some), slice(h * group, (h + some) * group)


def _chunk_for(tokens: int, chunk: int) -> int:
    return min(chunk, 1 << (tokens - 1).bit_length())  # a power of two


def gated_delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, *, scale: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Same contract as `gated_delta_rule_reference`; `chunk` (tokens, a power of two) is invisible beyond rounding.

    Not differentiable: `gated_delta_rule_chunked_backward` has the gradients.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    batch, tokens, heads = q.shape[:3]
    if tokens == 1:
        out, state = _one_token(q, k, v, g, beta, initial_state.to(acc), scale=scale)
        return out.to(v.dtype), state.to(initial_state.dtype)
    chunk = _chunk_for(tokens, chunk)
    out = v.new_empty(batch, tokens, heads, v.shape[3])
    most = FORWARD_MATRICES.get(q.device.type, FORWARD_MATRICES["cuda"])
    final = torch.empty(initial_state.shape, dtype=acc, device=q.device).copy_(initial_state)
    for b, hk, hq in _slices(batch, k.shape[2], heads // k.shape[2], most):
        state = final[b, hq].flatten(0, 1).clone()
        step = chunk * max(1, most // state.shape[0])
        for start in range(0, tokens, step):
            t = slice(start, start + step)
            rate = _gather(beta[b, t, hq], chunk, acc).unsqueeze(-1)
            w = _within(q[b, t, hq], k[b, t, hk], g[b, t, hq], rate, scale=scale, chunk=chunk, acc=acc)
            rows = _gather(v[b, t, hk], chunk, acc, heads // k.shape[2]).mul_(rate)
            _walk(w, rows, state)
            _scatter(out[b, t, hq], rows)
        final[b, hq] = state.view(final[b, hq].shape)
    return out, final.to(initial_state.dtype)


def _walk(w: _Within, rows: Tensor, state: Tensor) -> None:
    """Chunk after chunk: rows [N, M, C, Dv] hold beta v and become the outputs; state [M, Dk, Dv] is updated."""
    chunk = rows.shape[2]
    w.queries.unflatten(2, (2, chunk)).mul_(w.into.unsqueeze(2))
    w.keys.mul_(w.leave)
    for n in range(rows.shape[0]):
        rows[n].baddbmm_(w.queries[n, :, chunk:], state, alpha=-1)
        fresh = torch.bmm(w.solve[n], rows[n])
        torch.bmm(w.queries[n, :, :chunk], state, out=rows[n])
        rows[n].baddbmm_(w.products[n, :, :chunk], fresh)
        state.mul_(w.shrink[n]).baddbmm_(w.keys[n].transpose(-1, -2), fresh)
