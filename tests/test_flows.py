import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import flows

MU, S = 0.7, 0.5


def sigma(t):
    return math.sqrt(t * t * S * S + (1 - t) ** 2)


def dsigma(t):
    return (t * S * S - (1 - t)) / sigma(t)


def gaussian_velocity(z, t):
    """E[X1 - X0 | X_t = z] for X0 ~ N(0, I), X1 ~ N(MU, S^2 I): the exact rectified flow between them.

    Its path from x0 is t MU + sigma(t) x0.
    """
    t = t.reshape(-1, *[1] * (z.ndim - 1)).to(z)
    return MU + (t * S**2 - (1 - t)) / (t**2 * S**2 + (1 - t) ** 2) * (z - t * MU)


class Counted:
    def __init__(self, velocity):
        self.velocity, self.times = velocity, []

    def __call__(self, x, t):
        assert t.shape == (x.shape[0],), "t is [B]"
        self.times.append(t.clone())
        return self.velocity(x, t)


# interpolation and loss

@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 4, 5, 6)])
def test_interpolate_runs_from_noise_to_image_and_broadcasts_t(shape):
    x0, x1 = torch.randn(shape), torch.randn(shape)
    t = torch.tensor([0.0, 0.25, 1.0])
    xt = flows.interpolate(x0, x1, t)
    assert xt.shape == shape
    assert torch.equal(xt[0], x0[0]) and torch.equal(xt[2], x1[2])
    torch.testing.assert_close(xt[1], 0.75 * x0[1] + 0.25 * x1[1])


def test_flow_loss_by_hand():
    x0 = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    x1 = torch.tensor([[3.0, 2.0], [1.0, 1.0]])
    t = torch.tensor([0.5, 0.25])
    seen = []

    def velocity(x, time):
        seen.append((x.clone(), time.clone()))
        return x

    # X_t = [[2, 2], [.25, -.5]], target X1 - X0 = [[2, 0], [1, 2]]; differences [[0, 2], [-.75, -2.5]]
    rows = flows.flow_loss(velocity, x0, x1, t, reduction="none")
    torch.testing.assert_close(rows, torch.tensor([2.0, (0.5625 + 6.25) / 2]))
    torch.testing.assert_close(flows.flow_loss(velocity, x0, x1, t), rows.mean())
    assert flows.flow_loss(velocity, x0, x1, t, reduction="mean").ndim == 0
    for x, time in seen:
        torch.testing.assert_close(x, torch.tensor([[2.0, 2.0], [0.25, -0.5]]))
        torch.testing.assert_close(time, t)


def test_flow_loss_none_is_a_mean_over_each_image():
    x0, x1, t = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.rand(3)
    rows = flows.flow_loss(lambda x, t: torch.zeros_like(x), x0, x1, t, reduction="none")
    torch.testing.assert_close(rows, ((x1 - x0) ** 2).flatten(1).mean(1))


def test_flow_loss_passes_gradient_to_the_velocity():
    x0, x1, t = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.1, 0.9])
    w = torch.zeros((), requires_grad=True)
    flows.flow_loss(lambda x, t: w.expand_as(x), x0, x1, t).backward()
    torch.testing.assert_close(w.grad, torch.tensor(-2.0))  # d/dw mean (1 - w)^2 at 0


def test_flow_loss_refuses_an_unknown_reduction():
    with pytest.raises((ValueError, KeyError)):
        flows.flow_loss(lambda x, t: x, torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), reduction="sum of it")


# time densities

def u_shaped_cdf(t, a=4.0):
    """Integral of p(t) ∝ e^{at} + e^{a(1-t)} on [0, 1], rescaled into [1e-5, 1 - 1e-5]."""
    u = np.clip((np.asarray(t, np.float64) - 1e-5) / (1 - 2e-5), 0, 1)
    return (np.expm1(a * u) + math.exp(a) - np.exp(a * (1 - u))) / (2 * math.expm1(a))


def early_cdf(t, a=6.0):
    """Integral of p(t) ∝ e^{-at} on [0, 1]."""
    return np.expm1(-a * np.clip(np.asarray(t, np.float64), 0, 1)) / math.expm1(-a)


