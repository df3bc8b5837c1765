"""Truncated SVDs, and what a rank-r adapter cannot mend between two low-rank matrices. All in float64."""

from typing import NamedTuple

import torch


class LowRank(NamedTuple):
    """The best rank-r approximation of a matrix, U diag(S) V^T.

    Attributes:
        left: U, (rows, r), orthonormal columns, float64.
        values: S, (r,), descending.
        right: V, (columns, r), orthonormal columns.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def matrix(self) -> torch.Tensor:
        """The product, (rows, columns)."""
        return (self.left * self.values) @ self.right.T


def truncated_svd(matrix: torch.Tensor, rank: int) -> LowRank:
    """The best rank-`rank` approximation (Eckart-Young).

    Through the eigenvectors of the smaller Gram matrix in float64: over twice as fast as an SVD. The singular values
    that are lost to squaring are those below 1e-8 of the largest; their directions come from a QR.

    Args:
        matrix: (rows, columns), any dtype.
        rank: at most the smaller side.
    """
    matrix = matrix.double()
    rows, columns = matrix.shape
    if rows < columns:
        right, values, left = truncated_svd(matrix.T, rank)
        return LowRank(left, values, right)
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    right = vectors[:, -rank:].flip(-1)
    # QR, not division by the singular values: columns stay orthonormal where a singular value is zero.
    left, triangle = torch.linalg.qr(matrix @ right)
    turn, values, back = torch.linalg.svd(triangle)
    return LowRank(left @ turn, values, right @ back.T)


def unmended(first: LowRank, second: LowRank) -> torch.Tensor:
    """|W^_i - (W^_j + D)|_F with D the best rank-r approximation of W^_i - W^_j (eq. 2-4); a float64 scalar.

    W^_i - W^_j = [U_i U_j] diag(S_i, -S_j) [V_i V_j]^T has rank 2r at most. With G the Gram matrices of the two stacked
    factors and G_U = R^T R, its squared singular values are the eigenvalues of R diag G_V diag R^T, which is 2r x 2r.
    """
    rank = len(first.values)
    weights = torch.cat((first.values, -second.values))
    core = weights[:, None] * _stacked_gram(first.right, second.right) * weights
    root = _stacked_root(first.left, second.left)
    squares = torch.linalg.eigvalsh(root @ core @ root.T)
    return squares[:-rank].clamp(min=0).sum().sqrt()


def _stacked_gram(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[A B]^T [A B] for A, B with orthonormal columns."""
    cross = first.T @ second
    identity = torch.eye(cross.shape[0], dtype=cross.dtype, device=cross.device)
    return torch.cat((torch.cat((identity, cross), 1), torch.cat((cross.T, identity), 1)), 0)


def _stacked_root(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """R with R^T R = [A B]^T [A B], block upper triangular; exists where A and B overlap as well."""
    cross = first.T @ second
    identity = torch.eye(cross.shape[0], dtype=cross.dtype, device=cross.device)
    values, vectors = torch.linalg.eigh(identity - cross.T @ cross)
    corner = values.clamp(min=0).sqrt()[:, None] * vectors.T
    return torch.cat((torch.cat((identity, cross), 1), torch.cat((torch.zeros_like(cross), corner), 1)), 0)


def tail_norm(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """|W - D|_F with D the best rank-`rank` approximation of W; a float64 scalar."""
    matrix = matrix.double()
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return torch.linalg.eigvalsh(gram)[:-rank].clamp(min=0).sum().sqrt()
