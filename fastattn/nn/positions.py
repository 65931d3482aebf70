"""Where tokens stand: encodings added to the input, a rotation of queries and keys, and scores by distance.

    SinusoidalPositions, LearnedPositions    x -> x + table[position]
    Rotary                                   every pair of features turned by position * frequency
    ALiBiSlopes, RelativeTable, T5Buckets    modules whose call gives a Score for attention
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import compat
from ..scores import ALiBi, RelativeBias, alibi_slopes, t5_bucket
from .errors import check_sizes

SCALINGS = (None, "linear", "ntk")
STYLES = ("half", "interleaved")


def positions_of(x: Tensor, positions: Tensor | None, offset: int | Tensor) -> Tensor:
    """Positions (n,) or (B, n) of x's n rows: those given, or `offset`, an int or (B,), and what follows it.

    Raises:
        TypeError, ValueError: positions is no integer tensor (n,) or (B, n), or offset no int and no integer tensor (B,).
    """
    n, batch = x.shape[-2], x.shape[0] if x.dim() > 2 else None
    if positions is not None:
        if not _is_integer(positions):
            got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise TypeError(f"positions must be an integer Tensor, got {got}")
        shape = tuple(positions.shape)
        if len(shape) not in (1, 2) or shape[-1] != n or (len(shape) == 2 and batch is not None and shape[0] not in (1, batch)):
            raise ValueError(f"positions must have shape ({n},) or ({'batch' if batch is None else batch}, {n}), got {shape}")
        return positions
    check_offset(offset, batch)
    index = torch.arange(n, device=x.device)
    return index + (offset[:, None] if isinstance(offset, Tensor) else offset)


def check_offset(offset: Any, batch: int | None) -> None:
    """Raise unless it is an int or an integer tensor (batch,)."""
    if isinstance(offset, Tensor):
        if not _is_integer(offset):
            raise TypeError(f"offset must be an int or an integer Tensor, got {offset.dtype}")
        if offset.dim() != 1 or (batch is not None and offset.shape[0] not in (1, batch)):
            shape = f"({'batch' if batch is None else batch},)"
            raise ValueError(f"offset must be an int or have shape {shape}, got {tuple(offset.shape)}")
    elif not isinstance(offset, (int, torch.SymInt)) or isinstance(offset, bool):
        raise TypeError(f"offset must be an int or an integer Tensor, got {offset!r}")


def _is_integer(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool


def frequencies(dim: int, base: float, device: Any = None) -> Tensor:
    """base^(-2i / dim) for i < dim / 2. # float64 (float32 on mps), (dim / 2,)"""
    return torch.arange(0, dim, 2, device=device, dtype=_wide(device)).div_(-dim).mul_(math.log(base)).exp_()


def _wide(device: Any) -> torch.dtype:
    return torch.float32 if device is not None and torch.device(device).type == "mps" else torch.float64


def _check_dim(name: str, dim: int) -> None:
    if not isinstance(dim, int) or dim < 2 or dim % 2:
        raise ValueError(f"{name} must be an even int of at least 2, got {dim!r}")


class SinusoidalPositions(nn.Module):
    """x -> x + table[position]: sines in the even features and cosines in the odd ones, at wavelengths up to 2 pi base.

    Args:
        dim: features, even. base: as above.
    """

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        _check_dim("dim", dim)
        self.dim, self.base = dim, base

    def forward(self, x: Tensor, positions: Tensor | None = None, offset: int | Tensor = 0) -> Tensor:
        """x (..., L, dim) at positions (L,) or (B, L); offset 0, 1, 2, ... by default."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have {self.dim} features, got shape {tuple(x.shape)}")
        return x + self.table(positions_of(x, positions, offset)).to(x.dtype)

    def table(self, positions: Tensor) -> Tensor:
        """The encodings of positions (...). # (..., dim)"""
        angles = positions[..., None] * frequencies(self.dim, self.base, positions.device)
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}"


