"""What the compiler makes of the kernels, without a GPU: registers, local memory, shared memory and matrix instructions.

The backend's own launches are recorded, not run, and each is compiled for a named architecture by Triton's own compiler
with the assembler and disassembler of its wheel. So what is reported is what a launch would compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import subprocess
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from .. import functional, masks, scores
from ..backends import hopper, triton_call
from ..backends import triton as portable
from ..kernels import shim
from ..kernels.hopper import gluon
from ..problem import LOW, Problem, Tangents, ThreeTangents
from . import bound, sass
from .bound import Bound

SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KB of a block


class Recorded(NamedTuple):
    """A launch that was not run."""

    kernel: Any
    args: tuple[Any, ...]
    num_warps: int
    num_stages: int


class Report(NamedTuple):
    """What a kernel came to."""

    kernel: str
    num_warps: int
    num_stages: int
    registers: int
    local: int  # bytes of local memory: what did not fit the registers
    loop_spills: int  # accesses to it in the loops that hold the products
    shared: int  # bytes
    products: int  # matrix instructions
    warning: str = ""  # the assembler's, where it made asynchronous products wait for each other, or `miscounted`

    def __str__(self) -> str:
        return (
            f"{self.kernel:<14} {self.num_warps} warps {self.num_stages} stages  {self.registers:>3} registers  "
            f"{self.local:>5} B local ({self.loop_spills} accesses in loops)  {self.shared / 1024:>5.0f} K shared  "
            f"{self.products} matrix instructions{self.warning and '  ' + self.warning}"
        )


class Loop(NamedTuple):
    """A loop that holds products, as its assembly has it."""

    instructions: int
    order: str  # of its products, exponentials, loads and waits
    overlapped: tuple[int, int]  # exponentials while an asynchronous product is in flight, and all of them
    bound: Bound | None

    def __str__(self) -> str:
        inside, total = self.overlapped
        text = f"loop of {self.instructions} instructions: {self.order}"
        text += f"\n    {inside} of {total} exponentials while a product is in flight" if "wgmma" in self.order else ""
        return text + (f"\n    {self.bound}" if self.bound is not None else "")


class Inspection(NamedTuple):
    """A report, and what else the compiler's work tells."""

    report: Report
    seconds: float  # of compiling it, on one core and without a cache
    hazards: list[str]  # registers that a product in flight still needs: sass.py
    loops: list[Loop]


def recorded(p: Problem, arch: str, order: int = 1, backend: ModuleType = portable) -> list[Recorded]:
    """The launches of p's forward, with order 1 also of its backward and with order 2 of every tangent, on an architecture.

    Parameters and sinks have tangents where p wants the parameters' gradients.
    """
    found: list[Recorded] = []

    def record(kernel: Any, programs: int, how: Any, *args: Any) -> None:
        found.append(Recorded(kernel, args, how.num_warps, how.num_stages))

    with mock.patch.object(triton_call, "run", record), mock.patch.object(triton_call, "architecture", return_value=arch):
        out, lse, out_lo = backend.forward(p, order > 0)
        if order > 0:
            backend.backward(p, out, None, out, lse, out_lo)
        if order > 1:
            t = directions(p)
            backend.forward_jvp(p, t, out, lse, out_lo)
            backend.backward_jvp(p, t, out, None, out if p.param_grads else None, None, out, lse, out_lo, out, lse)
            backend.forward_jvp2(p, ThreeTangents(t, t, t), out, lse, out_lo, lse, lse)
    return found


def directions(p: Problem) -> Tangents:
    """p's own inputs as a direction; its parameters and sinks among them where p wants the parameters' gradients."""
    params: list[Tensor | None] = [x if p.param_grads else None for x in p.params]
    return Tangents(p.q, p.k, p.v, params, p.sinks if p.param_grads else None)


def own_launches(p: Problem, arch: str, order: int = 1) -> list[Recorded]:
    """The launches of p by the kernels that an architecture has beside the portable ones; none on most."""
    if arch != hopper.ARCH or hopper.misfits(p) or p.q.dtype not in LOW:
        return []
    known, p = {launch.kernel for launch in recorded(p, arch, order)}, dataclasses.replace(p, deterministic=False)
    return [launch for launch in recorded(p, arch, order, hopper) if launch.kernel not in known]


