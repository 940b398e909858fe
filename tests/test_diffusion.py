import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

import diffusion
import flows
from conftest import relative_error

BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
STEPS = [1, 2, 3, 8, 14, 15, 25, 50]
T_MIN, T_MAX = 0.064, 0.972


@pytest.fixture(scope="module")
def schedule():
    return diffusion.Schedule.stable_diffusion()


def curved(x, timestep):
    """A stand-in for a noise predictor: bent in x and in the timestep, mixing neighbours."""
    s = torch.as_tensor(timestep).to(x).reshape(-1, *[1] * (x.ndim - 1)) / 1000
    return torch.tanh((0.4 + s) * x) + 0.3 * torch.sin(7 * s + x.roll(1, -1)) + 0.2 * s


def by_scheduler(scheduler, x, steps):
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x = scheduler.step(curved(x, timestep), timestep, x, return_dict=False)[0]
    return x


def test_schedule(schedule):
    theirs = DDIMScheduler(**BETAS).alphas_cumprod
    ours = schedule.alphas_cumprod
    assert ours.dtype == torch.float64 and ours.shape == (1000,)
    # diffusers multiplies up to a thousand factors in float32
    assert ((ours - theirs.double()).abs() / ours).max() < 5e-6
    t = ours.sqrt() / (ours.sqrt() + (1 - ours).sqrt())
    assert abs(t.min() - T_MIN) < 5e-4 and abs(t.max() - T_MAX) < 5e-4


@pytest.mark.parametrize("steps", STEPS)
def test_ddim(schedule, steps):
    x = torch.randn(3, 4, 6, 5)
    before = x.clone()
    ours = diffusion.ddim(curved, x, steps, schedule)
    assert torch.equal(x, before)
    theirs = by_scheduler(DDIMScheduler(
        **BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading"), x, steps)
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the peer's
@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver(schedule, steps):
    x = torch.randn(3, 4, 6, 5)
    before = x.clone()
    ours = diffusion.dpm_solver(curved, x, steps, schedule)
    assert torch.equal(x, before)
    theirs = by_scheduler(DPMSolverMultistepScheduler(**BETAS), x, steps)
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
def test_one_call_a_step(schedule, sampler):
    calls = []

    def eps(x, timestep):
        timestep = torch.as_tensor(timestep)
        assert timestep.shape in ((), (x.shape[0],))
        calls.append(timestep)
        return curved(x, timestep)

    getattr(diffusion, sampler)(eps, torch.randn(2, 3), 5, schedule)
    assert len(calls) == 5


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
def test_too_few_steps(schedule, sampler):
    with pytest.raises(ValueError):
        getattr(diffusion, sampler)(curved, torch.zeros(1, 2), 0, schedule)


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_euler_of_the_flow_is_diffusers_flow_matching_euler(steps):
    # Its sigma is 1 - t and its velocity points from the image to the noise.
    def velocity(x, t):
        return curved(x, 1000 * (1 - t))

    x = torch.randn(3, 4, 6, 5)
    ours = flows.euler(velocity, x, steps)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    for timestep in scheduler.timesteps:
        x = scheduler.step(-curved(x, timestep), timestep, x, return_dict=False)[0]
    assert relative_error(ours, x) < 1e-5


# A noise predictor's velocity

def per_image(values, x):
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1))


class GaussianNoisePredictor:
    """E[noise | x] for data N(mu, s^2 I), defined at float indices by log-SNR linear between the schedule's."""

    def __init__(self, schedule, mu, s):
        alphas = schedule.alphas_cumprod
        self.log_snr, self.mu, self.s, self.calls = torch.log(alphas / (1 - alphas)), mu, s, []

    def __call__(self, x, index):
        index = torch.as_tensor(index).double().expand(x.shape[0])
        self.calls.append((x, index))
        assert index.min() >= 0 and index.max() <= 999
        low = index.floor().long().clamp(max=998)
        log_snr = torch.lerp(self.log_snr[low], self.log_snr[low + 1], index - low)
        a, b = per_image(torch.sigmoid(log_snr).sqrt(), x), per_image(torch.sigmoid(-log_snr).sqrt(), x)
        return (b * (x.double() - a * self.mu) / (a**2 * self.s**2 + b**2)).to(x.dtype)


def rectified_velocity(z, t, mu, s):
    """E[X1 - X0 | X_t = z] for X0 ~ N(0, I), X1 ~ N(mu, s^2 I)."""
    z, t = z.double(), per_image(t, z)
    return mu + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (z - t * mu)


