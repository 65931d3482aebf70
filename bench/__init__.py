"""The benchmark suite: real models' attention, the error against float64, the time beside every peer at hand.

    python -m fastattn bench                 models' shapes and a small GPT trained twice
    python -m fastattn bench targets         what the CPU backend promises, against torch's fused attention
    python -m fastattn bench memory          dropout, bias gradients and second order at length 4096
    python -m fastattn bench numerics        gradients in bf16 where keys and values have a mean
    python -m fastattn bench hosts           other libraries' models beside their own attention: routes and differences

`workloads` says what is computed, `peers` who computes it, `timing`, `accuracy` and `memory` how that is judged, and
`table` and `plot` show it. A ratio is printed only where it stands clear of the noise of the run.
"""

SUITES = ("models", "training", "targets", "memory", "numerics", "hosts")
