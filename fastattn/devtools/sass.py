"""Reading a disassembled kernel: registers that a matrix instruction in flight still needs, and the order of a loop.

On sm_90 a warp group's products (HGMMA) are asynchronous: they go on reading operands from registers and writing their
accumulators until a wait (WARPGROUP.DEPBAR). Versions of the assembler are known that hand such a register out too early,
and nothing else would notice. So `hazards` walks every path through a kernel with the set of products in flight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "OMMA")
WITHOUT_RESULT = (
    "ST", "RED", "BAR", "BRA", "BRX", "BSSY", "BSYNC", "CALL", "CCTL", "DEPBAR", "EXIT", "FENCE", "LDGSTS", "MEMBAR", "NOP",
    "R2UR", "RET", "SYNCS", "UTMA", "USETMAXREG", "WARPGROUP", "WARPSYNC",
)  # fmt: skip
SHOWN = (  # what the order of a loop names, by the instruction's beginning
    ("HGMMA", "wgmma"), ("HMMA", "mma"), ("UTCHMMA", "mma"), ("MUFU.EX2", "exp2"), ("LDGSTS", "async load"),
    ("UTMALDG", "TMA load"), ("LDGDEPBAR", ""), ("LDG", "load"), ("LDL", "LOCAL"), ("STL", "LOCAL"), ("BAR.SYNC", "barrier"),
    ("WARPGROUP.DEPBAR", "wait for wgmma"), ("DEPBAR", "wait for loads"), ("SYNCS.PHASECHK", "wait for mbarrier"),
)  # fmt: skip
MIXED = 6  # as often in turn, two kinds of instructions are named once
MOST = 8  # groups that are followed: no kernel has more in flight


class Instruction(NamedTuple):
    """A line of a listing."""

    address: int
    predicate: str  # "P0" or "!UP1"; it runs where this holds
    name: str  # with its modifiers: "LDG.E.128"
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address:#06x} {self.name} {', '.join(self.operands)}"

    @property
    def is_product(self) -> bool:
        return self.name.startswith(PRODUCTS)

    @property
    def target(self) -> int | None:
        """Where a branch or a call goes."""
        branch = self.operands and self.name.startswith(("BRA", "CALL"))
        found = re.search(r"0x([0-9a-f]+)$", self.operands[-1]) if branch else None
        return int(found[1], 16) if found else None


class Group(NamedTuple):
    """Products that are waited for together, and the registers that they use: accumulators, and operands."""

    sums: frozenset[int] = frozenset()
    operands: frozenset[int] = frozenset()


class State(NamedTuple):
    """What is in flight at a place: groups, the oldest first, and the one that is not closed yet."""

    closed: tuple[Group, ...] = ()
    open: Group = Group()

    @property
    def busy(self) -> Group:
        groups = (*self.closed, self.open)
        return Group(frozenset().union(*(g.sums for g in groups)), frozenset().union(*(g.operands for g in groups)))


def instructions(listing: str) -> list[Instruction]:
    """The instructions of cuobjdump's listing of a kernel."""
    found = (LINE.search(line) for line in listing.splitlines())
    return [Instruction(int(m[1], 16), m[2] or "", m[3], _split(m[4])) for m in found if m]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text.strip() else ()


def registers(operand: str, width: int = 1) -> set[int]:
    """The registers that an operand names; `width` of them, or 2 with .64, from a plain one on."""
    found: set[int] = set()
    for number, wide in re.findall(r"\bR(\d+)\b(\.64)?", operand):
        found.update(range(int(number), int(number) + max(width, 2 if wide else 1)))
    return found


def _width(name: str) -> int:
    """Registers of a result, or of a stored value."""
    if name.startswith(("LDSM", "STSM")):
        count = name.rsplit(".", 1)[-1]  # of matrices; one alone ends in its layout, as LDSM.16.M88
        return int(count) if count.isdigit() else 1
    if ".128" in name:
        return 4
    double = name.startswith(("CS2R", "DADD", "DMUL", "DFMA", "DMNMX")) and ".32" not in name
    return 2 if double or ".64" in name or ".WIDE" in name else 1


