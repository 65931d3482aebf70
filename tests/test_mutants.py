"""Planted faults: each makes a named small test of the kernels fail, in the interpreter, in a process of its own.

A change that moves the text a fault replaces fails here too, and says which text is gone.
"""

import pytest
from processes import copied, forked_suite
from test_triton import needs_triton

pytestmark = needs_triton
FEATURES, TANGENTS = "interpreted/features.py::", "interpreted/tangents.py::"
DENSE = FEATURES + "test_block_structured_dense_masks[{}]"
UNSEEN = FEATURES + "test_what_no_row_sees_may_hold_anything[{}]"
TILES = FEATURES + "test_long_enough_for_every_kind_of_tile[{}]"

# name -> (file, what stands there, the fault, the test that must see it)
MUTANTS = {
    "mask bound": ("walk.py", "(k_idx[None, :] < rows[2][:, None])", "(k_idx[None, :] <= rows[2][:, None])",
                   TILES.format("causal")),
    "mask of dk": ("backward.py", "hidden(dp - tl.load(delta + q_idx)[None, :], seen, 0.0)",
                   "(dp - tl.load(delta + q_idx)[None, :])", UNSEEN.format("lengths-plain")),
    "mask of dv": ("backward.py", "data[2], seen, SCORES, 0)", "data[2], (), SCORES, 0)", TILES.format("causal")),
    "mask of a slope": ("backward.py", "hidden(pull_scores(p, x, at, scores, SCORES, first), seen, 0.0)",
                        "pull_scores(p, x, at, scores, SCORES, first)", UNSEEN.format("lengths-softcap")),
    "rows that do not exist": ("masks.py", "tl.where(ok, q_idx * FLAGS[1]", "tl.where(ok | True, q_idx * FLAGS[1]",
                               UNSEEN.format("causal-plain")),
    "full run too long": ("masks.py", "full_hi = tl.min(tl.where(ok, stop, n_k))", "full_hi = tl.max(tl.where(ok, stop, 0))",
                          TILES.format("causal")),
    "last row of a key tile": ("masks.py", "last = tl.where(some, row + 1, last)", "last = tl.where(some, row, last)",
                               TILES.format("sinks_window")),
    "jump over the full run": ("walk.py", "tl.where(step < run[2], step, step + run[3])",
                               "tl.where(step < run[2], step, step + run[3] * 0)", TILES.format("causal")),
    "column mask of a head": ("tiles.py", "inside = inside & (tl.arange(0, PADDED) < DIM)[None, :]", "inside = inside",
                              FEATURES + "test_wide_heads[96]"),
    "transposed strides": ("tiles.py", "b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]",
                           "b.to(tl.int64) * strides[1] + h.to(tl.int64) * strides[0]",
                           FEATURES + "test_coordinates[0.0-offsets]"),
    "strides of k for v": ("forward.py", "load_some(v, k0, strides[2],", "load_some(v, k0, strides[1],",
                           FEATURES + "test_wide_heads[96]"),
    "dropout offset of the row pass": ("forward.py", "at, k0 + size[5],", "at, k0,",
                                       FEATURES + "test_dropout_bits_are_those_of_the_cpu[4]"),
    "dropout offset of the backward": ("backward.py", "at, k0 + size[5],", "at, k0,",
                                       FEATURES + "test_dropout_bits_are_those_of_the_cpu[4]"),
    "a word of dropout": ("dropout.py", "tl.interleave(w0, w2), tl.interleave(w1, w3)",
                          "tl.interleave(w0, w1), tl.interleave(w2, w3)",
                          FEATURES + "test_dropout_bits_are_those_of_the_cpu[0]"),
    "a row of delta": ("backward.py", "tl.store(delta + row, tl.where(seen, total, 0.0))",
                       "tl.store(delta + row, tl.where(seen & (q_idx != 46), total, 0.0))",
                       FEATURES + "test_dv_alone_and_dlse_alone"),
    "what earlier entries left": ("backward.py", "x += tl.load(sums[3] + at", "x -= tl.load(sums[3] + at",
                                  FEATURES + "test_the_gradient_of_a_bias_beside_dq[shared-float32]"),
    "a row of the zero sum": ("backward.py", "dq -= total[:, None] * reference[None, :]",
                              "dq -= tl.where(q_idx == 40, 0.0, total)[:, None] * reference[None, :]",
                              FEATURES + "test_keys_with_a_mean"),
    "the low half of out": ("forward.py", "low = acc - rounded(acc, out.dtype.element_ty).to(tl.float32)", "low = acc * 0.0",
                            FEATURES + "test_keys_with_a_mean"),
    "a sink in the zero sum": ("backward.py", "total -= row_delta * tl.exp2(sink * LOG2E - row_lse)", "total -= 0.0 * sink",
                               FEATURES + "test_dv_alone_and_dlse_alone"),
    "a mixed tile taken for full": ("dense.py", "full = some & (hidden == 0) &", "full = some &", DENSE.format("documents")),
    "a cell that is seen": ("dense.py", "(some_low + 2 * hidden_low).to",
                            "(tl.where(k_cell == 2, 0, some_low) + 2 * hidden_low).to", DENSE.format("documents")),
    "a hidden key that is read": ("dense.py", "tl.reduce(bits, 0, either),", "tl.reduce(bits, 0, either) | 8,",
                                  DENSE.format("scattered")),
    "a visible key that is not": ("dense.py", "tl.reduce(bits, 0, either),", "tl.reduce(bits, 0, either) & ~8,",
                                  DENSE.format("documents")),
    "the half of a word": ("masks.py", "tl.load(x) >> key % WORD", "tl.load(x)",
                           FEATURES + "test_dense_masks_in_tiles_of_half_a_word_and_of_several[16-16-scattered]"),
    "a turned bit": ("dense.py", ">> k_idx % WORD) & 1 != 0", ">> q_idx % WORD) & 1 != 0", DENSE.format("scattered")),
    "a word of several": ("masks.py", "tl.where(index >= part * WORD, words[part], word)", "words[part]",
                          FEATURES + "test_dense_masks_in_tiles_of_half_a_word_and_of_several[32-64-with lengths]"),
    "a tile of several cells": ("dense.py", "tl.max(found & 1, 1) > 0", "tl.min(found & 1, 1) > 0", DENSE.format("documents")),
    "a full tile beyond its span": ("dense.py", "& (tile * BLOCK < full_hi)", "", DENSE.format("with lengths")),
    "full in spite of a custom mask": ("dense.py", "if FLAGS[9] == 2:", "if FLAGS[9] == 3:", DENSE.format("with a custom one")),
    "the last mixed tile": ("walk.py", "(walk[3] - walk[2]) * BLOCK, walk[3] * BLOCK",
                            "(walk[3] - walk[2]) * BLOCK, (walk[3] - 1) * BLOCK", DENSE.format("documents")),
    "the lists of a head": ("walk.py", "(b * lists[1] + h * lists[2] + r) * n_own", "(b * lists[1] + r) * n_own",
                            DENSE.format("two tensors")),
    "the map of a gradient": ("grads.py", "one + q0 // BLOCKS[0], one + k0 // BLOCKS[1]",
                              "one + k0 // BLOCKS[1], one + q0 // BLOCKS[0]", DENSE.format("rows")),
    "a block of a table": ("grads.py", "column == one - first, row", "column == one, row",
                           FEATURES + "test_the_gradient_of_a_table_at_scattered_coordinates[by entry]"),
    "the shift of a tangent": ("tangents.py", "acc -= (mean - shift)[:, None] * o", "acc -= mean[:, None] * o",
                               TANGENTS + "test_keys_and_values_with_a_mean[False-False]"),
    "the zero sum of a tangent": ("tangents.py", "dq -= toff[:, None] * mean_k[None, :] + off[:, None] * mean_tk[None, :]",
                                  "dq -= off[:, None] * mean_tk[None, :]",
                                  TANGENTS + "test_keys_and_values_with_a_mean[False-False]"),
    "the sums of a sink": ("tangents.py", "toff -= tl.load(tsums + row)", "toff -= 0.0",
                           TANGENTS + "test_keys_and_values_with_a_mean[False-True]"),
    "a crossed term of both directions": ("tangents2.py", "mixed = crossed(q1, q2, k1, k2, DIMS",
                                          "mixed = crossed(q1, q1, k1, k1, DIMS",
                                          TANGENTS + "test_tangents_of_tangents[everything-causal-none-float32-0.0]"),
    "the slice of a result": ("tiles.py", "slice_of(tile, tl.program_id(1) * PADDED,", "slice_of(tile, tl.program_id(1) * 0,",
                              TANGENTS + "test_split_tangents[dense-none-float32-0.0-(40, 300)]"),
    "a parameter's tangent": ("grads.py", "PUSHED, BEHIND,", "PUSHED, 0,",
                              TANGENTS + "test_tangents[some-sinks_window-chain-float32-0.0]"),
}  # fmt: skip


def run(package, *tests):
    return forked_suite(package, *tests, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_without_a_fault_they_pass(tmp_path):
    """A copy is as good as the original, whose suites run all of these tests."""
    tests = FEATURES + "test_dv_alone_and_dlse_alone", FEATURES + "test_dropout_bits_are_those_of_the_cpu[0]"
    assert {*tests} <= {test for *_, test in MUTANTS.values()}
    done = run(copied(tmp_path), *tests)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"{len(tests)} passed" in done.stdout


@pytest.mark.parametrize("name", MUTANTS)
def test_is_seen(name, tmp_path):
    *change, test = MUTANTS[name]
    done = run(copied(tmp_path, [change]), test)
    assert done.returncode == 1, f"{test} did not fail by an assertion:\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
    assert "AssertionError" in done.stdout
    assert "1 failed" in done.stdout
