"""Who computes attention: small files which say what each can do, so that a cell is a number or a reason.

    Peer.unavailable(device) -> why it is not on this machine, or None
    Peer.cannot(workload, device, direction) -> why it cannot compute this pass, or None
    Peer.build(workload, inputs) -> a function of inputs that computes out

`plain` is attention as a textbook writes it: the yardstick of the error columns. None of the others is a dependency: what
is not installed is a reason in the table.
"""

from .base import Peer
from .flash import Flash2, Flash3, Flash4
from .flex import Flex
from .others import FastFlash, Fla, JvpFlash, XFormers
from .ours import Ours
from .plain import Plain
from .sdpa import KERNELS, Sdpa

OURS = Ours()
PLAIN = Plain()
PEERS: tuple[Peer, ...] = (
    OURS, Sdpa(None), *(Sdpa(kernel) for kernel in KERNELS), PLAIN, Flex(), Flex("FLASH"), Flash2(), Flash3(), Flash4(),
    Fla(), FastFlash(), JvpFlash(), XFormers(),
)  # fmt: skip

__all__ = ["OURS", "PEERS", "PLAIN", "Peer"]
