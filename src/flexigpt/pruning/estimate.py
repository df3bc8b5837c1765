"""What pruning will read, write, hold in memory and take in time, told before it starts."""

import time
from dataclasses import dataclass

import torch

from flexigpt.pruning.options import ScoringOptions
from flexigpt.pruning.scores import MOST_WINDOWS, REMOVAL_SCORE
from flexigpt.pruning.source import CheckedSource
from flexigpt.replicas import HIDDEN_COPIES
from flexigpt.runtime import find_device, workers_of

# Python, torch and transformers, with nothing loaded.
_LIBRARIES = 600 * 2**20

# Of one truncated SVD for each number of the weight and each rank; 60 to 90 in benchmarks/factors.py.
_FACTOR_FLOPS = 70

# Copies of the largest linear that factoring it or initialising its adapter holds, in bytes a number.
_FACTOR_BYTES = 28

# Passes of calibration text through a block, of each kind, that a fit takes, one backward among them.
_FIT_PASSES = 14

# What a fit holds of float64 numbers: moments of the widest inputs, and copies of the largest linear; and by how much a
# backward pass multiplies a block's activations.
_FIT_MOMENTS, _FIT_LINEARS = 3, 6

_BACKWARD = 3

# Of the eigendecomposition of an n x n matrix in float64, by n^3; and what it holds beside it, in bytes a number.
_EIGEN_FLOPS = 40

_EIGEN_BYTES = 40

# Float32 tensors of the MLP's width that a block holds while it runs on one batch of 2048 tokens.
_ACTIVATIONS = 6 * 2048 * 4

_PROBE_SIDE, _PROBES = 1024, 3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes if nothing that it needs is in the cache, perplexities left out.

    Attributes:
        read: bytes of weights, each as often as it is read.
        written: bytes of the checkpoint.
        scratch: bytes in the cache folder at a time.
        memory: bytes at the peak, file-backed ones included.
        seconds: on this machine as it is.
    """

    read: int
    written: int
    scratch: int
    memory: int
    seconds: float

    def line(self) -> str:
        """All of it in one line."""
        scratch = f" and {_size(self.scratch)} of scratch files" if self.scratch >= 1e6 else ""
        return (
            f"reads {_size(self.read)}, writes {_size(self.written)}{scratch}, takes at most about "
            f"{_size(self.memory)} of memory and {_duration(self.seconds)}, less where results are in the cache"
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done.

    Attributes:
        tokens: of calibration text, none where it is not run through the blocks.
        factors: whether distances between low-rank factors are measured.
        activations: pruned blocks whose distances are measured on what calibration text makes of weights.
        removals: blocks that are chosen one after the other, by perplexity without them.
        replicas: number of them to be made.
        rank: of factors and adapters.
        spreads: whether each adapter gets a rank of its own.
        written: bytes of the checkpoint.
    """

    tokens: int
    factors: bool = False
    activations: int = 0
    removals: int = 0
    replicas: int = 0
    rank: int = 0
    spreads: bool = False
    written: int = 0