TIMES = [T_MIN + 1e-3, 0.1, 0.25, 1 / 3, 0.5, 0.62, 0.8, 0.95, T_MAX - 1e-3]


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("mu, s", [(0.2, 1.0), (0.7, 0.5), (-0.3, 2.0)])
def test_velocity_of_a_noise_predictor_is_the_rectified_flow(schedule, mu, s, dtype, limit):
    v = diffusion.velocity_from_eps(GaussianNoisePredictor(schedule, mu, s), schedule)
    t = torch.tensor(TIMES, dtype=dtype)
    z = torch.randn(len(t), 4, 3, 2, dtype=dtype)
    before = z.clone(), t.clone()
    together = v(z, t)
    assert together.dtype == dtype
    assert torch.equal(z, before[0]) and torch.equal(t, before[1])
    exact = rectified_velocity(z, t, mu, s)
    for i in range(len(t)):
        assert relative_error(together[i].double(), exact[i]) < limit, f"t = {t[i]:.3f}"
        assert relative_error(v(z[i:i + 1], t[i:i + 1])[0].double(), exact[i]) < limit, f"t = {t[i]:.3f}"


def test_velocity_agrees_with_the_predictor_at_whole_indices(schedule):
    # At a whole index x = (a + b) z, and v = (x - b eps) / a - eps: no interpolation takes part.
    for k in (0, 1, 250, 500, 998, 999):
        alpha = schedule.alphas_cumprod[k].item()
        a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
        predictor = GaussianNoisePredictor(schedule, 0.7, 0.5)
        z = torch.randn(2, 3, dtype=torch.float64)
        ours = diffusion.velocity_from_eps(predictor, schedule)(z, torch.full((2,), a / (a + b), dtype=torch.float64))
        (x, index), = predictor.calls
        assert (index - k).abs().max() < 1e-6
        torch.testing.assert_close(x, (a + b) * z)
        eps = predictor(x, index)
        assert relative_error(ours, (x - b * eps) / a - eps) < 1e-6


def test_bfloat16_latents_keep_an_exact_index(schedule):
    # bfloat16 holds three digits: it would move index 937.3 to 936, and 1/a at t_min by as much.
    t = torch.tensor(TIMES)
    seen = []

    def eps(x, index):
        seen.append(torch.as_tensor(index).double())
        return torch.zeros_like(x)

    z = torch.ones(len(t), 3, dtype=torch.bfloat16)
    v = diffusion.velocity_from_eps(eps, schedule)
    low, full = v(z, t), v(z.double(), t.double())
    assert low.dtype == torch.bfloat16
    assert (seen[0] - seen[1]).abs().max() < 1e-3
    assert ((low - full).abs() / full.abs()).max() < 2.0**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_velocity_has_its_points_dtype(schedule, dtype):
    z = torch.randn(2, 3).to(dtype)
    assert diffusion.velocity_from_eps(lambda x, index: x * index[:, None].double(), schedule)(
        z, torch.tensor([0.2, 0.6])).dtype == dtype


@pytest.mark.parametrize("t, index", [(0.0, 999), (0.03, 999), (0.99, 0), (1.0, 0)])
def test_outside_the_schedule_the_nearest_index_sees_unit_scale(schedule, t, index):
    predictor = GaussianNoisePredictor(schedule, 0.7, 0.5)
    z = torch.randn(2, 3, dtype=torch.float64)
    ours = diffusion.velocity_from_eps(predictor, schedule)(z, torch.full((2,), t, dtype=torch.float64))
    (x, seen), = predictor.calls
    assert (seen - index).abs().max() < 1e-9
    torch.testing.assert_close(x, z / math.sqrt(t**2 + (1 - t) ** 2))
    assert ours.isfinite().all()


def test_velocity_is_continuous_where_the_schedule_ends(schedule):
    a, b = schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()
    v = diffusion.velocity_from_eps(GaussianNoisePredictor(schedule, 0.7, 0.5), schedule)
    z = torch.randn(1, 5, dtype=torch.float64)
    for k in (0, 999):
        edge = a[k] / (a[k] + b[k])
        inside, outside = (v(z, (edge + d).reshape(1)) for d in (-1e-7, 1e-7))
        assert relative_error(inside, outside) < 1e-4


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the peer's
@pytest.mark.parametrize("start,steps", [(899, 7), (500, 1), (3, 3)])
def test_dpm_solver_from_within(schedule, start, steps):
    x = torch.randn(3, 4, 6, 5)
    scheduler = DPMSolverMultistepScheduler(**BETAS)
    scheduler.set_timesteps(timesteps=np.linspace(0, start, steps + 1).round()[1:][::-1].astype(int).tolist())
    theirs = x
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(curved(theirs, timestep), timestep, theirs, return_dict=False)[0]
    assert relative_error(diffusion.dpm_solver(curved, x, steps, schedule, start), theirs) < 1e-5
    with pytest.raises(ValueError, match=f"must be from 1 to {start}"):
        diffusion.dpm_solver(curved, x, start + 1, schedule, start)
