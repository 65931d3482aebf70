"""Launch configurations: one pure function over a table per architecture.

tuning/<architecture>.json: kernel -> bits of an element -> padded head_dim -> [BLOCK_Q, BLOCK_K, num_warps, num_stages]; a
fifth number, where the head_dim is split, says how many of its columns a program holds at once (kernels/tiles.py). Under
"<kernel>, <load>" stands what a call wants that has more to do (LOADS, `fastattn.backends.facts.load_of`; "sums" is a dq that
adds up a bias's gradient over entries), where that is not what a lighter load wants: it needs registers that a larger tile
would take. "hopper forward" and the like are the kernels for sm_90 alone (kernels/hopper). What does not fit an architecture
has no entry. An architecture without a table takes the nearest older one of its maker. The values were chosen by what the
compiler reports: no local memory in a loop, shared memory that fits, rows for every warp, as far as these go together
(kernels/README.md). No table was tuned on a card yet.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

TABLES = Path(__file__).parent / "tuning"
KERNELS = ("forward", "dkdv", "dq", "grads", "jvp", "jvp dq", "jvp dkdv", "jvp grads", "jvp2")
LOADS = {  # a load, and whose entries it takes, the first that there is
    "": (), "additive": ("additive",), "chain": ("chain",), "dense": ("dense", "chain"), "bias": ("bias", "chain"),
    "heavy": ("heavy", "chain"), "sums": ("sums", "heavy", "chain"),
}  # fmt: skip
LIKE = {"jvp grads": "jvp dkdv"}  # where a table has no entry of its own
SHORT = 16  # rows up to which a query tile is as small as a product permits: decoding


class Launch(NamedTuple):
    """How a kernel is launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    columns: int = 0  # of head_dim that a program holds at once; 0: all

    def dims(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        """DIMS of a kernel from those (head_dim, padded, v_dim, padded) of a call."""
        if not self.columns:
            return dims
        return dims[0], min(dims[1], self.columns), dims[2], min(dims[3], self.columns)

    def slices(self, *dims: int) -> int:
        """How many programs share the columns of results of these widths."""
        return -(-max(dims) // self.columns) if self.columns else 1


@functools.cache
def tables() -> dict[str, dict]:
    """Every table, by architecture: sm_80, sm_90, gfx900 for AMD, interpreter and so on."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(TABLES.glob("*.json"))}


def table_of(arch: str) -> str:
    """The architecture whose table `arch` uses.

    Raises:
        ValueError: there is none.
    """
    known = tables()
    if arch in known:
        return arch
    maker = arch.rstrip("0123456789abcdef") if not arch.startswith("gfx") else "gfx"
    older = [x for x in known if x.startswith(maker) and _number(x) <= _number(arch)]
    if not older:
        raise ValueError(f"no launch table for {arch!r}; there are tables for {', '.join(known)}")
    return max(older, key=_number)


def _number(arch: str) -> int:
    digits = arch.removeprefix("sm_").removeprefix("gfx")
    return int(digits, 16 if arch.startswith("gfx") else 10) if digits and digits[0].isdigit() else -1


def padded(dim: int) -> int:
    """head_dim as kernels hold it: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def launch(kernel: str, head_dim: int, v_dim: int, itemsize: int, arch: str, load: str = "", n_q: int = 1 << 30) -> Launch:
    """The launch of a kernel.

    Args:
        kernel: one of KERNELS.
        head_dim, v_dim: of q and k, and of v; the larger decides.
        itemsize: bytes of an element of q.
        arch: "sm_90", "gfx942", "interpreter" and the like.
        load: one of LOADS.
        n_q: rows; few of them take a small query tile.

    Raises:
        ValueError: the kernel does not fit the architecture at this size.
    """
    table, bits, dim = tables()[table_of(arch)], str(8 * itemsize), str(max(padded(head_dim), padded(v_dim)))
    own = [kernel, LIKE[kernel]] if kernel in LIKE else [kernel]
    for name in (each + suffix for each in own for suffix in (*(f", {x}" for x in LOADS[load]), "")):
        if dim in table.get(name, {}).get(bits, {}):
            found = Launch(*table[name][bits][dim])
            break
    else:
        raise ValueError(f"the {kernel} kernel does not fit {arch} at a head_dim of {max(head_dim, v_dim)} in {bits} bits")
    return found._replace(block_q=min(found.block_q, 16)) if n_q <= SHORT else found
