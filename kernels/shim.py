"""What the kernels need of Triton, so that these files import where it is not installed: there `jit` is the identity."""

import os
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    PRESENT = True
    jit = triton.jit
    INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")
except ImportError:
    PRESENT = INTERPRETED = False
    tl = SimpleNamespace(constexpr=lambda value: value)

    def jit(fn=None, **_):
        return fn if fn is not None else lambda fn: fn


# Sizes that change from call to call: a kernel is compiled once for all their values.
SIZES = ("n_q", "n_k", "start", "stop", "q_at", "k_at", "n_b", "n_pad", "entries", "n_tiles", "n_table")
kernel = jit(do_not_specialize=SIZES)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter keeps bf16 as raw bits, which its products would multiply
