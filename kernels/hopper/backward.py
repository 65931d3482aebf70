"""The fused backward of sm_90: dk, dv and dq of a tile of keys in one pass, five products where two passes take seven.

    s' = k q'    p' = exp2(s' - lse2)    dp' = v do'    x' = p' (dp' - delta)
    dv += p' do    dk += x' q    dq += x k, by copies that add in float32: their order is not fixed

Two warp groups own half of the keys each; a third part, one warp, brings queries, their statistics and cotangents through a
ring of STAGES. A group keeps s', p', dv and dk to itself. x' of both goes to shared memory, where each group makes half of
the columns of dq from it. The query heads of a key head's group and their spans are one loop, and so are the tiles in it.
"""

from ..chain import apply_scores, place, pull_scores
from ..masks import row_range, row_spans
from ..shim import LOG2E, tl
from ..shim import kernel as portable
from ..tiles import head_of, mean_row, program_tile, store_rows
from ..walk import key_walk, middle_tile
from .gluon import (
    fence_async_shared,
    gl,
    jit,
    kernel,
    mbarrier,
    named_barrier_wait,
    tma_load,
    tma_reduce_add,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

WIDE = gl.constexpr(16)  # equal columns of a tile of row sums: what a product and a copy have at least


@jit
def key_place(n_k, n_kv, BLOCK_K: gl.constexpr):
    """(first key, entry, key head) of the program's tile; tiles of a head are neighbours, so its queries stay in the cache."""
    n_tiles = gl.cdiv(n_k, BLOCK_K)
    head = gl.program_id(0) // n_tiles
    return gl.program_id(0) % n_tiles * BLOCK_K, head // n_kv, head % n_kv


@jit
def turn(step, b, kv, k0, call, FLAGS: gl.constexpr, GROUP: gl.constexpr, SPANS: gl.constexpr, BLOCKS: gl.constexpr):
    """(head, span, lo, full_lo, full_hi, hi) of a turn: kernels/walk.py. A tile with keys that do not exist is never full."""
    h, r = kv * GROUP + step // SPANS, step % SPANS
    size = call[1]
    lo, full_lo, full_hi, hi = row_range(
        call[0][0], r, b.to(gl.int64), h.to(gl.int64), k0, size, FLAGS, False, BLOCKS[0], BLOCKS[1]
    )
    full_hi = gl.where(k0 + BLOCKS[1] > size[1], full_lo, full_hi)
    return h, r, lo, full_lo, full_hi, hi


@jit
def producer(
    inputs, buffers, bars, b, kv, k0, call, n_h, n_pad, FLAGS: gl.constexpr, GROUP: gl.constexpr, SPANS: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring the keys and values once, then every turn's queries with lse2, and cotangents with delta."""
    q, k, v, do, lse2, delta = inputs
    q_s, k_s, v_s, do_s, lse_s, delta_s = buffers
    kv_full, q_full, q_empty, do_full, do_empty = bars
    BLOCK_Q: gl.constexpr = BLOCKS[0]
    mbarrier.expect(kv_full.index(0), k.block_type.nbytes)
    tma_load(k, [b, kv, k0, 0], kv_full.index(0), k_s.index(0))
    mbarrier.expect(kv_full.index(1), v.block_type.nbytes)
    tma_load(v, [b, kv, k0, 0], kv_full.index(1), v_s.index(0))
    count = 0
    for step in range(GROUP * SPANS):
        h, _, lo, _, _, hi = turn(step, b, kv, k0, call, FLAGS, GROUP, SPANS, BLOCKS)
        row = (b * n_h + h) * n_pad
        for q0 in range(lo, hi, BLOCK_Q):
            stage = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(q_empty.index(stage), phase)
            mbarrier.expect(q_full.index(stage), q.block_type.nbytes + BLOCK_Q * 4)
            tma_load(q, [b, h, q0, 0], q_full.index(stage), q_s.index(stage))
            tma_load(lse2, [row + q0], q_full.index(stage), lse_s.index(stage))
            mbarrier.wait(do_empty.index(stage), phase)
            mbarrier.expect(do_full.index(stage), do.block_type.nbytes + BLOCK_Q * 4)
            tma_load(do, [b, h, q0, 0], do_full.index(stage), do_s.index(stage))
            tma_load(delta, [row + q0], do_full.index(stage), delta_s.index(stage))
            count += 1


@jit
def hidden(p, q0, k_idx, h, r, b, call, FLAGS: gl.constexpr, Q_LAYOUT: gl.constexpr, BLOCK_Q: gl.constexpr):
    """p with zeros for the pairs that a span hides; one end after the other, which takes fewer registers. # [keys, BLOCK_Q]"""
    q_idx = q0 + gl.arange(0, BLOCK_Q, Q_LAYOUT)
    size = call[1]
    start, stop = row_spans(call[0][0], r, b.to(gl.int64), h.to(gl.int64), q_idx, q_idx < size[0], size, FLAGS)
    p = gl.where(k_idx[:, None] >= start[None, :], p, 0.0)
    return gl.where(k_idx[:, None] < stop[None, :], p, 0.0)


@jit
def weights(s, lse2, q0, k_idx, h, b, scale, call, FLAGS: gl.constexpr, SCORES: gl.constexpr, Q_LAYOUT: gl.constexpr,
            BLOCK_Q: gl.constexpr):  # fmt: skip
    """(p, scaled scores, place) of raw products s. # [keys, BLOCK_Q]"""
    if len(SCORES) == 0:
        return gl.exp2(s * (scale * LOG2E) - lse2[None, :]), s, 0
    else:
        size = call[1]
        near = gl.minimum(q0 + gl.arange(0, BLOCK_Q, Q_LAYOUT), size[0] - 1)
        near_k = gl.minimum(k_idx, size[1] - 1)
        data = call[0]
        at = place(data[1], b.to(gl.int64), h.to(gl.int64), near[None, :], near_k[:, None], size, call[2], FLAGS)
        s = s * scale
        return gl.exp2(apply_scores(s, at, data[2], SCORES, len(SCORES)) * LOG2E - lse2[None, :]), s, at


@jit
def dp_product(values, do, zero, W: gl.constexpr):
    """dp' of half W of the keys, issued. # [keys, BLOCK_Q]"""
    KEYS: gl.constexpr = values.shape[0] // 2
    return warpgroup_mma(values.slice(W * KEYS, KEYS, 0), do.permute((1, 0)), zero, use_acc=False, is_async=True)


@jit
def consumer(
    outputs, buffers, bars, scratch, b, kv, k0, scale, call, W: gl.constexpr, FLAGS: gl.constexpr,
    SCORES: gl.constexpr, GROUP: gl.constexpr, SPANS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, ZERO_SUM: gl.constexpr,
):  # fmt: skip
    """Half W of the keys: their dk and dv, and half W of the columns of every tile of dq. The first has its row sums too.

    OVERLAP: 2 has dp in flight during the exponentials; 1 beside dv; 0 after dv, when the rounded p is not needed any more.
    The fewer, the more registers are left, and the other group has the matrix units meanwhile.
    """
    dk_out, dv_out, dq_out, sums_out = outputs
    x_s, dq_s, ones, sums_s = scratch
    SUMS: gl.constexpr = ZERO_SUM and W == 0
    q_s, k_s, v_s, do_s, lse_s, delta_s = buffers
    kv_full, q_full, q_empty, do_full, do_empty = bars
    BLOCK_Q: gl.constexpr = BLOCKS[0]
    BLOCK_K: gl.constexpr = BLOCKS[1]
    KEYS: gl.constexpr = BLOCK_K // 2
    COLUMNS: gl.constexpr = HEAD_DIM // 2
    dtype: gl.constexpr = q_s.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    q_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    k_idx = k0 + W * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, s_layout))
    dk = gl.zeros([KEYS, HEAD_DIM], gl.float32, sum_layout)
    dv = gl.zeros([KEYS, HEAD_DIM], gl.float32, sum_layout)
    s_zero = gl.zeros([KEYS, BLOCK_Q], gl.float32, s_layout)
    dq_zero = gl.zeros([BLOCK_Q, COLUMNS], gl.float32, dq_layout)
    if SUMS:
        sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
        sums_zero = gl.zeros([BLOCK_Q, WIDE], gl.float32, sums_layout)
        ones.store(gl.full([BLOCK_K, WIDE], 1.0, dtype, sums_layout))
        fence_async_shared()
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(kv_full.index(1), 0)
    count = 0
    for step in range(GROUP * SPANS):
        h, r, lo, full_lo, full_hi, hi = turn(step, b, kv, k0, call, FLAGS, GROUP, SPANS, BLOCKS)
        for q0 in range(lo, hi, BLOCK_Q):
            stage = count % STAGES
            phase = (count // STAGES) & 1
            q, do = q_s.index(stage).reshape([BLOCK_Q, HEAD_DIM]), do_s.index(stage).reshape([BLOCK_Q, HEAD_DIM])
            same = q0 >> 31  # 0, which the assembler does not know: else it keeps every address of keys and values in registers
            keys, values = k_s.index(same).reshape([BLOCK_K, HEAD_DIM]), v_s.index(same).reshape([BLOCK_K, HEAD_DIM])
            mbarrier.wait(q_full.index(stage), phase)
            s = warpgroup_mma(keys.slice(W * KEYS, KEYS, 0), q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            if OVERLAP == 2:
                mbarrier.wait(do_full.index(stage), phase)
                dp = dp_product(values, do, s_zero, W)
            lse2 = lse_s.index(stage).load(q_layout)
            s = warpgroup_mma_wait(OVERLAP // 2, deps=(s,))
            p, s, at = weights(s, lse2, q0, k_idx, h, b, scale, call, FLAGS, SCORES, q_layout, BLOCK_Q)
            if (q0 < full_lo) | (q0 >= full_hi):
                p = hidden(p, q0, k_idx, h, r, b, call, FLAGS, q_layout, BLOCK_Q)
            p_low = gl.convert_layout(p.to(dtype), operand)
            if len(SCORES) > 0:
                p = pull_scores(p, s, at, call[0][2], SCORES, 0)
            if OVERLAP < 2:
                mbarrier.wait(do_full.index(stage), phase)
            dv = warpgroup_mma(p_low, do, dv, is_async=True)
            if OVERLAP == 0:
                dv = warpgroup_mma_wait(0, deps=(dv,))
            if OVERLAP < 2:
                dp = dp_product(values, do, s_zero, W)
                dp, dv = warpgroup_mma_wait(0, deps=(dp, dv))
            else:
                dp = warpgroup_mma_wait(1, deps=(dp,))
            delta = delta_s.index(stage).load(q_layout)
            if OVERLAP < 2:
                mbarrier.arrive(do_empty.index(stage), count=1)
            x = (p * (dp - delta[None, :])).to(dtype)
            x_tile = x_s.index(count % 2)
            x_tile.slice(W * KEYS, KEYS, 0).store(x)
            fence_async_shared()
            dk = warpgroup_mma(gl.convert_layout(x, operand), q, dk, is_async=True)
            named_barrier_wait(8, 256)  # both halves of x' are there
            if SUMS:
                sums = warpgroup_mma(x_tile.permute((1, 0)), ones, sums_zero, use_acc=False, is_async=True)
            columns = keys.slice(W * COLUMNS, COLUMNS, 1)
            dq = warpgroup_mma(x_tile.permute((1, 0)), columns, dq_zero, use_acc=False, is_async=True)
            if SUMS:
                dk, dv, sums = warpgroup_mma_wait(1, deps=(dk, dv, sums))
            else:
                dk, dv = warpgroup_mma_wait(1, deps=(dk, dv))
            mbarrier.arrive(q_empty.index(stage), count=1)
            if OVERLAP == 2:
                mbarrier.arrive(do_empty.index(stage), count=1)
            tma_store_wait(0)  # the copy of the tile before has read what dq is about to overwrite
            dq = warpgroup_mma_wait(0, deps=(dq,))
            dq_s.index(W).reshape([BLOCK_Q, COLUMNS]).store(dq)
            if SUMS:
                sums_s.reshape([BLOCK_Q, WIDE]).store(sums)
            fence_async_shared()
            tma_reduce_add(dq_out, [b, h, q0, W * COLUMNS], dq_s.index(W))
            if SUMS:
                tma_reduce_add(sums_out, [b, h, q0, 0], sums_s)
            count += 1
    named_barrier_wait(9, 256)  # the other group has read the keys for its last dq
    values, keys = v_s.index(0), k_s.index(0)
    values.reshape([BLOCK_K, HEAD_DIM]).slice(W * KEYS, KEYS, 0).store(dv.to(dtype))
    keys.reshape([BLOCK_K, HEAD_DIM]).slice(W * KEYS, KEYS, 0).store((dk * scale).to(dtype))
    fence_async_shared()
    tma_store(dv_out, [b, kv, k0 + W * KEYS, 0], values.slice(W * KEYS, KEYS, 2))
    tma_store(dk_out, [b, kv, k0 + W * KEYS, 0], keys.slice(W * KEYS, KEYS, 2))
    tma_store_wait(0)


@kernel
def hopper_backward(
    q, k, v, do, lse2, delta, dk_out, dv_out, dq_out, sums_out, data, scale, n_q, n_k, start, stop, q_at, k_at, n_kv, n_b,
    n_pad, FLAGS: gl.constexpr, SCORES: gl.constexpr, GROUP: gl.constexpr, SPANS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, ZERO_SUM: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, and its part of dq, without the scale, added to dq_out; with ZERO_SUM its row sums of x.

    All tensors but `data` are descriptors: over (B, H, L, D), lse2 and delta over their padded rows as one, dq_out and
    sums_out over (B, H, n_pad, HEAD_DIM and WIDE) in float32.
    """
    BLOCK_Q: gl.constexpr = BLOCKS[0]
    BLOCK_K: gl.constexpr = BLOCKS[1]
    k0, b, kv = key_place(n_k, n_kv, BLOCK_K)
    size = (n_q, n_k, start, stop, q_at, k_at)
    call = (data, size, n_b)
    k_s = gl.allocate_shared_memory(k.dtype, [1, 1, 1, BLOCK_K, HEAD_DIM], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [1, 1, 1, BLOCK_K, HEAD_DIM], v.layout)
    q_s = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_Q, HEAD_DIM], q.layout)
    do_s = gl.allocate_shared_memory(do.dtype, [STAGES, 1, 1, BLOCK_Q, HEAD_DIM], do.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], lse2.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], delta.layout)
    x_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_s = gl.allocate_shared_memory(q.dtype, [2, BLOCK_K, BLOCK_Q], x_layout)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 1, 1, BLOCK_Q, HEAD_DIM // 2], dq_out.layout)
    ones_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * WIDE, element_bitwidth=16, rank=2)
    ones = gl.allocate_shared_memory(q.dtype, [BLOCK_K, WIDE], ones_layout)
    sums_s = gl.allocate_shared_memory(gl.float32, [1, 1, BLOCK_Q, WIDE], sums_out.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_empty.index(i), count=2)
    fence_async_shared()  # copies see the barriers
    inputs = (q, k, v, do, lse2, delta)
    outputs = (dk_out, dv_out, dq_out, sums_out)
    scratch = (x_s, dq_s, ones, sums_s)
    buffers = (q_s, k_s, v_s, do_s, lse_s, delta_s)
    bars = (kv_full, q_full, q_empty, do_full, do_empty)
    n_h = n_kv * GROUP
    gl.warp_specialize(
        [
            (consumer, (outputs, buffers, bars, scratch, b, kv, k0, scale, call, 0, FLAGS, SCORES, GROUP, SPANS,
                        HEAD_DIM, BLOCKS, STAGES, OVERLAP, ZERO_SUM)),
            (consumer, (outputs, buffers, bars, scratch, b, kv, k0, scale, call, 1, FLAGS, SCORES, GROUP, SPANS,
                        HEAD_DIM, BLOCKS, STAGES, OVERLAP, ZERO_SUM)),
            (producer, (inputs, buffers, bars, b, kv, k0, call, n_h, n_pad, FLAGS, GROUP, SPANS, BLOCKS, STAGES)),
        ],
        [4, 1],
        [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip


@portable
def finish_dq(
    total, sums, k, lse2, delta, dlse, sinks, dq_out, data, strides, scale, n_q, n_k, start, stop, q_at, k_at, n_h, n_pad,
    FLAGS: tl.constexpr, GROUP: tl.constexpr, SPANS: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr,
    ZERO_SUM: tl.constexpr,
):  # fmt: skip
    """dq_out = scale total, in dq_out's dtype, with the zero-sum correction of kernels/backward.py.

    strides: k, dq, sinks. total (B, H, n_pad, padded head_dim) and sums (B, H, n_pad, WIDE) in float32; DIMS: head_dim, padded.
    """
    BLOCK_Q: tl.constexpr = BLOCKS[0]
    HEAD_DIM: tl.constexpr = DIMS[1]
    size = (n_q, n_k, start, stop, q_at, k_at)
    q0, b, h = program_tile(n_q, n_h, BLOCK_Q, False)
    q_idx = q0 + tl.arange(0, BLOCK_Q)
    ok = q_idx < n_q
    row = (b * n_h + h) * n_pad + q_idx
    dq = tl.load(total + row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :])
    if ZERO_SUM:
        k = head_of(k, b, h // GROUP, strides[0])
        reference = tl.zeros([HEAD_DIM], tl.float32)
        for r in tl.range(0, SPANS, num_stages=1):
            start_k, stop_k = row_spans(data[0], r, b, h, q_idx, ok, size, FLAGS)
            walk, first, last = key_walk(data[0], r, b, h, q0, start_k, stop_k, ok, size, FLAGS, (), BLOCKS)
            middle, some = middle_tile(walk, FLAGS, BLOCKS[1])
            if some:
                reference = mean_row(k, middle, strides[0], first, last, BLOCKS[1], DIMS[0], HEAD_DIM)
        row_lse = tl.load(lse2 + row)
        off = tl.load(sums + row * WIDE)
        if dlse is not None:
            row_dlse = tl.load(dlse + (b * n_h + h) * n_q + q_idx, mask=ok, other=0.0)
            off -= tl.where(row_lse < float("inf"), row_dlse, 0.0)
        if sinks is not None:
            sink = tl.load(sinks + b * strides[2][0] + h * strides[2][1]).to(tl.float32)
            off -= tl.load(delta + row) * tl.exp2(sink * LOG2E - row_lse)
        dq -= off[:, None] * reference[None, :]
    store_rows(head_of(dq_out, b, h, strides[1]), dq * scale, q0, strides[1], n_q, BLOCK_Q, DIMS[0], HEAD_DIM)
