"""The Fréchet distance against closed forms and scipy's matrix root."""
import numpy as np
import pytest
import scipy.linalg

import fid


def spd(rng, d):
    x = rng.standard_normal((2 * d, d))
    return x.T @ x / d


def test_statistics_are_numpys():
    features = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32) + 1000     # float32 sums would be off here
    mu, sigma = fid.statistics(features)
    assert mu.dtype == sigma.dtype == np.float64
    centred = features.astype(np.float64) - features.astype(np.float64).mean(0)
    assert np.abs(sigma - centred.T @ centred / 49).max() < 1e-12
    with pytest.raises(ValueError):
        fid.statistics(features[:1])


def test_equal_covariances_leave_the_means():
    rng = np.random.default_rng(1)
    s, a, b = spd(rng, 16), rng.standard_normal(16), rng.standard_normal(16)
    assert fid.frechet_distance(a, s, b, s) == pytest.approx(((a - b) ** 2).sum(), rel=1e-9)
    assert abs(fid.frechet_distance(a, s, a, s)) < 1e-6 * np.trace(s)


def test_commuting_covariances():
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    p, r = rng.uniform(0, 3, 12), rng.uniform(0, 3, 12)
    zero = np.zeros(12)
    assert fid.frechet_distance(zero, q * p @ q.T, zero, q * r @ q.T) == pytest.approx(((p ** .5 - r ** .5) ** 2).sum(), rel=1e-9)


def test_rank_deficient():
    """Covariances u u^T and w w^T: tr (S1 S2)^1/2 = |u . w|."""
    rng = np.random.default_rng(3)
    u, w, zero = rng.standard_normal(20), rng.standard_normal(20), np.zeros(20)
    exact = u @ u + w @ w - 2 * abs(u @ w)
    assert fid.frechet_distance(zero, np.outer(u, u), zero, np.outer(w, w)) == pytest.approx(exact, rel=1e-6)


def test_against_scipys_matrix_root():
    rng = np.random.default_rng(4)
    s1, s2, a, b = spd(rng, 64), spd(rng, 64), rng.standard_normal(64), rng.standard_normal(64)
    theirs = ((a - b) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(a, s1, b, s2) == pytest.approx(theirs, rel=1e-6)
