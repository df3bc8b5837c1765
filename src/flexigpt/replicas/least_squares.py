"""Low-rank least squares from second moments. All in float64."""

from typing import NamedTuple

import torch

from flexigpt.replicas.svd import truncated_svd

# Of the inputs' mean variance, the weight of an adapter that mends weights instead of outputs.
_DAMPING = 1e-3

# The same for a kept block's whole weight, which has more to lose.
_RIDGE = 0.1

# Of the mean weight of a linear's outputs, what is added to each: an output that no direction met is not given up.
_OUTPUT_DAMPING = 1e-2

# How often the damping of a matrix that is not positive definite with it grows tenfold.
_MOST_DAMPINGS = 4

# Scale and adapter of a base are fitted in turn: at most so often, or until the scale moves by less.
_SCALE_ROUNDS, _SCALE_TOLERANCE = 3, 1e-2


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


def damped(moments: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """L, lower triangular, and d with L L^T = M + d I, of a matrix M of second moments.

    d is that share of M's mean eigenvalue, or more where rounding errors have left M less than none.
    """
    damping = share * moments.diagonal().mean().clamp(min=1e-30)
    for more in range(_MOST_DAMPINGS):
        damping = 10 * damping if more else damping
        root = moments.clone()
        root.diagonal().add_(damping)
        root, failed = torch.linalg.cholesky_ex(root, check_errors=more + 1 == _MOST_DAMPINGS)
        if not failed.item():
            break
    return root, damping


def output_root(weights: torch.Tensor | None) -> torch.Tensor | None:
    """K with K^T K = G', the damped weights of a linear's outputs: |K E|_F^2 is what errors E weigh.

    Args:
        weights: G, (outputs, outputs), or its diagonal (outputs,); None: all outputs weigh alike.

    Returns:
        Upper triangular, (outputs, outputs), or its diagonal (outputs,), float64; or None.
    """
    if weights is None:
        return None
    if weights.ndim == 1:
        return (weights + _OUTPUT_DAMPING * weights.mean().clamp(min=1e-30)).sqrt()
    return damped(weights, _OUTPUT_DAMPING)[0].T


def weighed(root: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """K times a matrix of so many rows."""
    if root is None:
        return matrix
    return root[:, None] * matrix if root.ndim == 1 else root @ matrix


def _unweighed(root: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of K times a matrix of so many rows."""
    if root is None:
        return matrix
    return matrix / root[:, None] if root.ndim == 1 else torch.linalg.solve_triangular(root, matrix, upper=True)


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

    Reduced-rank regression (Izenman, 1975): with L L^T = C + c I, T = (E[y x^T] + c W_i) L^(-T) and S = W_j L,
    B A is the best rank-r approximation of T - s S, times L^(-1). For y = W_i x it truncates (W_i - s W_j) L.
    The second term decides in directions of x that calibration text never shows: there, with s = 1, the adapter is that
    of eq. 7-8. Where the base is scaled, s and B A are fitted in turn, each given the other: no turn leaves more than
    the one before. With weights G of the outputs, |.|^2 is e^T G e: the root of G is applied to T and S first and taken
    back from B.

    Args:
        pruned: W_i, (outputs, inputs), any dtype.
        base: W_j.
        moments: of the linear.
        rank: r.
        scaled: whether s is fitted; otherwise it is 1.
    """
    root, damping = damped(moments.inputs, _DAMPING)
    wanted = torch.linalg.solve_triangular(root.T, moments.targets + damping * pruned.double(), upper=True, left=False)
    outputs = output_root(moments.weights)
    wanted, given = weighed(outputs, wanted), weighed(outputs, base.double() @ root)
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
    down = torch.linalg.solve_triangular(root, fitted.right.T, upper=False, left=False)
    # Rows of A of length one, as in eq. 8: training moves both factors by steps of the same size.
    lengths = down.norm(dim=1).clamp(min=1e-30)
    up = fitted.left * fitted.values * lengths
    return FittedAdapter(down / lengths[:, None], _unweighed(outputs, up), scale)


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
    residual = moments.targets - kept @ moments.inputs
    return kept + torch.cholesky_solve(residual.T, damped(moments.inputs, _RIDGE)[0]).T
