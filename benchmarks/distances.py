"""Base distances through the low-rank core against full SVDs: time for each pair, and how far the two differ.

python benchmarks/distances.py > benchmarks/results/distances.md
"""

import argparse
import platform
import time
from collections.abc import Callable

import torch

from flexigpt.replicas import unmended
from flexigpt.replicas.svd import exact_svd


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call."""
    function()
    seconds = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    size, rank = arguments.size, arguments.rank
    generator = torch.Generator().manual_seed(0)

    def weight() -> torch.Tensor:
        # A power-law spectrum on a random one, as trained weights have.
        u, s, v = torch.linalg.svd(torch.randn(size, size, generator=generator, dtype=torch.float64))
        return ((u * (s * torch.arange(1, size + 1) ** -0.3)) @ v).to(arguments.device)

    weights = [weight() for _ in range(arguments.candidates + 1)]
    factors = [exact_svd(w, rank) for w in weights]
    matrices = [f.matrix() for f in factors]
    pruned, candidates = factors[0], factors[1:]

    def by_svd(candidate: torch.Tensor) -> torch.Tensor:
        """Equations 3 and 4 with W^ at hand: one full SVD a pair."""
        difference = matrices[0] - candidate
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        return (difference - (u[:, :rank] * s[:rank]) @ v[:rank]).norm()

    exact = torch.stack([by_svd(m) for m in matrices[1:]])
    ours = torch.stack([unmended(pruned, c) for c in candidates])
    full = timed(lambda: by_svd(matrices[1]), 3)
    values_only = timed(lambda: torch.linalg.svdvals(matrices[0] - matrices[1]), 3)
    core = timed(lambda: [unmended(pruned, c) for c in candidates], 9) / len(candidates)
    factor = timed(lambda: exact_svd(weights[0], rank), 3)
    whole_svd = timed(lambda: torch.linalg.svd(weights[0], full_matrices=False), 3)

    print(f"# Distances of one pruned linear to {len(candidates)} candidates, {size} x {size}, rank {rank}\n")
    print(f"`python benchmarks/distances.py --size {size} --rank {rank}`: float64, torch {torch.__version__},")
    print(f"{torch.get_num_threads()} threads, {platform.machine()}, {arguments.device}.\n")
    print("| | seconds | ratio |\n| --- | ---: | ---: |")
    print(f"| one pair by a full SVD (U, S, V) | {full:.4f} | {full / core:.0f} x |")
    print(f"| one pair by singular values alone | {values_only:.4f} | {values_only / core:.0f} x |")
    print(f"| one pair by the low-rank core | {core:.4f} | 1 x |")
    print(f"| once for each weight: truncated SVD through the Gram matrix | {factor:.4f} | |")
    print(f"| once for each weight: full SVD | {whole_svd:.4f} | {whole_svd / factor:.1f} x the truncated one |")
    count = len(candidates)
    ours_in_all, naive_in_all = (count + 1) * factor + count * core, (count + 1) * whole_svd + count * full
    print(f"\nWith every weight factored once, {count} pairs take {ours_in_all:.1f} s against {naive_in_all:.1f} s by")
    print(f"full SVDs: {naive_in_all / ours_in_all:.1f} x. Factors are shared by all pruned blocks, pairs are not.")
    print(f"\nLargest relative difference of the distances: {((ours - exact).abs() / exact).max():.1e}.")


if __name__ == "__main__":
    main()