def written_and_read(one: Instruction) -> tuple[set[int], set[int]]:
    """(registers that an instruction writes, that it reads), products apart."""
    operands = list(one.operands)
    written: set[int] = set()
    wide = _width(one.name)
    if not one.name.startswith(WITHOUT_RESULT) and not re.search(r"SETP|PLOP", one.name):
        while operands and re.fullmatch(r"!?U?P(\d|T)", operands[0]):  # predicates that it sets as well
            del operands[0]
        if operands and re.fullmatch(r"R\d+(\.64)?", operands[0]):
            written = registers(operands.pop(0), wide)
    stores = one.name.startswith("ST")
    read = [registers(x, wide if stores and "[" not in x else 1) for x in operands]
    if ".WIDE" in one.name and operands:
        read.append(registers(operands[-1], 2))  # what a wide product is added to
    return written, set().union(*read)


def _product(one: Instruction) -> tuple[Group, bool]:
    """(the registers of an HGMMA, whether it begins its sum at zero)."""
    columns = int(re.search(r"64x(\d+)x", one.name)[1])  # type: ignore[index]
    (first,) = registers(one.operands[0])
    sums = frozenset(range(first, first + columns // (2 if ".F32" in one.name else 4)))
    return Group(sums, frozenset(registers(one.operands[1], 4))), "RZ" in one.operands[2:]


def hazards(code: list[Instruction]) -> list[str]:
    """Every access to a register that an asynchronous product in flight still reads or writes, on any path; empty is good.

    A product may use what was written before the fence in front of it (WARPGROUP.ARRIVE), and nothing else.
    """
    if not any(one.name.startswith("HGMMA") for one in code):
        return []
    at = {one.address: i for i, one in enumerate(code)}
    found: dict[str, None] = {}
    known: dict[tuple[int, State], frozenset[int]] = {}  # what was seen there as written since the last fence
    reached: set[int] = set()
    for entry in range(len(code)):  # the first, and what no branch with a known target leads to
        todo = [(entry, State(), frozenset[int]())] if entry not in reached else []
        while todo:
            i, state, unfenced = todo.pop()
            before = known.get((i, state))
            if i == len(code) or (before is not None and unfenced <= before):
                continue
            unfenced |= before or frozenset()
            known[i, state] = unfenced
            reached.add(i)
            one = code[i]
            found.update(dict.fromkeys(f"{one}: {fault}" for fault in _faults(one, state, unfenced)))
            state, unfenced = _after(one, state), _unfenced(one, unfenced)
            todo += [(j, state, unfenced) for j in _next(code, at, i)]
    return list(found)


def _next(code: list[Instruction], at: dict[int, int], i: int) -> Iterator[int]:
    """Where it goes on behind the instruction at i."""
    one = code[i]
    if one.target in at:
        yield at[one.target]
    leaves = one.name == "BRA" or one.name.startswith(("EXIT", "RET", "BRX", "JMP"))
    if not leaves or one.predicate or any("P" in x for x in one.operands[:-1]):
        yield i + 1


def _faults(one: Instruction, state: State, unfenced: frozenset[int]) -> Iterator[str]:
    busy = state.busy
    if one.name.startswith("HGMMA"):
        own, fresh = _product(one)
        written, read = set(own.sums), set(own.operands)
        if late := (own.operands | (frozenset() if fresh else own.sums - busy.sums)) & unfenced:
            yield f"uses {_names(late)}, written after the last fence"
        if own.sums <= busy.sums:  # one product after another into an accumulator is in order
            written -= busy.sums
    else:
        written, read = written_and_read(one) if busy.sums else (set(), set())
    if written & busy.sums:
        yield f"writes {_names(written & busy.sums)}, which a product in flight writes"
    if written & busy.operands:
        yield f"writes {_names(written & busy.operands)}, which a product in flight reads"
    if read & busy.sums:
        yield f"reads {_names(read & busy.sums)}, which a product in flight writes"


def _unfenced(one: Instruction, unfenced: frozenset[int]) -> frozenset[int]:
    if one.name.startswith("WARPGROUP.ARRIVE"):
        return frozenset()
    return unfenced if one.name.startswith("HGMMA") else unfenced | written_and_read(one)[0]


def _names(numbers: Iterable[int]) -> str:
    """R4-R7, R9 and so on."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"R{run[0]}" + (f"-R{run[-1]}" if len(run) > 1 else "") for run in runs)


def _after(one: Instruction, state: State) -> State:
    """What is in flight behind an instruction."""
    if one.name.startswith("HGMMA"):
        own, _ = _product(one)
        group = Group(state.open.sums | own.sums, state.open.operands | own.operands)
        if "gsb0" not in one.operands:
            return state._replace(open=group)
        closed = tuple(g for g in state.closed if g != group)[1 - MOST :]
        return state._replace(closed=(*closed, group), open=Group())
    if one.name.startswith("WARPGROUP.DEPBAR"):
        left = int(one.operands[-1], 16)
        return state._replace(closed=state.closed[-left:] if left else ())
    return state


def loops(code: list[Instruction], products: bool = True) -> list[list[Instruction]]:
    """The bodies of the loops that hold products (or of all), without those that hold another such loop."""
    ends = [(one.target, one.address) for one in code if one.target is not None and one.target < one.address]
    if products:
        wanted = [one.address for one in code if one.is_product]
        ends = [(low, high) for low, high in ends if any(low <= x <= high for x in wanted)]
    inner = [x for x in ends if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in ends)]
    return [[one for one in code if low <= one.address <= high] for low, high in inner]


def without_mask(body: list[Instruction]) -> list[Instruction]:
    """A loop without what its longest branch forward passes over, as a turn runs it whose tile hides nothing.

    The whole loop where that holds a product or an exponential.
    """
    at = {one.address: i for i, one in enumerate(body)}
    jumps = [(i + 1, at.get(one.target or 0, 0)) for i, one in enumerate(body) if one.name == "BRA"]
    first, last = max(jumps, key=lambda jump: jump[1] - jump[0], default=(0, 0))
    last = max(first, last)
    needed = any(one.is_product or one.name.startswith("MUFU.EX2") for one in body[first:last])
    return body if needed else body[:first] + body[last:]


def loop_spills(code: list[Instruction]) -> int:
    """Accesses to local memory in the innermost loops that hold products (or, without any, in all innermost loops)."""
    bodies = loops(code) or loops(code, products=False)
    return sum(one.name.split(".")[0] in ("LDL", "STL") for body in bodies for one in body)


def order(body: list[Instruction]) -> str:
    """A loop's products, exponentials, loads and waits in one line; "8 mma among 4 async load" come in turns."""
    named = [name for one in body if (name := _shown(one))]
    runs = [(name, len(list(run))) for name, run in groupby(named)]
    parts = []
    while runs:
        names = [name for name, _ in runs[:2]]
        turns = next((i for i, (name, _) in enumerate(runs) if name not in names), len(runs))
        if turns < MIXED:
            parts.append(_counted(*runs.pop(0)))
            continue
        first, second = (_counted(name, sum(n for other, n in runs[:turns] if other == name)) for name in names)
        parts.append(f"{first} among {second}")
        del runs[:turns]
    return ", ".join(parts)


def _counted(name: str, n: int) -> str:
    return name if n == 1 else f"{n} {name}"


def _shown(one: Instruction) -> str:
    name = next((name for start, name in SHOWN if one.name.startswith(start)), "")
    if name == "wgmma" and one.operands[1].startswith("R"):
        return "wgmma from registers"
    return f"{name} (but {int(one.operands[-1], 16)})" if name in ("wait for wgmma", "wait for loads") else name


def overlapped(body: list[Instruction]) -> tuple[int, int]:
    """(exponentials of a loop that run while a product is in flight, all of them); on sm_90."""
    state, counted = State(), (0, 0)
    for _ in range(2):  # what the turn before left in flight
        hidden = total = 0
        for one in body:
            if one.name.startswith("MUFU.EX2"):
                hidden, total = hidden + bool(state.busy.sums), total + 1
            state = _after(one, state)
        counted = hidden, total
    return counted
