"""The Triton kernels of bottleneck attention; `launch` calls them.

One program computes one head of one sequence. A sequence is a frame (kinds `mean` and `shared`) or a clip (`joint`, and
any kind with a single frame). Local row i < N of a sequence is its token i, row N + z is bottleneck token z. Rows of
the packed matrix follow by index arithmetic, so nothing is gathered, concatenated or copied. The few bottleneck queries
use the padding of the last tile of rows.

`KIND` defines how the results of a sequence's bottleneck queries are used:

    ALONE   the sequence is the whole clip: the result is final
    COPIES  kind `mean`: each frame's copy has its own row in the output
    PARTS   kind `shared`: each frame computes a partial softmax over its own keys, with its log-sum-exp; `merge_parts`
            combines them (only the first frame includes the bottleneck's keys, so that each key counts once)

Log-sum-exps are to base 2, of scores scaled by log2(e) / sqrt(d), because the hardware computes exp2.

The gradients of a clip's bottleneck rows are sums over its frames. Every program writes its own part in float32, and
`sum_parts` adds the parts in a fixed order: no atomics, and two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

ALONE, COPIES, PARTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _sequence(TILES: tl.constexpr, H: tl.constexpr, frames):
    """Returns tile, head, sequence and clip of this program; tiles of a head are neighbours because they share keys."""
    pid = tl.program_id(0)
    seq = (pid // TILES // H).to(tl.int64)
    return pid % TILES, (pid // TILES) % H, seq, seq // frames


@triton.jit
def _count(known: tl.constexpr, trips, TRIPS: tl.constexpr):
    """Returns the number of iterations of a loop: `known`, or the equal `trips`, which is hidden from the compiler.

    With a known number the compiler unrolls three iterations, for 140 registers instead of 99 on sm_90. Only the
    interpreter needs the known number.
    """
    return trips if TRIPS else known


@triton.jit
def _in_rows(local, seq, clip, first, N: tl.constexpr, Z: tl.constexpr):
    """Converts local rows to rows of the packed input."""
    return tl.where(local < N, seq * N + local, first + clip * Z + local - N)


@triton.jit
def _out_rows(local, seq, clip, first, N: tl.constexpr, Z: tl.constexpr, KIND: tl.constexpr):
    """Converts local rows to rows of the output; with `PARTS`, bottleneck rows are those of the merged result."""
    if KIND == COPIES:
        return tl.where(local < N, seq * N + local, first + seq * Z + local - N)
    return tl.where(local < N, seq * N + local, first + clip * Z + local - N)


@triton.jit
def _visible(row, col, is_first, N: tl.constexpr, Z: tl.constexpr, KIND: tl.constexpr):
    """Returns the mask of pairs of local rows (queries) and columns (keys), which are given with broadcastable axes."""
    mask = (row >= 0) & (col < N + Z)
    if KIND == PARTS:
        mask = mask & ((row < N) | (col < N) | is_first)
    return mask


@triton.jit
def _attend(q, k, v, acc, top, total, keep, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds a tile of keys and values [columns, d] to the running softmax."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        s = tl.where(keep, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def forward(
    qkv, out, lse, part_out, part_lse, scale, frames, first, num_out, trips,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, Z: tl.constexpr, QUERIES: tl.constexpr, KIND: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    TRIPS: tl.constexpr,
):  # fmt: skip
    """Computes a tile of output rows and their log-sum-exp.

    Pointers: qkv [rows, 3, H, D]; out [num_out, H, D]; lse float32 [H, num_out]; with `PARTS` also float32
    part_out [sequences, Z, H, D] and part_lse [sequences, Z, H]. `first`: number of token rows. `QUERIES`: Z, or 0 if
    the result of the bottleneck rows is not needed. Keys: full tiles of tokens without a mask, then tiles of TAIL.
    """
    tile, head, seq, clip = _sequence(TILES, H, frames)
    is_first = seq % frames == 0
    row_size: tl.constexpr = 3 * H * D
    dim = tl.arange(0, D)
    local = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = local < N + QUERIES
    rows = _in_rows(local, seq, clip, first, N, Z)
    q = tl.load(qkv + rows[:, None] * row_size + head * D + dim[None, :], mask=real[:, None], other=0.0)
    keys = qkv + H * D + head * D
    token_keys = keys + seq * N * row_size  # offsets from here fit into 32 bits: fewer registers
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    full: tl.constexpr = N // BLOCK_N
    for j in range(_count(full, trips, TRIPS)):
        at = token_keys + (j * BLOCK_N + tl.arange(0, BLOCK_N))[:, None] * row_size + dim[None, :]
        k = tl.load(at)
        v = tl.load(at + H * D)
        acc, top, total = _attend(q, k, v, acc, top, total, 0, scale, False, PRECISION)
    for j in range((N + Z - full * BLOCK_N + TAIL - 1) // TAIL):
        col = full * BLOCK_N + j * TAIL + tl.arange(0, TAIL)
        at = keys + _in_rows(col, seq, clip, first, N, Z)[:, None] * row_size + dim[None, :]
        valid = (col < N + Z)[:, None]
        k = tl.load(at, mask=valid, other=0.0)
        v = tl.load(at + H * D, mask=valid, other=0.0)
        keep = _visible(local[:, None], col[None, :], is_first, N, Z, KIND)
        acc, top, total = _attend(q, k, v, acc, top, total, keep, scale, True, PRECISION)
    acc = acc / total[:, None]
    log = top + tl.log2(total)
    local = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if KIND == PARTS:
        final = local < N
        part = seq * Z + local - N
        at_part = part_out + (part[:, None] * H + head) * D + dim[None, :]
        tl.store(at_part, acc, mask=(real & (local >= N))[:, None])
        tl.store(part_lse + part * H + head, log, mask=real & (local >= N))
    else:
        final = real
    to = _out_rows(local, seq, clip, first, N, Z, KIND)
    tl.store(out + (to[:, None] * H + head) * D + dim[None, :], acc.to(out.dtype.element_ty), mask=final[:, None])
    tl.store(lse + head * num_out + to, log, mask=final)


@triton.jit
def merge_parts(
    part_out, part_lse, out, lse, first, num_out,
    H: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, FRAMES: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """Combines the frames' partial results of a clip's bottleneck queries, weighted by their share of the softmax."""
    tiles: tl.constexpr = (Z + BLOCK_Z - 1) // BLOCK_Z
    tile, head, clip, _ = _sequence(tiles, H, 1)
    dim = tl.arange(0, D)
    z = tile * BLOCK_Z + tl.arange(0, BLOCK_Z)
    real = z < Z
    top = tl.full([BLOCK_Z], float("-inf"), tl.float32)
    for f in range(FRAMES):
        part = (clip * FRAMES + f) * Z + z
        top = tl.maximum(top, tl.load(part_lse + part * H + head, mask=real, other=0.0))
    total = tl.zeros([BLOCK_Z], tl.float32)
    acc = tl.zeros([BLOCK_Z, D], tl.float32)
    for f in range(FRAMES):
        part = (clip * FRAMES + f) * Z + z
        share = tl.exp2(tl.load(part_lse + part * H + head, mask=real, other=0.0) - top)
        o = tl.load(part_out + (part[:, None] * H + head) * D + dim[None, :], mask=real[:, None], other=0.0)
        total += share
        acc += share[:, None] * o
    to = first + clip * Z + z
    acc = acc / total[:, None]
    tl.store(out + (to[:, None] * H + head) * D + dim[None, :], acc.to(out.dtype.element_ty), mask=real[:, None])
    tl.store(lse + head * num_out + to, top + tl.log2(total), mask=real)


@triton.jit
def _queries(
    qkv, out, dout, lse, local, seq, clip, head, first, num_out,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, Z: tl.constexpr, QUERIES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Loads a tile of queries: q and dout [rows, d], log-sum-exp and rowsum(out * dout) [rows]."""
    dim = tl.arange(0, D)
    real = local < N + QUERIES
    rows = _in_rows(local, seq, clip, first, N, Z)
    to = _out_rows(local, seq, clip, first, N, Z, KIND)
    q = tl.load(qkv + rows[:, None] * (3 * H * D) + head * D + dim[None, :], mask=real[:, None], other=0.0)
    at = (to[:, None] * H + head) * D + dim[None, :]
    do = tl.load(dout + at, mask=real[:, None], other=0.0)
    o = tl.load(out + at, mask=real[:, None], other=0.0)
    log = tl.load(lse + head * num_out + to, mask=real, other=0.0)
    return q, do, log, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)


