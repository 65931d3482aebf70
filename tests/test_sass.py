"""Reading assembly: registers of products in flight, the order of loops, and the bound that their instructions set."""

import pickle
import re

import pytest
import torch
from test_triton import needs_compiler

from fastattn import cli
from fastattn.devtools import baseline, bound, offline, sass, survey
from fastattn.devtools.offline import Inspection, Loop, Report

GOOD = """
    /*0000*/                   MOV R40, R1 ;
    /*0010*/                   WARPGROUP.ARRIVE ;
    /*0020*/                   HGMMA.64x16x16.F32.BF16 R8, R40, gdesc[UR4].tnspB, R8 ;
    /*0030*/                   HGMMA.64x16x16.F32.BF16 R8, R44, gdesc[UR8].tnspB, R8, gsb0 ;
    /*0040*/                   MUFU.EX2 R20, R21 ;
    /*0050*/                   LDGDEPBAR ;
    /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0070*/                   FADD R8, R8, R20 ;
    /*0080*/                   MUFU.EX2 R22, R21 ;
    /*0090*/               @P2 BRA 0x0 ;
    /*00a0*/                   EXIT ;
"""


def doctored(old, new):
    assert old in GOOD
    return sass.instructions(GOOD.replace(old, new))


def test_a_clean_listing():
    code = sass.instructions(GOOD)
    assert [one.address for one in code] == list(range(0, 0xB0, 0x10))
    assert code[9] == (0x90, "P2", "BRA", ("0x0",))
    assert sass.hazards(code) == []
    (body,) = sass.loops(code)
    assert sass.order(body) == "2 wgmma from registers, exp2, wait for wgmma (but 0), exp2"
    assert sass.overlapped(body) == (1, 2)


WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("MUFU.EX2 R20, R21", "MUFU.EX2 R45, R21", "writes R45, which a product in flight reads"),
        ("MUFU.EX2 R20, R21", "LDS.128 R44, [R2]", "writes R44-R47, which a product in flight reads"),
        ("MUFU.EX2 R20, R21", "@!P1 LDG.E.64 R14, desc[UR4][R2.64]", "writes R14-R15, which a product in flight writes"),
        ("MUFU.EX2 R20, R21", "MUFU.EX2 R20, -R15.reuse", "reads R15, which a product in flight writes"),
        ("MUFU.EX2 R20, R21", "STS.64 [R2], R14", "reads R14-R15, which a product in flight writes"),
        ("MUFU.EX2 R20, R21", "IMAD.WIDE R20, R2, R3, R14", "reads R14-R15, which a product in flight writes"),
        ("MUFU.EX2 R20, R21", "ISETP.GE.AND P0, PT, R9, R2, PT", "reads R9, which a product in flight writes"),
        ("MUFU.EX2 R20, R21", "SHFL.BFLY PT, R44, R2, 0x1, 0x1f", "writes R44, which a product in flight reads"),
        ("R8, R44, gdesc", "R8, R12, gdesc", "reads R12-R15, which a product in flight writes"),
        ("BF16 R8, R44, gdesc[UR8].tnspB, R8, gsb0", "BF16 R12, gdesc[UR8], R12, gsb0", "writes R12-R15"),
        ("BF16 R8, R44, gdesc[UR8].tnspB, R8, gsb0", "BF16 R40, gdesc[UR8], R40, gsb0", "writes R40-R43"),
        (WAIT, "NOP", "FADD R8, R8, R20: writes R8, which a product in flight writes"),
        (WAIT, WAIT.replace("0x0", "0x1"), "FADD R8, R8, R20: reads R8, which a product in flight writes"),
        ("WARPGROUP.ARRIVE", "NOP", "uses R40, written after the last fence"),
        ("WARPGROUP.ARRIVE", "@P0 BRA 0x20", "uses R40, written after the last fence"),
    ],
)  # fmt: skip
def test_a_planted_hazard_is_found(old, new, found):
    hazards = sass.hazards(doctored(old, new))
    assert any(found in text for text in hazards), hazards


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("MUFU.EX2 R20, R21", "MUFU.EX2 R20, R44"),  # reading what a product reads
        ("MUFU.EX2 R20, R21", "STS.128 [R44], R20"),
        ("FADD R8, R8, R20", "MOV R44, R8"),  # behind the wait
        ("BF16 R8, R40, gdesc[UR4].tnspB, R8 ;", "BF16 R8, gdesc[UR4], RZ, !UPT ;"),  # begins at zero
    ],
)  # fmt: skip
def test_what_is_allowed(old, new):
    assert sass.hazards(doctored(old, new)) == []