def test_pseudo_huber_in_closed_form():
    """At ||e|| = sqrt(3) c it is (2c - c) / d = 0.00054, whatever d; far out it is ||e|| / d - 0.00054; near 0,
    ||e||^2 / (2 c d)."""
    for shape in ((4, 8, 8), (4, 64, 64)):
        d = int(np.prod(shape))
        c, direction = 0.00054 * d, torch.randn(1, d, dtype=torch.float64)
        at = lambda norm: flows.pseudo_huber(norm * direction / direction.norm()).item()
        assert at(3 ** 0.5 * c) == pytest.approx(0.00054, rel=1e-12)
        assert at(1e6 * c) == pytest.approx(1e6 * c / d - 0.00054, rel=1e-6)
        assert at(1e-3 * c) == pytest.approx(1e-6 * c / (2 * d), rel=1e-6)
        assert at(0.0) == 0


def test_pseudo_huber_is_the_flow_loss_of_the_same_errors():
    x0, x1, t = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.tensor([0.1, 0.5, 0.9])
    velocity = lambda x, t: x.sin()
    error = ((x1 - x0) - velocity(flows.interpolate(x0, x1, t), t)).flatten(1)
    wanted = torch.stack([(torch.sqrt((e ** 2).sum() + (0.054) ** 2) - 0.054) / 100 for e in error])
    losses = flows.flow_loss(velocity, x0, x1, t, "none", huber=True)
    assert torch.allclose(losses, wanted, rtol=1e-5) and losses.shape == (3,)
    assert flows.flow_loss(velocity, x0, x1, t, huber=True) == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert not torch.allclose(losses, flows.flow_loss(velocity, x0, x1, t, "none"))


@pytest.mark.parametrize("density, cdf", [("uniform", stats.uniform.cdf), ("u-shaped", u_shaped_cdf),
                                          ("early", early_cdf)])
def test_sample_time_has_its_density(density, cdf):
    n = 1_000_000  # tells a = 4 from 3.9
    t = flows.sample_time(n, density, generator=np.random.default_rng(1))
    assert t.dtype == torch.float32 and t.shape == (n,)
    assert 0 <= t.min() and t.max() <= 1
    assert stats.kstest(t.numpy(), cdf).pvalue > 0.01


def test_the_densities_are_told_apart():
    uniform = flows.sample_time(50_000, "uniform", generator=np.random.default_rng(1)).numpy()
    assert stats.kstest(uniform, u_shaped_cdf).pvalue < 1e-6 and stats.kstest(uniform, early_cdf).pvalue < 1e-6


def test_u_shaped_support_stops_short_of_the_ends():
    class Ends:
        """A generator whose uniform draws are the two ends in all combinations, in whichever way they are drawn."""

        def random(self, size=None, dtype=np.float64, out=None):
            return np.random.default_rng(0).choice([0.0, 1.0 - 2.0**-53], size).astype(dtype)

        def uniform(self, low=0.0, high=1.0, size=None):
            return low + (high - low) * self.random(size)

    t = flows.sample_time(64, "u-shaped", generator=Ends()).double()
    ulp = 2.0**-24  # float32's rounding just under 1
    assert abs(t.min() - 1e-5) <= 1e-5 * ulp and abs(t.max() - (1 - 1e-5)) <= ulp