def require_compiler() -> None:
    """Raise ValueError where triton is missing or this process interprets kernels."""
    if not shim.PRESENT or shim.INTERPRETED:
        raise ValueError("compiling needs triton to be installed, and TRITON_INTERPRET unset")


def _bound(launch: Recorded, arch: str) -> tuple[Any, Any, Any, Any]:
    """(target, its compiler, the launch's arguments by name, what the compiler specialises on)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    compiler = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, compiler)
    arguments, specialization, _ = bind(*launch.args, num_warps=launch.num_warps, num_stages=launch.num_stages)
    return target, compiler, arguments, specialization


def variant(launch: Recorded, arch: str) -> tuple[str, str]:
    """(kernel, key): launches of a kernel with one key share a binary."""
    return launch.kernel.__name__, str((_bound(launch, arch)[3], launch.num_warps, launch.num_stages))


def flat_arguments(launch: Recorded, arch: str) -> list[tuple[str, Any]]:
    """(type, value) of the parameters that a compiled launch takes: tuples laid flat, without what is constant."""

    def flat(value: Any, kind: Any) -> list[tuple[str, Any]]:
        if isinstance(kind, tuple):
            return [pair for x, k in zip(value, kind, strict=True) for pair in flat(x, k)]
        return [] if kind == "constexpr" else [(kind, value)]

    _, _, arguments, specialization = _bound(launch, arch)
    return [pair for value, (kind, _) in zip(arguments.values(), specialization) for pair in flat(value, kind)]


def _source(launch: Recorded, arch: str) -> tuple[Any, Any, Any, Any]:
    """(what Triton compiles of a recorded launch, target, its compiler, the compiler's options)"""
    from triton.compiler import ASTSource

    target, compiler, arguments, specialization = _bound(launch, arch)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = launch.kernel
    options, signature, constants, attributes = kernel._pack_args(compiler, options, arguments, specialization, None)
    source = gluon.GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, signature, constants, attributes), target, compiler, options


def compiled(launch: Recorded, arch: str) -> Any:
    """A recorded launch, compiled for an architecture ("sm_90", "gfx942")."""
    import triton

    source, target, _, options = _source(launch, arch)
    return triton.compile(source, target=target, options=options.__dict__)


def parsed(launch: Recorded, arch: str) -> str:
    """The TTIR of a recorded launch, which is all that depends on Triton's reading of Python: a tenth of `compiled`'s time."""
    from triton._C.libtriton import ir

    source, target, compiler, options = _source(launch, arch)
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    functions, modules = compiler.get_codegen_implementation(options), compiler.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    stages: dict[str, Any] = {}
    compiler.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def report(launch: Recorded, arch: str) -> Report:
    """Compile a recorded launch and read what it came to."""
    return inspect(launch, arch).report


def inspect(launch: Recorded, arch: str) -> Inspection:
    """Compile a recorded launch, and read its assembly as well where that is NVIDIA's."""
    binary, log, seconds = _logged(launch, arch)
    name = launch.kernel.__name__, launch.num_warps, launch.num_stages
    if arch.startswith("gfx"):
        return Inspection(Report(*name, *_amd(binary.asm["amdgcn"], binary.metadata.shared)), seconds, [], [])
    usage, code = _dump(binary.asm["cubin"], "-res-usage"), sass.instructions(_dump(binary.asm["cubin"], "-sass"))
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    seen = Report(
        *name, found.get("REG", 0), found.get("STACK", 0) + found.get("LOCAL", 0), sass.loop_spills(code),
        binary.metadata.shared, sum(one.is_product for one in code),
        serialised(log) or miscounted(binary.asm["ttgir"]),
    )  # fmt: skip
    specialised = any(one.name.startswith("USETMAXREG") for one in code)  # warp groups run loops of their own
    loops, end = [], 0
    for body in sass.loops(code):
        order, counted = sass.order(body), sass.overlapped(body)
        limit = None
        if not specialised:
            limit = bound.of_loop(body, launch.num_warps, arch)
        elif body[0].address > end and counted[1]:  # two groups with the same loop; what reaches into one is around it
            limit = bound.of_loop(sass.without_mask(body), 8, arch)
            end = body[-1].address
        loops.append(Loop(len(body), order, counted, limit))
    return Inspection(seen, seconds, sass.hazards(code), loops)