@pytest.mark.parametrize(("name", "n"), [("LDSM.16.M88", 1), ("LDSM.16.MT88.2", 2), ("LDSM.16.M88.4", 4), ("LDS.128", 4)])
def test_how_much_a_load_writes(name, n):
    assert sass.written_and_read(sass.Instruction(0, "", name, ("R8", "[R2+0x10]"))) == (set(range(8, 8 + n)), {2})


def test_kinds_that_come_in_turns_are_named_once():
    named = {"m": "HMMA.16816.F32", "l": "LDGSTS.E", "e": "MUFU.EX2", "b": "BAR.SYNC"}
    order = lambda text: sass.order([sass.Instruction(0, "", named[c], ("R0", "R1")) for c in text])
    assert order("bmmmlmmlmlbe") == "barrier, 6 mma among 3 async load, barrier, exp2"
    assert order("mlmlm") == "mma, async load, mma, async load, mma"
    assert order("mmeeebme") == "2 mma, 3 exp2, barrier, mma, exp2"


def test_hazards_over_the_back_edge_and_behind_a_branch():
    """The group that a turn leaves in flight meets the next turn's instructions; so does one taken branch of two."""
    late = doctored(WAIT, WAIT.replace("0x0", "0x1"))
    assert any("0x0000 MOV R40" in text and "reads" in text for text in sass.hazards(late))
    skipped = doctored("MUFU.EX2 R20, R21", "@P0 BRA 0x70")
    assert any("FADD" in text for text in sass.hazards(skipped))


