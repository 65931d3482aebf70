"""PTX executed on the CPU: a compiled kernel as one Python function over numpy arrays, an array for every register.

All threads of a block take an instruction together (machine.py), so a branch must be taken by all or by none; where it skips
plain arithmetic the two ways are joined. What is known are the instructions that Triton makes of this project's portable
kernels for NVIDIA's GPUs from sm_80 to sm_90; another one raises NotImplementedError by name. PTX ISA 8.7 is the reference;
what is approximate there is taken as exact, and of all flushing of subnormal numbers only that of ex2 is done.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import numpy as np

from .machine import Array, Block, Fault, Memory

BITS = {"rs": 16, "r": 32, "f": 32, "rd": 64, "p": 1}  # of a register, by the letters of its name
SPECIAL = {"%tid.x": "TID", "%ctaid.x": "CTA[0]", "%ctaid.y": "CTA[1]", "%ctaid.z": "CTA[2]"}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
LOGIC = {"and": "&", "or": "|", "xor": "^"}
OF_ONE = {  # functions of one number
    "abs": "np.abs({})", "neg": "-{}", "ex2": "flushed(np.exp2(flushed({})))", "lg2": "np.log2({})", "rcp": "1 / {}",
    "sqrt": "np.sqrt({})", "rsqrt": "1 / np.sqrt({})",
}  # fmt: skip
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*"}
IDLE = ("membar", "bar.warp", "wgmma.fence")
PLAIN = re.compile(  # arithmetic, of the types that are known; that of a conversion's result is looked at with it
    rf"({'|'.join(OF_ONE)}|add|and|bfe|div|fma|mad|max|min|mov|mul|not|or|popc|prmt|rem|selp|setp|shl|shr|sub|xor)"
    r"(?!.*\.(sat|cc)\b).*\.(pred|f32|[bsu](16|32|64))|cvt(\.r[nzmp]i?)?(\.(f32|b?f16(x2)?|[su](8|16|32|64))){2}"
)


class Statement(NamedTuple):
    """An instruction: `@p add.s32 a, b, c`."""

    predicate: str  # "", "%p1" or "!%p1"
    opcode: str
    operands: list[str]
    place: str  # file:line of the kernel's source


def register(name: str) -> str:
    """A register's name in Python."""
    return SPECIAL.get(name) or name[1:]


@functools.cache
def bits_of(name: str) -> int:
    """Of a register or of a type: 32 of %r1, f32, b32 and bf16x2."""
    if name[0] == "%":
        return BITS[re.match(r"%([a-z]+)", name)[1]]  # type: ignore[index]
    if name in ("pred", "bf16x2", "f16x2"):
        return 1 if name == "pred" else 32
    return int(re.search(r"\d+$", name)[0])  # type: ignore[index]


