"""The tutorial's mask and score (docs/tutorial), imported as a reader has them: from a folder of their own."""

import sys
from pathlib import Path

import cases

FOLDER = Path(cases.__file__).parent.parent / "docs" / "tutorial"
sys.path.append(str(FOLDER))

import my_mask  # noqa: E402
import my_score  # noqa: E402

MASKS = {
    "chunks_back": lambda b, h, q, k: my_mask.ChunksBack(5, 2),
    "strided_heads": lambda b, h, q, k: my_mask.strided_heads(),
    "both": lambda b, h, q, k: my_mask.strided_heads() & my_mask.ChunksBack(7, 1),
}
SCORES = {
    "root_cap": lambda b, h, q, k, t: (my_score.RootCap(2.0),),
    "log_distance": lambda b, h, q, k, t: (my_score.LogDistance(cases.leaf(b, h, dtype=t, positive=True)),),
    "mine": lambda b, h, q, k, t: (
        my_score.LogDistance(cases.leaf(h, dtype=t, positive=True)),
        my_score.RootCap(3.0),
    ),
}
