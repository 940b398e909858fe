"""The mathematics of rectified flow (InstaFlow section 2; Liu et al. 2022), for any velocity v(x, t).

One convention everywhere: t = 0 is noise, t = 1 is the image, and a velocity points from noise to image.
x is [B, ...], t is float [B] in [0, 1], v(x, t) has the shape of x. Nothing changes its arguments in place.
"""
import numpy as np
import torch


def noise(stream, seed, index, shape):
    """X0 ~ N(0, I), named by stream, seed and index: float32 tensor of `shape`,
    the same on any device and in any batch.

    stream: 0 sampling and evaluation, 1 pair generation, so that no student is evaluated on noise that it was trained
    on; seed and index: whole numbers >= 0. Raises ValueError where one is negative.
    """
    return torch.from_numpy(np.random.default_rng([stream, seed, index]).standard_normal(shape, dtype=np.float32))


def _as(t, x):
    """t [B] -> [B, 1, ..., 1], to be broadcast against x."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def interpolate(x0, x1, t):
    """X_t = (1 - t) X0 + t X1 (InstaFlow section 2: the line between noise and image)."""
    t = _as(t, x0)
    return (1 - t) * x0 + t * x1


def flow_loss(velocity, x0, x1, t, reduction="mean", huber=False):
    """E ||(X1 - X0) - v(X_t, t)||^2 (the rectified flow objective), averaged over elements. reduction: "mean" -> 0-d,
    "none" -> [B]. huber: `pseudo_huber` in place of the square."""
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction is {reduction!r}; it must be "mean" or "none"')
    error = ((x1 - x0) - velocity(interpolate(x0, x1, t), t)).float().flatten(1)             # [B, d]
    losses = pseudo_huber(error) if huber else error.square().mean(1)
    return losses.mean() if reduction == "mean" else losses


def pseudo_huber(error):
    """(sqrt(||e||^2 + c^2) - c) / d with c = 0.00054 d, of errors [B, d] -> [B] (Lee, Lin and Fanti 2024, section 4):
    large errors count by their size, not its square."""
    d = error.shape[1]
    c = 0.00054 * d
    return ((error.square().sum(1) + c * c).sqrt() - c) / d


DENSITIES = "uniform", "u-shaped", "early"


def sample_time(n, density="uniform", generator=None):
    """t ~ p(t) -> float32 [n]. generator: a numpy one (default: fresh).

    "uniform" is the paper's. "u-shaped" is p(t) ~ e^{at} + e^{a(1-t)}, a = 4, squeezed into [1e-5, 1 - 1e-5]
    (Lee, Lin and Fanti 2024, section 4). "early" is p(t) ~ e^{-at}, a = 6: half of it before 0.12, where a reflowed
    flow loses most of what its teacher draws (`experiments.py where`). Raises ValueError for another name.
    """
    u = (generator or np.random.default_rng()).random((2, n))
    exponential = lambda a: np.log1p(u[0] * np.expm1(a)) / a                 # p(t) ~ e^{at}, by the inverse CDF
    if density == "uniform":
        t = u[0]
    elif density == "u-shaped":
        t = exponential(4.0)                               # its mirror image half of the time
        t = 1e-5 + (1 - 2e-5) * np.where(u[1] < 0.5, t, 1 - t)
    elif density == "early":
        t = exponential(-6.0)
    else:
        raise ValueError(f"density is {density!r}; it must be one of {', '.join(DENSITIES)}")
    return torch.from_numpy(t.astype(np.float32))


def guided(velocity, context, null, alpha):
    """v^alpha = alpha v(.|T) + (1 - alpha) v(.|NULL), guidance on the velocity, of a velocity(x, t, context)
    -> a function v(x, t).

    context: [B, ...], null the same or [1, ...]. Both run as one batch of 2 B; alpha = 1 needs no NULL,
    and costs one call of B.
    """
    if alpha == 1:
        return lambda x, t: velocity(x, t, context)

    both = torch.cat([context, null.expand_as(context)])   # once, not in every step

    def v(x, t):
        # in x's dtype: under autocast the difference of two velocities in bf16 would be rounded, and then enlarged
        text, without = velocity(torch.cat([x, x]), torch.cat([t, t]), both).to(x.dtype).chunk(2)
        return alpha * text + (1 - alpha) * without
    return v


def _grid(x, steps):
    """The times 0, 1/N, ..., (N-1)/N, each as [B], in float32 or, for x in float64, that."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    for i in range(steps):
        yield torch.full((len(x),), i / steps, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def euler(velocity, x0, steps, path=False):
    """Z += v(Z, t) / N for t = 0, 1/N, ...
    (the ODE dZ = v dt in N steps; exact in one step where the flow is straight).

    -> Z_1 with the shape of x0; with path=True all points, [steps + 1, B, ...], x0 first. steps < 1 is a ValueError.
    """
    x, points = x0, [x0]
    for t in _grid(x0, steps):
        x = x + velocity(x, t) / steps
        points += [x] if path else []
    return torch.stack(points) if path else x


def heun(velocity, x0, steps, path=False):
    """Euler's step corrected by the velocity at its end: second order, two calls a step. Else as `euler`."""
    x, points = x0, [x0]
    for t in _grid(x0, steps):
        first = velocity(x, t)
        second = velocity(x + first / steps, (t + 1 / steps).clamp(max=1))
        x = x + (first + second) / (2 * steps)
        points += [x] if path else []
    return torch.stack(points) if path else x


def straightness(velocity, x0, steps=100, curve=False):
    """S(Z) = integral of E ||(Z_1 - Z_0) - v(Z_t, t)||^2 dt (Liu et al. 2022, section 2.2): 0 where paths are straight.

    The left Riemann sum over Euler's own points, Z_1 the path's end, the mean over batch and elements -> 0-d tensor;
    with curve=True what is integrated, at t = 0, 1/N, ... -> [steps].
    """
    x, velocities = x0, []
    for t in _grid(x0, steps):
        velocities.append(velocity(x, t))
        x = x + velocities[-1] / steps
    along = torch.stack([(x - x0 - v).float().square().mean() for v in velocities])
    return along if curve else along.mean()