def parts_of(text: str) -> list[str]:
    """What commas separate outside of brackets."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]


def members(operand: str) -> list[str]:
    """The registers of a vector; a scalar is one of one."""
    return parts_of(operand[1:-1]) if operand[0] == "{" else [operand]


def statements(text: str) -> tuple[list[Statement], dict[str, int]]:
    """The instructions of a kernel, and to which of them its labels lead."""
    files = dict(re.findall(r'\.file\s+(\d+) "(?:[^"]*/)?([^"]+)"', text))
    body = text.split(".reqntid", 1)[1]
    body = re.split(r"\$L__func_end0|// -- End function|\.section", body[body.index("{") + 1 :])[0]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"(?m)^\s*\.loc\s+(\d+) (\d+)[^\n]*", r".loc \1 \2;", body)
    found: list[Statement] = []
    labels: dict[str, int] = {}
    place = ""
    for line in body.split(";"):
        line = re.sub(r"^[\s{}]+", "", " ".join(line.split()))  # braces around inline assembly
        while label := re.match(r"(\$\w+):[\s{}]*", line):
            labels[label[1]], line = len(found), line[label.end() :]
        if moved := re.match(r"\.loc (\d+) (\d+)", line):
            place = f"{files.get(moved[1], '?')}:{moved[2]}"
        elif line and line[0] != ".":
            predicate, opcode, operands = re.match(r"(?:@(!?%\w+) )?(\S+) ?(.*)", line).groups()  # type: ignore[union-attr]
            found.append(Statement(predicate or "", opcode, parts_of(operands), place))
    return found, labels


class Program:
    """A kernel's PTX, ready to be run."""

    def __init__(self, text: str) -> None:
        self.threads = int(re.search(r"\.reqntid (\d+)", text)[1])  # type: ignore[index]
        self.params = re.findall(r"\.param [^,)]*?(\w+_param_\d+)", text.split(".reqntid")[0])
        self.statements, labels = statements(text)
        self.cell = min((width for one in self.statements for width in _widths(one)), default=4)
        self.source = _Writer(self.statements, labels).source()
        names: dict[str, Any] = {"np": np, **HELPERS}
        exec(compile(self.source, "<ptx>", "exec"), names)
        self.function = names["run"]

    def launch(self, grid: tuple[int, ...], params: list[int], shared_bytes: int, memory: Memory) -> None:
        """Run all blocks of a grid, one after another; params: the bits of the kernel's parameters.

        Raises:
            Fault: an access out of bounds, one that is not aligned, a race, something before its wait, or a branch in a warp.
        """
        values = dict(zip(self.params, params, strict=True))
        tid = np.arange(self.threads, dtype=np.uint32)
        full = [1, 1, 1]
        full[: len(grid)] = grid
        for number in range(full[0] * full[1] * full[2]):
            at = number % full[0], number // full[0] % full[1], number // full[0] // full[1]
            place = [np.full(self.threads, x, np.uint32) for x in at]
            block = Block(number, self.threads, shared_bytes, self.cell, memory)
            current = [0]
            try:
                self.function(block, values, tid, place, current)
            except Fault as fault:
                one = self.statements[current[0]]
                raise Fault(f"{one.place}, block {at}: {fault} ({one.opcode} {', '.join(one.operands)})") from None


