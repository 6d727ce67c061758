"""Gradients of the gated delta rule by chunks, written by hand: the adjoint of `chunked`, which is recomputed.

With the names of that file, dO and dS (of the state after the chunk) given, chunks in reverse:

    dV' = P^T dO + (k exp(c_C - c)) dS      dR = T^T dV'      Z = [dO; -dR]
    dS <- exp(c_C) dS + [q exp(c); beta k exp(c)]^T Z

and then for all chunks at once, stacking q over beta k and P over B * L:

    G = Z V'^T * [L; strictly lower L]      d[q; beta k] = (Z S^T) exp(c) + G k
    dk = (V' dS^T) exp(c_C - c) + G^T [q; beta k] + beta d(beta k)

No inverse is differentiated: dT = dV' R^T gives d(B * L) = -T^T dT T^T = -dR V'^T. The gradient of c_t is what each
decay multiplies: row sums less column sums of Z V'^T * [P; B * L] and the row sums of the two state terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked import BACKWARD_BYTES, CHUNK, _chunk_for, _gather, _product, _scatter, _slices, _Within, _within


@dataclass(frozen=True)
class _Walked:
    """What the two walks leave behind, N chunks, M rows."""

    states: Tensor  # [N, M, Dk, Dv]: S at the start of each chunk
    d_states: Tensor  # [N + 1, M, Dk, Dv]: gradient of the state at the start of each chunk, and at the end of all
    fresh: Tensor  # [N, M, C, Dv]: V'
    z: Tensor  # [N, M, 2C, Dv]: dO, then -dR


def _walks(w: _Within, rows: Tensor, state: Tensor, d_out: Tensor, d_state: Tensor) -> _Walked:
    """Forward for S and V', then in reverse for dS and dR. rows [N, M, C, Dv] = beta v; both states [M, Dk, Dv]."""
    count, _, chunk = rows.shape[:3]
    from_start = (w.queries.unflatten(2, (2, chunk)) * w.into.unsqueeze(2)).flatten(2, 3)
    to_end = w.keys * w.leave
    states, fresh = rows.new_empty(count, *state.shape), torch.empty_like(rows)
    for n in range(count):
        states[n] = state
        rows[n].baddbmm_(from_start[n, :, chunk:], state, alpha=-1)
        torch.bmm(w.solve[n], rows[n], out=fresh[n])
        state = torch.baddbmm(state * w.shrink[n], to_end[n].transpose(-1, -2), fresh[n])
    d_states = rows.new_empty(count + 1, *state.shape)
    d_states[count] = d_state
    z = rows.new_empty(*rows.shape[:2], 2 * chunk, rows.shape[3])
    z[:, :, :chunk] = d_out
    for n in reversed(range(count)):
        d_fresh = torch.bmm(to_end[n], d_states[n + 1])
        d_fresh.baddbmm_(w.products[n, :, :chunk].transpose(-1, -2), z[n, :, :chunk])
        torch.neg(torch.bmm(w.solve[n].transpose(-1, -2), d_fresh), out=z[n, :, chunk:])
        torch.mul(d_states[n + 1], w.shrink[n], out=d_states[n]).baddbmm_(from_start[n].transpose(-1, -2), z[n])
    return _Walked(states, d_states, fresh, z)


def _gradients(w: _Within, x: _Walked) -> tuple[Tensor, Tensor, Tensor]:
    """d[q; beta k] [N, M, 2C, Dk], dk without its share through beta k [N, M, C, Dk] and dg [N, M, C] in float64."""
    chunk = w.keys.shape[2]
    inner = _product(x.z, x.fresh.transpose(-1, -2))
    moved = inner * w.products
    moved[:, :, :chunk].diagonal(dim1=-2, dim2=-1).zero_()  # L_tt = 1 whatever g is
    moved = moved.unflatten(2, (2, chunk)).sum(2)
    d_total = moved.sum(-1).double() - moved.sum(-2).double()
    del moved
    inner.unflatten(2, (2, chunk)).mul_(w.decay.unsqueeze(2))
    inner[:, :, chunk:].diagonal(dim1=-2, dim2=-1).zero_()
    d_queries = _product(x.z, x.states.transpose(-1, -2))
    d_queries.unflatten(2, (2, chunk)).mul_(w.into.unsqueeze(2))
    d_total += (d_queries * w.queries).sum(-1).unflatten(2, (2, chunk)).sum(2)
    d_keys = _product(x.fresh, x.d_states[1:].transpose(-1, -2)).mul_(w.leave)
    at_end = (d_keys * w.keys).sum(-1).double()
    kept = (x.d_states[1:] * x.states).sum((-1, -2), keepdim=True).mul_(w.shrink).squeeze(-1)
    # c_C takes at_end of every token and each c_t gives its own back: what is left for g_t is the tokens before t.
    d_gate = d_total.flip(-1).cumsum(-1).flip(-1) + kept + (at_end.cumsum(-1) - at_end)
    _accumulate(d_queries, inner, w.keys)
    _accumulate(d_keys, inner.transpose(-1, -2), w.queries)
    return d_queries, d_keys, d_gate


