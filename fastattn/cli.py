"""The command line: info, explain, bench, compare, report, compile, tune and gpu-check.

python -m fastattn info
python -m fastattn explain --q 1,32,1024,128 --k 1,8,1024,128 --dtype bfloat16 --mask "Causal()"
python -m fastattn bench
python -m fastattn compare before/results.json after/results.json
python -m fastattn report bench-out --html page.html
python -m fastattn compile --arch sm_90
python -m fastattn tune --minutes 9
python -m fastattn gpu-check --minutes 9 --out gpu-check
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import environment, functional, masks, scores
from .bench import SUITES
from .kernels.launch import KERNELS, table_of

DTYPES = {str(t)[6:]: t for t in functional.DTYPES}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 where the arguments do not fit or a file cannot be had."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, NotImplementedError) as error:
        print(f"fastattn {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"fastattn {options.command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor whose shape `explain` looks at. It takes no memory but on cuda, where kernels look at strides too.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        strided = torch.device(device).type == "cuda"
        return torch.empty(shape if strided else (), dtype=dtype, device=device).expand(shape)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device!r}: {str(error).splitlines()[0]}") from error


def info(options: argparse.Namespace) -> int:
    """Versions, machine and backends."""
    facts = environment.describe()
    if options.json:
        print(json.dumps({**facts, "backends": environment.backends()}, indent=1))
        return 0
    rows = {**facts, **{f"backend {name}": line for name, line in environment.backends().items()}}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {'no' if value is None else value}")
    return 0


def explain(options: argparse.Namespace) -> int:
    """What a call of these shapes would run."""
    q_shape = options.q
    k_shape = options.k or q_shape
    v_shape = options.v or k_shape
    dtype = DTYPES[options.dtype]
    q, k, v = (_empty(shape, dtype, options.device) for shape in (q_shape, k_shape, v_shape))
    mask = None if options.mask is None else written(options.mask, masks.Mask, masks, "--mask")
    score = [written(text, scores.Score, scores, "--score") for text in options.score]
    print(functional.explain(q, k, v, mask=mask, score=score, dropout_p=options.dropout, backend=options.backend))
    return 0


def bench(options: argparse.Namespace) -> int:
    """Run benchmark suites and write their results."""
    from .bench import compare, revisions, suite
    from .bench import report as bench_report
    from .bench.sweeps import SWEEPS

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.profile:
        return _profile(options, device)
    suites = tuple(dict.fromkeys(options.suites)) or (("models",) if options.base or options.only else suite.DEFAULT)
    if "all" in suites:
        suites = tuple(name for name in SUITES if name in SWEEPS or not options.base)
    if options.list:
        if wrong := [name for name in options.suites if name not in (*SUITES, "all")]:
            raise ValueError(f"no suite is named {wrong[0]}; there are {', '.join(SUITES)} and all")
        for name in SWEEPS if not options.suites else [name for name in suites if name in SWEEPS]:
            print(f"{name}:")
            for w in dict.fromkeys(cell.workload for cell in SWEEPS[name](device)):
                print(f"  {w.name:<18} {w.model}: {w}")
        return 0
    chosen = suite.Options(
        suites=suites,
        only=tuple(options.only),
        minutes=options.minutes,
        quick=options.quick,
        compiled=not options.no_compile,
        threads=options.threads,
        device=device,
    )
    if options.base is not None:
        if options.into is not None:
            raise ValueError("--into must be left out with --base, which compares and writes nothing")
        print(compare.text(compare.compare(*revisions.against(options.base, chosen))))
        return 0
    if options.into is not None:
        bench_report.check(options.into, suites)
    options.out.mkdir(parents=True, exist_ok=True)  # now: what was measured is to be kept
    results = suite.run(chosen)
    print("  ".join(f"{name} {results.environment[name]}" for name in ("fastattn", "torch", "cpu", "gpu", "threads")))
    for name, section in results.sections().items():
        print(f"\n## {name}\n\n{section}")
    written_files = suite.write(results, options.out)
    for note in results.notes:
        print(f"\nnote: {note}")
    print(f"\nwritten: {', '.join(map(str, written_files))}")
    if results.error is not None:
        raise results.error
    if options.into is not None:
        _insert(results.sections(), results.environment, options.into)
    return 0


def _profile(options: argparse.Namespace, device: str) -> int:
    from .bench import profile

    proton = profile.require(device)
    files = profile.run(profile.chosen(options.suites or ["models"], options.only, device), device, options.out, proton)
    print(files[-1].read_text(), end="")
    print(f"\nwritten: {', '.join(map(str, files))}")
    return 0


def compare_runs(options: argparse.Namespace) -> int:
    """What became slower or faster from one run to another."""
    from .bench import compare

    changes = compare.compare(*(_results(path) for path in (options.before, options.after)))
    print(compare.text(changes))
    return int(any(change.verdict == "slower" for change in changes))


def report(options: argparse.Namespace) -> int:
    """A run's pictures and tables as a page, and its pictures by themselves."""
    from .bench import page, plot

    results = _results(options.results)
    folder = options.results if options.results.is_dir() else options.results.parent
    text = folder / "tables.md"
    if options.html is None and options.figures is None:
        options.html = folder / "report.html"
    try:
        if options.html is not None:
            options.html.write_text(page.html(results, page.read_sections(text.read_text()) if text.exists() else {}))
            print(f"written: {options.html}")
        if options.figures is not None:
            options.figures.mkdir(parents=True, exist_ok=True)
            for name, figure in plot.figures(page.rows(results)).items():
                page.save(figure, options.figures / f"{name}.svg")
                print(f"written: {options.figures / name}.svg")
    except ImportError as missing:
        raise ValueError(f"pictures need matplotlib: pip install matplotlib ({missing})") from missing
    return 0


