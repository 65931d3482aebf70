"""Dropout bits: Philox by its published answers, and the same bit for a weight wherever and however it is computed."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import fastattn as fa
from fastattn.dropout import keep_mask, philox, threshold

# counter, key, output of Philox4x32-10, from the Random123 distribution
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert [x.item() for x in philox(*map(torch.tensor, (*key, *counter)))] == words


def words(seed, b, h, q, k):
    """One element's word, by the definition: word k % 4 of the counter (k // 4, q, h, b)."""
    return philox(*map(torch.tensor, (*seed, k // 4, q, h, b)))[k % 4].item()


def keep(rng, p, n_b=2, n_h=3, n_q=5, n_k=11, b=0, h=0, q=0, k=0):
    """keep_mask over a box of coordinates that starts at (b, h, q, k)."""
    axes = [torch.arange(n) + at for n, at in ((n_b, b), (n_h, h), (n_q, q), (n_k, k))]
    shapes = [(-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)]
    return keep_mask(rng, p, *(x.reshape(s) for x, s in zip(axes, shapes)), slice(0, n_b), n_b)


RNG = torch.tensor([[0xDEADBEEF, 0x12345678]])


def test_definition():
    mask = keep(RNG, 0.4, q=3, k=2)
    for b, h, q, k in [(0, 0, 0, 0), (1, 2, 4, 10), (0, 1, 3, 1), (1, 0, 2, 5), (0, 2, 1, 6)]:
        assert mask[b, h, q, k].item() == (words(RNG[0].tolist(), b, h, q + 3, k + 2) >= 0.4 * 2**32)


def test_a_box_is_a_part_of_the_whole():
    whole = keep(RNG, 0.3, n_q=40, n_k=70)
    for q, k, n_q, n_k in ((0, 0, 40, 70), (7, 0, 3, 70), (0, 1, 40, 5), (11, 3, 20, 4), (39, 69, 1, 1), (5, 66, 9, 4)):
        assert torch.equal(keep(RNG, 0.3, n_q=n_q, n_k=n_k, q=q, k=k), whole[:, :, q : q + n_q, k : k + n_k])
    assert torch.equal(keep(RNG, 0.3, n_b=1, b=1, n_q=40, n_k=70), whole[1:])
    assert torch.equal(keep(RNG, 0.3, n_h=2, h=1, n_q=40, n_k=70), whole[:, 1:])


def test_keys_in_any_order():
    whole = keep(RNG, 0.3, n_k=70)
    index = torch.tensor([5, 4, 4, 69, 0, 33, 34, 35, 8])
    b, h, q = torch.arange(2)[:, None, None, None], torch.arange(3)[None, :, None, None], torch.arange(5)[None, None, :, None]
    assert torch.equal(keep_mask(RNG, 0.3, b, h, q, index[None, None, None], slice(0, 2), 2), whole[..., index])
    per_entry = torch.stack([index, index.flip(0)])[:, None, None]
    found = keep_mask(RNG, 0.3, b, h, q, per_entry, slice(0, 2), 2)
    assert torch.equal(found[1], whole[1][..., index.flip(0)])


def test_one_key_per_group():
    rng = torch.tensor([[1, 2], [3, 4]])
    found = keep(rng, 0.5, n_b=4)
    for group, entries in enumerate((slice(0, 2), slice(2, 4))):
        assert torch.equal(found[entries], keep(rng[group : group + 1], 0.5, n_b=4)[entries])


def test_empty():
    assert keep(RNG, 0.5, n_k=0).shape == (2, 3, 5, 0)
    assert keep(RNG, 0.5, n_q=0).shape == (2, 3, 0, 11)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_independence(p):
    """Within five standard deviations: the rate, and the agreement of neighbours along every axis and of two seeds."""
    n = dict(n_b=4, n_h=4, n_q=128, n_k=129)
    mask = keep(RNG, p, **n)
    deviation = 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert mask.double().mean().item() == pytest.approx(1 - p, abs=deviation)
    agree = p * p + (1 - p) * (1 - p)
    pairs = [(mask.narrow(d, 0, mask.shape[d] - 1), mask.narrow(d, 1, mask.shape[d] - 1)) for d in range(4)]
    pairs += [(mask, keep(RNG + torch.tensor([1, 0]), p, **n)), (mask, keep(RNG + torch.tensor([0, 1]), p, **n))]
    pairs += [(mask[..., :-4], mask[..., 4:]), (mask, mask.transpose(0, 1))]
    for a, b in pairs[:-1]:
        bound = 5 * (agree * (1 - agree) / a.numel()) ** 0.5
        assert (a == b).double().mean().item() == pytest.approx(agree, abs=bound)


def test_threshold():
    assert threshold(0.0) == 0
    assert threshold(0.5) == 2**31
    assert keep(RNG, 0.0).all()


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_drops_exactly_these():
    """With v the identity the output shows the weights themselves."""
    q, k, v = make(1, 2, 6, 4), make(1, 2, 9, 4, seed=1), torch.eye(9, dtype=torch.float64).expand(1, 2, 9, 9)
    torch.manual_seed(3)
    dropped = fa.attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    rng = torch.randint(0, 1 << 32, (1, 2))
    kept = keep(rng, 0.4, n_b=1, n_h=2, n_q=6, n_k=9)
    assert_close(dropped, fa.attention(q, k, v) * kept / 0.6)


@pytest.mark.parametrize("rows", [slice(0, 40), slice(17, 90), slice(100, 130)])
def test_rows_told_by_coordinates_drop_the_same(rows):
    q, k, v = make(2, 2, 130, 8), make(2, 2, 130, 8, seed=1), make(2, 2, 130, 8, seed=2)
    torch.manual_seed(0)
    whole = fa.attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(0)
    part = fa.attention(q[:, :, rows], k, v, dropout_p=0.3, coords=fa.Coordinates(q=rows.start))
    assert_close(part, whole[:, :, rows])


def test_seeds():
    q, k, v = make(1, 2, 6, 4), make(1, 2, 9, 4, seed=1), make(1, 2, 9, 4, seed=2)
    call = lambda: fa.attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    first, second = call(), call()
    torch.manual_seed(0)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    fa.attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), state)  # no dropout, no draw


def test_threads_do_not_matter():
    q, k, v = (make(2, 4, 300, 16, seed=s) for s in range(3))
    found = []
    before = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        torch.manual_seed(0)
        found.append(fa.attention(q, k, v, dropout_p=0.2))
    torch.set_num_threads(before)
    assert torch.equal(found[0] == 0, found[1] == 0)
    assert_close(found[0], found[1])
    assert_close(found[0], found[2])


def test_documents_drop_as_if_alone():
    """Dropout sees a document's number and the positions inside it."""
    cu, (q, k, v) = torch.tensor([0, 5, 12]), (make(12, 2, 4, seed=s) for s in range(3))
    torch.manual_seed(0)
    packed = fa.varlen_attention(q, k, v, cu, dropout_p=0.4)
    for n, (a, b) in enumerate([(0, 5), (5, 12)]):
        torch.manual_seed(0)
        alone = fa.attention(
            *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), dropout_p=0.4, coords=fa.Coordinates(b=n)
        )
        assert_close(packed[a:b], alone[0].transpose(0, 1))


