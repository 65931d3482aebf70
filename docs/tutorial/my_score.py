"""Two scores in one file: a cap without exponentials (pointwise), and a learned penalty on log distance (additive)."""

import torch

import fastattn as fa
from fastattn.kernels.shim import jit, tl
from fastattn.scores.base import DeviceGradient, lead_strides, leading


@jit
def ratio(s, args):
    return tl.minimum(tl.maximum(s / args[0], -1e9), 1e9)


@jit
def root_cap(s, args):
    x = ratio(s, args)
    return args[0] * x / tl.sqrt(1 + x * x)


@jit
def root_cap_first(s, args):
    x = ratio(s, args)
    r = 1 / tl.sqrt(1 + x * x)
    return r * r * r


@jit
def root_cap_second(s, args):
    x = ratio(s, args)
    r = 1 / tl.sqrt(1 + x * x)
    return (-3 / args[0]) * x * r * r * r * r * r


class RootCap(fa.Pointwise):
    """s -> s / sqrt(1 + (s / cap)^2), which keeps logits within (-cap, cap); -inf, a hidden pair's bias, gives -cap."""

    def __init__(self, cap):
        self.floats = (float(cap),)

    def value(self, s):
        return self.derivs(s)[0]

    def derivs(self, s):
        (cap,) = self.floats
        x = (s / cap).clamp(-1e9, 1e9)
        r = (1 + x * x).rsqrt()
        return cap * x * r, r**3, (-3 / cap) * x * r**5

    def device_functions(self):
        return root_cap, root_cap_first, root_cap_second


@jit
def log_distance_weight(at, args):
    return -tl.log(1 + tl.abs(at[2] - at[3]).to(tl.float32))


@jit
def log_distance(at, args):
    slopes, strides = args[0], args[1]
    slope = tl.load(slopes + at[4] * strides[0] + at[5] * strides[1]).to(tl.float32)
    return slope * log_distance_weight(at, args)


class LogDistance(fa.Additive):
    """s -> s - slope * log(1 + |q - k|), slopes (H,) or (B, H): the logarithmic kernel of KERPLE (arXiv 2205.09921)."""

    def __init__(self, slopes):
        self.params = (slopes,)

    def canonical(self, n_b, n_h):
        return self.with_params((leading(self.params[0], n_b, n_h, 0, "slopes"),))

    def term(self, tile):
        distance = (tile.q - tile.k).abs().to(tile.dtype)
        return -tile.heads(self.params[0]).to(tile.dtype)[:, :, None, None] * torch.log1p(distance)

    def device_functions(self):
        return (log_distance,)

    def device_args(self):
        return self.params[0], lead_strides(self.params[0])

    def device_gradient(self):
        shape = self.params[0].shape
        finish = lambda sums, q, k: sums.sum(2).sum_to_size(shape)
        return DeviceGradient("rows", True, True, log_distance_weight, finish, anywhere=True)