def _results(path: Path) -> dict[str, Any]:
    """A run's results.json, from its path or its folder's.

    Raises:
        ValueError: there is none.
    """
    found = path / "results.json" if path.is_dir() else path
    try:
        data = json.loads(found.read_text())
    except OSError as error:
        raise ValueError(f"no results at {found}: {error.strerror}") from error
    except ValueError as error:  # no text, or no JSON
        raise ValueError(f"{found} is no results.json: {error}") from error
    facts = data.get("environment") if isinstance(data, dict) else None
    if not isinstance(facts, dict) or not {"fastattn", "cpu", "date", "command"} <= set(facts):
        raise ValueError(f"{found} is no results.json of the benchmark")
    return data


def compile_kernels(options: argparse.Namespace) -> int:
    """What the compiler makes of the kernels' default configurations."""
    from .devtools import baseline, offline, survey

    if options.baseline or (options.all and not options.arch):
        for name, found in baseline.write():
            print(f"{name:<48} {found}", flush=True)
        if options.baseline:
            return 0
    units = [
        survey.Unit(arch, dim, DTYPES[dtype], options.all)
        for arch in options.arch or (offline.SHARED if options.all else baseline.DEFAULTS)
        for dtype in options.dtype or (["bfloat16", "float32"] if options.all else ["bfloat16"])
        for dim in options.head_dim or [64, 128]
    ]
    rows = []
    for row in survey.survey(units, options.jobs):
        print(row, flush=True)
        rows.append(row)
    print("", *survey.waits(rows), survey.NOTE, sep="\n")
    if options.pages:
        print("", *survey.pages(rows), sep="\n")
    return int(any(row.faults for row in rows))


