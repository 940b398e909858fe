"""toy.py: what reflow does in the plane, against closed forms, scipy, and the paper's ordering."""
import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import multivariate_normal, wasserstein_distance_nd

import flows
import plane
import toy

ROOT = Path(__file__).parent.parent


def settings(**changed):
    defaults = dict(data="moons", seed=0, time="uniform", coupling="independent", solver="euler", pairs=6000,
                    labels=None, vp=False, length=0.2)
    return argparse.Namespace(**defaults | changed)


@pytest.fixture(scope="module")
def measured():
    """{name: row} of a story cut to a fifth."""
    args = settings()
    return ({flow.name: toy.measure(flow, student, args) for flow, student in toy.story(args)}
            | {"truth": toy.floor(args)})


def test_reflow_straightens(measured):
    first, second, third = (measured[f"{k}-RF"]["S"] for k in (1, 2, 3))
    assert second < first / 8 and third < second


def test_one_step_is_mended_by_reflow(measured):
    assert measured["2-RF"]["W2 1"] < measured["1-RF"]["W2 1"] / 3
    assert measured["1-RF"]["W2 1"] > 3 * measured["1-RF"]["W2 100"]


def test_reflow_keeps_the_distribution_and_raises_no_transport_cost(measured):
    for k in (1, 2):
        before, after = measured[f"{k}-RF"], measured[f"{k + 1}-RF"]
        assert after["W2 100"] < before["W2 100"] + 0.05
        for cost in ("cost p=1", "cost p=2"):
            assert after[cost] < 1.01 * before[cost]
    assert measured["1-RF"]["cost p=2"] < measured["truth"]["cost p=2"]


def test_one_step_students_come_close_to_their_teachers(measured):
    for k in (1, 2, 3):
        assert measured[f"{k}-RF"]["W2 distilled"] < measured[f"{k}-RF"]["W2 100"] + 0.1