class LearnedPositions(nn.Module):
    """x -> x + weight[position].

    Args:
        max_length: positions that there are. dim: features. device, dtype: of the weight (max_length, dim).
    """

    def __init__(self, max_length: int, dim: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_sizes(max_length=max_length, dim=dim)
        self.weight = nn.Parameter(torch.empty(max_length, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, positions: Tensor | None = None, offset: int | Tensor = 0) -> Tensor:
        """x (..., L, dim) at positions (L,) or (B, L); offset 0, 1, 2, ... by default."""
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"x must have {self.weight.shape[1]} features, got shape {tuple(x.shape)}")
        n, last = x.shape[-2], self.weight.shape[0]
        if positions is None and not isinstance(offset, Tensor):
            check_offset(offset, None)
            if not 0 <= offset <= last - n:
                raise ValueError(f"offset {offset} and length {n} must stay within max_length {last}")
            return x + self.weight[offset : offset + n].to(x.dtype)
        return x + F.embedding(positions_of(x, positions, offset), self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class Rotary(nn.Module):
    """RoPE: turns every pair of features of a query or key by position * base^(-2i / rotary_dim) (arXiv 2104.09864).

    Products of a turned query and a turned key depend on the distance alone. The tables are computed in float64, kept in
    float32 for every device that was met, and grow with the longest length; they are no part of the state_dict.

    Args:
        head_dim: features of a head.
        base: as above.
        rotary_dim: how many of the features are turned, the first ones; all by default.
        style: "half" pairs feature i with i + rotary_dim / 2 (GPT-NeoX, Llama in transformers), "interleaved" 2i with 2i + 1
            (GPT-J, the paper).
        scaling: None; "linear" divides positions by `factor`; "ntk" raises the base to base * factor^(d / (d - 2)).
        factor: how many times longer the sequences are than those trained on.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        style: str = "half",
        scaling: str | None = None,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        _check_dim("head_dim" if rotary_dim is None else "rotary_dim", self.rotary_dim)
        if self.rotary_dim > head_dim:
            raise ValueError(f"rotary_dim must be at most head_dim {head_dim}, got {rotary_dim}")
        if not base > 0:
            raise ValueError(f"base must be positive, got {base!r}")
        if style not in STYLES:
            raise ValueError(f"style must be one of {STYLES}, got {style!r}")
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {SCALINGS}, got {scaling!r}")
        if not factor > 0 or (scaling is None and factor != 1.0):
            raise ValueError(f"factor must be positive, and needs scaling='linear' or 'ntk', got {factor} and {scaling!r}")
        if scaling == "ntk" and self.rotary_dim == 2:
            raise ValueError("scaling='ntk' needs a rotary_dim of at least 4, got 2")
        self.base, self.style, self.scaling, self.factor = base, style, scaling, factor
        self._tables: dict[torch.device, Tensor] = {}

    def forward(self, x: Tensor, positions: Tensor | None = None, offset: int | Tensor = 0) -> Tensor:
        """x (B, H, L, head_dim) turned, in x's dtype, computed in float32 or float64.

        Args:
            positions: (L,) or (B, L); offset, an int or (B,), and what follows it, by default.
        """
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"x must have {self.head_dim} features, got shape {tuple(x.shape)}")
        cos, sin = self.tables(x, positions, offset)
        r = self.rotary_dim
        if self.style == "half":
            a, b = x[..., : r // 2], x[..., r // 2 : r]
            parts = [a * cos - b * sin, b * cos + a * sin]
        else:
            a, b = x[..., 0:r:2], x[..., 1:r:2]
            parts = [torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)]
        turned = [part.to(x.dtype) for part in parts]
        return torch.cat((*turned, x[..., r:]) if r < self.head_dim else turned, -1)

    def tables(self, x: Tensor, positions: Tensor | None = None, offset: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """(cos, sin) for x's rows. # (L, rotary_dim / 2) or (B, 1, L, rotary_dim / 2)"""
        n, dtype = x.shape[-2], torch.float64 if x.dtype == torch.float64 else torch.float32
        kept = positions is None and type(offset) is int and dtype == torch.float32 and compat.nothing_watches()
        if not kept or isinstance(offset, Tensor) or offset < 0:
            found = self._angles(positions_of(x, positions, offset))
            found = found[:, None] if found.dim() == 3 else found
            return found.cos().to(dtype), found.sin().to(dtype)
        table = self._tables.get(x.device)
        if table is None or table.shape[1] < offset + n:
            length = 1 << max(offset + n - 1, 255).bit_length()
            with torch.no_grad(), torch.inference_mode(False):
                angles = self._angles(torch.arange(length, device=x.device))
                table = torch.stack((angles.cos(), angles.sin())).to(dtype)
            self._tables[x.device] = table
        return table[0, offset : offset + n], table[1, offset : offset + n]

    def _angles(self, positions: Tensor) -> Tensor:
        """position * frequency. # (..., rotary_dim / 2)"""
        base = self.base
        if self.scaling == "ntk":
            base = base * self.factor ** (self.rotary_dim / (self.rotary_dim - 2))
        angles = positions[..., None] * frequencies(self.rotary_dim, base, positions.device)
        return angles / self.factor if self.scaling == "linear" else angles

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def extra_repr(self) -> str:
        parts = [f"{self.head_dim}, base={self.base}, style={self.style!r}"]
        parts += [f"rotary_dim={self.rotary_dim}"] if self.rotary_dim != self.head_dim else []
        parts += [f"scaling={self.scaling!r}, factor={self.factor}"] if self.scaling else []
        return ", ".join(parts)


class ALiBiSlopes(nn.Module):
    """ALiBi's slopes; calling the module gives the score.

    Args:
        n_heads: how many. learned: whether the slopes are a parameter. distance: "abs" or "rel", as in `fastattn.ALiBi`.
        device: of the slopes, which are float32.
    """

    slopes: Tensor

    def __init__(self, n_heads: int, learned: bool = False, distance: str = "abs", device: Any = None) -> None:
        super().__init__()
        slopes = alibi_slopes(n_heads, device)
        if learned:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes, persistent=False)
        ALiBi(slopes, distance)  # its check of distance
        self.distance = distance

    def forward(self) -> ALiBi:
        return ALiBi(self.slopes, self.distance)


class RelativeTable(nn.Module):
    """A learned bias for every head and distance -reach .. reach, those beyond sharing the last; calling gives the score.

    Args:
        n_heads: how many. reach: as above. device, dtype: of the weight (n_heads, 2 * reach + 1), which starts at 0.
    """

    def __init__(self, n_heads: int, reach: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_sizes(n_heads=n_heads)
        if not isinstance(reach, int) or isinstance(reach, bool) or reach < 0:
            raise ValueError(f"reach must be an int of at least 0, got {reach!r}")
        self.weight = nn.Parameter(torch.zeros(n_heads, 2 * reach + 1, device=device, dtype=dtype))

    def forward(self) -> RelativeBias:
        return RelativeBias(self.weight)


class T5Buckets(nn.Module):
    """T5's relative bias: a learned value for every head and bucket of distances; calling the module gives the score.

    One table serves all lengths, because distances beyond max_distance share a bucket. T5 itself uses scale=1.

    Args:
        n_heads: how many. num_buckets, max_distance, bidirectional: as in `fastattn.t5_bucket`.
        device, dtype: of the weight (num_buckets, n_heads), T5's `relative_attention_bias.weight`.
    """

    def __init__(
        self,
        n_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(n_heads=n_heads, num_buckets=num_buckets, max_distance=max_distance)
        exact = num_buckets // (4 if bidirectional else 2)
        if not 1 <= exact < max_distance:
            raise ValueError(
                f"num_buckets must be at least {4 if bidirectional else 2} and max_distance above {exact}, "
                f"got {num_buckets} and {max_distance}"
            )
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, n_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self) -> RelativeBias:
        n = self.max_distance
        distance = torch.arange(-n, n + 1, device=self.weight.device)
        bucket = t5_bucket(distance, self.bidirectional, self.num_buckets, self.max_distance)
        return RelativeBias(self.weight[bucket].T)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.num_buckets}, {self.max_distance}, bidirectional={self.bidirectional}"
