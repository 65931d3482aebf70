"""Where and when kernels run: on the device of their operands, on the current stream, in every derivative."""

import contextlib
import sys

import cases
import pytest
import torch
from device_cases import DEVICE, checkerboard
from torch.testing import assert_close

import fastattn as fa
from fastattn.backends import triton, triton_call
from fastattn.kernels import forward as forward_kernels

on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
FIRST = {"pack_bits", "cell_map", "tile_lists", "shown_keys", "forward"}
SUMS = {"row_delta", "span_bounds", "turn_bits", "backward_dq", "backward_dkdv", "score_grads"}
TWICE = {"forward_jvp", "backward_dq_jvp", "backward_dkdv_jvp"}


def operands(device=DEVICE):
    """q, k, v, a bias and sinks."""
    bias, sinks = cases.leaf(19, 35, dtype=torch.float32), cases.leaf(2, dtype=torch.float32)
    made = (*cases.tensors(1, 2, 1, 19, 35, 8, 8, torch.float32), bias, sinks)
    return [x.detach().to(device).requires_grad_() for x in made]


def attend(q, k, v, bias, sinks):
    """Spans as tensors, a bool tensor, a parameter whose gradient a kernel sums."""
    documents = fa.Documents(cu_seqlens=cases.cu_seqlens(19), cu_seqlens_k=cases.cu_seqlens(35))
    mask = documents & fa.Dense(checkerboard(2, 19, 35, 16))
    return fa.attention(q, k, v, mask=mask, score=(fa.Bias(bias), fa.Softcap(3.0)), sinks=sinks, backend="triton")


def backward(leaves, create_graph=False):
    return torch.autograd.grad(attend(*leaves).square().sum(), leaves, create_graph=create_graph)


def double_backward(leaves):
    first = backward(leaves, True)
    return (*first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves))


def jvp(leaves):
    return torch.func.jvp(attend, tuple(leaves), tuple(leaves))


def jvp_of_jvp(leaves):
    return torch.func.jvp(lambda *x: torch.func.jvp(attend, x, tuple(leaves))[1], tuple(leaves), tuple(leaves))


VERBS = {
    "forward": (lambda leaves: attend(*leaves), FIRST),
    "backward": (backward, FIRST | SUMS),
    "jvp": (jvp, FIRST | {"forward_jvp"}),
    "double backward": (double_backward, FIRST | SUMS | TWICE),
    "forward over forward": (jvp_of_jvp, FIRST | {"forward_jvp", "forward_jvp2"}),
}


def tensors_in(x):
    if isinstance(x, (tuple, list)):
        return [tensor for part in x for tensor in tensors_in(part)]
    return [x] if isinstance(x, torch.Tensor) else []


@pytest.fixture
def launches(monkeypatch):
    """(kernel, device of the guard that its launch is inside of or None, devices of its tensors) of every launch to come."""
    guards, found = [], []
    kind, on_device = type(forward_kernels.forward), triton_call.on_device

    @contextlib.contextmanager
    def guard(x):
        with on_device(x):
            guards.append(x.device)
            try:
                yield
            finally:
                guards.pop()

    def launcher(kernel, grid, real=kind.__getitem__):
        def launch(*args, **constants):
            found.append((kernel.fn.__name__, guards[-1] if guards else None, {x.device for x in tensors_in(args)}))
            return real(kernel, grid)(*args, **constants)

        return launch

    monkeypatch.setattr(kind, "__getitem__", launcher)
    assert triton.on_device is on_device
    for name, module in list(sys.modules.items()):
        if name.startswith("fastattn.backends.") and getattr(module, "on_device", None) is on_device:
            monkeypatch.setattr(module, "on_device", guard)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_launch_is_guarded_by_its_operands_device(verb, launches):
    leaves = operands()
    compute, kernels = VERBS[verb]
    compute(leaves)
    assert {kernel for kernel, _, _ in launches} == kernels
    for kernel, guard, devices in launches:
        assert devices == {leaves[0].device}, kernel
        assert guard == leaves[0].device, f"{kernel} is launched outside of on_device"


def everything(leaves):
    return [x.detach() for x in (attend(*leaves), *double_backward(leaves), *jvp(leaves))]


def keep_busy():
    """Some tenths of a second for the current stream, or more."""
    x = torch.zeros(8192, 8192, device=DEVICE)
    for _ in range(20):
        x = x @ x


def written_late(leaves):
    """Copies that hold NaN until the current stream has done other work."""
    late = [torch.full_like(x, torch.nan) for x in leaves]
    torch.cuda.current_stream().synchronize()
    keep_busy()
    with torch.no_grad():
        for x, y in zip(late, leaves, strict=True):
            x.copy_(y)
    return [x.requires_grad_() for x in late]


@on_a_gpu
def test_kernels_wait_for_the_current_stream_alone():
    """Every derivative on a side stream, whose own work comes first, while the default stream has more to do than it."""
    leaves, side = operands(), torch.cuda.Stream()
    wanted = [x.cpu() for x in everything(leaves)]
    torch.cuda.synchronize()
    for _ in range(3):
        keep_busy()
    with torch.cuda.stream(side):
        found = [x.cpu() for x in everything(written_late(leaves))]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@on_a_gpu
def test_operands_that_another_stream_writes_come_by_event():
    leaves, side = operands(), torch.cuda.Stream()
    wanted = everything(leaves)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = written_late(leaves)
        ready = side.record_event()
    ready.wait()
    assert all(torch.equal(a, b) for a, b in zip(everything(late), wanted, strict=True))


@on_a_gpu
def test_backward_runs_on_the_stream_of_the_forward():
    """It is asked for outside of the side stream, by a thread whose current stream is idle."""
    leaves, side = operands(), torch.cuda.Stream()
    wanted = backward(leaves)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = written_late(leaves)
        loss = attend(*late).square().sum()
    found = torch.autograd.grad(loss, late)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    """Its kernels and its results; and the current device stays what it was."""
    assert torch.cuda.current_device() == 0
    found = everything(operands("cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, everything(operands("cuda:0")), strict=True):
        assert a.device == torch.device("cuda:1")
        assert_close(a.cpu(), b.cpu(), atol=1e-5, rtol=1e-5)
