"""Jagged nested tensors inside compiled functions: one graph, which serves other lengths, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fastattn as fa

pytestmark = pytest.mark.compile
D = torch.float64


def jagged(lengths, features):
    torch.manual_seed(len(lengths))
    parts = [torch.randn(n, features, dtype=D) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)  # (B, n, ragged, D)


def itself(x, y):
    q = heads(x, 4)
    return fa.scaled_dot_product_attention(q, q, q, is_causal=True)


def grouped(x, y):
    return fa.scaled_dot_product_attention(heads(x, 4), heads(y, 2), heads(y, 2), enable_gqa=True)


def torchs(x, y):
    q = heads(x, 4)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.mark.parametrize("fn", [itself, grouped, torchs], ids=lambda fn: fn.__name__)
def test_compiles_whole(fn):
    """torch's function under `install` too, whose jagged kernels know no causal mask on the CPU."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with fa.use():
        compiled = torch.compile(fn, backend=counter, fullgraph=True)
        for lengths_q, lengths_k in (((3, 5), (4, 6)), ((4, 4, 2), (2, 7, 3)), ((2, 6, 3, 2), (3, 3, 8, 2))):
            x, y = jagged(lengths_q, 16), jagged(lengths_k, 8)
            got, expected = compiled(x, y), fn(x, y)
            assert_close(got.transpose(1, 2).values(), expected.transpose(1, 2).values())
            for i, rows in enumerate(got.unbind()):  # the same as each entry alone
                alone = fn(*(torch.nested.nested_tensor([z.unbind()[i]], layout=torch.jagged) for z in (x, y)))
                assert_close(rows, alone.unbind()[0])
            wrt = (x, y) if fn is grouped else (x,)
            grads = [torch.autograd.grad(out.transpose(1, 2).values().square().sum(), wrt) for out in (got, expected)]
            for a, b in zip(*grads, strict=True):
                assert_close(a.values(), b.values())
    assert counter.frame_count <= 2  # the second is for any lengths


def test_a_mask_is_refused_while_compiling():
    torch._dynamo.reset()
    x = heads(jagged((3, 5), 16), 4)
    fn = torch.compile(
        lambda x: fa.scaled_dot_product_attention(x, x, x, torch.ones(5, 5).bool()), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match="attn_mask must be None for jagged nested tensors"):
        fn(x)
