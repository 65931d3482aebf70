"""Pairwise covering arrays."""

import itertools


def pairwise(factors):
    """Rows that together hold every pair of values of every two factors; greedy, and the same every time."""
    names = list(factors)
    open_pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(factors[names[a]]))
        for y in range(len(factors[names[b]]))
    }
    rows = []
    while open_pairs:
        row = [None] * len(names)
        a, x, b, y = min(open_pairs)
        row[a], row[b] = x, y
        for i, name in enumerate(names):
            if row[i] is None:
                gains = [
                    sum(((i, n, j, m) if i < j else (j, m, i, n)) in open_pairs for j, m in enumerate(row) if m is not None)
                    for n in range(len(factors[name]))
                ]
                best = max(gains)
                ties = [n for n, gain in enumerate(gains) if gain == best]
                row[i] = ties[len(rows) % len(ties)]
        open_pairs -= {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(names)), 2)}
        rows.append({name: factors[name][n] for name, n in zip(names, row, strict=True)})
    return rows
