"""How far from float64 a result may be: no constant of its own, but what plain PyTorch and torch's SDPA manage.

A result passes when its error against float64 on the same rounded inputs is at most `factor` times the better of theirs
(2 for outputs, 3 for gradients), plus one rounding unit of the largest value.
"""

import torch

# float32 also carries the rounding of logits of about 10 through the exponential
UNIT = {torch.float64: 1e-10, torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def errors(x, exact):
    """(largest absolute error, relative L2 error)"""
    difference = (x.double() - exact.double()).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    finite = exact.double().nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return difference.abs().max().item() if x.numel() else 0.0, (difference.norm() / finite.norm().clamp(min=1e-30)).item()


def assert_within(x, exact, others, factor, what="", scale=0.0):
    """x is as near to `exact` as the best of `others` times `factor` plus a rounding unit, and finite where it is.

    `scale`: the largest value of the terms that x sums, for sums that cancel (the gradient of a row's bias is exactly 0).
    """
    assert x.shape == exact.shape, f"{what}: shape {tuple(x.shape)}, expected {tuple(exact.shape)}"
    if x.numel() == 0:
        return
    assert not x.isnan().any(), f"{what}: NaN where float64 is finite"
    assert torch.equal(x.isinf(), exact.isinf()), f"{what}: inf where float64 is finite"
    unit = UNIT[x.dtype]
    top = exact.double().nan_to_num(0.0, posinf=0.0, neginf=0.0).abs().max().item()
    largest, relative = errors(x, exact)
    bars = [errors(y, exact) for y in others] or [(0.0, 0.0)]
    bar_largest = factor * min(bar[0] for bar in bars) + unit * max(top, scale, unit)
    assert largest <= bar_largest, f"{what}: largest error {largest:.2e}, bar {bar_largest:.2e}"
    bar_relative = factor * min(bar[1] for bar in bars) + unit * max(top, scale, unit) / max(top, unit)
    assert relative <= bar_relative or top <= unit * scale, f"{what}: relative L2 error {relative:.2e}, bar {bar_relative:.2e}"
