"""hosted/takeover.py: x-transformers, which `make test` installs beside the environment, and timm, open_clip and diffusers."""

import re

import pytest
from processes import ROOT, overlay, suite


@pytest.mark.slow
def test_libraries_that_call_torchs_attention():
    path = [overlay("hosts")] if overlay("hosts").is_dir() else []
    done = suite(ROOT, "hosted/takeover.py", "-rs", path=path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip(", ".join(sorted(set(re.findall(r"\w+ is not installed", done.stdout)))))
