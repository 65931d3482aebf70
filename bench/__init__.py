"""The benchmark suite: real models' attention, the error against float64, the time beside every peer at hand.

    python -m fastattn bench                 models' shapes and a small GPT trained twice
    python -m fastattn bench forward         head sizes, lengths, full and causal, in FlashAttention's terms; backward likewise
    python -m fastattn bench masks           windows, documents, padding, a prefix, a random mask; bias: biases with gradients
    python -m fastattn bench second-order    double backward and forward mode
    python -m fastattn bench overhead        what surrounds the kernel: the smallest calls
    python -m fastattn bench memory          dropout, bias gradients and second order at length 4096
    python -m fastattn bench accuracy        gradients in bf16 where keys and values have a mean
    python -m fastattn bench targets         what the CPU backend promises, against torch's fused attention
    python -m fastattn bench hosts           other libraries' models beside their own attention: routes and differences

`workloads` and `sweeps` say what is computed, `passes` in which direction, `peers` who computes it, `timing`, `accuracy`,
`memory` and `roof` how that is judged, `table`, `plot` and `page` show it, `compare` and `revisions` set two runs side by side.
A ratio is printed only where it stands clear of the noise of the run.
"""

SUITES = (
    "models", "training", "forward", "backward", "masks", "bias", "second-order", "overhead", "memory", "accuracy", "targets",
    "hosts",
)  # fmt: skip
