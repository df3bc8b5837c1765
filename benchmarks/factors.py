"""Truncated SVDs by block Krylov search against the exact ones: CPU seconds, and what changes in results.

OMP_NUM_THREADS=1 python benchmarks/factors.py > benchmarks/results/factors.md
"""

import argparse
import platform
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from flexigpt.replicas import LowRank, unmended
from flexigpt.replicas.svd import exact_svd, krylov_svd

T = TypeVar("T")
SHAPES = [(2048, 2048, 128), (5632, 2048, 128), (4096, 4096, 256)]
# LLaMA-2 7B at 30 %: 9 pruned blocks, 23 candidates, 4 + 3 linears of 4096 x 4096 and 11008 x 4096, 32 blocks.
PAIRS, BLOCKS, SQUARE, OBLONG = 9 * 23, 32, 4, 3


def cpu_seconds(function: Callable[[], T]) -> tuple[T, float]:
    """What a call gives, and the CPU seconds that it takes."""
    started = time.process_time()
    given = function()
    return given, time.process_time() - started


def spiked_noise(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A Gaussian bulk and power-law directions above it, as trained weights have; flat at the cut."""
    count = columns // 4
    left, right = (torch.linalg.qr(torch.randn(n, count, generator=generator)).Q for n in (rows, columns))
    spikes = 8 * (rows**0.5 + columns**0.5) * torch.arange(1, count + 1) ** -0.7
    return (left * spikes) @ right.T + torch.randn(rows, columns, generator=generator)


def power_law(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Singular values k^-0.5."""
    left, right = (torch.linalg.qr(torch.randn(n, columns, generator=generator)).Q for n in (rows, columns))
    return (left * torch.arange(1, columns + 1) ** -0.5) @ right.T


def noise(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Nothing but a Gaussian bulk: the flattest."""
    return torch.randn(rows, columns, generator=generator)


KINDS = {"spiked noise": spiked_noise, "power law": power_law, "noise": noise}


def tail(weight: torch.Tensor, factors: LowRank) -> torch.Tensor:
    return (weight.double() - factors.matrix()).norm()


def compared(kind: str, rows: int, columns: int, rank: int) -> tuple[float, float]:
    """One row of the table. CPU seconds of the exact factors and of those found."""
    generator = torch.Generator().manual_seed(0)
    first, other = (KINDS[kind](rows, columns, generator) for _ in range(2))
    second = 0.7 * first + 0.3 * other
    weights = [first, second, first.double() - second.double()]
    exact, found, exact_seconds, found_seconds = [], [], [], []
    for weight in weights:
        factors, seconds = cpu_seconds(lambda weight=weight: exact_svd(weight, rank))
        exact.append(factors)
        exact_seconds.append(seconds)
        factors, seconds = cpu_seconds(lambda weight=weight: krylov_svd(weight, rank))
        if factors is None:
            raise SystemExit(f"{kind}, {rows} x {columns}: no factors found, truncated_svd would take the exact ones")
        found.append(factors)
        found_seconds.append(seconds)
    slow, fast = sorted(exact_seconds)[1], sorted(found_seconds)[1]
    tails, adapter = (tail(weights[i], found[i]) / tail(weights[i], exact[i]) - 1 for i in (0, 2))
    distance = unmended(*found[:2]) / unmended(*exact[:2]) - 1
    print(f"| {rows} x {columns}, {rank} | {kind} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} x ", end="")
    print(f"| {tails:.0e} | {distance:.0e} | {adapter:.0e} |", flush=True)
    return slow, fast


def extrapolate(seconds: dict[tuple[int, int], float], whole: dict[tuple[int, int], float]) -> None:
    """LLaMA-2 7B: an oblong weight costs as much more than a square one as at half the size."""
    square, small, oblong = (4096, 4096), (2048, 2048), (5632, 2048)
    rank = 256
    pair = [krylov_svd(torch.randn(4096, 4096, generator=torch.Generator().manual_seed(i)), rank) for i in range(2)]
    assert pair[0] is not None
    assert pair[1] is not None
    core = min(cpu_seconds(lambda: unmended(pair[0], pair[1]))[1] for _ in range(3))

    def all_linears(costs: dict[tuple[int, int], float]) -> float:
        return costs[square] * (SQUARE + OBLONG * costs[oblong] / costs[small])

    factors, cores = BLOCKS * all_linears(seconds), PAIRS * (SQUARE + OBLONG) * core
    naive = PAIRS * all_linears(whole)
    print("\n## What this makes of a 7B model: extrapolated, not run\n")
    print(f"{BLOCKS * (SQUARE + OBLONG)} weights factored once (spiked noise): {factors / 60:.0f} CPU minutes.")
    print(
        f"{PAIRS * (SQUARE + OBLONG)} pairs through the core of rank {rank}, {core:.3f} s each: {cores / 60:.1f} min."
    )
    print(f"A full float64 SVD for each of the pairs instead, {whole[square]:.0f} s for 4096 x 4096:")
    print(f"{naive / 60:.0f} minutes, {naive / (factors + cores):.0f} x as long;", end=" ")
    print(f"a pair by itself {whole[square] / core:.0f} x.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("# Truncated SVDs: block Krylov search against the exact route\n")
    print(f"`python benchmarks/factors.py`: torch {torch.__version__}, {torch.get_num_threads()} thread,")
    print(
        f"{platform.machine()}. CPU seconds (median of three weights) on a machine that others used at the same time."
    )
    print("Errors, relative to the exact route: |W - W^_r|_F; the distance of W_i to 0.7 W_i + 0.3 W_j; |D - B A|_F of")
    print("the adapter between them. The tolerance of all three is 1e-3.\n")
    print("| weight, rank | singular values | exact | search | ratio | tail | distance | adapter |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    seconds: dict[tuple[int, int], float] = {}
    for rows, columns, rank in SHAPES:
        for kind in KINDS if rows < 4096 else ["spiked noise"]:
            fast = compared(kind, rows, columns, rank)[1]
            if kind == "spiked noise":
                seconds[rows, columns] = fast
    whole = {}
    for rows, columns, _ in SHAPES:
        weight = torch.randn(rows, columns, dtype=torch.float64)
        whole[rows, columns] = cpu_seconds(lambda w=weight: torch.linalg.svd(w, full_matrices=False))[1]
    extrapolate(seconds, whole)


if __name__ == "__main__":
    main()