@pytest.mark.parametrize("density", flows.DENSITIES)
def test_sample_time_repeats_with_its_generator(density):
    draws = [flows.sample_time(64, density, generator=np.random.default_rng(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    generator = np.random.default_rng(5)
    first, second = (flows.sample_time(64, density, generator=generator) for _ in range(2))
    assert torch.equal(first, draws[0]) and not torch.equal(first, second)


def test_sample_time_without_generator_and_with_an_unknown_density():
    assert flows.sample_time(3).shape == (3,)
    with pytest.raises((ValueError, KeyError)):
        flows.sample_time(3, "v-shaped")


# guidance

class Network:
    """velocity(x, t, context), nonlinear in each, that records whose context it saw."""

    def __init__(self):
        self.contexts = []

    def __call__(self, x, t, context):
        assert len(x) == len(t) == len(context)
        self.contexts.append(context)
        return torch.tanh(x * context.mean((1, 2))[:, None]) + t[:, None] * context[:, 0, :1]


@pytest.mark.parametrize("null_rows", [1, 3])
@pytest.mark.parametrize("alpha", [0.0, 1.5, 5.0])
def test_guidance_formula(alpha, null_rows):
    x, t = torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    context, null = torch.randn(3, 4, 5), torch.randn(null_rows, 4, 5)
    network, plain = Network(), Network()
    ours = flows.guided(network, context, null, alpha)(x, t)
    nulls = null.expand(3, -1, -1)
    expected = alpha * plain(x, t, context) + (1 - alpha) * plain(x, t, nulls)
    torch.testing.assert_close(ours, expected)
    assert len(network.contexts) <= 2 and sum(map(len, network.contexts)) <= 6


def test_guidance_does_not_round_the_difference():
    x = torch.randn(64, 4)
    velocity = lambda x, t, context: (x + context).to(torch.bfloat16)        # as under autocast
    context, null = torch.randn(64, 4), torch.zeros(1, 4)
    got = flows.guided(velocity, context, null, 5.0)(x, torch.zeros(64))
    expected = 5 * velocity(x, 0, context).float() - 4 * velocity(x, 0, null).float()
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_guidance_of_one_never_calls_with_the_null_prompt():
    x, t, context = torch.randn(3, 2), torch.rand(3), torch.randn(3, 4, 5)
    network = Network()
    ours = flows.guided(network, context, torch.full((3, 4, 5), float("nan")), 1.0)(x, t)
    assert len(network.contexts) == 1 and torch.equal(network.contexts[0], context)
    assert torch.equal(ours, Network()(x, t, context))


# solvers

SOLVERS = [(flows.euler, 1), (flows.heun, 2)]


@pytest.mark.parametrize("solver, order", SOLVERS)
def test_order_of_convergence(solver, order):
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = MU + S * x0
    steps = np.array([16, 32, 64, 128])
    errors = [(solver(gaussian_velocity, x0, int(n)) - exact).abs().max().item() for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.15, f"order {slope:.2f}"


@pytest.mark.parametrize("solver, order", SOLVERS)
def test_calls_and_times(solver, order):
    for n in (1, 2, 4):
        velocity = Counted(lambda x, t: torch.ones_like(x))
        solver(velocity, torch.zeros(3, 2), n)
        assert len(velocity.times) == order * n
        if order == 1:
            times = [i / n for i in range(n)]
        else:  # the slope at both ends of each step
            times = [i / n for step in range(n) for i in (step, step + 1)]
        torch.testing.assert_close(torch.stack(velocity.times), torch.tensor(times)[:, None].expand(-1, 3))


def test_one_euler_step_and_one_heun_step_by_hand():
    velocity = lambda x, t: x + t[:, None]  # noqa: E731
    x0 = torch.tensor([[1.0], [2.0]])
    torch.testing.assert_close(flows.euler(velocity, x0, 1), torch.tensor([[2.0], [4.0]]))
    # slopes 1 and 3 from 1; 2 and 5 from 2
    torch.testing.assert_close(flows.heun(velocity, x0, 1), torch.tensor([[3.0], [5.5]]))


@pytest.mark.parametrize("solver, order", SOLVERS)
def test_path_starts_at_the_noise_and_ends_at_the_image(solver, order):
    x0 = torch.randn(3, 4, 2, 2)
    path = solver(gaussian_velocity, x0, 5, path=True)
    assert path.shape == (6, 3, 4, 2, 2)
    assert torch.equal(path[0], x0)
    torch.testing.assert_close(path[-1], solver(gaussian_velocity, x0, 5))
    step = 0.2 * gaussian_velocity(x0, torch.zeros(3))
    if order == 1:
        torch.testing.assert_close(path[1], x0 + step)
    assert not torch.equal(path[1], path[2])


@pytest.mark.parametrize("solver, order", SOLVERS)
def test_a_straight_flow_is_exact_in_any_number_of_steps(solver, order):
    x0, v = torch.randn(2, 3), torch.randn(2, 3)
    for n in (1, 3, 10):
        torch.testing.assert_close(solver(lambda x, t: v, x0, n), x0 + v)


@pytest.mark.parametrize("solver, order", SOLVERS)
@pytest.mark.parametrize("steps", [0, -1])
def test_too_few_steps(solver, order, steps):
    with pytest.raises(ValueError):
        solver(gaussian_velocity, torch.zeros(1, 2), steps)


@pytest.mark.parametrize("solver, order", SOLVERS)
@pytest.mark.parametrize("path", [False, True])
def test_solvers_leave_their_arguments_alone(solver, order, path):
    x0, constant = torch.randn(2, 3), torch.randn(2, 3)
    before, constant_before = x0.clone(), constant.clone()
    out = solver(lambda x, t: constant, x0, 3, path=path)
    assert torch.equal(x0, before) and torch.equal(constant, constant_before)
    out.zero_()
    assert torch.equal(x0, before), "the result shares memory with x0"


def test_solvers_keep_dtype():
    x0 = torch.randn(2, 3, dtype=torch.float64)
    assert flows.euler(gaussian_velocity, x0, 2).dtype == flows.heun(gaussian_velocity, x0, 2).dtype == torch.float64


def test_gradient_flows_through_one_euler_step():
    w = torch.ones((), requires_grad=True)
    flows.euler(lambda x, t: w * x, torch.full((1, 2), 3.0), 1).sum().backward()
    torch.testing.assert_close(w.grad, torch.tensor(6.0))


# straightness

def test_straightness_of_a_straight_flow_is_zero():
    v = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    s = flows.straightness(lambda x, t: v, torch.randn(2, 3, 4, 4, dtype=torch.float64), steps=10)
    assert s.ndim == 0 and 0 <= s < 1e-28


def test_straightness_survives_float32():
    # A sum of many small steps must not drown in the rounding of the latents.
    v, x0 = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert flows.straightness(lambda x, t: v, x0, steps=100) < 1e-9


def test_straightness_by_hand():
    # v = t: slopes 0 and .5, so Z1 - Z0 = .25, and both differ from it by .25
    s = flows.straightness(lambda x, t: t[:, None].expand_as(x).clone(), torch.randn(3, 2), steps=2)
    torch.testing.assert_close(s, torch.tensor(0.0625))
    # v = x from 1 and 2: slopes 1, 1.5 and 2, 3; Z1 - Z0 = 1.25 and 2.5; mean of .0625 and .25
    s = flows.straightness(lambda x, t: x, torch.tensor([[1.0], [2.0]]), steps=2)
    torch.testing.assert_close(s, torch.tensor(0.15625))


@pytest.mark.parametrize("shape", [(7,), (7, 2, 3)])
def test_straightness_of_a_gaussian_flow(shape):
    # On the exact path v = MU + sigma'(t) x0 and Z1 - Z0 = MU + (S - 1) x0.
    x0 = torch.randn(shape, dtype=torch.float64)
    integral = integrate.quad(lambda t: (S - 1 - dsigma(t)) ** 2, 0, 1)[0]
    exact = x0.square().mean().item() * integral
    coarse, fine = (flows.straightness(gaussian_velocity, x0, steps=n) for n in (500, 1000))
    assert coarse.ndim == fine.ndim == 0
    # a left Riemann sum is first order: its Richardson limit is the integral
    assert abs((2 * fine - coarse).item() / exact - 1) < 1e-4
    assert abs(fine.item() / exact - 1) < 1e-2


def test_straightness_takes_a_hundred_steps_and_leaves_its_argument_alone():
    velocity, x0 = Counted(gaussian_velocity), torch.randn(2, 3)
    before = x0.clone()
    s = flows.straightness(velocity, x0)
    assert torch.equal(x0, before)
    assert len({round(t[0].item(), 6) for t in velocity.times}) == 100
    torch.testing.assert_close(s, flows.straightness(gaussian_velocity, x0, steps=100))


@pytest.mark.parametrize("solver, sum_of_times", [(flows.euler, 0.45), (flows.heun, 0.5)])
def test_times_are_as_exact_as_the_points(solver, sum_of_times):
    end = solver(lambda x, t: t[:, None].expand_as(x), torch.zeros(2, 3, dtype=torch.float64), 10)      # dx/dt = t
    assert (end - sum_of_times).abs().max() < 1e-14
