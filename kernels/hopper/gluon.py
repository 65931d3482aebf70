"""Everything that these kernels take from Triton's Gluon, under one name whatever the version: 3.6, 3.7, 3.8 or 3.9.

Gluon renames and adds primitives from release to release; here is the only place that knows. A simulator has to offer the names
of this file and nothing else. Where Triton or its Gluon is missing there are stand-ins, as in kernels/shim.py.
"""

from types import SimpleNamespace
from typing import Any

from ..shim import SIZES
from ..tiles import PAIR

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language._core import builtin
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    PRESENT = True
    jit, constexpr_function = gluon.jit, gluon.constexpr_function
    kernel = jit(do_not_specialize=(*SIZES, "section"))
except ImportError:
    PRESENT = False
    gl: Any = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[no-redef]
    mbarrier: Any = SimpleNamespace()  # type: ignore[no-redef]
    tma: Any = SimpleNamespace(async_load=None, async_store=None, async_atomic_add=None, store_wait=None)  # type: ignore[no-redef]
    fence_async_shared = warpgroup_mma = warpgroup_mma_wait = TensorDescriptor = GluonASTSource = None

    def builtin(fn: Any) -> Any:
        return fn

    jit = kernel = constexpr_function = builtin


@builtin
def _reduce_add(desc, coord, src, _semantic=None):
    """The copy that adds, where Gluon has the operation and no name for it: before 3.9."""
    from triton._C.libtriton import ir

    at = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, at, src.handle)


@constexpr_function
def _assembly(what, number, threads):
    return f"bar.{what} {number}, {threads}; mov.u32 $0, $1;"


# A tile by descriptor, from memory (signals a barrier), to memory, and added to memory; waiting until all stores but the last
# `n` of this warp group have read their shared memory. Before 3.9 the first two had other names.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_reduce_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _reduce_add
tma_store_wait = tma.store_wait

# The barrier of all warps of a partition: `thread_barrier` in 3.6
barrier = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None)


@jit
def named_barrier_wait(NUMBER: gl.constexpr, THREADS: gl.constexpr):
    """Arrive at one of the processor's 16 barriers and wait until THREADS have. Triton uses the lowest; take 8 to 15."""
    asm: gl.constexpr = _assembly("sync", NUMBER, THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@jit
def named_barrier_arrive(NUMBER: gl.constexpr, THREADS: gl.constexpr):
    """Arrive there without waiting."""
    asm: gl.constexpr = _assembly("arrive", NUMBER, THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


TO_FP16 = gl.constexpr(
    "{.reg .b16 a, b; cvt.rn.f16x2.f32 $0, $4, $3; mov.b32 {a, b}, $0; cvt.f32.f16 $1, a; cvt.f32.f16 $2, b;}"
)


@jit
def rounded(x, DTYPE: gl.constexpr):
    """(float32 x in float16 or bfloat16, the same in float32 again), two neighbours at once.

    Left to itself the compiler converts one by one what is used in both.
    """
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(PAIR, "=r,=r,=r,r,r", [x], dtype=(gl.bfloat16, gl.float32), is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(TO_FP16, "=r,=r,=r,r,r", [x], dtype=(gl.float16, gl.float32), is_pure=True, pack=2)
