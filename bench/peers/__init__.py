"""Who computes attention: one small file each, which says what its subject can do, so that a cell is a number or a reason.

    Peer.unavailable(device) -> why it is not on this machine, or None
    Peer.cannot(workload, device, gradients) -> why it cannot compute this, or None
    Peer.build(workload, inputs) -> a function of no arguments that computes out

`plain` is attention as a textbook writes it: the yardstick of the error columns.
"""

from .base import Peer
from .flex import Flex
from .ours import Ours
from .plain import Plain
from .sdpa import KERNELS, Sdpa

OURS = Ours()
PLAIN = Plain()
PEERS: tuple[Peer, ...] = (OURS, Sdpa(None), *(Sdpa(kernel) for kernel in KERNELS), PLAIN, Flex())

__all__ = ["OURS", "PEERS", "PLAIN", "Peer"]