def test_spills_are_counted_in_the_loop_that_multiplies():
    lines = ["LDL R1, [R2]", "HMMA.16816.F32 R0, R4, R8, R0", "STL [R2], R2", "BRA 0x10", "LDL R3, [R2]", "BRA 0x40"]
    code = sass.instructions("\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)))
    assert sass.loop_spills(code) == 1
    assert sass.loop_spills([one for one in code if not one.is_product]) == 2


def test_a_loop_that_waits_inside_a_loop_does_not_hide_it():
    """Waiting for a barrier is a loop of its own, without products; what is around it counts all the same."""
    lines = ["LDL R1, [R2]", "HMMA.16816.F32 R0, R4, R8, R0", "SYNCS.PHASECHK.TRANS64 P0, [R4], R5", "@!P0 BRA 0x20", "BRA 0x0"]
    code = sass.instructions("\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)))
    assert sass.loop_spills(code) == 1
    assert len(sass.loops(code)) == 1


def test_a_loop_without_its_mask():
    lines = ["FADD R1, R1, R2", "@P0 BRA 0x50", "ISETP R1, R2", "FSEL R1, R2, R3", "@P1 BRA 0x40", "MUFU.EX2 R1, R1", "BRA 0x0"]
    code = sass.instructions("\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)))
    assert [one.address for one in sass.without_mask(code)] == [0x0, 0x10, 0x50, 0x60]
    needed = [one._replace(name="MUFU.EX2") if one.name == "FSEL" else one for one in code]
    assert sass.without_mask(needed) == needed
    assert sass.without_mask(code[2:4]) == code[2:4]


# The bound


def test_the_bound_of_a_known_loop():
    """Of a tile of 128 x 128 at a head_dim of 128: 32 products of 64 x 128 x 16 in two warp groups, 66 exponentials."""
    product = sass.Instruction(0, "", "HGMMA.64x128x16.F32.BF16", ("R8", "gdesc[UR4]", "R8"))
    exp2 = sass.Instruction(0, "", "MUFU.EX2", ("R1", "R1"))
    other = sass.Instruction(0, "", "FADD", ("R1", "R1", "R2"))
    found = bound.of_loop([product] * 16 + [exp2] * 66 + [other] * 402, 8, "sm_90")
    assert found == (2048, 1056, 968)
    assert found.peak == 1.0
    assert "bound by matrix units, 100% of the matrix peak" in str(found)
    slow = bound.of_loop([product] * 8 + [exp2] * 66 + [other] * 1000, 8, "sm_90")
    assert slow.clocks == slow.issue == 2148
    assert "bound by issue slots, 48%" in str(slow)
    assert bound.of_loop([product], 8, "sm_100") is None


def test_the_bound_on_cards_without_asynchronous_products():
    """8 warps with 16 products of 16 x 8 x 16 each, on a unit that takes 1024 flops a clock."""
    product = sass.Instruction(0, "", "HMMA.16816.F32.BF16", ("R8", "R4", "R2", "R8"))
    assert bound.of_loop([product] * 16, 8, "sm_89") == (512, 0, 32)
    assert bound.of_loop([product] * 16, 8, "sm_80").clocks == 256


def test_products_of_every_shape_are_counted():
    shapes = {"HMMA.16816.F32.BF16": 4096, "HMMA.1688.F32.TF32": 4096, "HGMMA.64x64x16.F32.BF16": 131072,
              "HGMMA.64x64x8.F32.TF32": 131072}  # fmt: skip
    for name, flops in shapes.items():
        assert bound.flops(sass.Instruction(0, "", name, ())) == flops


# What the compiler makes of the default kernels on sm_90


@pytest.fixture(scope="module")
def listings(tmp_path_factory):
    """{(head_dim, kernel): (inspection, code)}"""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        kept = []
        read = sass.instructions
        patch.setattr(sass, "instructions", lambda listing: kept.append(read(listing)) or kept[-1])
        for head_dim in (64, 128):
            for launch in offline.recorded(offline.example(head_dim, torch.bfloat16), "sm_90"):
                name = launch.kernel.__name__
                found[head_dim, name] = offline.inspect(launch, "sm_90"), kept[-1]
    return found


KERNELS = ("forward", "backward_dq", "backward_dkdv")


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_default_kernels_touch_no_register_of_a_product_in_flight(kernel, head_dim, listings):
    found, code = listings[head_dim, kernel]
    assert sum(one.name.startswith("HGMMA") for one in code) == found.report.products > 0
    assert found.hazards == []
    for loop in found.loops:
        named = {re.sub(r"^\d+ ", "", x) for x in re.split(", | among ", loop.order)}
        assert {"wgmma", "wait for wgmma (but 0)", "exp2"} <= named
        assert loop.overlapped[1] > 0
        assert 0 < loop.bound.peak <= 1
    assert len(found.loops) >= 2  # tiles without and with a mask


@needs_compiler
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_waits_and_fences_of_default_kernels_are_needed(kernel, listings):
    """Without them the same code is full of hazards: it is no accident that there are none."""
    _, code = listings[64, kernel]
    for name in ("WARPGROUP.DEPBAR", "WARPGROUP.ARRIVE"):
        without = [one._replace(name="NOP", operands=()) if one.name.startswith(name) else one for one in code]
        assert sass.hazards(without)


@needs_compiler
def test_every_instruction_of_a_listing_is_read(listings):
    for _, code in listings.values():
        assert [one.address for one in code] == list(range(0, 16 * len(code), 16))


# The command


def test_pages(monkeypatch, capsys):
    loop = Loop(803, "8 wgmma, wait for wgmma (but 0), 68 exp2", (0, 68), bound.Bound(512, 544, 803))
    report = Report("forward", 8, 3, 255, 16, 0, 100 * 1024, 24)
    unit = survey.Unit("sm_90", 64, torch.bfloat16, False)
    found = [
        survey.Row(unit, "causal", Inspection(report, 1.25, [], [loop]), changes="registers 250 -> 255"),
        survey.Row(unit, "dense", Inspection(report, 1.0, ["0x0 FADD R8: writes R8"], [loop])),
        survey.Row(unit._replace(arch="sm_86"), "causal", Inspection(report, 1.0, [], [loop])),
        survey.Row(unit, "dropout", None, "backward_dq: RuntimeError: no"),
    ]
    monkeypatch.setattr(survey, "survey", lambda units, jobs: iter(found[: 1 if units[0].everything else 4]))
    assert cli.main(["compile", "--all", "--arch", "sm_90", "--pages"]) == 0
    text = capsys.readouterr().out
    cells = (line.split() for line in text.splitlines() if line.startswith("| sm_90"))
    assert "| sm_90 | 64 | bfloat16 | causal | 8 | 3 | 255 | 16 | 0 | 100 of 227 | 24 | 803 | 64% | registers 250 -> 255 |" in [
        " ".join(x) for x in cells
    ]
    for part in ("# forward", "registers 250 -> 255", "no register of a product in flight is touched", "1.2 s",
                 "0 of 68 exponentials while a product is in flight", "at least 803 clocks", "64% of the matrix peak",
                 "a bound from counts of instructions, not a measurement", "waits 1.2 s for the compiler"):  # fmt: skip
        assert part in text, part
    assert cli.main(["compile", "--arch", "sm_90"]) == 1
    text = capsys.readouterr().out
    assert "HAZARD 0x0 FADD R8: writes R8" in text
    assert "backward_dq: RuntimeError: no" in text
    assert text.count("TOO MUCH SHARED MEMORY") == 1
    assert "# forward" not in text
    assert cli.main(["compile", "--arch", "sm_90", "--pages"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"\| sm_90 \| 64 \| bfloat16 \| dropout \|.*does not compile \|", text)
    assert "sm_90   d 64  bfloat16 dropout             backward_dq: RuntimeError: no" in text.split("# backward_dq")[1]


def test_a_page_says_why_there_is_no_bound():
    unit = survey.Unit("sm_100", 64, torch.bfloat16, False)
    loop = Loop(8, "mma", (0, 0), None)
    found = Inspection(Report("forward", 8, 3, 255, 16, 0, 100 * 1024, 24), 1.0, [], [loop])
    (page,) = survey.pages([survey.Row(unit, "causal", found)])
    assert "no bound: its listing does not hold the shapes of its products" in page
    (page,) = survey.pages([survey.Row(unit._replace(arch="sm_90"), "causal", found)])
    assert "no bound: its warps run loops of their own" in page


def test_units_are_compiled_side_by_side_in_order():
    units = [survey.Unit(arch, 16, torch.float16, False) for arch in ("sm_80", "sm_90", "gfx942")]
    assert list(survey.side_by_side(tuple, units, 2)) == [x for unit in units for x in unit]


@needs_compiler
def test_a_row_travels_between_processes(listings):
    found, _ = listings[64, "forward"]
    row = survey.Row(survey.Unit("sm_90", 64, torch.bfloat16, False), "causal", found)
    assert pickle.loads(pickle.dumps(row)) == row


@needs_compiler
def test_rows_come_once_and_an_error_is_a_row(monkeypatch):
    def inspect(launch, arch):
        name = launch.kernel.__name__
        if name == "backward_dq":
            raise RuntimeError("no registers")
        return Inspection(Report(name, 4, 2, 255, 0, 0, 0, 1), 1.0, [], [])

    monkeypatch.setattr(offline, "inspect", inspect)
    monkeypatch.setattr(survey, "_known", baseline.read)  # whichever Triton is at hand
    unit = survey.Unit("sm_90", 64, torch.bfloat16, False)
    found = list(survey.survey([unit]))
    assert sum(row.kernel == "row_delta" for row in found) == 1
    portable = {"forward", "row_delta", "backward_dq", "backward_dkdv", "span_bounds"}
    assert {row.kernel for row in found} == portable | {"hopper_forward", "span_walks", "hopper_backward", "finish_dq"}
    assert next(row.faults for row in found if row.kernel == "backward_dq") == ["backward_dq: RuntimeError: no registers"]
    assert all("registers" in row.changes for row in found if row.kernel == "row_delta")


def test_changes_against_the_baseline():
    entry = next(iter(baseline.read().values()))
    report = Report("forward", **{name: value for name, value in entry.items() if name != "key"})
    same = Inspection(report, 0.0, [], [])
    assert survey.changes(same, entry) == ""
    more = same._replace(report=report._replace(registers=entry["registers"] + 1))
    assert re.fullmatch(r"registers \d+ -> \d+", survey.changes(more, entry))
