"""Least-squares searches that turn weights into block integers: 8-bit affine, 4-bit with a float minimum.

Blocks are 32 neighbouring input columns. All is vectorised over blocks and works a slice of blocks at a time,
so that memory stays small beside the matrix itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.quant.gguf_blocks import BLOCK, F32, U8

F64 = npt.NDArray[np.float64]
_SLICE = 1 << 16  # blocks per pass: 2 Mi weights, 16 MiB per f64 temporary


def affine_to_q8(q: npt.NDArray[Any], scale: F32, minimum: F32) -> tuple[U8, F32, U8]:
    """Blocks w = scale·q + minimum with small unsigned q → (Q uint8, s f32, z uint8) with w ≈ s·(Q − z).

    q is uint8[rows, cols]; scale and minimum f32[rows, cols/32]; the answer has the same shapes.
    An 8-bit integer grid can hold a finer copy of the 4-bit grid: Q − z = a·q + k with integer a, k. Each a
    that fits gives k = round(a·minimum/scale) and the least-squares s; the a with the smallest error wins.
    Only rounding k errs, so the error is several times smaller than that of rounding the weights afresh
    (and zero for Q4_0, where minimum/scale is -8: a = 1 is exact). Blocks that no a fits are rounded afresh.
    """
    rows, cols = q.shape
    blocks = q.reshape(-1, BLOCK)
    out = np.empty_like(blocks, dtype=np.uint8)
    out_scale = np.empty(len(blocks), dtype=np.float32)
    out_zero = np.empty(len(blocks), dtype=np.uint8)
    flat_scale, flat_minimum = scale.reshape(-1), minimum.reshape(-1)
    for start in range(0, len(blocks), _SLICE):
        part = slice(start, start + _SLICE)
        out[part], out_scale[part], out_zero[part] = _search_slice(
            blocks[part], flat_scale[part], flat_minimum[part]
        )
    shape = (rows, cols // BLOCK)
    return out.reshape(rows, cols), out_scale.reshape(shape), out_zero.reshape(shape)


def _search_slice(q: npt.NDArray[Any], scale: F32, minimum: F32) -> tuple[U8, F32, U8]:
    d, m = scale.astype(np.float64), minimum.astype(np.float64)
    low, high = q.min(axis=1).astype(np.int64), q.max(axis=1).astype(np.int64)
    s1 = q.sum(axis=1, dtype=np.int64).astype(np.float64)
    s2 = np.einsum("ij,ij->i", q, q, dtype=np.int64).astype(np.float64)
    energy = d * d * s2 + 2 * d * m * s1 + BLOCK * m * m  # Σ w²

    best_error = np.full(len(q), np.inf)
    best_a = np.zeros(len(q), dtype=np.int64)
    best_k = np.zeros(len(q), dtype=np.int64)
    best_s = np.zeros(len(q))
    span = high - low
    usable = (d != 0) & (span > 0)
    ratio = np.divide(m, d, out=np.zeros_like(m), where=usable)
    usable &= np.abs(ratio) <= 255
    for a in range(1, 256):
        live = np.flatnonzero(usable & (a * span <= 255))
        if not len(live):
            break
        k = np.rint(a * ratio[live])
        largest = np.maximum(np.abs(a * high[live] + k), np.abs(a * low[live] + k))
        cross = a * d[live] * s2[live] + (d[live] * k + m[live] * a) * s1[live] + BLOCK * m[live] * k
        square = a * a * s2[live] + 2 * a * k * s1[live] + BLOCK * k * k
        fitted = np.divide(cross, square, out=np.zeros_like(cross), where=square > 0)
        error = energy[live] - fitted * cross
        # A finer grid must win by more than rounding noise: exact imports keep the smallest a.
        better = (largest <= 255) & (error < best_error[live] - 1e-13 * energy[live])
        chosen = live[better]
        best_error[chosen], best_a[chosen] = error[better], a
        best_k[chosen], best_s[chosen] = k[better].astype(np.int64), fitted[better]

    u = best_a[:, None] * q + best_k[:, None]
    # Rounding afresh costs step²/12 per weight on average; take it where the search found nothing better.
    edges = np.stack([d * low + m, d * high + m])
    step = _fresh_step(edges.min(axis=0), edges.max(axis=0))
    fresh = np.flatnonzero(best_error > BLOCK * step * step / 12)
    if len(fresh):
        weights = d[fresh, None] * q[fresh] + m[fresh, None]
        u[fresh], best_s[fresh] = _round_fresh(weights)
    zero = np.maximum(-u.min(axis=1), 0)
    return (u + zero[:, None]).astype(np.uint8), best_s.astype(np.float32), zero.astype(np.uint8)


def dense_to_q8(weights: npt.NDArray[np.floating[Any]]) -> tuple[U8, F32, U8]:
    """f32[rows, cols] → (Q uint8[rows, cols], s f32, z uint8[rows, cols/32]) with w ≈ s·(Q − z)."""
    rows, cols = weights.shape
    blocks = weights.reshape(-1, BLOCK)
    out = np.empty(blocks.shape, dtype=np.uint8)
    out_scale = np.empty(len(blocks), dtype=np.float32)
    out_zero = np.empty(len(blocks), dtype=np.uint8)
    for start in range(0, len(blocks), _SLICE):
        part = slice(start, start + _SLICE)
        u, fitted = _round_fresh(blocks[part].astype(np.float64))
        zero = np.maximum(-u.min(axis=1), 0)
        out[part] = (u + zero[:, None]).astype(np.uint8)
        out_scale[part], out_zero[part] = fitted.astype(np.float32), zero.astype(np.uint8)
    shape = (rows, cols // BLOCK)
    return out.reshape(rows, cols), out_scale.reshape(shape), out_zero.reshape(shape)


def _fresh_step(low: F64, high: F64) -> F64:
    """The smallest step with which Q and its zero point both fit into 0..255."""
    reach: F64 = np.maximum(np.maximum(np.abs(low), np.abs(high)), high - low)
    return reach / 255


def _round_fresh(weights: F64) -> tuple[npt.NDArray[np.int64], F64]:
    """f64[n, 32] → (u int64[n, 32], s f64[n]): u = round(w/step) inside 255 levels, s by least squares."""
    step = _fresh_step(weights.min(axis=1), weights.max(axis=1))
    u = np.rint(np.divide(weights, step[:, None], out=np.zeros_like(weights), where=step[:, None] > 0))
    # Both ends can round outwards at once, which is one level too many.
    u = np.minimum(u, 255 + np.minimum(u.min(axis=1), 0)[:, None])
    square = np.einsum("ij,ij->i", u, u)
    cross = np.einsum("ij,ij->i", u, weights)
    return u.astype(np.int64), np.divide(cross, square, out=np.zeros_like(cross), where=square > 0)


def dense_to_q4(weights: npt.NDArray[np.floating[Any]], *, trials: int = 14) -> tuple[U8, F32, F32]:
    """f32[rows, cols] → (q uint8 0..15, d f32, m f32[rows, cols/32]) with w ≈ d·q + m.

    Tries `trials` step sizes around (max − min)/15, refits d and m by least squares for each and keeps the
    best: the search of ggml's make_qkx2_quants, unweighted. Only for sources of 8 bits or more.
    """
    rows, cols = weights.shape
    blocks = weights.reshape(-1, BLOCK)
    out = np.zeros(blocks.shape, dtype=np.uint8)
    out_d = np.zeros(len(blocks), dtype=np.float32)
    out_m = np.zeros(len(blocks), dtype=np.float32)
    for start in range(0, len(blocks), _SLICE):
        part = slice(start, start + _SLICE)
        out[part], out_d[part], out_m[part] = _fit_q4(blocks[part].astype(np.float32), trials)
    shape = (rows, cols // BLOCK)
    return out.reshape(rows, cols), out_d.reshape(shape), out_m.reshape(shape)


def _fit_q4(w: F32, trials: int) -> tuple[U8, F32, F32]:
    low = w.min(axis=1)
    span = w.max(axis=1) - low
    total = w.sum(axis=1, dtype=np.float64)
    energy = np.einsum("ij,ij->i", w, w, dtype=np.float64)
    best_error = np.full(len(w), np.inf)
    q_best = np.zeros(w.shape, dtype=np.uint8)
    d_best = np.zeros(len(w))
    m_best = total / BLOCK  # a block of one value needs no q at all
    for levels in np.linspace(14.0, 16.0, trials, dtype=np.float32):
        inverse = np.divide(levels, span, out=np.zeros_like(span), where=span > 0)
        q = np.clip(np.rint((w - low[:, None]) * inverse[:, None]), 0, 15)
        s1 = q.sum(axis=1, dtype=np.float64)
        s2 = np.einsum("ij,ij->i", q, q, dtype=np.float64)
        cross = np.einsum("ij,ij->i", q, w, dtype=np.float64)
        spread = BLOCK * s2 - s1 * s1
        d = np.divide(BLOCK * cross - s1 * total, spread, out=np.zeros_like(spread), where=spread > 0)
        m = (total - d * s1) / BLOCK
        error = energy - d * cross - m * total
        better = error < best_error
        best_error[better] = error[better]
        q_best[better] = q[better].astype(np.uint8)
        d_best[better], m_best[better] = d[better], m[better]
    return q_best, d_best.astype(np.float32), m_best.astype(np.float32)
