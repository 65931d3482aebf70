"""The forward kernel for sm_90: a warp that loads, and two warp groups of 64 rows that multiply.

    s = chain(scale q k')   p = exp(s - max)   out = p v / sum p   lse = max + log sum p

The producer fills a ring of key tiles and a ring of value tiles by descriptor (TMA); ends of tensors and of head_dim come as
zeros. A consumer issues the product with the next keys and the one with the last values, waits for the first alone, and runs
the softmax while the second goes on. A wait for the keys after those keeps the assembler from moving the wait for the
second product in front of the exponentials. With PING_PONG the two groups take turns at issuing, so that one multiplies while
the other exponentiates. Programs stay for many work items: counters of the rings and the turn carry over.
"""

from ..chain import apply_scores, place
from ..masks import row_spans
from ..shim import LOG2E
from .gluon import (
    fence_async_shared,
    gl,
    jit,
    kernel,
    mbarrier,
    named_barrier_arrive,
    named_barrier_wait,
    rounded,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .schedule import key_step, key_walks, work_item
from .softmax import ROWS, lane_sums, log_sum, softmax_step, with_sink

TURN = gl.constexpr(8)  # named barriers TURN and TURN + 1: it is the turn of the first, of the second consumer
BOTH = gl.constexpr(256)  # threads of both consumers


@jit
def stage(count, STAGES: gl.constexpr):
    """(slot, phase) of the count-th tile of a ring."""
    return count % STAGES, (count // STAGES) & 1


@jit
def matrix(tiles, i, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """Tile i of a buffer of tiles (1, 1, rows, columns). # [HEIGHT, WIDTH]"""
    return tiles.index(i).reshape([HEIGHT, WIDTH])


@jit
def load(desc, b, h, row, tiles, full, free, slot, phase):
    """Load a tile into a slot, once the one before has been released there."""
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma_load(desc, [b, h, row, 0], full.index(slot), tiles.index(slot))


@jit
def produce(
    descs, tiles, bars, work, data, size, section, n_h, FLAGS: gl.constexpr, GROUP: gl.constexpr, SPANS: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the tiles of every work item of this program, in the consumers' order."""
    q, k, v = descs
    q_tiles, k_tiles, v_tiles = tiles[0], tiles[1], tiles[2]
    q_full, q_free, k_full, k_free, v_full, v_free = bars
    first, last, step, heads = work
    count = 0
    parity = 0
    for t in range(first, last, step):
        q0, b, h = work_item(t, size[0], n_h, heads, section, BLOCKS[0])
        steps, walks = key_walks(data[0], b, h, q0, size, FLAGS, SPANS, BLOCKS)
        for j in range(steps):
            k0 = key_step(walks, j, FLAGS, SPANS, BLOCKS[1])[0]
            slot, phase = stage(count + j, STAGES)
            if j == 0:
                load(q, b, h, q0, q_tiles, q_full, q_free, 0, parity)
            load(k, b, h // GROUP, k0, k_tiles, k_full, k_free, slot, phase)
            if j == 0:
                load(q, b, h, q0 + ROWS, q_tiles, q_full, q_free, 1, parity)
            load(v, b, h // GROUP, k0, v_tiles, v_full, v_free, slot, phase)
        count += steps
        parity ^= 1


@jit
def scored(s, q_idx, k0, r, partial, b, h, scale, data, size, n_b, FLAGS: gl.constexpr, SCORES: gl.constexpr):
    """Raw products after the score chain, and -inf where hidden; what remains is to multiply by `factor`."""
    k_idx = k0 + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    if len(SCORES) > 0:
        q_at = gl.expand_dims(gl.minimum(q_idx, size[0] - 1), 1)
        k_at = gl.expand_dims(gl.minimum(gl.maximum(k_idx, 0), size[1] - 1), 0)
        at = place(data[1], b.to(gl.int64), h.to(gl.int64), q_at, k_at, size, n_b, FLAGS)
        s = apply_scores(s * scale, at, data[2], SCORES, len(SCORES))
    if partial:
        start, stop = row_spans(data[0], r, b, h, q_idx, q_idx < size[0], size, FLAGS)
        k_row = gl.expand_dims(k_idx, 0)
        seen = (k_row >= gl.expand_dims(start, 1)) & (k_row < gl.expand_dims(stop, 1))
        s = gl.where(seen, s, float("-inf"))
    return s


@jit
def consume(
    descs, lse, sinks, sink_strides, tiles, bars, work, data, size, section, n_h, n_b, scale, W: gl.constexpr,
    FLAGS: gl.constexpr, SCORES: gl.constexpr, SPANS: gl.constexpr, DIMS: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr, PING_PONG: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """The rows of one warp group, W of 2, of every work item of this program."""
    out, out_lo = descs
    q_tiles, k_tiles, v_tiles, o_tiles = tiles
    q_full, q_free, k_full, k_free, v_full, v_free = bars
    first, last, step, heads = work
    DIM: gl.constexpr = DIMS[0]
    V_DIM: gl.constexpr = DIMS[1]
    BLOCK_K: gl.constexpr = BLOCKS[1]
    DTYPE: gl.constexpr = q_tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q = matrix(q_tiles, W, ROWS, DIM)
    o_tile = matrix(o_tiles, W, ROWS, V_DIM)
    nothing = gl.zeros([ROWS, BLOCK_K], gl.float32, s_layout)
    if len(SCORES) == 0:
        factor = scale * LOG2E
    else:
        factor = scale * 0.0 + LOG2E
    if PING_PONG and W == 1:
        named_barrier_arrive(TURN, BOTH)  # the first consumer begins
    count = 0
    parity = 0
    for t in range(first, last, step):
        q0, b32, h32 = work_item(t, size[0], n_h, heads, section, BLOCKS[0])
        b, h = b32.to(gl.int64), h32.to(gl.int64)
        steps, walks = key_walks(data[0], b, h, q0, size, FLAGS, SPANS, BLOCKS)
        q_idx = q0 + W * ROWS + gl.arange(0, ROWS, row_layout)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        row_sum = lane_sums(nothing, BLOCK_K)
        out_sum = row_sum
        acc = gl.zeros([ROWS, V_DIM], gl.float32, o_layout)
        mbarrier.wait(q_full.index(W), parity)
        slot, phase = stage(count, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        k = matrix(k_tiles, slot, BLOCK_K, DIM)
        s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(slot), count=1)
        k0, partial, r = key_step(walks, 0, FLAGS, SPANS, BLOCK_K)
        s = scored(s, q_idx, k0, r, partial, b32, h32, scale, data, size, n_b, FLAGS, SCORES)
        weights, row_max, row_sum, out_sum, alpha = softmax_step(s, row_max, row_sum, out_sum, factor, DTYPE, BLOCK_K)
        p = gl.convert_layout(weights, p_layout)
        slot, phase = stage(count + 1, STAGES)
        mbarrier.wait(k_full.index(slot), phase, pred=steps > 1)
        for j in range(1, steps):
            k_slot = (count + j) % STAGES
            v_slot, v_phase = stage(count + j - 1, STAGES)
            if PING_PONG:
                named_barrier_wait(TURN + W, BOTH)
            k = matrix(k_tiles, k_slot, BLOCK_K, DIM)
            s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_slot), v_phase)
            acc = warpgroup_mma(p, matrix(v_tiles, v_slot, BLOCK_K, V_DIM), acc, is_async=True)
            if PING_PONG:
                named_barrier_arrive(TURN + 1 - W, BOTH)
            k0, partial, r = key_step(walks, j, FLAGS, SPANS, BLOCK_K)
            s = warpgroup_mma_wait(1, deps=(s,))
            mbarrier.arrive(k_free.index(k_slot), count=1)
            s = scored(s, q_idx, k0, r, partial, b32, h32, scale, data, size, n_b, FLAGS, SCORES)
            weights, row_max, row_sum, out_sum, alpha = softmax_step(s, row_max, row_sum, out_sum, factor, DTYPE, BLOCK_K)
            ahead = gl.convert_layout(weights, p_layout)
            slot, phase = stage(count + j + 1, STAGES)
            mbarrier.wait(k_full.index(slot), phase, pred=j + 1 < steps)  # a spin loop, which nothing is moved across
            acc, p = warpgroup_mma_wait(0, deps=(acc, ahead))
            mbarrier.arrive(v_free.index(v_slot), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, o_rows), 1)
        count += steps
        parity ^= 1
        if APART:
            mbarrier.arrive(q_free.index(W), count=1)  # its last product is done
        v_slot, v_phase = stage(count - 1, STAGES)
        mbarrier.wait(v_full.index(v_slot), v_phase)
        acc = warpgroup_mma(p, matrix(v_tiles, v_slot, BLOCK_K, V_DIM), acc, is_async=True)
        row_sum = gl.convert_layout(gl.sum(row_sum, 1), row_layout)
        out_sum = gl.convert_layout(gl.sum(out_sum, 1), row_layout)
        if sinks is not None:
            sink = gl.load(sinks + b * sink_strides[0] + h * sink_strides[1]).to(gl.float32) * LOG2E
            row_max, row_sum, out_sum, alpha = with_sink(row_max, row_sum, out_sum, sink)
            weight = alpha / gl.where(out_sum == 0.0, 1.0, out_sum)
        else:
            weight = 1.0 / gl.where(out_sum == 0.0, 1.0, out_sum)
        gl.store(lse + (b * n_h + h) * size[0] + q_idx, log_sum(row_max, row_sum), mask=q_idx < size[0])
        tma_store_wait(0)  # what was stored before has left its tile
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_free.index(v_slot), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(weight, o_rows), 1)
        high, exact = rounded(acc, DTYPE)
        if out_lo is not None:
            low = rounded(acc - exact, DTYPE)[0]
        o_tile.store(high)
        fence_async_shared()
        tma_store(out, [b32, h32, q0 + W * ROWS, 0], o_tile.reshape([1, 1, ROWS, V_DIM]))
        if out_lo is not None:
            tma_store_wait(0)
            o_tile.store(low)
            fence_async_shared()
            tma_store(out_lo, [b32, h32, q0 + W * ROWS, 0], o_tile.reshape([1, 1, ROWS, V_DIM]))
        if not APART:
            tma_store_wait(0)
            mbarrier.arrive(q_free.index(W), count=1)
    if PING_PONG and W == 0:
        named_barrier_wait(TURN, BOTH)  # the turn that nobody took
    tma_store_wait(0)


@kernel
def hopper_forward(
    q, k, v, out, out_lo, lse, sinks, sink_strides, data, scale, n_q, n_k, start, stop, q_at, k_at, n_h, n_b, heads, section,
    FLAGS: gl.constexpr, SCORES: gl.constexpr, GROUP: gl.constexpr, SPANS: gl.constexpr, DIMS: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """out, its low half (where out_lo is given) and lse, as kernels/forward.py has them.

    q, k, v, out and out_lo are descriptors; data, FLAGS and SCORES are those of the portable kernel. DIMS: of q and k, of v,
    padded. BLOCKS: BLOCK_Q, which is 128, and BLOCK_K. APART: out has shared memory of its own and does not wait in q's.
    """
    DIM: gl.constexpr = DIMS[0]
    V_DIM: gl.constexpr = DIMS[1]
    BLOCK_K: gl.constexpr = BLOCKS[1]
    gl.static_assert(STAGES > 1, "the next keys are waited for before the last values are released")
    size = (n_q, n_k, start, stop, q_at, k_at)
    work = (gl.program_id(0), gl.cdiv(n_q, BLOCKS[0]) * heads, gl.num_programs(0), heads)
    q_tiles = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, DIM], q.layout)
    k_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_K, DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_K, V_DIM], v.layout)
    if APART:
        o_tiles = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, V_DIM], out.layout)
    else:
        o_tiles = q_tiles
    tiles = (q_tiles, k_tiles, v_tiles, o_tiles)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()  # copies see the barriers
    bars = (q_full, q_free, k_full, k_free, v_full, v_free)
    gl.warp_specialize(
        [
            (consume, ((out, out_lo), lse, sinks, sink_strides, tiles, bars, work, data, size, section, n_h, n_b, scale, 0,
                       FLAGS, SCORES, SPANS, DIMS, BLOCKS, STAGES, PING_PONG, APART)),
            (consume, ((out, out_lo), lse, sinks, sink_strides, tiles, bars, work, data, size, section, n_h, n_b, scale, 1,
                       FLAGS, SCORES, SPANS, DIMS, BLOCKS, STAGES, PING_PONG, APART)),
            (produce, ((q, k, v), tiles, bars, work, data, size, section, n_h, FLAGS, GROUP, SPANS, BLOCKS, STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