def tune(options: argparse.Namespace) -> int:
    """Measure launch configurations on the card at hand and write its table."""
    from .backends import triton_call
    from .devtools import tune as tuning
    from .kernels import shim
    from .kernels.launch import TABLES

    if not shim.PRESENT or not (torch.cuda.is_available() or shim.INTERPRETED):
        raise ValueError("tuning needs triton and a GPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = TABLES if options.out is None else options.out
    folder.mkdir(parents=True, exist_ok=True)
    arch = triton_call.architecture(torch.device(device))
    dtypes = [DTYPES[name] for name in options.dtype or ["bfloat16", "float32"]]
    found = tuning.tune(
        options.head_dim or [64, 128, 256], dtypes, minutes=options.minutes, n=options.length, device=device,
        only=tuple(options.only),
    )  # fmt: skip
    try:
        for row in found:
            print(row, flush=True)
            tuning.write(folder, arch)  # each time: a configuration may bring down the process
    except KeyboardInterrupt:
        print("stopped; what was found is kept")
    print(f"written: {tuning.write(folder, arch)}")
    return 0


def gpu_check(options: argparse.Namespace) -> int:
    """Judge this GPU's results in one command."""
    from .devtools import gpu_check as checking

    if not options.dry_run:
        return checking.check(options.minutes, options.out)
    here = checking.machine()
    print(checking.describe(here, checking.plan(here, options.minutes, options.out, Path("scratch")), options.minutes))
    return 0


def written(text: str, kind: type, module: Any, argument: str) -> Any:
    """A mask or score from the text of its construction, such as "Causal() & SlidingWindow(255, 0)".

    Only the subclasses of `kind` in `module` that fastattn exports, literals, & and | count; nothing else is evaluated.

    Raises:
        TypeError, ValueError: the text is none, or what it names does not take its arguments.
    """
    from . import __all__ as exported

    names = {name: x for name in module.__all__ if name in exported and _is_below(x := getattr(module, name), kind)}

    def read(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            left, right = read(node.left), read(node.right)
            return left & right if isinstance(node.op, ast.BitAnd) else left | right
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            if not all(k.arg for k in node.keywords):
                raise SyntaxError(ast.unparse(node))
            keywords = {k.arg: _literal(k.value) for k in node.keywords if k.arg}
            return names[node.func.id](*map(_literal, node.args), **keywords)
        raise SyntaxError(ast.unparse(node))

    try:
        return read(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        example = "Causal()" if kind is masks.Mask else "Softcap(50.0)"
        raise ValueError(
            f'{argument} {text!r}: cannot read {error.msg}; there are {", ".join(names)}; an example: "{example}"'
        ) from error
    except (ValueError, TypeError) as error:
        raise type(error)(f"{argument} {text!r}: {error}") from error


def _is_below(x: Any, kind: type) -> bool:
    return isinstance(x, type) and issubclass(x, kind) and x is not kind


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise SyntaxError(ast.unparse(node)) from None


def _insert(sections: dict[str, str], facts: dict[str, Any], page: Path) -> None:
    from .bench import report

    caption = (
        f"Measured {facts['date']} by `{facts['command']}` on {facts['cpu']} ({facts['cpu capability']}), "
        f"torch {facts['torch']}, fastattn {facts['fastattn']}."
    )
    print(f"put into {page}: {', '.join(report.insert(page, sections, caption))}")


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(n) for n in text.split(","))
    except ValueError:
        sizes = (-1,)
    if min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"a shape is written as 1,8,1024,64, got {text!r}")
    if max(sizes) >= 1 << 31:
        raise argparse.ArgumentTypeError(f"sizes must be below 2^31, got {text!r}")
    return sizes


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0.0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return minutes


def _architecture(text: str) -> str:
    try:
        if re.fullmatch(r"sm_\d+|gfx[0-9a-f]+", text):
            table_of(text)
            return text
    except ValueError:
        pass
    accepted = "sm_80 or a later one of NVIDIA's, such as sm_90, or one of AMD's, such as gfx942"
    raise argparse.ArgumentTypeError(f"must be {accepted}, got {text!r}")


def _page(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be an existing Markdown page, got {text!r}")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastattn", description="Exact attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("info", help="versions, machine and backends")
    one.add_argument("--json", action="store_true", help="as JSON")
    one.set_defaults(run=info)

    one = commands.add_parser("explain", help="what a call would run, and why not something else")
    one.add_argument("--q", type=_shape, required=True, metavar="B,H,L,D", help="shape of q")
    one.add_argument("--k", type=_shape, metavar="B,H,L,D", help="shape of k (default: q's)")
    one.add_argument("--v", type=_shape, metavar="B,H,L,D", help="shape of v (default: k's)")
    one.add_argument("--dtype", choices=DTYPES, default="float32")
    one.add_argument("--device", default="cpu")
    one.add_argument("--mask", help='for instance "Causal() & SlidingWindow(255, 0)"')
    one.add_argument("--score", action="append", default=[], help='for instance "Softcap(50.0)"; may be repeated')
    one.add_argument("--dropout", type=float, default=0.0, metavar="P")
    one.add_argument("--backend", help="ask for a backend by name")
    one.set_defaults(run=explain)

    one = commands.add_parser("bench", help="errors against float64 and times beside every peer at hand")
    one.add_argument("suites", nargs="*", metavar="suite", help=f"{', '.join(SUITES)} or all (default: models training)")
    one.add_argument("--quick", action="store_true", help="few workloads, rounds and steps: to see that it runs")
    one.add_argument("--minutes", type=_minutes, help="about how long the whole run may take: the most telling cells come "
                     "first, and what is left out is named (default: everything)")  # fmt: skip
    one.add_argument("--only", action="append", default=[], metavar="WORKLOAD", help="this workload; may be repeated")
    one.add_argument("--list", action="store_true", help="list the workloads and stop")
    one.add_argument("--profile", action="store_true", help="instead of suites: time per kernel of the workloads on a GPU, by "
                     "Triton's profiler")  # fmt: skip
    one.add_argument("--no-compile", action="store_true", help="leave out peers that compile first (FlexAttention)")
    one.add_argument("--threads", type=_count, default=1, help="torch's CPU threads (default 1)")
    one.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    one.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for JSON, tables and picture")
    one.add_argument("--base", metavar="REF", help="measure the same on another git revision too, in turns, and compare")
    one.add_argument("--into", type=_page, metavar="PAGE", help="also put the tables between the marks of a Markdown page")
    one.set_defaults(run=bench)

    one = commands.add_parser("compare", help="what became slower or faster from one run to another; 1 if anything is slower")
    one.add_argument("before", type=Path, help="results.json, or its folder")
    one.add_argument("after", type=Path, help="likewise, made on the same machine")
    one.set_defaults(run=compare_runs)

    one = commands.add_parser("report", help="a run as one HTML page with its pictures")
    one.add_argument("results", type=Path, help="results.json, or its folder")
    one.add_argument("--html", type=Path, metavar="PAGE", help="where to (default: report.html beside the results)")
    one.add_argument("--figures", type=Path, metavar="DIR", help="the pictures as SVG files instead, or as well")
    one.set_defaults(run=report)

    one = commands.add_parser("compile", help="compile the Triton kernels without a GPU: registers, spills, shared memory")
    one.add_argument("--arch", action="append", type=_architecture, metavar="SM", help="for instance sm_90; may be repeated "
                     "(default sm_80 sm_90)")  # fmt: skip
    one.add_argument("--head-dim", action="append", type=_count, metavar="D", help="may be repeated (default 64 128)")
    one.add_argument("--dtype", action="append", choices=["float16", "bfloat16", "float32"], help="may be repeated (bfloat16)")
    one.add_argument("--all", action="store_true", help="tangents, parameter gradients, dense masks and dropout as well, in "
                     "bfloat16 and float32; without --arch also every architecture, and the baseline anew")  # fmt: skip
    one.add_argument("--pages", action="store_true", help="then a page per kernel: changes against the baseline, the order of "
                     "its loops, registers of products in flight, a bound on its speed")  # fmt: skip
    one.add_argument("--jobs", type=_count, default=1, metavar="N", help="compile for N calls side by side (default 1)")
    one.add_argument("--baseline", action="store_true", help="write the baseline of the default configurations anew, and stop")
    one.set_defaults(run=compile_kernels)

    one = commands.add_parser("tune", help="measure the kernels' launch configurations on this GPU and write its table")
    one.add_argument("--head-dim", action="append", type=_count, metavar="D", help="may be repeated (default 64 128 256)")
    one.add_argument("--dtype", action="append", choices=["float16", "bfloat16", "float32"], help="default bfloat16 float32")
    one.add_argument("--only", action="append", default=[], metavar="KERNEL", choices=KERNELS, help=", ".join(KERNELS))
    one.add_argument("--length", type=_count, default=4096, metavar="L", help="rows and keys of the timed calls (default 4096)")
    one.add_argument("--minutes", type=_minutes, default=9.0, help="no entry begins later (default 9)")
    one.add_argument("--out", type=Path, help="folder of the table (default: where the package reads it)")
    one.set_defaults(run=tune)

    one = commands.add_parser("gpu-check", help="tests, sanitizer, benchmark and tuning on this GPU, and a verdict per claim")
    one.add_argument("--minutes", type=_minutes, default=9.0, help="about how long it may take (default 9)")
    one.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of its files, at most eight")
    one.add_argument("--dry-run", action="store_true", help="print the plan and stop; needs no GPU")
    one.set_defaults(run=gpu_check)
    return parser
