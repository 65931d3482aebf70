"""The tutorial's mask and score in the kernels: forward, backward with the slopes' gradient, and the second order."""

import cases
import pytest
import torch
import tutorial_cases
from device_cases import DEVICE
from test_covering import check
from torch.testing import assert_close
from tutorial_cases import MASKS, SCORES

import fastattn as fa


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, score in SCORES.items():
        monkeypatch.setitem(cases.SCORES, name, score)


CALLS = [
    ("chunks_back", "root_cap", torch.float32),
    ("strided_heads", "log_distance", torch.float32),
    ("both", "mine", torch.bfloat16),
]


@pytest.mark.parametrize(("mask", "score", "dtype"), CALLS, ids=lambda x: str(x).replace("torch.", ""))
def test_against_float64(mask, score, dtype):
    check(
        mask, score, True, (2, 1), 0.0, dtype, 21, 37, 8, 8, True, n_b=1, backend="triton", masks=MASKS, lse=(True,),
        device=DEVICE,
    )  # fmt: skip


def test_no_derivative_takes_torch_operations():
    q, k, v = (x.detach().to(DEVICE) for x in cases.tensors(1, 2, 1, 21, 37, 8, 8, torch.float32))
    slopes = torch.full((2,), 0.1, device=DEVICE, requires_grad=True)
    score = (tutorial_cases.my_score.LogDistance(slopes), tutorial_cases.my_score.RootCap(3.0))
    plan = fa.explain(q, k, v, mask=MASKS["both"](1, 2, 21, 37), score=score, backend="triton")
    assert plan.backend == "triton"
    assert [what for what, _ in plan.reasons if what != "hopper"] == []  # on sm_90 those kernels' reasons stand beside


def test_double_backward():
    """The gradient of a gradient penalty, with the slopes' share, against the reference in float64."""

    def penalty(backend, dtype):
        q, k, v = (x.detach().to(DEVICE, dtype).requires_grad_() for x in cases.tensors(1, 2, 1, 21, 37, 8, 8, torch.float32))
        score = SCORES["mine"](1, 2, 21, 37, torch.float32)
        slopes = score[0].params[0].detach().to(DEVICE, dtype).requires_grad_()
        chain = (score[0].with_params((slopes,)), score[1])
        out = fa.attention(q, k, v, mask=MASKS["both"](1, 2, 21, 37), score=chain, backend=backend)
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v, slopes), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), (q, k, v, slopes))

    for ours, exact in zip(penalty("triton", torch.float32), penalty("reference", torch.float64), strict=True):
        assert_close(ours, exact.float(), atol=2e-5, rtol=2e-5)
