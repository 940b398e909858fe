"""Rectified flow you can see: InstaFlow's sections 2 and 3 on points in the plane, in about a minute of a laptop.

    python toy.py                                   # noise -> two moons: 1-, 2-, 3-rectified flow, each distilled
    python toy.py --data 8gaussians --gif toy.gif   # the particles flowing
    python toy.py --data spirals --seeds 5          # mean and deviation over five seeds

Read it from top to bottom, like the paper. Everything that the experiments below vary is a flag; `--help` lists them.
"""
import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from tqdm import tqdm

import cli
import diffusion
import figures
import flows
from plane import DATA, MEAN, draw, exact_velocity, gauss, root_covariance

PAIRS = 20_000            # of (noise, end) that reflow and distillation train on
BATCH = 1024
# iterations and Adam's learning rate, cosine to zero
FIRST, AGAIN, DISTIL = (4000, 2e-3), (2000, 1e-3), (1500, 1e-3)
STEPS = 100               # Euler steps that stand for the exact ODE
CHECKED = 10_000          # points that every number is measured on
# of the labels become NULL in the first training, so that guidance has something to guide away from
DROP = 0.2
OT_BATCH = 64             # points an optimal assignment is made among


# --- a velocity that can be learnt ---

class Net(nn.Module):
    """v(x, t) of points x [B, 2] at times t [B] in [0, 1], and, where there are labels,
    of label [B] (the last of them is NULL)."""

    def __init__(self, classes=0, width=128):
        super().__init__()
        self.label = nn.Embedding(classes + 1, 16) if classes else None
        layers = [nn.Linear(3 + 16 * bool(classes), width)]
        for _ in range(2):
            layers += [nn.SiLU(), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t, label=None):
        inputs = [x, t.to(x.dtype)[:, None]] + ([] if self.label is None else [self.label(label)])
        return self.layers(torch.cat(inputs, 1))


def fit(net, loss, iterations, lr, name):
    """Minimise loss(net), starting from a copy of `net`: Adam, the learning rate falling to zero by a cosine
    -> the new net."""
    net = copy.deepcopy(net).train().requires_grad_(True)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in tqdm(range(iterations), desc=name, leave=False, mininterval=1):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
        falling.step()
    return net.eval().requires_grad_(False)


# --- section 2: rectified flow, v = argmin E ||(X1 - X0) - v(X_t, t)||^2 with X_t = (1 - t) X0 + t X1 ---

def rectify(net, batch, args, rng, iterations, lr, name):
    """Train on the lines between X0 and X1, whichever way `batch()` -> (x0, x1, label) couples them."""
    def loss(net):
        x0, x1, label = batch()
        t = flows.sample_time(len(x0), args.time, rng)
        return flows.flow_loss(lambda x, t: net(x, t, label), x0, x1, t)
    return fit(net, loss, iterations, lr, name)


def first_batch(args, rng):
    """The 1-rectified flow's coupling: X0 and X1 know nothing of each other (or, with --coupling minibatch-ot, each
    X0 of a small batch goes to the X1 that the cheapest assignment gives it: Pooladian et al. 2023;
    Tong et al. 2023)."""
    x0, (x1, label) = gauss(rng, BATCH), draw(args.data, rng, BATCH)
    if args.coupling == "minibatch-ot":
        for part in torch.arange(BATCH).split(OT_BATCH):
            order = part[linear_sum_assignment(torch.cdist(x0[part], x1[part]).square().numpy())[1]]
            x1[part], label[part] = x1[order], label[order]
    return x0, x1, torch.where(torch.from_numpy(rng.random(BATCH) < DROP), DATA[args.data][1], label)


# --- section 2: reflow. X1 = ODE[v](X0): the flow's own pairs, whose lines hardly cross ---

