"""Modules: a drop-in for torch.nn.MultiheadAttention."""

from .multihead import MultiheadAttention

__all__ = ["MultiheadAttention"]
