"""Truncated SVDs, and what a rank-r adapter cannot mend between two low-rank matrices. Results are float64."""

import math
from typing import NamedTuple

import torch

# Up to this smaller side, and from this share of it as rank, the exact route takes no longer than the other.
_EXACT_SIDE, _EXACT_RANK_SHARE = 512, 0.2

# Of |W - W^_r|_F^2, what the search may have missed. Distances, the most sensitive, are then right to 0.1 %.
_TOLERANCE = 1e-4

# Of |W|_F^2, the least |W - W^_r|_F^2 that float32 resolves.
_LEAST_TAIL = 1e-4

# The search, in directions: first looked at with so many for each of the rank, then grown by so large a share at most.
_FIRST_CHECK, _SECOND_CHECK, _LARGEST_STEP = 2.5, 3.0, 0.3

# Steps that fresh directions are followed for; how many times the tolerance may still be missing when they are added.
_PROBE_STEPS, _PROBE_FROM = 3, 3

# Rows count as orthogonal to Q once a pass leaves so much of each.
_UNCHANGED, _MOST_PASSES = 0.7, 6


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

    By `krylov_svd` where the matrix is large and that attains its accuracy, by `exact_svd` everywhere else.

    Args:
        matrix: (rows, columns), any dtype.
        rank: at most the smaller side.
    """
    found = krylov_svd(matrix, rank) if _is_large(matrix, rank) else None
    return exact_svd(matrix, rank) if found is None else found


def exact_svd(matrix: torch.Tensor, rank: int) -> LowRank:
    """`truncated_svd` in float64 to the last digits.

    Through the eigenvectors of the smaller Gram matrix: over twice as fast as an SVD. The singular values that are lost
    to squaring are those below 1e-8 of the largest; their directions come from a QR.
    """
    matrix = matrix.double()
    rows, columns = matrix.shape
    if rows < columns:
        right, values, left = exact_svd(matrix.T, rank)
        return LowRank(left, values, right)
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    right = vectors[:, -rank:].flip(-1)
    return _with_left(right, matrix @ right)


def krylov_svd(matrix: torch.Tensor, rank: int) -> LowRank | None:
    """`truncated_svd` by block Krylov search in float32: W is read a few dozen times, no Gram matrix of it is made.

    The search ends where at most 1e-4 of the energy of the tail, |W - W^_r|_F^2, can have been missed: by the bound of
    `_Krylov.leading`, which needs no gap at r, and after fresh random directions have been added to the block and
    followed for three steps without finding more (a value that repeats more often than the block is wide shows itself
    only then). |W - W^_r|_F is then right to 5e-5, and distances between such factors to 1e-3, as measured in
    benchmarks/factors.py. The same matrix gives the same factors: the directions come from a generator of fixed seed.
    Products must be of float32 and not of TF32, torch's default.

    Args:
        matrix: (rows, columns), any dtype.
        rank: well below the smaller side.

    Returns:
        None where that is not attained: a zero matrix, a tail below 1 % of |W|_F, which float32 cannot resolve, or a
        search that would span half of the space.
    """
    matrix = matrix.detach()
    if matrix.shape[0] < matrix.shape[1]:
        found = krylov_svd(matrix.T, rank)
        return None if found is None else LowRank(found.right, found.values, found.left)
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float64)
    if not 0 < norm < math.inf:
        return None
    # Of norm 1: neither squares of tiny entries vanish, nor those of huge ones overflow.
    unit = (matrix.to(torch.promote_types(matrix.dtype, torch.float32)) / norm).float()
    search = _Krylov(unit, rank)
    leading = _searched(search)
    if leading is None:
        return None
    captured, vectors = leading
    factors = _with_left(*search.directions(vectors))
    if captured - factors.values.square().sum() > _TOLERANCE * (1 - captured):  # Q was not orthonormal
        return None
    return LowRank(factors.left, factors.values * norm, factors.right)


def _is_large(matrix: torch.Tensor, rank: int) -> bool:
    side = min(matrix.shape)
    return side > _EXACT_SIDE and rank < _EXACT_RANK_SHARE * side


def _with_left(right: torch.Tensor, products: torch.Tensor) -> LowRank:
    """Factors of `products` @ `right`.T; `right` has orthonormal columns."""
    # QR, not division by the singular values: columns stay orthonormal where a singular value is zero.
    left, triangle = torch.linalg.qr(products)
    turn, values, back = torch.linalg.svd(triangle)
    return LowRank(left @ turn, values, right @ back.T)


class _Krylov:
    """Orthonormal directions Q of the smaller side, grown block by block, and W Q.

    Everything lies in rows, as matrix products of few rows are fastest so.

    Attributes:
        size: directions in Q.
        limit: directions at most.
    """

    def __init__(self, matrix: torch.Tensor, rank: int) -> None:
        """matrix: W of norm 1, (rows, columns), float32, no fewer rows than columns."""
        rows, columns = matrix.shape
        self.matrix, self.rank = matrix, rank
        # Narrow blocks need fewer directions in all, wide ones multiply faster.
        self.width = max(8, rank // 8)
        self.limit, self.size = columns // 2, 0
        self.generator = torch.Generator().manual_seed(0)
        self.basis = matrix.new_empty(self.limit, columns)
        self.products = matrix.new_empty(self.limit, rows, dtype=torch.float64)
        self.gram = matrix.new_empty(self.limit, self.limit, dtype=torch.float64)
        self.block = matrix.new_empty(0, columns)
        self.coupling = self.gram
        self.widen()

    def widen(self) -> None:
        """Adds random directions to the block."""
        fresh = torch.randn(self.width, self.matrix.shape[1], generator=self.generator).to(self.matrix.device)
        self.block, _ = self._orthonormal(torch.cat((self.block, fresh / fresh.norm(dim=1, keepdim=True))))

    def grow(self) -> None:
        """Takes the block into Q; the next one is what W^T W makes of it and Q does not hold."""
        start, end = self.size, self.size + len(self.block)
        product = self.block @ self.matrix.T
        self.basis[start:end], self.products[start:end] = self.block, product
        self.gram[start:end, :end] = self.products[start:end] @ self.products[:end].T
        self.gram[:start, start:end] = self.gram[start:end, :start].T
        self.size = end
        self.block, coupling = self._orthonormal(product @ self.matrix)
        self.coupling = coupling.double()

    def grow_to(self, size: int) -> bool:
        """Whether so many directions, or a block more, are within the limit."""
        while self.size < size:
            if self.size + len(self.block) > self.limit:
                return False
            self.grow()
        return True

    def leading(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The largest r eigenvalues of Q^T W^T W Q, descending, their vectors, and what their sum can lack.

        With Y the vectors, R = W^T W Q Y - Q Y diag(values) is what couples them to the rest of the space, and only the
        last block has any. Without it they would be eigenvectors; it raises the sum of the largest r by |R|_* at most
        (Ky Fan's norms are norms), if nothing larger hides in the rest. Rounding errors of float32 come on top.
        """
        values, vectors = torch.linalg.eigh(self.gram[: self.size, : self.size])
        values, vectors = values[-self.rank :].flip(0).clamp(min=0), vectors[:, -self.rank :].flip(1)
        last = vectors[self.size - self.coupling.shape[1] :]
        missing = torch.linalg.matrix_norm(self.coupling @ last, "nuc")
        rounding = torch.finfo(torch.float32).eps / 2 * values[0].sqrt() * values.sqrt().sum()
        return values, vectors, (missing + rounding).item()

    def directions(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Orthonormal columns that span Q `vectors`, and W times them, both float64."""
        right, triangle = torch.linalg.qr(self.basis[: self.size].double().T @ vectors)
        products = self.products[: self.size].T @ vectors
        return right, torch.linalg.solve_triangular(triangle, products, upper=True, left=False)

    def _orthonormal(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Orthonormal Z, orthogonal to Q, and C with `rows` = C^T Z + what lies in Q."""
        basis = self.basis[: self.size]
        coupling = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        for _ in range(_MOST_PASSES):
            columns, triangle = torch.linalg.qr((rows - (rows @ basis.T) @ basis).T)
            rows, coupling = columns.T.contiguous(), triangle @ coupling
            # What rounding errors leave of a row that lies in Q lies in Q as well, and takes more passes.
            if triangle.diagonal().abs().min() > _UNCHANGED:
                break
        return rows, coupling


def _searched(search: _Krylov) -> tuple[float, torch.Tensor] | None:
    """Grows the search until it holds the leading directions: their share of |W|_F^2, and their vectors in Q.

    None where it does not succeed.
    """
    target = math.ceil(_FIRST_CHECK * search.rank)
    before: tuple[int, float] | None = None
    captured_before_probe: float | None = None
    while search.grow_to(target):
        values, vectors, missing = search.leading()
        captured = values.sum().item()
        tail = 1 - captured
        if not tail > _LEAST_TAIL:
            return None
        share, goal = missing / tail, _TOLERANCE
        if captured_before_probe is None:
            goal *= _PROBE_FROM
        if share > goal:
            target = _next_check(before, (search.size, share), goal, search.rank)
        elif captured_before_probe is not None and captured - captured_before_probe <= goal * tail:
            return captured, vectors
        else:
            captured_before_probe = captured
            search.widen()
            target = search.size + _PROBE_STEPS * len(search.block)
        before = search.size, share
    return None


def _next_check(before: tuple[int, float] | None, now: tuple[int, float], goal: float, rank: int) -> int:
    """The size of Q at which the share that is missing, which falls by a factor for each direction, is in reach."""
    size, share = now
    if before is None:
        return max(size + 1, math.ceil(_SECOND_CHECK * rank))
    step = _LARGEST_STEP * size
    if before[1] > share:
        falling = math.log(before[1] / share) / (size - before[0])
        step = min(step, math.log(share / goal) / falling)
    return size + max(1, math.ceil(step))


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
    """|W - D|_F with D the best rank-`rank` approximation of W, as exact as `truncated_svd`; a float64 scalar."""
    found = krylov_svd(matrix, rank) if _is_large(matrix, rank) else None
    if found is not None:
        norm = torch.linalg.vector_norm(matrix, dtype=torch.float64)
        return (norm.square() - found.values.square().sum()).sqrt()
    matrix = matrix.double()
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return torch.linalg.eigvalsh(gram)[:-rank].clamp(min=0).sum().sqrt()
