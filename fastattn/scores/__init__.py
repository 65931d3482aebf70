"""Score modifiers: what happens to a logit between scale * q . k and the softmax. One file each."""

from .alibi import ALiBi, alibi_slopes
from .base import Additive, General, Pointwise, Score, resolve
from .bias import Bias
from .relative import RelativeBias, t5_bucket
from .softcap import Softcap

__all__ = [
    "ALiBi", "Additive", "Bias", "General", "Pointwise", "RelativeBias", "Score", "Softcap", "alibi_slopes", "resolve",
    "t5_bucket",
]  # fmt: skip
