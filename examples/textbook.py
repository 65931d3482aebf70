"""The multi-head attention of the textbooks, before and after: its score lines become one call, nothing else changes.

    python -m examples.textbook
"""

import math
import time

import torch
from torch import nn

import fastattn

from .common import command


class MultiHeadAttention(nn.Module):
    """Before: scores, mask, softmax and the weighted sum, each a tensor of its own."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        assert d_model % num_heads == 0, "d_model must be a multiple of num_heads"
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        self.v_linear = nn.Linear(d_model, d_model)
        self.out_linear = nn.Linear(d_model, d_model)

    def split(self, x):  # (batch, length, d_model) -> (batch, heads, length, head_dim)
        return x.view(x.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2)

    def join(self, x):  # (batch, heads, length, head_dim) -> (batch, length, d_model)
        return x.transpose(1, 2).reshape(x.shape[0], -1, self.d_model)

    def forward(self, query, key, value, mask=None):
        q = self.split(self.q_linear(query))
        k = self.split(self.k_linear(key))
        v = self.split(self.v_linear(value))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)  # (batch, heads, n_q, n_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        weights = torch.softmax(scores, dim=-1)
        out = weights @ v
        return self.out_linear(self.join(out))


class FastMultiHeadAttention(MultiHeadAttention):
    """After: the same weights, the same arguments."""

    def forward(self, query, key, value, mask=None):
        q = self.split(self.q_linear(query))
        k = self.split(self.k_linear(key))
        v = self.split(self.v_linear(value))
        out = fastattn.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask != 0)
        return self.out_linear(self.join(out))


def results(layer, query, memory, mask):
    """(output, gradients of the inputs and of every weight, seconds) of one pass there and back."""
    inputs = [x.clone().requires_grad_() for x in (query, memory, memory)]
    began = time.process_time()
    out = layer(*inputs, mask)
    out.square().sum().backward()
    seconds = time.process_time() - began
    grads = [x.grad for x in (*inputs, *layer.parameters())]
    layer.zero_grad(set_to_none=True)
    return out.detach(), grads, seconds


def compare(before, after, query, memory, mask=None):
    """(largest difference of the outputs, of the gradients relative to the largest one, seconds before, seconds after)."""
    for layer in (before, after):
        results(layer, query, memory, mask)  # the first call of a kind also loads what it needs
    out, grads, seconds = results(before, query, memory, mask)
    same_out, same_grads, fast_seconds = results(after, query, memory, mask)
    scale = max(g.abs().max() for g in grads)
    d_grad = max((a - b).abs().max() for a, b in zip(grads, same_grads)) / scale
    return (out - same_out).abs().max().item(), d_grad.item(), seconds, fast_seconds


def main(steps=512):
    """steps is the length of the sequence here; nothing is trained."""
    n = steps
    torch.manual_seed(0)
    before = MultiHeadAttention(d_model=256, num_heads=8)
    after = FastMultiHeadAttention(d_model=256, num_heads=8)
    after.load_state_dict(before.state_dict())

    x, memory = torch.randn(2, n, 256), torch.randn(2, n // 2, 256)
    real = torch.tensor([n, 2 * n // 3])
    padding = (torch.arange(n) < real[:, None])[:, None, None].int()  # (batch, 1, 1, n_k)
    causal = torch.ones(n, n).tril()[None, None]  # (1, 1, n_q, n_k)
    cases = {"no mask": (x, None), "padding": (x, padding), "causal": (x, causal), "cross": (memory, None)}
    differences = {}
    print("            output    gradients   before      after")
    for name, (keys, mask) in cases.items():
        d_out, d_grad, seconds, fast_seconds = compare(before, after, x, keys, mask)
        differences[name] = max(d_out, d_grad)
        print(f"{name:10s}{d_out:9.1e}{d_grad:12.1e}{seconds:9.3f} s{fast_seconds:9.3f} s")

    # A row whose mask is all zero: -1e9 everywhere is the same score everywhere, so the textbook gives the mean of v.
    # No key is visible, so we give 0, and nothing of a hidden value reaches the output.
    mask = torch.ones(1, 1, n, n)
    mask[..., 3, :] = 0
    with torch.no_grad():
        mean = before.out_linear(before.v_linear(x).mean(1))  # (batch, d_model)
        is_mean = torch.allclose(before(x, x, x, mask)[:, 3], mean, atol=1e-5)
        is_zero = torch.equal(after(x, x, x, mask)[:, 3], after.out_linear.bias.expand(2, -1))
    print(f"a row without keys: before, out_linear(mean of v): {is_mean}; after, out_linear(0): {is_zero}")
    return differences, is_mean and is_zero


if __name__ == "__main__":
    command(main)