class _Writer:
    """Writes the function: a loop over basic blocks, in each of which a statement is a line or more."""

    def __init__(self, found: list[Statement], labels: dict[str, int]) -> None:
        self.found = found
        ends = [i + 1 for i, one in enumerate(found) if one.opcode.startswith(("bra", "ret"))]
        self.starts = sorted({0, *labels.values(), *ends} - {len(found)})
        self.block_at = {start: n for n, start in enumerate(self.starts)}
        self.labels = labels
        self.constants: dict[tuple[int, int], str] = {}
        self.joins: dict[int, list[tuple[int, list[str]]]] = {}  # by statement: branches that lead there, what they skip
        self.in_flight = _in_flight(found)

    def source(self) -> str:
        blocks = []
        for n, start in enumerate(self.starts):
            end = self.starts[n + 1] if n + 1 < len(self.starts) else len(self.found)
            lines = [line for i in range(start, end) for line in self.statement(i, self.found[i])]
            blocks.append((start, lines))
        out = ["def run(B, P, TID, CTA, CURRENT):", "  T = B.threads"]
        out += [f"  {name} = np.full(T, {value}, {_dtype(bits)})" for (value, bits), name in self.constants.items()]
        names = set(re.findall(r"%(?:p|rs|rd|r|f)\d+\b", " ".join(f"{x.predicate} {' '.join(x.operands)}" for x in self.found)))
        out += [f"  {name[1:]} = np.zeros(T, {_dtype(bits_of(name))})" for name in sorted(names)]
        out += [f"  J{i} = None" for branches in self.joins.values() for i, _ in branches]
        out += ["  at = 0", "  while True:"]
        for n, (start, lines) in enumerate(blocks):
            out.append(f"    if at == {n}:")
            for i, skipped in self.joins.get(start, []):
                out.append(f"      if J{i} is not None:")
                out += [f"        {name} = np.where(J{i}[0], J{i}[{j + 1}], {name})" for j, name in enumerate(skipped)]
                out.append(f"        J{i} = None")
            out += [f"      {line}" for line in lines] + [f"      at = {n + 1}"]
        return "\n".join(out)

    # Operands, as expressions

    def read(self, operand: str, bits: int) -> str:
        """A register, widened or narrowed to so many bits, or an immediate."""
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand[0] == "%":
            return register(operand) if bits_of(operand) == bits else f"{register(operand)}.astype({_dtype(bits)})"
        if operand == "global_smem":
            value = 0
        elif operand[:2].lower() == "0f":
            value = int(operand[2:], 16)
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            value = int(operand.rstrip("U"), 0) & ((1 << bits) - 1)
        else:
            raise NotImplementedError(f"the operand {operand}")
        return self.constants.setdefault((value, bits), f"C{len(self.constants)}")

    def meant(self, operand: str, kind: str) -> str:
        """The same, as what a type says of its bits."""
        if kind == "bf16":
            return f"widened({self.read(operand, 16)})"
        if kind[0] in "sf":
            return f"{self.read(operand, bits_of(kind))}.view(np.{'int' if kind[0] == 's' else 'float'}{bits_of(kind)})"
        return self.read(operand, bits_of(kind))

    def address(self, operand: str, bits: int) -> str:
        base, _, offset = operand[1:-1].replace(" ", "").partition("+")
        return self.read(base, bits) if offset in ("", "0") else f"({self.read(base, bits)} + {self.read(offset, bits)})"

    def several(self, operand: str, bits: int) -> str:
        return "[" + ", ".join(self.read(x, bits) for x in members(operand)) + "]"

    def on(self, one: Statement) -> str:
        return "None" if not one.predicate else ("~" if one.predicate[0] == "!" else "") + register(one.predicate.lstrip("!"))

    def write(self, one: Statement, value: str, to: str | None = None) -> list[str]:
        """Assign to a register, where the predicate holds."""
        to = one.operands[0] if to is None else to
        if to == "_":
            return []
        return [f"{register(to)} = {value if not one.predicate else f'np.where({self.on(one)}, {value}, {register(to)})'}"]

    def write_several(self, one: Statement, values: str, kind: str) -> list[str]:
        """Assign a list of words to the registers of a vector, extended to their size as their type says."""
        lines = [f"t = {values}"]
        for i, to in enumerate(members(one.operands[0])):
            word = f"t[{i}]"
            if to != "_" and bits_of(to) != bits_of(kind):
                sign = "int" if kind[0] == "s" else "uint"
                word = f"{word}.view(np.{sign}{bits_of(kind)}).astype(np.{sign}{bits_of(to)}).view(np.uint{bits_of(to)})"
            lines += self.write(one, word, to)
        return lines

    # Statements, as lines

    def statement(self, i: int, one: Statement) -> list[str]:
        if one.opcode.startswith(IDLE):
            return []
        head = one.opcode.split(".")[0]
        if head == "bra":
            return self.branch(i, one)
        special = getattr(self, f"_{head}", None)
        if not PLAIN.fullmatch(one.opcode) and (special is None or head in ("cvt", "mov", "selp", "setp")):
            raise NotImplementedError(one.opcode)
        if special is not None:
            lines = special(one, one.opcode.split("."))
            return [f"CURRENT[0] = {i}", *lines] if "B." in lines[0] else lines
        return self.write(one, self.expression(one, head, one.opcode.split(".")[-1]))

    def branch(self, i: int, one: Statement) -> list[str]:
        end = self.labels[one.operands[0]]
        go = [f"at = {self.block_at[end]}", "continue"]
        if not one.predicate:
            return go
        lines = [f"c = {self.on(one)}", "if c.all():", *(f"  {line}" for line in go)]
        region = self.found[i + 1 : end]
        if region and all(PLAIN.fullmatch(x.opcode) for x in region):
            skipped = sorted({register(to) for x in region for to in members(x.operands[0])})
            self.joins.setdefault(end, []).append((i, skipped))
            return [*lines, "if c.any():", f"  J{i} = c, {', '.join(skipped)}"]
        return [f"CURRENT[0] = {i}", f"if B.all_or_none({self.on(one)}):", *(f"  {line}" for line in go)]

    def _ret(self, one: Statement, parts: list[str]) -> list[str]:
        return ["return"] if not one.predicate else [f"if B.all_or_none({self.on(one)}):", "  return"]

    def _bar(self, one: Statement, parts: list[str]) -> list[str]:
        if parts != ["bar", "sync"] or one.operands != ["0"]:
            raise NotImplementedError(f"{one.opcode} {', '.join(one.operands)}")
        return ["B.wait()"]

    def _ld(self, one: Statement, parts: list[str]) -> list[str]:
        kind = parts[-1]
        if parts[1] == "param":
            value = f"[np.full(T, P[{one.operands[1][1:-1]!r}], {_dtype(bits_of(kind))})]"
            return self.write_several(one, value, kind)
        count = len(members(one.operands[0]))
        shared = "shared" in one.opcode
        at = self.address(one.operands[1], 32 if shared else 64)
        call = f"B.load{'_shared' * shared}({at}, {bits_of(kind) // 8}, {count}, {self.on(one)})"
        return self.write_several(one, call, kind)

    def _st(self, one: Statement, parts: list[str]) -> list[str]:
        shared, bits = "shared" in one.opcode, bits_of(parts[-1])
        at, words = self.address(one.operands[0], 32 if shared else 64), self.several(one.operands[1], bits)
        return [f"B.store{'_shared' * shared}({at}, {words}, {bits // 8}, {self.on(one)})"]

    def _fence(self, one: Statement, parts: list[str]) -> list[str]:
        return ["B.order.fence()"] if parts[:3] == ["fence", "proxy", "async"] else ["pass"]

    def _cp(self, one: Statement, parts: list[str]) -> list[str]:
        if parts[2] == "commit_group":
            return ["B.order.commit_copies()"]
        if parts[2] == "wait_group":
            return [f"B.order.wait_copies({int(one.operands[0])})"]
        if parts[2] not in ("ca", "cg"):
            raise NotImplementedError(one.opcode)
        to, at, size, *some = one.operands
        read = self.read(some[0], 32) if some else "None"
        return [f"B.copy({self.address(to, 32)}, {self.address(at, 64)}, {int(size, 0)}, {read}, {self.on(one)})"]

    def _ldmatrix(self, one: Statement, parts: list[str]) -> list[str]:
        count = len(members(one.operands[0]))
        call = f"B.load_matrices({self.address(one.operands[1], 32)}, {count}, {'trans' in parts})"
        return self.write_several(one, call, "b32")

    def _stmatrix(self, one: Statement, parts: list[str]) -> list[str]:
        at, registers = self.address(one.operands[0], 32), self.several(one.operands[1], 32)
        return [f"B.store_matrices({at}, {registers}, {'trans' in parts})"]

    def _mma(self, one: Statement, parts: list[str]) -> list[str]:
        if "m16n8k16" not in parts:
            raise NotImplementedError(one.opcode)
        a, b, c = (self.several(x, 32) for x in one.operands[1:])
        return self.write_several(one, f"B.multiply({a}, {b}, {c}, {parts[-2]!r})", "b32")

    def _wgmma(self, one: Statement, parts: list[str]) -> list[str]:
        if parts[1] == "commit_group":
            return ["B.order.commit_products()"]
        if parts[1] == "wait_group":
            return [f"B.order.wait_products({one.operands[0]})", *(f"{x} = B.order.landed({x})" for x in self.in_flight)]
        size = re.fullmatch(r"m64n(\d+)k16", parts[4])
        if size is None:
            raise NotImplementedError(one.opcode)
        d, a, b, add, *rest = one.operands
        signs, turned = rest[:2], [x == "1" for x in rest[2:]]
        in_registers = a[0] == "{"
        left = self.several(a, 32) if in_registers else self.read(a, 64)
        turned = [False, *turned] if in_registers else turned
        operands = f"{self.several(d, 32)}, {left}, {self.read(b, 64)}, {self.read(add, 1)}"
        call = f"B.multiply_group({size[1]}, {parts[-1]!r}, {operands}, ({', '.join(signs)}), {tuple(turned)})"
        return self.write_several(one, call, "b32")

    def _shfl(self, one: Statement, parts: list[str]) -> list[str]:
        to, x, by, *_ = one.operands
        return self.write(one, f"B.shuffle({parts[2]!r}, {self.read(x, 32)}, {self.read(by, 32)})", to.split("|")[0])

    def _redux(self, one: Statement, parts: list[str]) -> list[str]:
        return self.write(one, f"B.reduce({parts[2]!r}, {self.meant(one.operands[1], parts[-1])})")

    def _mov(self, one: Statement, parts: list[str]) -> list[str]:
        to, x = one.operands
        bits = bits_of(parts[-1])
        if to[0] == "{":
            share = bits // len(members(to))
            words = f"np.ascontiguousarray({self.read(x, bits)}).view(np.uint{share}).reshape(T, -1).T.copy()"
            return self.write_several(one, words, f"b{share}")
        if x[0] == "{":
            share = bits // len(members(x))
            return self.write(one, f"np.stack({self.several(x, share)}, 1).view(np.uint{bits}).reshape(T)")
        return self.write(one, self.read(x, bits))

    def _cvt(self, one: Statement, parts: list[str]) -> list[str]:
        to, kind = parts[-2:]
        if to in ("bf16x2", "f16x2"):
            high, low = (_narrow(self.meant(x, kind), to[:-2]) for x in one.operands[1:])
            return self.write(one, f"({high}.astype(np.uint32) << 16 | {low})")
        x = self.meant(one.operands[1], kind)
        if to in ("bf16", "f16"):
            return self.write(one, _narrow(x, to))
        if to == "f32":
            return self.write(one, f"{x}.astype(np.float32).view(np.uint32)")
        if kind[-3:] in ("f32", "f16"):
            whole = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}[parts[1]]
            x = f"np.{whole}({x})"
        sign, bits = "int" if to[0] == "s" else "uint", bits_of(one.operands[0])
        return self.write(one, f"{x}.astype(np.{sign}{bits_of(to)}).astype(np.{sign}{bits}).view(np.uint{bits})")

    def _setp(self, one: Statement, parts: list[str]) -> list[str]:
        kind, how = parts[-1], parts[1]
        a, b = (self.meant(x, kind) for x in one.operands[1:3])
        if kind == "f32":
            strange = f"(np.isnan({a}) | np.isnan({b}))"
            unordered = how in ("equ", "neu", "ltu", "leu", "gtu", "geu")
            if how in ("num", "nan"):
                value = strange if how == "nan" else f"~{strange}"
            else:
                value = f"({a} {COMPARED[how[:2]]} {b})"
                value = f"({value} | {strange})" if unordered else f"({value} & ~{strange})" if how == "ne" else value
        else:
            value = f"({a} {COMPARED[how]} {b})"
        if parts[2] in LOGIC:
            value = f"({value} {LOGIC[parts[2]]} {self.read(one.operands[3], 1)})"
        return self.write(one, value)

    def _selp(self, one: Statement, parts: list[str]) -> list[str]:
        bits = bits_of(parts[-1])
        _, a, b, which = one.operands
        return self.write(one, f"np.where({self.read(which, 1)}, {self.read(a, bits)}, {self.read(b, bits)})")

    def expression(self, one: Statement, head: str, kind: str) -> str:
        """The value of an instruction of arithmetic."""
        bits, operands, parts = bits_of(kind), one.operands[1:], one.opcode.split(".")
        x = [self.meant(operand, kind) for operand in operands]
        back = f".view(np.uint{bits})"
        if head in LOGIC:
            return f"({x[0]} {LOGIC[head]} {x[1]})"
        if head == "not":
            return f"~{x[0]}"
        if head in ("shl", "shr"):
            by = self.read(operands[1], 32)
            moved = f"{x[0]} {'<<' if head == 'shl' else '>>'} np.minimum({by}, {bits - 1}).astype({x[0]}.dtype)"
            return f"({moved}){back}" if kind[0] == "s" else f"np.where({by} < {bits}, {moved}, {x[0]} * 0)"
        if head in ("bfe", "prmt"):
            a, b, c = (self.read(operand, size) for operand, size in zip(operands, (bits, 32, 32)))
            return f"field({a}, {b}, {c}, {kind[0] == 's'})" if head == "bfe" else f"permuted({a}, {b}, {c})"
        if head == "popc":
            return f"ones({x[0]})"
        if head in ("mul", "mad") and kind != "f32":
            value, size = self.product(parts[1], operands, kind)
            return value if head == "mul" else f"({value} + {self.read(operands[2], size)})"
        if head in ARITHMETIC:
            return f"({x[0]} {ARITHMETIC[head]} {x[1]}){back}"
        if head == "fma":
            return f"({x[0]}.astype(np.float64) * {x[1]} + {x[2]}).astype(np.float32){back}"
        if head in OF_ONE:
            return f"({OF_ONE[head].format(x[0])}){back}"
        if head in ("min", "max"):
            name = f"f{head}" if kind == "f32" and "NaN" not in parts else f"{head}imum"
            value = f"np.{name}({x[0]}, {x[1]})"
            return (f"np.maximum({value}, 0).astype({x[0]}.dtype)" if "relu" in parts else value) + back
        if kind == "f32":  # what is left are quotients and remainders
            return f"({x[0]} / {x[1]}){back}"
        return f"divided({x[0]}, {x[1]})[{int(head == 'rem')}]{back}"

    def product(self, part: str, operands: list[str], kind: str) -> tuple[str, int]:
        """(the low half, the high half or all of a product of integers, its bits)"""
        a, b = (self.meant(x, kind) for x in operands[:2])
        bits, wide = bits_of(kind), "np.int64" if kind[0] == "s" else "np.uint64"
        if part == "lo":
            return f"({a} * {b}).view(np.uint{bits})", bits
        if bits == 64:
            raise NotImplementedError(f"mul.{part}.{kind}")
        whole = f"({a}.astype({wide}) * {b}.astype({wide}))"
        if part == "hi":
            return f"({whole} >> {bits}).astype({_dtype(bits)})", bits
        return f"{whole}.astype({_dtype(2 * bits)})", 2 * bits