@triton.jit
def _keys_values(
    qkv, col, seq, clip, head, first, H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, Z: tl.constexpr
):  # fmt: skip
    """Loads a tile of keys and values [rows, d]; zeros beyond the sequence."""
    valid = (col < N + Z)[:, None]
    at = _in_rows(col, seq, clip, first, N, Z)[:, None] * (3 * H * D) + head * D + tl.arange(0, D)[None, :]
    k = tl.load(qkv + H * D + at, mask=valid, other=0.0)
    v = tl.load(qkv + 2 * H * D + at, mask=valid, other=0.0)
    return k, v


@triton.jit
def _store_rows(
    dqkv, parts, which, value, local, seq, clip, head, first, limit,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, Z: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Writes gradients [rows, d] of q, k or v (`which` 0, 1, 2) of local rows below `limit`.

    With `SPLIT`, gradients of bottleneck rows go to this sequence's entry in `parts`, float32 [sequences, Z, 3, H, D].
    """
    dim = tl.arange(0, D)
    rows = _in_rows(local, seq, clip, first, N, Z)
    at = dqkv + rows[:, None] * (3 * H * D) + (which * H + head) * D + dim[None, :]
    if SPLIT:
        tl.store(at, value.to(dqkv.dtype.element_ty), mask=((local < N) & (local < limit))[:, None])
        part = ((seq * Z + local[:, None] - N) * 3 + which) * (H * D) + head * D + dim[None, :]
        tl.store(parts + part, value, mask=((local >= N) & (local < limit))[:, None])
    else:
        tl.store(at, value.to(dqkv.dtype.element_ty), mask=(local < limit)[:, None])


@triton.jit
def _key_gradients(q, do, log, delta, k, v, dk, dv, keep, scale, unit, PRECISION: tl.constexpr):
    """Adds a tile of queries to the gradients of keys and values; returns these and the scores' [keys, queries]."""
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    p = tl.where(keep, tl.exp2(s - log[None, :]), 0.0)
    dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = (p * (dp - delta[None, :]) * unit).to(q.dtype)
    dk += tl.dot(ds, q, input_precision=PRECISION)
    return dk, dv, ds


@triton.jit
def backward_whole(
    qkv, out, dout, lse, dqkv, parts, scale, unit, frames, first, num_out,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, Z: tl.constexpr, QUERIES: tl.constexpr, KIND: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes all gradients of one head of one short sequence; its N + Z <= KEYS keys and values stay on chip.

    Scores are transposed (keys by queries), so that the many keys are the rows of the tensor cores' products. This
    takes five matrix products per tile, where two kernels take seven. rowsum(out * dout) is computed here, because each
    query belongs to one program. `scale` is log2(e) / sqrt(d), `unit` is 1 / sqrt(d).
    """
    _, head, seq, clip = _sequence(1, H, frames)
    is_first = seq % frames == 0
    col = tl.arange(0, KEYS)
    k, v = _keys_values(qkv, col, seq, clip, head, first, H, D, N, Z)
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    for i in range((N + QUERIES + BLOCK_M - 1) // BLOCK_M):
        local = i * BLOCK_M + tl.arange(0, BLOCK_M)
        q, do, log, delta = _queries(
            qkv, out, dout, lse, local, seq, clip, head, first, num_out, H, D, N, Z, QUERIES, KIND
        )
        keep = _visible(local[None, :], col[:, None], is_first, N, Z, KIND)
        dk, dv, ds = _key_gradients(q, do, log, delta, k, v, dk, dv, keep, scale, unit, PRECISION)
        if D < 64:  # the tensor cores of sm_90 need 64 rows of a product: channels, or else queries
            dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
        else:
            dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION))
        _store_rows(dqkv, parts, 0, dq, local, seq, clip, head, first, N + QUERIES, H, D, N, Z, SPLIT)
    _store_rows(dqkv, parts, 1, dk, col, seq, clip, head, first, N + Z, H, D, N, Z, SPLIT)
    _store_rows(dqkv, parts, 2, dv, col, seq, clip, head, first, N + Z, H, D, N, Z, SPLIT)


@triton.jit
def backward_keys(
    qkv, out, dout, lse, dqkv, parts, scale, unit, frames, first, num_out,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, Z: tl.constexpr, QUERIES: tl.constexpr, KIND: tl.constexpr,
    SPLIT: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of a tile of keys and values, for sequences of any length; see `backward_whole`."""
    tile, head, seq, clip = _sequence(TILES, H, frames)
    is_first = seq % frames == 0
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k, v = _keys_values(qkv, col, seq, clip, head, first, H, D, N, Z)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    for i in range((N + QUERIES + BLOCK_M - 1) // BLOCK_M):
        local = i * BLOCK_M + tl.arange(0, BLOCK_M)
        q, do, log, delta = _queries(
            qkv, out, dout, lse, local, seq, clip, head, first, num_out, H, D, N, Z, QUERIES, KIND
        )
        keep = _visible(local[None, :], col[:, None], is_first, N, Z, KIND)
        dk, dv, _ = _key_gradients(q, do, log, delta, k, v, dk, dv, keep, scale, unit, PRECISION)
    _store_rows(dqkv, parts, 1, dk, col, seq, clip, head, first, N + Z, H, D, N, Z, SPLIT)
    _store_rows(dqkv, parts, 2, dv, col, seq, clip, head, first, N + Z, H, D, N, Z, SPLIT)


@triton.jit
def backward_queries(
    qkv, out, dout, lse, dqkv, parts, scale, unit, frames, first, num_out,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, Z: tl.constexpr, QUERIES: tl.constexpr, KIND: tl.constexpr,
    SPLIT: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of a tile of queries, for sequences of any length."""
    tile, head, seq, clip = _sequence(TILES, H, frames)
    is_first = seq % frames == 0
    local = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q, do, log, delta = _queries(qkv, out, dout, lse, local, seq, clip, head, first, num_out, H, D, N, Z, QUERIES, KIND)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for j in range((N + Z + BLOCK_N - 1) // BLOCK_N):
        col = j * BLOCK_N + tl.arange(0, BLOCK_N)
        k, v = _keys_values(qkv, col, seq, clip, head, first, H, D, N, Z)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        keep = _visible(local[:, None], col[None, :], is_first, N, Z, KIND)
        p = tl.where(keep, tl.exp2(s - log[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * unit
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    _store_rows(dqkv, parts, 0, dq, local, seq, clip, head, first, N + QUERIES, H, D, N, Z, SPLIT)


@triton.jit
def sum_parts(
    parts, dqkv, first,
    H: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, FRAMES: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):  # fmt: skip
    """Adds up the frames' parts of the gradients of a clip's bottleneck rows, in the order of the frames."""
    tiles: tl.constexpr = (Z + BLOCK_Z - 1) // BLOCK_Z
    tile, column, clip, _ = _sequence(tiles, 3 * H, 1)
    dim = tl.arange(0, D)
    z = tile * BLOCK_Z + tl.arange(0, BLOCK_Z)
    real = (z < Z)[:, None]
    acc = tl.zeros([BLOCK_Z, D], tl.float32)
    if (QUERIES > 0) | (column >= H):  # without QUERIES, the gradient of the bottleneck queries is zero
        for f in range(FRAMES):
            part = ((clip * FRAMES + f) * Z + z[:, None]) * (3 * H) + column
            acc += tl.load(parts + part * D + dim[None, :], mask=real, other=0.0)
    to = ((first + clip * Z + z)[:, None] * (3 * H) + column) * D + dim[None, :]
    tl.store(dqkv + to, acc.to(dqkv.dtype.element_ty), mask=real)
