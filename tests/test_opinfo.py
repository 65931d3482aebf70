"""torch's own judge: every OpInfo sample of nn.functional.scaled_dot_product_attention, forward and every derivative."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("expecttest", reason="torch's OpInfo database needs expecttest")
pytest.importorskip("numpy", reason="torch's OpInfo database needs numpy")

from bars import assert_within
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db

import fastattn

(OP,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def samples(dtype, requires_grad=False):
    return list(OP.sample_inputs("cpu", dtype, requires_grad=requires_grad))


N_SAMPLES = len(samples(torch.float64))


def call(fn, sample):
    torch.manual_seed(0)
    return fn(sample.input, *sample.args, **sample.kwargs)


def to_double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def without_dropout(sample):
    return not sample.kwargs.get("dropout_p")


def differentiable(sample):
    tensors = [sample.input, *sample.args, *sample.kwargs.values()]
    return [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]


def function_of(sample, inputs):
    """The sample as a function of its differentiable tensors."""

    def fn(*tensors):
        at = {id(x): y for x, y in zip(inputs, tensors, strict=True)}

        def new(x):
            return at.get(id(x), x)

        torch.manual_seed(0)
        return fastattn.scaled_dot_product_attention(
            new(sample.input), *(new(x) for x in sample.args), **{name: new(x) for name, x in sample.kwargs.items()}
        )

    return fn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("i", range(N_SAMPLES))
def test_forward(i, dtype):
    sample = samples(dtype)[i]
    out = call(fastattn.scaled_dot_product_attention, sample)
    expected = call(F.scaled_dot_product_attention, sample)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    if without_dropout(sample):
        exact = call(F.scaled_dot_product_attention, sample.transform(to_double))
        assert_within(out, exact, [expected], 2)


@pytest.mark.parametrize("i", range(N_SAMPLES))
def test_backward(i):
    sample = samples(torch.float64, requires_grad=True)[i]
    if not without_dropout(sample):
        pytest.skip("other dropout bits than torch's; gradcheck covers the gradient")
    inputs = differentiable(sample)
    out, expected = call(fastattn.scaled_dot_product_attention, sample), call(F.scaled_dot_product_attention, sample)
    do = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, do, allow_unused=True)
    for ours, torchs, x in zip(grads, torch.autograd.grad(expected, inputs, do, allow_unused=True), inputs, strict=True):
        assert ours.shape == x.shape
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("i", range(N_SAMPLES))
def test_derivatives(i):
    sample = samples(torch.float64, requires_grad=True)[i]
    inputs = differentiable(sample)
    fn = function_of(sample, inputs)
    fast = dict(fast_mode=True)
    assert gradcheck(fn, inputs, check_forward_ad=True, check_batched_grad=False, **fast)
    assert gradgradcheck(fn, inputs, check_fwd_over_rev=True, **fast)


@pytest.mark.parametrize("i", range(N_SAMPLES))
def test_noncontiguous(i):
    sample = samples(torch.float64)[i]
    if not without_dropout(sample):
        pytest.skip("dropout draws anew")
    strided = sample.noncontiguous()
    torch.testing.assert_close(
        call(fastattn.scaled_dot_product_attention, strided), call(fastattn.scaled_dot_product_attention, sample)
    )


@pytest.mark.parametrize("i", range(N_SAMPLES))
def test_vmap(i):
    sample = samples(torch.float64)[i]
    if not without_dropout(sample):
        pytest.skip("vmap of a random function is tested with the transforms")
    stacked = torch.stack([sample.input, 2 * sample.input])
    out = torch.vmap(lambda q: fastattn.scaled_dot_product_attention(q, *sample.args, **sample.kwargs))(stacked)
    expected = [fastattn.scaled_dot_product_attention(q, *sample.args, **sample.kwargs) for q in stacked]
    torch.testing.assert_close(out, torch.stack(expected))