def _widths(one: Statement) -> list[int]:
    """Bytes of an instruction's single access to shared memory."""
    if one.opcode.startswith(("ld.shared", "st.shared")):
        return [bits_of(one.opcode.split(".")[-1]) // 8]
    if one.opcode.startswith(("cp.async.ca", "cp.async.cg")):
        return [int(one.operands[2], 0)]
    return [2] if one.opcode.startswith(("wgmma.mma", "ldmatrix", "stmatrix")) else []


def _in_flight(found: list[Statement]) -> list[str]:
    """The registers, in Python, that may hold what a product has yet to give."""
    names = {x for one in found if one.opcode.startswith("wgmma.mma") for x in members(one.operands[0])}
    moved = [one.operands for one in found if one.opcode.startswith("mov.b32")]
    size = -1
    while size < len(names):
        size = len(names)
        names |= {to for to, x in moved if x in names}
    return sorted(map(register, names))


def _dtype(bits: int) -> str:
    return "np.bool_" if bits == 1 else f"np.uint{bits}"


def _narrow(x: str, to: str) -> str:
    """float32 as the bits of 16."""
    return f"bfloat16({x})" if to == "bf16" else f"{x}.astype(np.float16).view(np.uint16)"


def bfloat16(x: Array) -> Array:
    """The bits of the nearest bfloat16, of two the even one."""
    word = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (word + 0x7FFF + (word >> 16 & 1)) >> 16).astype(np.uint16)