def test_the_same_seed_gives_the_same_story():
    x0 = toy.gauss(np.random.default_rng(1), 50)
    one, two, other = (toy.one_step(toy.story(settings(length=0.004, pairs=1500, seed=seed))[-1][1], x0,
                                    torch.zeros(50, dtype=torch.long)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_too_few_pairs_are_learnt_by_heart():
    """A student of 60 pairs fits them, and not the ends of fresh noise; with 6,000 both errors are alike."""
    args, rng = settings(), np.random.default_rng(5)
    teacher = toy.story(settings(length=0.1, pairs=100))[0][0]
    ratios = []
    for n in (60, 6000):
        own = toy.pairs(teacher, argparse.Namespace(**vars(args) | {"pairs": n}), rng)
        fresh = toy.pairs(teacher, args, rng)
        student = toy.distil(teacher.velocity, own, rng, 600, 2e-3, "")
        error = lambda fixed: float((toy.one_step(student, fixed[0], fixed[2]) - fixed[1]).square().mean())
        ratios.append(error(fresh) / error(own))
    assert ratios[0] > 3 and ratios[1] < 1.5


# --- closed forms ---

def test_exact_velocity_is_the_conditional_mean():
    """Against the joint Gaussian of (X_t, X1 - X0), conditioned with plain linear algebra."""
    root = plane.root_covariance()
    c, m, eye = root @ root, np.array(plane.MEAN), np.eye(2)
    x = torch.randn(5, 2, dtype=torch.float64)
    for t in (0.0, 0.3, 0.7, 1.0):
        cross, own = t * c - (1 - t) * eye, (1 - t) ** 2 * eye + t ** 2 * c
        wanted = m + (x.numpy() - t * m) @ np.linalg.solve(own, cross.T)
        got = toy.exact_velocity(x, torch.full((5,), t, dtype=torch.float64))
        assert np.abs(got.numpy() - wanted).max() < 1e-12


def test_exact_velocity_is_what_the_loss_asks_for():
    """Nudged any way, it fits the lines between X0 and X1 worse."""
    rng = np.random.default_rng(0)
    x0, x1 = toy.gauss(rng, 200_000), toy.draw("gaussian", rng, 200_000)[0]
    t = torch.from_numpy(rng.random(200_000, dtype=np.float32))
    best = flows.flow_loss(toy.exact_velocity, x0, x1, t)
    for nudge in (lambda v, x, t: 1.05 * v, lambda v, x, t: 0.95 * v,
                  lambda v, x, t: v + 0.1, lambda v, x, t: v + 0.1 * x):
        assert flows.flow_loss(lambda x, t: nudge(toy.exact_velocity(x, t), x, t), x0, x1, t) > best + 1e-3


def exact_numbers():
    """S and transport cost (p = 2) of Z_t = t m + ((1 - t)^2 I + t^2 C)^1/2 X0. Along an axis of deviation s, with
    r(t) = sqrt((1 - t)^2 + t^2 s^2): S is the mean of the integral of (s - 1 - r')^2, the cost
    |m|^2 + sum (s - 1)^2."""
    t = (np.arange(100_000) + 0.5) / 100_000
    slopes = [(t * s ** 2 - (1 - t)) / np.sqrt((1 - t) ** 2 + t ** 2 * s ** 2) for s in plane.DEVIATIONS]
    return {"S": float(np.mean([((s - 1 - slope) ** 2).mean() for s, slope in zip(plane.DEVIATIONS, slopes)])),
            "cost p=2": float(np.square(plane.MEAN).sum() + sum((s - 1) ** 2 for s in plane.DEVIATIONS))}


def test_the_exact_flow_has_the_numbers_of_its_closed_form():
    x0, known = toy.gauss(np.random.default_rng(0), 100_000).double(), exact_numbers()
    assert float(flows.straightness(toy.exact_velocity, x0, 100)) == pytest.approx(known["S"], rel=0.03)
    end = flows.heun(toy.exact_velocity, x0, 50)
    assert toy.transport_cost(x0, end, 2) == pytest.approx(known["cost p=2"], rel=0.01)
    whole = multivariate_normal(plane.MEAN, plane.root_covariance() @ plane.root_covariance()).rvs(
        100_000, random_state=1)
    assert toy.sliced_w2(end.float(), torch.from_numpy(whole).float()) < 0.03


def test_the_exact_row_ends_where_its_student_says():
    flow, student = toy.exact_row()
    x0, label = toy.gauss(np.random.default_rng(0), 500), torch.zeros(500, dtype=torch.long)
    end = flows.heun(flow.guided(label, settings(data="gaussian")), x0, 400)
    assert (end - toy.one_step(student, x0, label)).abs().max() < 1e-3


def test_a_learnt_gaussian_comes_close_to_the_exact_one():
    args = settings(data="gaussian", length=0.2)
    (exact, there), (learnt, student), *_ = toy.story(args)
    assert (exact.name, learnt.name) == ("exact", "1-RF") and toy.velocity_error(exact, args) == 0
    assert toy.velocity_error(learnt, args) < 0.1
    best, got = toy.measure(exact, there, args), toy.measure(learnt, student, args)
    for name in ("S", "cost p=1", "cost p=2"):
        assert got[name] == pytest.approx(best[name], rel=0.15), name
    assert got["W2 100"] < best["W2 100"] + 0.1


def test_sliced_w2_of_a_shift_and_of_a_scaling():
    """Shifted by d: every projection's W2 is |<d, u>|, whose root mean square is |d| / sqrt 2. Of N(0, 1) and
    N(0, s^2): |s - 1|."""
    x = torch.randn(4000, 2)
    assert toy.sliced_w2(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(5 / 2 ** 0.5, rel=1e-5)
    assert toy.sliced_w2(x, x[torch.randperm(4000)]) == 0
    square = x.square().sum(1).mean() / 2
    assert toy.sliced_w2(x, 3 * x) == pytest.approx(2 * float(square) ** 0.5, rel=1e-3)


def test_sliced_w2_never_exceeds_scipys_w1_by_much():
    """Sliced W2 <= W2 and, in the plane, W1 <= W2: two close clouds agree within what lies between."""
    x, y = torch.randn(60, 2), torch.randn(60, 2) + 2
    assert toy.sliced_w2(x, y) > 0.5 * wasserstein_distance_nd(x.numpy(), y.numpy())


def test_transport_cost():
    x0, x1 = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    assert toy.transport_cost(x0, x1, 1) == 2.5 and toy.transport_cost(x0, x1, 2) == 12.5


# --- the experiments ---

def test_minibatch_ot_pairs_cost_less_and_keep_both_ends():
    far, near = (toy.first_batch(settings(coupling=coupling), np.random.default_rng(0))
                 for coupling in ("independent", "minibatch-ot"))
    assert torch.equal(far[0], near[0]) and torch.equal(far[1].sort(0)[0], near[1].sort(0)[0])
    assert toy.transport_cost(near[0], near[1], 2) < 0.5 * toy.transport_cost(far[0], far[1], 2)


@pytest.mark.parametrize("name", toy.DATA)
def test_labels_are_the_parts_of_the_data(name):
    """The mean of a part is not the mean of another's; every part is drawn; nothing lies outside the picture."""
    x, label = toy.draw(name, np.random.default_rng(0), 4000)
    parts = [x[label == k] for k in range(toy.DATA[name][1])]
    assert (x.dtype == torch.float32 and x.shape == (4000, 2)
            and sum(map(len, parts)) == 4000 and all(len(part) > 300 for part in parts))
    assert (x.abs() < 5.2).float().mean() > 0.95


def test_guidance_makes_the_first_flow_another_and_goes_into_its_pairs():
    weak, strong = (toy.story(settings(data="8gaussians", labels=alpha, length=0.1, pairs=3000))
                    for alpha in (1.0, 3.0))
    assert (weak[0][0].alpha, strong[0][0].alpha) == (1, 3) and strong[1][0].alpha == 1
    x0 = toy.gauss(np.random.default_rng(1), 2000)
    label = torch.from_numpy(np.random.default_rng(2).integers(8, size=2000))
    centre = 4 * torch.stack([(label * np.pi / 4).cos(), (label * np.pi / 4).sin()], 1)
    off = lambda rows, k: (rows[k][0].sample(x0, label, 100, settings()) - centre).norm(dim=1).mean()
    for k in (0, 1):                                       # the teacher, and the reflow of what it drew
        assert off(weak, k) < 2.5                          # each label goes to its own part
        assert abs(off(strong, k) - off(weak, k)) > 0.02


def test_the_diffusion_is_exact_where_its_noise_predictor_is():
    """With the exact eps of Gaussian data, diffuse()'s reading gives the exact velocity: the one line it adds is the
    net's input."""
    args = settings(data="gaussian", vp=True, length=0.3)
    teacher = toy.diffuse(toy.Net(), args, np.random.default_rng(0), 800, 2e-3)
    rng = np.random.default_rng(1)
    t = torch.from_numpy(rng.uniform(0.2, 0.9, 4000).astype(np.float32))
    x = flows.interpolate(toy.gauss(rng, 4000), toy.draw("gaussian", rng, 4000)[0], t)
    with torch.no_grad():
        got, wanted = teacher.velocity(x, t, None), toy.exact_velocity(x, t)
    assert (got - wanted).norm() / wanted.norm() < 0.15


# --- the command line ---

def run(folder, *words):
    return subprocess.run([sys.executable, ROOT / "toy.py", *words], cwd=folder, capture_output=True, text=True,
                          timeout=300)


def test_one_command_prints_the_table_and_draws(tmp_path):
    done = run(tmp_path, "--length", "0.01", "--pairs", "1500", "--vp", "--labels", "2", "--gif", "toy.gif")
    assert done.returncode == 0, done.stderr
    assert all(f"| {name} |" in done.stdout for name in ("truth", "diffusion", "1-RF", "2-RF", "3-RF"))
    assert Image.open(tmp_path / "toy.png").width > 1000
    with Image.open(tmp_path / "toy.gif") as moving:
        assert moving.n_frames == 41 and (tmp_path / "toy.gif").stat().st_size < 3e6


@pytest.mark.parametrize("words", [["--data", "bananas"], ["--pairs", "0"], ["--out", "nowhere/toy.png"],
                                   ["--labels", "-1"], ["--seeds", "0"], ["--tiem", "x"]])
def test_bad_input_is_one_line(tmp_path, words):
    done = run(tmp_path, *words)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1, done.stderr
