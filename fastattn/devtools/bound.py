"""How fast a loop can be at best, from its instructions alone: a bound, not a measurement.

Every turn of a loop occupies the matrix units, the unit of exponentials and the issue slots of a multiprocessor for so many
clocks. The longest of the three is what a turn takes at least, however well the rest overlaps; latency, memory, clock
rates and the loop's beginning and end come on top. So the share of the matrix peak that it leaves is out of reach.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .sass import Instruction

WARP = 32


class Rates(NamedTuple):
    """What a multiprocessor does in a clock."""

    flops: int  # of 16-bit matrix products, dense; where makes of an architecture differ, of the fastest
    special: int  # exponentials and their like
    issues: int  # warp instructions


# From published peaks: TFLOP/s / (GHz of the boost clock x multiprocessors). GeForce cards of sm_86, 89 and 120 reach half of
# theirs where sums are float32, as they are here: for them the bound is looser than it could be.
RATES = {
    "sm_80": Rates(2048, 16, 4),  # A100: 312 at 1.41 and 108
    "sm_86": Rates(1024, 16, 4),  # A40: 150 at 1.74 and 84
    "sm_89": Rates(1024, 16, 4),  # L40S: 362 at 2.52 and 142
    "sm_90": Rates(4096, 16, 4),  # H100 SXM: 989 at 1.83 and 132
    "sm_120": Rates(1024, 16, 4),  # RTX 5090: 419 with sums in 16 bits, at 2.41 and 170
}
NONE = {"sm_100": "its listing does not hold the shapes of its products"}


class Bound(NamedTuple):
    """Clocks of a multiprocessor for one turn of a block's loop."""

    matrix: float
    special: float
    issue: float

    @property
    def clocks(self) -> float:
        return max(self)

    @property
    def peak(self) -> float:
        """The share of the matrix units' peak that it can reach."""
        return self.matrix / self.clocks

    def __str__(self) -> str:
        limit = ("matrix units", "exponentials", "issue slots")[self.index(self.clocks)]
        parts = f"{self.matrix:.0f} matrix, {self.special:.0f} exponential, {self.issue:.0f} issue"
        return f"a turn takes at least {self.clocks:.0f} clocks ({parts}): bound by {limit}, {self.peak:.0%} of the matrix peak"


def flops(one: Instruction) -> int:
    """Of a product, counted as 16-bit ones: those in TF32 take twice the time. Of a warp; HGMMA: of its group of four."""
    if one.name.startswith("HGMMA"):
        m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", one.name).groups())  # type: ignore[union-attr]
    else:
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}[one.name.split(".")[1]]
    return 2 * m * n * k * (2 if "TF32" in one.name else 1)


def of_loop(body: list[Instruction], num_warps: int, arch: str) -> Bound | None:
    """The bound of a loop that all warps of a block run; None for an architecture without rates.

    Each instruction of the body counts once, also where a branch in it would pass over it.
    """
    if arch not in RATES:
        return None
    rates = RATES[arch]
    groups = {True: num_warps / 4, False: num_warps}
    products = sum(flops(one) * groups[one.name.startswith("HGMMA")] for one in body if one.is_product)
    special = sum(one.name.startswith("MUFU") for one in body) * num_warps * WARP
    return Bound(products / rates.flops, special / rates.special, len(body) * num_warps / rates.issues)