def widened(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


def flushed(x: Array) -> Array:
    """Without subnormal numbers."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, x * np.float32(0), x)


def field(x: Array, first: Array, count: Array, signed: bool) -> Array:
    """`count` bits of x from bit `first` on."""
    one = np.uint64(1)
    found = x.astype(np.uint64) >> first.astype(np.uint64) & (one << count.astype(np.uint64)) - one
    if signed:
        top = one << count.astype(np.uint64) - one
        found = (found ^ top) - top
    return found.astype(x.dtype)


def permuted(a: Array, b: Array, which: Array) -> Array:
    """Four of the eight bytes of a and b; with bit 3 of a choice, only that byte's sign."""
    both, out = b.astype(np.uint64) << np.uint64(32) | a, np.zeros_like(a)
    for i in range(4):
        choice = which >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        byte = np.where(choice & np.uint32(8), np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0)), byte)
        out |= byte << np.uint32(8 * i)
    return out


def ones(x: Array) -> Array:
    return np.unpackbits(x.view(np.uint8).reshape(len(x), -1), axis=1).sum(1).astype(np.uint32)


def divided(a: Array, b: Array) -> tuple[Array, Array]:
    """(quotient towards 0, remainder); what a GPU makes of a division by 0 is of no interest."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.where((a % b != 0) & ((a < 0) != (b < 0)), a // b + a.dtype.type(1), a // b)
    return quotient, a - quotient * b


HELPERS = {f.__name__: f for f in (bfloat16, widened, flushed, field, permuted, ones, divided)}
