"""The teacher's ODE: Stable Diffusion's noise schedule, its samplers, and its noise predictor read as a velocity.

A noise predictor is a function eps(x, timestep) with x [B, ...] on the variance-preserving path x = a x1 + b eps,
a^2 = alphas_cumprod[timestep], b^2 = 1 - a^2, and timestep a float tensor [B], 0 (image) to 999 (noise).
"""
import functools
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Schedule:
    """alphas_cumprod: float64 tensor [1000], falling from nearly 1 (image) to nearly 0 (noise)."""
    alphas_cumprod: torch.Tensor

    @classmethod
    def stable_diffusion(cls):
        """"Scaled linear": sqrt(beta) is linear from sqrt(0.00085) to sqrt(0.012) (Rombach et al. 2022)."""
        beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
        return cls(torch.cumprod(1 - beta, 0))

    def range(self):
        """The flow times (t_min, t_max) that the schedule reaches: [0.064, 0.972] for Stable Diffusion."""
        t = self.flow_time(self.alphas_cumprod)
        return float(t[-1]), float(t[0])

    def scales(self):
        """a and b of x = a x1 + b eps at every index -> two lists of float."""
        bar = self.alphas_cumprod.numpy()
        return np.sqrt(bar).tolist(), np.sqrt(1 - bar).tolist()

    @staticmethod
    def flow_time(alpha_bar):
        """The t at which the line (1 - t) eps + t x1 has this point's signal-to-noise ratio: a / (a + b)."""
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return a / (a + b)

    def index(self, t):
        """Float index [B] with the signal-to-noise ratio of flow time t [B], log-SNR interpolated linearly between
        whole indices, clamped at the schedule's ends -> (index, a, b), all float64 [B]."""
        # Apple's GPUs have no float64
        t = t.to("cpu" if t.device.type == "mps" else t.device, torch.float64)
        noisier = _noisier(self.alphas_cumprod, t.device)
        wanted = 2 * (torch.log1p(-t) - torch.log(t))                        # minus the log-SNR of the line at t
        i = torch.searchsorted(noisier, wanted).clamp(1, len(noisier) - 1)
        index = (i - 1 + (wanted - noisier[i - 1]) / (noisier[i] - noisier[i - 1])).clamp(0, len(noisier) - 1)
        alpha_bar = torch.sigmoid(-wanted.clamp(noisier[0], noisier[-1]))
        return index, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


@functools.lru_cache(maxsize=8)
def _noisier(alpha_bar, device):
    """Minus the log-SNR at each index, rising with it. Kept: a copy to a GPU would have every step wait for it."""
    bar = alpha_bar.to(device)
    return (1 - bar).log() - bar.log()


def _steps_ok(steps, most=999):
    if not 1 <= steps <= most:
        raise ValueError(f"steps is {steps}; it must be from 1 to {most}")


def _call(eps, x, timestep):
    return eps(x, torch.full((len(x),), float(timestep), device=x.device))


def ddim(eps, x, steps, schedule):
    """DDIM with eta = 0 (Song et al. 2020, equation 12) from noise x [B, ...] -> x_0, on the grid Stable Diffusion
    uses: 'leading' spacing, offset 1, the last step to alphas_cumprod[0]. steps: 1 to 999, else ValueError."""
    _steps_ok(steps)
    stride = 1000 // steps
    a, b = schedule.scales()
    for i in reversed(range(steps)):
        now, then = i * stride + 1, max((i - 1) * stride + 1, 0)
        e = _call(eps, x, now)
        x1 = (x - b[now] * e) / a[now]
        x = a[then] * x1 + b[then] * e
    return x


def dpm_solver(eps, x, steps, schedule, start=999):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) from noise x [B, ...] -> x_0: second order, one call a step,
    evenly spaced timesteps, the end at sigma 0; the first and the last step are of first order. start: the timestep
    of x, where it is no longer pure noise. steps: 1 to start (where that is 0: 1), else ValueError."""
    _steps_ok(steps, max(start, 1))
    grid = np.linspace(0, start, steps + 1).round()[1:][::-1].astype(int)
    a, b = ([scale[i] for i in grid] for scale in schedule.scales())
    lam = [np.log(p / q) for p, q in zip(a, b)]                              # half the log-SNR
    previous = None
    for i in range(steps):
        x1 = (x - b[i] * _call(eps, x, grid[i])) / a[i]
        # to sigma 0, where h is infinite: x is its own x1
        if i == steps - 1:
            return x1
        h = lam[i + 1] - lam[i]
        slope = x1 if previous is None else x1 + h / (2 * (lam[i] - lam[i - 1])) * (x1 - previous)
        x = b[i + 1] / b[i] * x - a[i + 1] * float(np.expm1(-h)) * slope
        previous = x1


def velocity_from_eps(eps, schedule):
    """The exact velocity, on the line z = (1 - t) eps + t x1, of a noise predictor -> a function v(z, t).

    z is x of the same signal-to-noise ratio, rescaled: x = (a + b) z, and v = (x - b eps)/a - eps. Below the schedule's
    t_min (above its t_max) its last (first) index serves, and x is rescaled to that index's scale. So a and b stay
    those of the line at t inside the range, and of the nearest index outside.
    """
    def v(z, t):
        shape = [-1] + [1] * (z.dim() - 1)
        index, a, b = schedule.index(t)
        # at least float32: bfloat16 would round 914.2 to 916
        index = index.to(z.device, torch.promote_types(z.dtype, torch.float32))
        a, b = a.to(z).reshape(shape), b.to(z).reshape(shape)
        # a^2 + b^2 = 1: the ratio of the two paths' norms
        x = z / (t ** 2 + (1 - t) ** 2).sqrt().to(z.dtype).reshape(shape)
        e = eps(x, index).to(z.dtype)
        return (x - b * e) / a - e
    return v
