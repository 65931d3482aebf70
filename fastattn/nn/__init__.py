"""Modules: a drop-in for torch.nn.MultiheadAttention, a modern attention block, positions, caches, transformer layers."""

from ..weights import attention_weights
from .attention import Attention
from .cache import Cache, DynamicCache, StaticCache
from .layers import DecoderLayer, EncoderLayer, FeedForward, LayerCache
from .multihead import MultiheadAttention
from .positions import ALiBiSlopes, LearnedPositions, RelativeTable, Rotary, SinusoidalPositions, T5Buckets
from .stacks import Decoder, Encoder

__all__ = [
    "ALiBiSlopes", "Attention", "Cache", "Decoder", "DecoderLayer", "DynamicCache", "Encoder", "EncoderLayer", "FeedForward",
    "LayerCache", "LearnedPositions", "MultiheadAttention", "RelativeTable", "Rotary", "SinusoidalPositions", "StaticCache",
    "T5Buckets", "attention_weights",
]  # fmt: skip
