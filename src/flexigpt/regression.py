"""Low-rank least squares from second moments. All in float64."""

from typing import NamedTuple

import torch

from flexigpt.factorization import truncated_svd

# Of the inputs' mean variance, the weight of an adapter that mends weights instead of outputs.
_DAMPING = 1e-3
# The same for a kept block's whole weight, which has more to lose.
_RIDGE = 0.1
# Of the mean weight of a linear's outputs, what is added to each: an output that no direction met is not given up.
_OUTPUT_DAMPING = 1e-2

# Scale and adapter of a base are fitted in turn: at most so often, or until the scale moves by less.
_SCALE_ROUNDS = 3
_SCALE_TOLERANCE = 1e-2


class Moments(NamedTuple):
    """Second moments of a linear's inputs x and wished-for outputs y over calibration tokens, float64.

    Attributes:
        inputs: C = E[x x^T], (inputs, inputs).
        targets: E[y x^T], (outputs, inputs), y without the bias.
        weights: G, what errors of y weigh: (outputs, outputs), or its diagonal (outputs,); None: all alike.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None


class RunningSum:
    """Adds up float32 tensors in float64.

    Attributes:
        total: of what was added, on its device.
    """

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """One more of the same shape."""
        self.total = self.total.to(values.device) + values.double()


class _Damped(NamedTuple):
    """C' = C + c I, its eigenvalues and eigenvectors; what is below zero in C is rounding."""

    values: torch.Tensor
    vectors: torch.Tensor
    damping: torch.Tensor


def _damped(inputs: torch.Tensor) -> _Damped:
    values, vectors = torch.linalg.eigh(inputs)
    damping = _DAMPING * values.clamp(min=0).mean().clamp(min=1e-30)
    return _Damped(values.clamp(min=0) + damping, vectors, damping)


def damped_root(inputs: torch.Tensor) -> torch.Tensor:
    """R with R R^T = C', the damped second moment that `low_rank_fit` fits to; exists where C is singular.

    `low_rank_fit` minimises |(W_i - W_j - B A) R|_F^2 for y = W_i x: what it leaves is the tail of (W_i - W_j) R beyond
    the r leading singular values.

    Args:
        inputs: C, (inputs, inputs), float64; its scale is that of R^2.
    """
    found = _damped(inputs)
    return found.vectors * found.values.sqrt()


class OutputRoot(NamedTuple):
    """K with K^T K = G', the damped weights of a linear's outputs: |K E|_F^2 is what errors E weigh.

    Attributes:
        root: K, (outputs, outputs), or its diagonal (outputs,), float64.
        inverse: of K, likewise.
    """

    root: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, weights: torch.Tensor) -> "OutputRoot":
        """Of G, (outputs, outputs), or its diagonal (outputs,)."""
        values, vectors = (weights, None) if weights.ndim == 1 else torch.linalg.eigh(weights)
        values = values.clamp(min=0)
        values = (values + _OUTPUT_DAMPING * values.mean().clamp(min=1e-30)).sqrt()
        if vectors is None:
            return cls(values, 1 / values)
        return cls(values[:, None] * vectors.T, vectors / values)

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """K times a matrix of so many rows."""
        return _times(self.root, matrix)

    def undone(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of K times a matrix of so many rows."""
        return _times(self.inverse, matrix)


def _times(root: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return root[:, None] * matrix if root.ndim == 1 else root @ matrix


class FittedAdapter(NamedTuple):
    """What `low_rank_fit` finds, float64.

    Attributes:
        down: A (r, inputs), its rows of length one.
        up: B (outputs, r).
        scale: s, (1,).
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor


def low_rank_fit(
    pruned: torch.Tensor, base: torch.Tensor, moments: Moments, rank: int, scaled: bool = False
) -> FittedAdapter:
    """The adapter that minimises E|y - (s W_j + B A) x|^2 + c |W_i - s W_j - B A|_F^2 with a small c.

    Reduced-rank regression (Izenman, 1975): with C' = C + c I, T = (E[y x^T] + c W_i) C'^(-1/2) and S = W_j C'^(1/2),
    B A is the best rank-r approximation of T - s S, times C'^(-1/2). For y = W_i x it truncates (W_i - s W_j) C'^(1/2).
    The second term decides in directions of x that calibration text never shows: there, with s = 1, the adapter is that
    of eq. 7-8. Where the base is scaled, s and B A are fitted in turn, each given the other: no turn leaves more than
    the one before. With weights G of the outputs, |.|^2 is e^T G e: the root of G is
    applied to T and S first and taken back from B.

    Args:
        pruned: W_i, (outputs, inputs), any dtype.
        base: W_j.
        moments: of the linear.
        rank: r.
        scaled: whether s is fitted; otherwise it is 1.
    """
    values, vectors, damping = _damped(moments.inputs)
    inverse_root = (vectors * values.rsqrt()) @ vectors.T
    wanted = (moments.targets + damping * pruned.double()) @ inverse_root
    given = base.double() @ ((vectors * values.sqrt()) @ vectors.T)
    root = None if moments.weights is None else OutputRoot.of(moments.weights)
    if root is not None:
        wanted, given = root.times(wanted), root.times(given)
    one = torch.ones(1, dtype=torch.float64, device=wanted.device)
    # What would be best without an adapter: from 1 the turns can end at a worse place.
    scale = least_squares_scale(wanted, given) if scaled else one
    fitted = truncated_svd(wanted - scale * given, rank)
    for _ in range(_SCALE_ROUNDS if scaled else 0):
        before = scale
        scale = least_squares_scale(wanted - (fitted.left * fitted.values) @ fitted.right.T, given)
        fitted = truncated_svd(wanted - scale * given, rank)
        if (scale - before).abs() <= _SCALE_TOLERANCE:
            break
    down = fitted.right.T @ inverse_root
    # Rows of A of length one, as in eq. 8: training moves both factors by steps of the same size.
    lengths = down.norm(dim=1).clamp(min=1e-30)
    up = fitted.left * fitted.values * lengths
    return FittedAdapter(down / lengths[:, None], up if root is None else root.undone(up), scale)


def least_squares_scale(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The s that minimises |wanted - s given|_F: (1,), float64."""
    wanted, given = wanted.double(), given.double()
    return ((wanted * given).sum() / given.square().sum().clamp(min=1e-30)).view(1)


def ridge_fit(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The V that minimises E|y - V x|^2 + c |V - W|_F^2: what a kept linear becomes.

    Args:
        weight: W, (outputs, inputs), any dtype.
        moments: of the linear.

    Returns:
        V, (outputs, inputs), float64.
    """
    kept = weight.double()
    damping = _RIDGE * moments.inputs.diagonal().mean().clamp(min=1e-30)
    damped = moments.inputs + damping * torch.eye(len(moments.inputs), dtype=torch.float64, device=weight.device)
    residual = moments.targets - kept @ moments.inputs
    return kept + torch.linalg.solve(damped, residual, left=False)
