"""No derivative holds an L x L tensor: twice the length takes about twice the memory."""

import pytest

from fastattn.bench import features, memory

pytestmark = pytest.mark.skipif(not memory.measurable("cpu"), reason="peak memory is known on Linux only")
SHORT = 2048


@pytest.mark.parametrize("feature", features.FEATURES)
def test_linear_in_length(feature):
    cells = [("feature", feature, "fastattn", n, "cpu") for n in (SHORT, 2 * SHORT)]
    short, long = (cell["bytes"] for cell in features.measured(cells, 2))
    matrix = features.HEADS * (2 * SHORT) ** 2 * 4  # bytes of one score matrix
    assert long < matrix / 2
    assert long < 2.5 * short + (4 << 20)


def test_the_measure_sees_a_matrix():
    """torch's math path does hold it."""
    [cell] = features.measured([("feature", "forward mode", "torch", SHORT, "cpu")])
    assert cell["bytes"] > features.HEADS * SHORT**2 * 4