def _accumulate(x: Tensor, a: Tensor, b: Tensor) -> None:
    """x += a @ b, over two leading dimensions."""
    x.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def _group_sum(x: Tensor, kv_heads: int, batch: int) -> Tensor:
    """[N, B * H, ...] -> [N, B * K, ...]: a key/value head's gradient is the sum over its query heads."""
    group = x.shape[1] // (batch * kv_heads)
    return x if group == 1 else x.unflatten(1, (batch * kv_heads, group)).sum(2)


def rows_at_once(q: Tensor, v: Tensor, chunk: int = CHUNK) -> int:
    """Rows (batch times heads) of q [B, T, H, Dk], v [B, T, K, Dv] whose matrices for all chunks fit BACKWARD_BYTES."""
    tokens, key_dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    chunk = _chunk_for(tokens, chunk)
    a_row = 8 * chunk * chunk + 11 * chunk * key_dim + 6 * chunk * value_dim + 2 * key_dim * value_dim
    itemsize = torch.promote_types(q.dtype, torch.float32).itemsize
    return BACKWARD_BYTES.get(q.device.type, BACKWARD_BYTES["cuda"]) // (-(-tokens // chunk) * a_row * itemsize)


def gated_delta_rule_chunked_backward(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    *,
    scale: float,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta, initial_state from those of the output and the final state, each in its dtype.

    Sums as `gated_delta_rule_chunked` does, in float32, or float64 if q is float64; contiguous results.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    batch, tokens, heads = q.shape[:3]
    kv_heads = v.shape[2]
    group = heads // kv_heads
    chunk = _chunk_for(tokens, chunk)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta, initial_state))
    dq, dk, dv, dg, dbeta, dstate = grads
    most = rows_at_once(q, v, chunk)
    for b, hk, hq in _slices(batch, kv_heads, group, most):
        rate = _gather(beta[b, :, hq], chunk, acc).unsqueeze(-1)
        w = _within(q[b, :, hq], k[b, :, hk], g[b, :, hq], rate, scale=scale, chunk=chunk, acc=acc)
        values = _gather(v[b, :, hk], chunk, acc, group)
        state, d_last = (x[b, hq].to(acc).flatten(0, 1).contiguous() for x in (initial_state, d_state))
        x = _walks(w, values * rate, state, _gather(d_out[b, :, hq], chunk, acc), d_last)
        d_queries, d_keys, d_gate = _gradients(w, x)
        d_scaled, d_values = d_queries[:, :, chunk:], x.z[:, :, chunk:].neg_()
        d_rate = torch.mul(d_scaled, w.keys).sum(-1) + values.mul_(d_values).sum(-1)
        d_keys.addcmul_(d_scaled, rate)
        d_values.mul_(rate)
        rows, some = dq[b, :, hq].shape[0], dk[b, :, hk].shape[2]
        _scatter(dq[b, :, hq], d_queries[:, :, :chunk].mul_(scale))
        _scatter(dk[b, :, hk], _group_sum(d_keys, some, rows))
        _scatter(dv[b, :, hk], _group_sum(d_values, some, rows))
        _scatter(dg[b, :, hq], d_gate)
        _scatter(dbeta[b, :, hq], d_rate)
        dstate[b, hq] = x.d_states[0].view(dstate[b, hq].shape).to(dstate.dtype)
    return dq, dk, dv, dg, dbeta, dstate
