"""Repeated self-distillation of kernel regression collapses; TAID's moving target does not.

The setting of Mobahi, Farajtabar and Bartlett (2020, arXiv 2002.05715): of all functions whose mean
squared error on N targets is at most a tolerance eps, a round of training gives the one of the
smallest norm in the kernel's space. In the basis of the kernel's eigenvectors (eigenvalues d) it
turns targets z into A z with A = d / (c + d), c >= 0 such that |z - A z|^2 = N eps; where
|z|^2 <= N eps it is the zero function: the collapse. Self-distillation gives each round the
answers of the one before as targets. TAID (Shing et al. 2025, arXiv 2501.16937) gives round t of T
the targets (1 - t/T) A z + (t/T) z_0. Norms are in units of sqrt(N eps), written r; kappa is the
largest eigenvalue over the smallest. Everything is float64; statements are derived in
docs/theory.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from w2s_jax.errors import UserError

HALVINGS = 200


@dataclass(frozen=True)
class Course:
    """Targets of rounds 0 to T in the eigenbasis, [T+1,N], and the multipliers c [T] of the fits
    (inf where the fit is the zero function)."""

    targets: np.ndarray
    multipliers: np.ndarray
    tolerance: float

    @property
    def ratios(self) -> np.ndarray:
        """r [T+1]: the norm of each round's targets in units of sqrt(N eps)."""
        size = self.targets.shape[1]
        return np.linalg.norm(self.targets, axis=1) / np.sqrt(size * self.tolerance)

    @property
    def collapse(self) -> int | None:
        """The first round whose targets the zero function fits (r <= 1), or None."""
        low = np.flatnonzero(self.ratios <= 1)
        return int(low[0]) if len(low) else None


def eigenbasis(gram: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues d [N] of a kernel matrix [N,N] and targets [N] in its eigenbasis.

    Raises:
      UserError: the matrix is not symmetric and positive definite.
    """
    if gram.shape != (len(targets),) * 2 or not np.allclose(gram, gram.T):
        raise UserError(f"a kernel matrix is symmetric [N,N] with N={len(targets)} targets")
    values, vectors = np.linalg.eigh(gram)
    if values[0] <= 0:
        raise UserError(f"the kernel matrix has an eigenvalue {values[0]:g}: none may be 0 or less")
    return values, vectors.T @ targets


def multiplier(targets: np.ndarray, values: np.ndarray, tolerance: float) -> float:
    """c of the fit to targets [N] with eigenvalues [N]; inf where the zero function fits them."""
    limit = len(targets) * tolerance
    if targets @ targets <= limit:
        return np.inf
    # from |A z - z| between those of the smallest and the largest eigenvalue alone
    above = np.sqrt(targets @ targets / limit) - 1
    low, high = values.min() / above, values.max() / above
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        missed = targets * middle / (middle + values)
        low, high = (middle, high) if missed @ missed < limit else (low, middle)
    return float((low + high) / 2)


def self_distillation(
    targets: np.ndarray, values: np.ndarray, tolerance: float, rounds: int
) -> Course:
    """Each round's targets are the answers of the one before: z_t = A_t z_{t-1}."""
    return _course(targets, values, tolerance, np.zeros(rounds))


def taid(targets: np.ndarray, values: np.ndarray, tolerance: float, rounds: int) -> Course:
    """Round t has the targets z_t = (1 - t/T) A_t z_{t-1} + (t/T) z_0, with T ``rounds``."""
    return _course(targets, values, tolerance, np.arange(1, rounds + 1) / rounds)


def _course(
    targets: np.ndarray, values: np.ndarray, tolerance: float, shares: np.ndarray
) -> Course:
    """Rounds that mix the share of the first targets into the answers."""
    if tolerance <= 0 or values.min() <= 0:
        raise UserError("the tolerance and the eigenvalues must be above 0")
    seen, multipliers = [np.asarray(targets, np.float64)], []
    for share in shares:
        multipliers.append(multiplier(seen[-1], values, tolerance))
        kept = values / (multipliers[-1] + values)  # 0 where c is inf
        seen.append((1 - share) * kept * seen[-1] + share * seen[0])
    return Course(np.stack(seen), np.array(multipliers), tolerance)


def collapse_window(ratio: float, kappa: float) -> tuple[float, float]:
    """Self-distillation that starts at r collapses at a round in [r - 1, kappa (r - 1) + 1].

    A fit misses its targets by exactly 1, so r falls by 1 a round at most; and by 1 / kappa at
    least. With kappa = 1 it is round ceil(r - 1).
    """
    return ratio - 1, kappa * (ratio - 1) + 1


def taid_floor(ratio: float, rounds: int) -> np.ndarray:
    """What r stays above in rounds 0 to T of TAID, [T+1]: max((t/T) r, r - e_t).

    e_t = (1 - t/T) (1 + e_{t-1}), e_0 = 0, bounds the distance from the first targets; it never
    exceeds sqrt(T), so TAID that starts above 1 + sqrt(T) never collapses.
    """
    floor, strayed = [ratio], 0.0
    for share in np.arange(1, rounds + 1) / rounds:
        strayed = (1 - share) * (1 + strayed)
        floor.append(max(share * ratio, ratio - strayed))
    return np.array(floor)
