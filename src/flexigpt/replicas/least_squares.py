"""Least squares from second moments, in their dtype."""

from typing import NamedTuple

import torch

# Of the inputs' mean variance, the weight of leaving a kept block's weight as it is.
_RIDGE = 0.1

# How often the damping of a matrix that is not positive definite with it grows tenfold.
_MOST_DAMPINGS = 4


class Moments(NamedTuple):
    """Second moments of a linear's inputs x and wished-for outputs y over calibration tokens.

    Attributes:
        inputs: C = E[x x^T], (inputs, inputs).
        targets: E[y x^T], (outputs, inputs).
    """

    inputs: torch.Tensor
    targets: torch.Tensor


def damped(moments: torch.Tensor, share: float, keeps: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """L, lower triangular, and d with L L^T = M + d I, of a matrix M of second moments.

    d is that share of M's mean eigenvalue, or more where rounding errors have left M less than none. Memory holds M, or
    L in its place, and one copy.

    Args:
        moments: M.
        share: of its mean eigenvalue.
        keeps: whether M stays as it is; L takes its memory otherwise.
    """
    copy = moments.clone()
    used, again = (copy, moments) if keeps else (moments, copy)
    damping = share * moments.diagonal().mean().clamp(min=1e-30)
    root, failed = used.mT, torch.zeros((), dtype=torch.int32, device=moments.device)
    for more in range(_MOST_DAMPINGS):
        if more:
            used.copy_(again)
            damping = 10 * damping
        used.diagonal().add_(damping)
        torch.linalg.cholesky_ex(root, out=(root, failed), check_errors=more + 1 == _MOST_DAMPINGS)
        if not failed.item():
            break
    return root, damping


def ridge_fit(
    weight: torch.Tensor | None, moments: Moments, ridge: float = _RIDGE, keeps: bool = False
) -> torch.Tensor:
    """The V that minimises E|y - V x|^2 + c |V - W|_F^2: what a kept linear becomes.

    Args:
        weight: W, (outputs, inputs), any dtype; None: nothing, which V is to be near.
        moments: of the linear. V takes the targets' memory.
        ridge: c, as a share of the inputs' mean variance.
        keeps: whether the inputs' moments stay as they are; their memory is used otherwise.

    Returns:
        V, (outputs, inputs), in the moments' dtype.
    """
    root, damping = damped(moments.inputs, ridge, keeps)
    found = moments.targets
    if weight is not None:
        found.add_(weight.to(found.dtype) * damping)
    torch.linalg.solve_triangular(root, found.T, upper=False, out=found.T)  # cholesky_solve would copy the root
    torch.linalg.solve_triangular(root.mT, found.T, upper=True, out=found.T)
    return found
