"""The Fréchet distance between two sets of features (Heusel et al. 2017, equation 6), in float64."""
import numpy as np


def statistics(features):
    """Features [N, D] -> (mu [D], sigma [D, D]), float64, the covariance with ddof 1. Raises ValueError for N < 2."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features are of shape {list(features.shape)}; [N, D] with N of at least 2 is needed")
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) -> float. The last trace is the sum of the roots of the eigenvalues of
    the symmetric S1^1/2 S2 S1^1/2, which are those of S1 S2: real, and defined for singular covariances too."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    product = np.linalg.eigvalsh(root @ sigma2 @ root)
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(product.clip(0)).sum())
