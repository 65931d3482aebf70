"""fastattn as one of torch's flash implementations: on the CPU through varlen_attn, and each kernel by itself."""

import pytest
import torch
from torch.nn import attention as torch_attention
from torch.testing import assert_close

import fastattn as fa
from fastattn.integrations import report, torch_flash

if not hasattr(torch_attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry of flash implementations", allow_module_level=True)

from torch.nn.attention.varlen import varlen_attn


@pytest.fixture
def active():
    torch_flash.register()
    assert torch_attention.current_flash_attention_impl() is None
    torch_attention.activate_flash_attention_impl("fastattn")
    yield
    torch_attention.restore_flash_attention_impl()


def make(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.requires_grad_()


CU_Q, CU_K = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([0, 4, 10], dtype=torch.int32)


def test_nothing_is_activated_by_registering():
    torch_flash.register()
    assert "fastattn" in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() is None
    q = make(8, 2, 4)
    with pytest.raises(NotImplementedError):
        varlen_attn(q, q, q, CU_Q, CU_Q, 5, 5)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 1)])
def test_varlen_attn_on_the_cpu(active, window):
    q, k, v = make(8, 4, 8), make(10, 4, 8, seed=1), make(10, 4, 8, seed=2)
    before = report()
    aux = torch_attention.varlen.AuxRequest(lse=True)
    out, lse = varlen_attn(q, k, v, CU_Q, CU_K, 5, 6, window_size=window, return_aux=aux)
    assert (report() - before).taken == {"torch flash attention, packed": 1}
    left, right = (None if n < 0 else n for n in window)
    mask = fa.SlidingWindow(left, right, "bottom_right")
    wanted, wanted_lse = fa.varlen_attention(
        *(x.double() for x in (q, k, v)), CU_Q, CU_K, mask=mask, return_lse=True, backend="reference"
    )
    assert_close(out.double(), wanted, atol=1e-6, rtol=1e-5)
    assert_close(lse.double(), wanted_lse, atol=1e-6, rtol=1e-5)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_restored(active):
    torch_attention.restore_flash_attention_impl()
    q = make(8, 2, 4)
    with pytest.raises(NotImplementedError):
        varlen_attn(q, q, q, CU_Q, CU_Q, 5, 5)
    torch_attention.activate_flash_attention_impl("fastattn")
    varlen_attn(q, q, q, CU_Q, CU_Q, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True])
def test_the_dense_kernels(causal, dropout_p, dtype):
    """What torch calls on cuda tensors, called here."""
    q, k, v = (make(2, 5, 4, 8, seed=i, dtype=dtype).transpose(1, 2) for i in range(3))
    bar = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps  # both sides are rounded, and o differently
    with torch.no_grad():
        torch.manual_seed(0)
        out, lse, _, _, n_q, n_k, seed, offset, _ = torch_flash.dense_forward(q, k, v, dropout_p, causal, scale=0.3)
        assert out.stride() == q.stride()
        assert lse.is_contiguous()
        assert lse.dtype == torch.float32
        assert seed.dtype == torch.uint64
        grads = torch_flash.dense_backward(
            2 * out, q, k, v, out, lse, None, None, n_q, n_k, dropout_p, causal, seed, offset, scale=0.3
        )
    torch.manual_seed(0)
    wanted = fa.attention(q, k, v, mask=fa.Causal("bottom_right") if causal else None, scale=0.3, dropout_p=dropout_p)
    for a, b in zip((out, *grads), (wanted, *torch.autograd.grad(wanted.square().sum(), (q, k, v))), strict=True):
        assert (a - b).double().norm() <= bar * b.double().norm()


def test_a_batch_without_cumulative_lengths(active):
    q, k, v = (make(2, 5, 4, 8, seed=i) for i in range(3))
    with torch.no_grad():
        found = torch.ops.aten._flash_attention_forward(q, k, v, None, None, 5, 5, 0.0, True, False)
    wanted = fa.attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=fa.Causal()).transpose(1, 2)
    assert_close(found[0], wanted)
    assert found[1].shape == (2, 4, 5)


def test_what_it_does_not_take(active):
    q = make(8, 2, 4)
    with pytest.raises(NotImplementedError, match="alibi_slopes"), torch.no_grad():
        torch.ops.aten._flash_attention_forward(q, q, q, CU_Q, CU_Q, 5, 5, 0.0, False, False, alibi_slopes=torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_under_scaled_dot_product_attention(active):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (make(2, 4, 70, 64, seed=i).to("cuda", torch.bfloat16).detach().requires_grad_() for i in range(3))
    before = report()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert sum((report() - before).taken.values()) == 1
    wanted = fa.attention(*(x.double() for x in (q, k, v)), mask=fa.Causal(), backend="reference")
    assert_close(out.double(), wanted, atol=2e-2, rtol=2e-2)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad(wanted.sum(), (q, k, v)), strict=True):
        assert_close(a, b, atol=5e-2, rtol=5e-2)
