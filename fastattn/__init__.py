"""fastattn: exact attention with any mask, any score modifier and every derivative.

    import fastattn
    from fastattn import ALiBi, Causal, SlidingWindow, alibi_slopes

    out = fastattn.attention(q, k, v, mask=Causal() & SlidingWindow(255, 0), score=ALiBi(alibi_slopes(8)))

`scaled_dot_product_attention` has torch's signature; `explain` says what would run.
"""

from pathlib import Path as _Path

if missing := [name for name in ("kernels", "bench") if not (_Path(__file__).parent / name).is_dir()]:
    raise ImportError(
        f"fastattn/{missing[0]} does not resolve: it is a symlink to ../{missing[0]}, which some archives and file systems "
        "drop. Check the repository out with git (on Windows with core.symlinks=true) or install the wheel."
    )

from . import batching as _batching  # noqa: F401  (registers the vmap rules)
from . import nn  # noqa: F401  (fastattn.nn; not in __all__, where it would hide torch's from a star import)
from .coords import Coordinates
from .functional import Explanation, attention, explain, merge, varlen_attention, warmup
from .integrations import convert, install, uninstall, use
from .masks import (
    Causal,
    Chunked,
    Custom,
    Dense,
    Documents,
    Full,
    Lengths,
    LoweredMask,
    Mask,
    Padding,
    PrefixLM,
    SinkTokens,
    SlidingWindow,
    Spans,
)
from .scores import Additive, ALiBi, Bias, General, Pointwise, RelativeBias, Score, Softcap, alibi_slopes, t5_bucket
from .sdpa import scaled_dot_product_attention
from .weights import attention_weights

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "Additive",
    "Bias",
    "Causal",
    "Chunked",
    "Coordinates",
    "Custom",
    "Dense",
    "Documents",
    "Explanation",
    "Full",
    "General",
    "Lengths",
    "LoweredMask",
    "Mask",
    "Padding",
    "Pointwise",
    "PrefixLM",
    "RelativeBias",
    "Score",
    "SinkTokens",
    "SlidingWindow",
    "Softcap",
    "Spans",
    "alibi_slopes",
    "attention",
    "attention_weights",
    "convert",
    "explain",
    "install",
    "merge",
    "scaled_dot_product_attention",
    "t5_bucket",
    "uninstall",
    "use",
    "varlen_attention",
    "warmup",
]
