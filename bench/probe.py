"""The process in which peak memory is measured: reads cells from stdin, prints a line of JSON for each.

["cell", suite, workload, direction, peer, device] or ["feature", name, who, length, device]
"""

from __future__ import annotations

import json
import sys

import torch

from . import cells, features, memory


def main() -> None:
    memory.settle()
    threads, todo = json.load(sys.stdin)
    torch.set_num_threads(threads or 1)
    for kind, *cell in todo:
        device = cell[-1]
        found: dict[str, int | str | None]
        try:
            if kind == "cell":
                call = cells.memory_call(*cell)
            else:
                name, who, length, _ = cell
                call = features.FEATURES[name](who, length, device)
            found = {"bytes": memory.peak(call, device)}
        except Exception as raised:  # out of memory is an answer too
            found = {"bytes": None, "reason": f"{type(raised).__name__}: {raised}"[:200]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