def estimate(checked: CheckedSource, options: ScoringOptions, work: Work) -> Estimate:
    """What that work takes: bytes by arithmetic, time by the arithmetic of its FLOPs and a short measurement.

    Args:
        checked: the source.
        options: of the run.
        work: what is to be done.
    """
    shape, itemsize, depth = checked.shape, checked.itemsize, checked.depth
    blocks = depth * shape.block_parameters
    linears = shape.linear_parameters * itemsize
    largest = max(outputs * inputs for outputs, inputs in shape.linears.values())
    read = shape.parameters * itemsize + work.written  # checked once; copied once
    flops = 0.0
    if work.tokens:
        read += blocks * itemsize
        flops += 2.0 * blocks * work.tokens
    if work.removals:
        flops += _choosing_flops(checked, options, work)
    if work.factors:
        read += depth * linears
        flops += _FACTOR_FLOPS * depth * shape.linear_parameters * work.rank
    if work.activations:
        read += blocks * itemsize + work.activations * (1 + depth - work.activations) * linears
        flops += _activation_flops(checked, work)
    read += 4 * work.replicas * linears  # adapters, and what they mend
    flops += _FACTOR_FLOPS * work.replicas * shape.linear_parameters * work.rank
    if work.spreads:
        read += blocks * itemsize
        flops += _spreading_flops(checked, work)
    if options.fits:
        fitted = depth if options.refit_kept else work.replicas
        flops += 2.0 * shape.block_parameters * work.tokens * (2 * depth + _FIT_PASSES * fitted)
    copies = HIDDEN_COPIES if options.fits else 1
    hidden = copies * work.tokens * shape.hidden_size * itemsize
    scratch = 0
    if work.factors:
        scratch = max(depth * work.rank * 8 * sum(size) for size in shape.linears.values())
    if checked.needs_file(copies * work.tokens):
        scratch, hidden = max(scratch, hidden), 0
    widest = max(max(size) for size in shape.linears.values())
    running = 2 * shape.block_parameters * itemsize + 4 * largest + _ACTIVATIONS * widest + hidden
    if options.fits or work.spreads:
        inputs = max(inputs for _, inputs in shape.linears.values())
        running += 8 * (_FIT_MOMENTS * inputs**2 + _FIT_LINEARS * largest) + (_BACKWARD - 1) * _ACTIVATIONS * widest
    if work.activations:
        squares = [inputs * inputs for _, inputs in shape.linears.values()]
        running += 8 * sum(squares) + max(_EIGEN_BYTES * max(squares), _FACTOR_BYTES * largest)
    outside = (shape.parameters - blocks) * itemsize
    workers = workers_of(find_device(options.device))
    factoring = workers * _FACTOR_BYTES * largest if work.factors or work.replicas else 0
    return Estimate(
        read=read,
        written=work.written,
        scratch=scratch,
        memory=_LIBRARIES + outside + max(running, factoring),
        seconds=flops / matmul_rate(find_device(options.device)),
    )


def _choosing_flops(checked: CheckedSource, options: ScoringOptions, work: Work) -> float:
    """Of judging every block in every step, without it or with its replica."""
    depth = checked.depth
    judged = min(work.tokens, MOST_WINDOWS * checked.window_length)
    a_pass = 2.0 * checked.shape.block_parameters * judged
    if options.block_score == REMOVAL_SCORE:  # text runs through what is behind the candidate: half, on average
        return work.removals * depth * a_pass * depth / 2
    fitting = 2 * depth + _FIT_PASSES * work.removals / 2 if options.fits else 0.0
    return work.removals * depth * a_pass / 2 * (depth + fitting)  # half of the text to fit, half to judge


def _activation_flops(checked: CheckedSource, work: Work) -> float:
    """Of text through the blocks once and, for each pruned block, roots of moments, products with them, and tails."""
    shape, candidates = checked.shape, checked.depth - work.activations
    flops = 2.0 * checked.depth * shape.block_parameters * work.tokens
    for outputs, inputs in shape.linears.values():
        root = 2.0 * work.tokens * inputs**2 + _EIGEN_FLOPS * inputs**3
        products = 4.0 * outputs * inputs**2 * (1 + candidates)  # in float64, at half the rate
        flops += work.activations * (root + products + _FACTOR_FLOPS * outputs * inputs * work.rank * candidates)
    return flops


def _spreading_flops(checked: CheckedSource, work: Work) -> float:
    """Of text through the blocks once, thrice more through those replaced, and singular values of their linears."""
    shape = checked.shape
    flops = 2.0 * (checked.depth + 3 * work.replicas) * shape.block_parameters * work.tokens
    for outputs, inputs in shape.linears.values():
        least = min(outputs, inputs)
        products = 4.0 * outputs * inputs * (2 * inputs + least)  # in float64, at half the rate
        flops += work.replicas * (2.0 * work.tokens * inputs**2 + products + _EIGEN_FLOPS / 2 * least**3)
    return flops


def matmul_rate(device: torch.device) -> float:
    """FLOPs a second of a float32 matrix product of that device, the best of three."""
    side = torch.ones(_PROBE_SIDE, _PROBE_SIDE, device=device)
    best = 0.0
    for _ in range(_PROBES):
        began = time.perf_counter()
        (side @ side)[0, 0].item()
        best = max(best, 2 * _PROBE_SIDE**3 / (time.perf_counter() - began))
    return best


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