TRITON = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(out, seed, n_q, n_k, FOURS: tl.constexpr):
    fours = tl.arange(0, FOURS)
    q_idx = tl.program_id(0)
    words = tl.philox(seed, fours, tl.zeros_like(fours) + q_idx, tl.zeros_like(fours) + 2, tl.zeros_like(fours) + 1)
    for i in tl.static_range(4):
        tl.store(out + q_idx * FOURS * 4 + fours * 4 + i, words[i].to(tl.int64) & 0xFFFFFFFF)
out = torch.zeros(3, 32, dtype=torch.int64)
kernel[(3,)](out, {seed}, 3, 32, 8)
print(out.flatten().tolist())
"""


def test_triton_draws_the_same_words(tmp_path):
    """The counter (k // 4, q, h, b) and the key as Triton's own generator takes them, through its interpreter."""
    pytest.importorskip("triton")
    pytest.importorskip("numpy")
    low, high = 0xDEADBEEF, 0x12345678
    script = tmp_path / "words.py"
    script.write_text(TRITON.replace("{seed}", str(high << 32 | low)))
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(done.stderr[-600:])
    found = torch.tensor(eval(done.stdout)).view(3, 32)
    q, k = torch.arange(3)[:, None], torch.arange(8)[None]
    ours = torch.stack(philox(*map(torch.tensor, (low, high)), k, q, torch.tensor(2), torch.tensor(1)), -1)
    assert torch.equal(found, ours.flatten(1))