class Flow(NamedTuple):
    """A row of the figure."""
    name: str
    velocity: Callable                                     # (x, t, label) -> [B, 2]
    alpha: float = 1.0                                     # the guidance it is sampled with
    span: tuple = (0.0, 1.0)                               # the part of [0, 1] that it is defined on

    def guided(self, label, args):
        """v^alpha = alpha v(.|label) + (1 - alpha) v(.|NULL) -> a function v(x, t)."""
        return flows.guided(self.velocity, label, torch.full_like(label[:1], DATA[args.data][1]), self.alpha)

    @torch.no_grad()
    def sample(self, x0, label, steps, args, path=False):
        """ODE[v](X0) by `--solver`, [B, 2]; with path=True [steps + 1, B, 2]."""
        return getattr(flows, args.solver)(self.guided(label, args), x0, steps, path)

    @torch.no_grad()
    def couple(self, x0, label, args):
        """X1 = ODE[v](X0) by Heun's method, nearly exact: an error made here would be learnt."""
        return flows.heun(self.guided(label, args), x0, STEPS // 2)


def pairs(flow, args, rng):
    """(X0, X1, label), fixed from here on."""
    x0, label = gauss(rng, args.pairs), draw(args.data, rng, args.pairs)[1]
    return x0, flow.couple(x0, label, args), label


def batches(fixed, rng):
    """Draw from fixed pairs."""
    return lambda: [x[rows] for rows in [torch.from_numpy(rng.integers(len(fixed[0]), size=BATCH))] for x in fixed]


# --- section 3: distillation, min E ||ODE[v](X0) - (X0 + v~(X0, 0))||^2, from the flow's own weights ---

def one_step(student, x0, label):
    """X0 + v(X0, 0) -> [B, 2]."""
    return x0 + student(x0, torch.zeros(len(x0)), label)


def distil(net, fixed, rng, iterations, lr, name):
    """Train on fixed pairs at t = 0 alone -> the student, a Net."""
    def loss(net):
        x0, x1, label = batches(fixed, rng)()
        return (one_step(net, x0, label) - x1).square().mean()
    return fit(net, loss, iterations, lr, name)


# --- the diffusion path in the same coordinates (--vp): what Stable Diffusion is before reflow ---

def diffuse(net, args, rng, iterations, lr):
    """Train eps(x, timestep) on x = a x1 + b eps (Ho et al. 2020, equation 14); read it as a velocity, exactly."""
    schedule = diffusion.Schedule.stable_diffusion()
    def loss(net):
        x0, x1, label = first_batch(args, rng)
        index = torch.from_numpy(rng.integers(1000, size=BATCH))
        a, b = (y.float()[:, None]
                for y in (schedule.alphas_cumprod[index].sqrt(), (1 - schedule.alphas_cumprod[index]).sqrt()))
        return (net(a * x1 + b * x0, index / 1000, label) - x0).square().mean()
    net = fit(net, loss, iterations, lr, "diffusion")
    velocity = lambda x, t, label: diffusion.velocity_from_eps(
        lambda y, index: net(y, (index / 1000).float(), label), schedule)(x, t)
    return Flow("diffusion", velocity, args.labels or 1.0, schedule.range())


# --- what is measured ---

def sliced_w2(x, y, directions=64):
    """Sliced Wasserstein-2 distance of two clouds [n, 2] of equal size (Rabin et al. 2011): the root mean, over
    evenly spread directions, of the squared W2 of the projections, which sorting solves -> float."""
    turn = torch.arange(directions) * (math.pi / directions)
    onto = torch.stack([turn.cos(), turn.sin()])                                    # [2, directions]
    return float(((x @ onto).sort(0)[0] - (y @ onto).sort(0)[0]).square().mean().sqrt())


def transport_cost(x0, x1, p):                             # E ||X1 - X0||^p
    return float((x1 - x0).norm(dim=1).pow(p).mean())


@torch.no_grad()
def straightness(flow, x0, label, args):
    """S over the flow's span, by mean over the two coordinates.
    (Below its first noise level a diffusion has no path.)"""
    (lo, hi), v = flow.span, flow.guided(label, args)
    start = x0 * math.sqrt(lo ** 2 + (1 - lo) ** 2)
    return float(flows.straightness(lambda x, u: (hi - lo) * v(x, lo + (hi - lo) * u), start, STEPS)) / (hi - lo) ** 2


def measure(flow, student, args):
    """A row of the table, on points that nothing was trained on."""
    rng = np.random.default_rng([args.seed, 1])
    x0, (truth, label) = gauss(rng, CHECKED), draw(args.data, rng, CHECKED)
    x1 = flow.couple(x0, label, args)
    return {"S": straightness(flow, x0, label, args),
            **{f"W2 {n}": sliced_w2(flow.sample(x0, label, n, args), truth) for n in (1, 2, STEPS)},
            "W2 distilled": sliced_w2(one_step(student, x0, label), truth),
            "cost p=1": transport_cost(x0, x1, 1), "cost p=2": transport_cost(x0, x1, 2)}


def floor(args):
    """The same for the truth, as the mean over five draws: W2 of two samples of it,
    and the cost of X0 and X1 drawn independently."""
    rng, rows = np.random.default_rng([args.seed, 2]), []
    for _ in range(5):
        x0, x, y = gauss(rng, CHECKED), draw(args.data, rng, CHECKED)[0], draw(args.data, rng, CHECKED)[0]
        rows.append((sliced_w2(x, y), transport_cost(x0, x, 1), transport_cost(x0, x, 2)))
    return dict(zip((f"W2 {STEPS}", "cost p=1", "cost p=2"), np.mean(rows, 0).tolist()))


# --- the one case that is known exactly: N(0, I) -> N(m, C) ---


def exact_row():
    """That flow as a row, its student the map to its ends, m + C^1/2 X0: the best that a learnt row can be."""
    there = lambda x0: torch.tensor(MEAN) + x0 @ torch.from_numpy(root_covariance()).float()
    return Flow("exact", lambda x, t, label: exact_velocity(x, t)), lambda x0, t, label: there(x0) - x0


@torch.no_grad()
def velocity_error(flow, args):
    """||v - v*|| / ||v*|| over the points X_t that training meets -> float."""
    rng = np.random.default_rng([args.seed, 3])
    x0, (x1, label) = gauss(rng, CHECKED), draw("gaussian", rng, CHECKED)
    t = torch.from_numpy(rng.random(CHECKED, dtype=np.float32))
    x = flows.interpolate(x0, x1, t)
    return float((flow.velocity(x, t, label) - exact_velocity(x, t)).norm() / exact_velocity(x, t).norm())


# --- the whole story ---

def story(args):
    """Train everything -> [(flow, its one-step student, a Net)], in the order of the rows."""
    rng = np.random.default_rng([args.seed, 0])
    classes, alpha = DATA[args.data][1] if args.labels else 0, args.labels or 1.0
    torch.manual_seed(args.seed)
    length = lambda recipe: (max(1, round(recipe[0] * args.length)), recipe[1])
    net, rows = rectify(Net(classes), lambda: first_batch(args, rng), args, rng, *length(FIRST), "1-RF"), []
    flow = Flow("1-RF", net, alpha)
    if args.vp:
        teacher = diffuse(Net(classes), args, rng, *length(FIRST))
        # its student starts from the rectified flow: a noise predictor's weights are no velocity's
        rows.append((teacher, distil(net, pairs(teacher, args, rng), rng, *length(DISTIL), "diffusion, distilled")))
    for k in (2, 3, 4):
        fixed = pairs(flow, args, rng)
        rows.append((flow, distil(net, fixed, rng, *length(DISTIL), f"{flow.name}, distilled")))
        if k < 4:
            # guidance is in the pairs from here on: the next flow is sampled without
            net = rectify(net, batches(fixed, rng), args, rng, *length(AGAIN), f"{k}-RF")
            flow = Flow(f"{k}-RF", net)
    return [exact_row()] * (args.data == "gaussian") + rows


COLUMNS = ("S", "W2 1", "W2 2", f"W2 {STEPS}", "W2 distilled", "cost p=1", "cost p=2")


def table(all_rows):
    """Rows by name and seed, {name: [row, ...]} -> Markdown, mean and, over several seeds, deviation."""
    def cell(values):
        return "" if not values else f"{np.mean(values):.3f}" + (
            f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
    return "\n".join(["| | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"] + [
        f"| {name} | " + " | ".join(cell([row[k] for row in rows if k in row]) for k in COLUMNS) + " |"
        for name, rows in all_rows.items()])


def drawing(args, rows, results):
    """What figures.py draws: (truth [n, 2], colours or None, [(name, path [STEPS + 1, n, 2], numbers, samples)])."""
    rng, out = np.random.default_rng([args.seed, 4]), []
    x0, (truth, label) = gauss(rng, 1500), draw(args.data, rng, 1500)
    for flow, student in rows:
        seen, way = results[flow.name][0], flow.sample(x0, label, STEPS, args, path=True)
        samples = [flow.sample(x0, label, n, args) for n in (1, 2)] + [way[-1], one_step(student, x0, label)]
        out.append((flow.name, way, (f"cost {seen['cost p=2']:.1f}", f"S = {seen['S']:.3f}"),
                    [(x, f"W2 = {seen[k]:.2f}") for x, k in zip(samples, COLUMNS[1:5])]))
    return truth, label / DATA[args.data][1] if args.labels else None, out


def main():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", choices=DATA, default="moons", help="what noise becomes; default moons")
    add("--seed", type=cli.seed, default=0)
    add("--seeds", type=cli.positive, default=1,
        help="repeat with as many seeds, from --seed on; the figure shows the first")
    add("--time", choices=flows.DENSITIES, default="uniform", help="the density of t in training")
    add("--coupling", choices=("independent", "minibatch-ot"), default="independent",
        help="of the 1-rectified flow's noise and data")
    add("--solver", choices=("euler", "heun"), default="euler", help="of the samples (Heun calls the net twice a step)")
    add("--pairs", type=cli.positive, default=PAIRS, help=f"that reflow and distillation train on; default {PAIRS}")
    add("--labels", type=cli.number(0.01, 100), metavar="ALPHA",
        help="condition flows on the data's parts, and sample the first one with this guidance")
    add("--vp", action="store_true", help="put a diffusion model, read as a velocity, beside the rectified flows")
    add("--length", type=cli.number(1e-3), default=1.0,
        help="stretches every training; below 1 it is quicker and worse")
    add("--out", type=Path, default=Path("toy.png"), help="the figure; default toy.png")
    add("--gif", type=Path, help="also write the moving picture")
    args = parser.parse_args()
    endings = {args.out: (".png", ".pdf", ".svg", ".jpg")} | ({args.gif: (".gif",)} if args.gif else {})
    if wrong := [path for path, ends in endings.items()
                 if path.is_dir() or not path.parent.is_dir() or path.suffix not in ends]:
        parser.error(f"{wrong[0]} cannot be written; name a file in a folder that exists, "
                     f"ending in {' or '.join(endings[wrong[0]])}")
    torch.set_num_threads(1)                               # nets this small are slower on two
    started, results, shown = time.time(), {}, None
    for seed in range(args.seed, args.seed + args.seeds):
        one = argparse.Namespace(**vars(args) | {"seed": seed})
        results.setdefault("truth", []).append(floor(one))
        rows = story(one)
        for flow, student in rows:
            results.setdefault(flow.name, []).append(measure(flow, student, one))
        shown = shown or (one, rows)
        if args.data == "gaussian":
            print(f"seed {seed}: relative error of the 1-rectified flow's velocity "
                  f"{velocity_error(next(f for f, _ in rows if f.name == '1-RF'), one):.3f}")
    print(f"\n{table(results)}\n\nnoise -> {args.data}, {CHECKED} points, seeds {args.seed} to {seed}, "
          f"{time.time() - started:.0f} s: `python {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`")
    seen = drawing(*shown, results)
    figures.coupling(*seen, ("coupling", f"{STEPS} steps' paths", "1 step", "2 steps", f"{STEPS} steps",
                             "distilled, 1 step"), args.out)
    if args.gif:
        figures.particles(*seen, args.gif)


if __name__ == "__main__":
    cli.run(main)