def _logged(launch: Recorded, arch: str) -> tuple[Any, str, float]:
    """(binary, what the assembler printed, seconds of compiling); the cache would give the first alone."""
    from triton import knobs

    said = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        start = time.perf_counter()
        binary = compiled(launch, arch)
        seconds = time.perf_counter() - start
    return binary, said.getvalue(), seconds


def serialised(log: str) -> str:
    """The line of an assembler's log that says wgmma instructions wait for each other, or nothing."""
    lines = [line.strip() for line in log.splitlines() if "wgmma" in line and "serializ" in line]
    return lines[0] if lines else ""


def miscounted(ttgir: str) -> str:
    """A product that Triton for NVIDIA (before 3.8) gets wrong, or nothing: four lanes with kWidth elements each share a row of
    an operand, and where it has fewer, some count twice and others not at all."""
    operand = r"tensor<([\dx]+)x\w+, #ttg\.dot_op<\{opIdx = ([01]), parent = [^,]+, kWidth = (\d+)\}>>"
    for line in ttgir.splitlines():
        for shape, index, width in re.findall(operand, line) if re.search(r"\.dot |_dot ", line) else ():
            inner = int(shape.split("x")[-1 - int(index)])
            if 4 * int(width) > inner:
                return f"a product over {inner} elements has operands for {4 * int(width)}: it would be wrong"
    return ""


def _amd(assembly: str, shared: int) -> tuple[int, int, int, int, int]:
    """Registers, scratch memory, accesses to it (all of them, in loops or not), shared memory and matrix instructions."""
    facts = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly)}
    scratch = len(re.findall(r"^\s*scratch_(?:load|store)", assembly, re.M))
    products = len(re.findall(r"^\s*v_mfma", assembly, re.M))
    return facts["vgpr_count"], facts["private_segment_fixed_size"], scratch, shared, products


def _dump(cubin: bytes, flag: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), flag, file.name], capture_output=True, text=True, check=True).stdout


def calls(everything: bool = False) -> dict[str, dict[str, Any]]:
    """What `example` takes, by name: causal and row spans, with and without a chain; `everything`: other loads as well."""
    rows = masks.SinkTokens(4) | masks.SlidingWindow(255, 0, "top_left")
    found: dict[str, dict[str, Any]] = {
        "causal": {}, "causal, chain": {"chain": True}, "row spans": {"mask": rows},
        "row spans, chain": {"mask": rows, "chain": True},
    }  # fmt: skip
    if everything:
        found["gradients of slopes"] = {"chain": True, "params": True}
        found["dense"] = {"mask": masks.Dense(torch.ones(1024, 1024, dtype=torch.bool))}
        found["dropout"] = {"dropout": 0.1}
        found["dense, dropout"] = {"mask": found["dense"]["mask"], "dropout": 0.1}
    return found


def example(
    head_dim: int, dtype: torch.dtype, *, chain: bool = False, mask: masks.Mask | None = None, dropout: float = 0.0,
    n: int = 1024, params: bool = False, device: str = "cpu", random: bool = False, score: list[scores.Score] | None = None,
) -> Problem:  # fmt: skip
    """A training call with grouped heads; with `params` the gradients of its parameters are wanted as well. `chain`: a softcap
    and slopes, where `score` does not say otherwise."""
    make = torch.randn if random else torch.empty
    q = make(1, n, 4, head_dim, dtype=dtype, device=device).transpose(1, 2)
    k, v = (make(1, n, 2, head_dim, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
    slopes = torch.full((4,), 0.01, device=device)
    if score is None:
        score = [scores.Softcap(30.0), scores.ALiBi(slopes)] if chain else []
    rng = None if dropout == 0.0 else torch.zeros(1, 2, dtype=torch.int64, device=device)
    p = functional.problem(
        q, k, v, masks.Causal("top_left") if mask is None else mask, score, None, None, dropout, "tiled", None, None, draw=False
    )
    return dataclasses.replace(p, rng=rng, param_grads=params)
