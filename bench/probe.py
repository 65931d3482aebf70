"""A process in which cells are checked and peak memory is measured: a line of JSON in, a line of JSON out.

["cell", suite, workload, direction, compiled, device] or ["feature", name, who, length, device]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from .. import environment
from . import checks, features, memory


def main() -> None:
    memory.settle()
    torch.set_num_threads(1)
    for line in sys.stdin:
        kind, *told = json.loads(line)
        answer = checks.named(*told).json() if kind == "cell" else feature(*told)
        print(json.dumps(answer), flush=True)
        if environment.lost_gpu():  # another process goes on
            raise SystemExit(1)


def feature(name: str, who: str, length: int, device: str) -> dict[str, Any]:
    """Peak bytes of one of `features`, or why there are none."""
    try:
        return {"bytes": memory.peak(features.FEATURES[name](who, length, device), device)}
    except Exception as raised:  # out of memory is an answer too
        return {"bytes": None, "reason": f"{type(raised).__name__}: {raised}"[:200]}


if __name__ == "__main__":
    main()
