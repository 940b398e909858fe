"""Distributions in the plane for toy.py: noise, the data sets, and the one flow between them that is known exactly."""
import numpy as np
import torch

# of the data set "gaussian": centre, turn, its two axes
MEAN, ANGLE, DEVIATIONS = (2.5, 1.5), 0.6, (2.0, 0.5)


# --- X0 ~ N(0, I), and X1, one of these ---

def eight_gaussians(rng, n):
    label = rng.integers(8, size=n)
    return (4 * np.stack([np.cos(label * np.pi / 4), np.sin(label * np.pi / 4)], 1)
            + 0.3 * rng.standard_normal((n, 2)), label)


def moons(rng, n):
    label, turn = rng.integers(2, size=n), np.pi * rng.random(n)
    upper = np.stack([np.cos(turn) - 0.5, np.sin(turn) - 0.25], 1)
    return 3 * np.where(label[:, None] == 0, upper, -upper) + 0.2 * rng.standard_normal((n, 2)), label


def checkerboard(rng, n):
    label = rng.integers(8, size=n)                        # the dark squares of a board of 4 x 4
    row = label // 2
    return 2 * (np.stack([2 * (label % 2) + row % 2, row], 1) + rng.random((n, 2)) - 2), label


def spirals(rng, n):
    label, turn = rng.integers(2, size=n), 3 * np.pi * np.sqrt(rng.random(n))
    arm = np.stack([np.cos(turn), np.sin(turn)], 1) * (turn * 4 / (3 * np.pi))[:, None]
    return np.where(label[:, None] == 0, arm, -arm) + 0.12 * rng.standard_normal((n, 2)), label


def gaussian(rng, n):
    return rng.standard_normal((n, 2)) @ root_covariance() + MEAN, np.zeros(n, np.int64)


# a function of (rng, n) -> points [n, 2] and the part of the data that each lies in [n]; how many parts there are
DATA = {"8gaussians": (eight_gaussians, 8), "moons": (moons, 2), "checkerboard": (checkerboard, 8),
        "spirals": (spirals, 2), "gaussian": (gaussian, 1)}


def draw(name, rng, n):
    """n points of a data set -> float32 [n, 2], and which part of it each lies in, int64 [n]."""
    x, label = DATA[name][0](rng, n)
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(label)


def gauss(rng, n):
    """n draws of N(0, I) -> float32 [n, 2]."""
    return torch.from_numpy(rng.standard_normal((n, 2), dtype=np.float32))


# --- the one case that is known exactly: N(0, I) -> N(m, C) ---

def root_covariance():
    """C^1/2 of the data set "gaussian", [2, 2]."""
    turn = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
    return turn * DEVIATIONS @ turn.T


def exact_velocity(x, t):
    """E[X1 - X0 | X_t = x] = m + (t C - (1 - t) I) ((1 - t)^2 I + t^2 C)^-1 (x - t m): both matrices share C's axes."""
    m, root = torch.tensor(MEAN, dtype=x.dtype), torch.from_numpy(root_covariance()).to(x.dtype)
    variance, axes = torch.linalg.eigh(root @ root)
    s = t.to(x.dtype)[:, None]
    return m + ((s * variance - (1 - s)) / ((1 - s) ** 2 + s ** 2 * variance) * ((x - s * m) @ axes)) @ axes.T
