"""How often intervals contain the truth: ``python -m benchmarks.interval_coverage``.

Simulated paired differences of two models whose true difference is known. A document's difference in log perplexity is
the truth, a part of its own, a part of the seed, and a part of both together. The tables of docs/comparison.md come
from here: 4,000 simulations a cell, so a share of 0.95 is known to 0.007.
"""

from __future__ import annotations

import argparse
import math
from itertools import product

import numpy as np

from workloads.evaluation.intervals import DocumentScores, gap_interval

TRUTH = 0.02  # nats per token
SPREAD = 0.01  # between documents
SHAPES = {
    "normal": lambda generator, size: generator.standard_normal(size),
    "skewed": lambda generator, size: (generator.gamma(2.0, 1.0, size) - 2) / math.sqrt(2),
    "heavy": lambda generator, size: generator.standard_t(4, size) / math.sqrt(2),
}


def coverage(
    documents: int,
    seeds: int = 1,
    shape: str = "normal",
    unequal: bool = False,
    seed_to_documents: float = 0.0,
    simulations: int = 4000,
) -> float:
    """The share of intervals that contain the true difference.

    Args:
        shape: how differences are distributed over documents.
        unequal: documents differ in length, log-normally with a standard deviation of 0.8; else all are alike.
        seed_to_documents: the standard error of the mean over seeds, as a multiple of that over documents.
    """
    generator, covered = np.random.default_rng(0), 0
    of_seeds = seed_to_documents * SPREAD * math.sqrt(seeds / documents)
    for _ in range(simulations):
        tokens = np.round(1000 * (np.exp(generator.normal(0, 0.8, documents)) if unequal else np.ones(documents))) + 1
        difference = TRUTH + SPREAD * SHAPES[shape](generator, documents)
        difference = difference + of_seeds * generator.standard_normal((seeds, 1))
        if seeds > 1:
            difference = difference + SPREAD / 2 * SHAPES[shape](generator, (seeds, documents))
        named = tuple(range(seeds))
        gap = gap_interval(
            DocumentScores((2.0 + difference) * tokens, tokens, named),
            DocumentScores(np.tile(2.0 * tokens, (seeds, 1)), tokens, named),
        )
        if gap.low is not None and gap.high is not None:
            covered += gap.low <= math.expm1(TRUTH) <= gap.high
    return covered / simulations


def main() -> None:
    """Prints both tables in Markdown."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.interval_coverage", description=__doc__)
    options.add_argument("--simulations", type=int, default=4000, help="of each cell (default: 4000)")
    simulations = options.parse_args().simulations
    counts = (5, 8, 19, 20, 30, 100)
    print("| differences | length | " + " | ".join(f"{count} documents" for count in counts) + " |")
    print("|---|---|" + "---|" * len(counts))
    for shape, unequal in product(SHAPES, (False, True)):
        cells = [f"{coverage(n, shape=shape, unequal=unequal, simulations=simulations):.3f}" for n in counts]
        print(f"| {shape} | {'unequal' if unequal else 'equal'} | {' | '.join(cells)} |")
    ratios = (0.0, 0.3, 1.0, 3.0)
    print("\n| documents | seeds | " + " | ".join(f"seeds {ratio:g} x documents" for ratio in ratios) + " |")
    print("|---|---|" + "---|" * len(ratios))
    for documents, seeds in product((8, 20), (2, 3, 5)):
        cells = [f"{coverage(documents, seeds, seed_to_documents=r, simulations=simulations):.3f}" for r in ratios]
        print(f"| {documents} | {seeds} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
