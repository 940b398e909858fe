"""When does reflow before distillation pay? Against direct distillation at equal distillation and at equal total cost.

    python benchmarks/regimes.py                              # trains what is missing below runs/regimes, then measures: an hour and a half of two cores
    python benchmarks/regimes.py --seeds 1 --out seed-1.json  # one seed alone, as beside the other once the teacher's pairs, which they share, are made

From the shipped teacher, with an eighth of its students' budgets, L2 alone, all in one step. Three routes from the same teacher's pairs:
  reflowed      REFLOW iterations of reflow, PAIRS pairs of the 2-rectified flow, DISTIL iterations on those
  direct        DISTIL iterations on the teacher's PAIRS pairs
  direct-total  what the first costs in all: REFLOW + DISTIL iterations, and as many more of the teacher's pairs as the U-Net
                passes of the 2-rectified flow's would have paid for
A regime is where a student starts. What is measured is kept in --out.
"""
import argparse
import functools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import mini
from instaflow import InstaFlow
from measure import Evaluation, ends, identity, keep

PAIRS, REFLOW, DISTIL = 3072, 500, 500
TEACHER_STEPS, FLOW_STEPS = 10, 8                          # of the samplers that make the pairs; all pairs are guided: two passes a step
MORE = PAIRS * FLOW_STEPS // TEACHER_STEPS                 # pairs of the teacher that cost what PAIRS of the 2-rectified flow do
# Flags and learning rates: of what starts at the teacher (reflow; direct), and of distillation after reflow. As the pipeline has them,
# and for the raw start as in the README's longer runs.
REGIMES = {"raw": ("", "1e-3", "1e-3", "5e-4"), "exact": ("--exact", "5e-4", "3e-4", "3e-4")}
ROUTES = ("reflowed", "direct", "direct-total")


def pipeline(root, regime, seed):
    """Command lines of one regime and seed, in order."""
    flags, reflow, direct, after = REGIMES[regime]
    folder, student = f"{root}/{regime}-{seed}", f"{mini.STUDENT} --seed {seed} {flags}"
    pairs = lambda model, steps, number, out: f"pairs.py --model {model} --prompts {root}/captions.txt --steps {steps} --guidance {mini.GUIDANCE} --number {number} --out {out}"
    return [f"scenes.py --captions {PAIRS + MORE} --seed 1 --out {root}/captions.txt",
            *(pairs("models/mini-sd", TEACHER_STEPS, n, f"{root}/pairs-{n}") for n in (PAIRS, PAIRS + MORE)),
            f"train_reflow.py --model models/mini-sd --pairs {root}/pairs-{PAIRS} --out {folder}/2rf --iterations {REFLOW} --lr {reflow} {student}",
            pairs(f"{folder}/2rf", FLOW_STEPS, PAIRS, f"{folder}/pairs") + f" --seed {seed}",
            f"distill.py --model {folder}/2rf --pairs {folder}/pairs --out {folder}/reflowed --iterations {DISTIL} --lr {after} {student}",
            f"distill.py --model models/mini-sd --pairs {root}/pairs-{PAIRS} --out {folder}/direct --iterations {DISTIL} --lr {direct} {student}",
            f"distill.py --model models/mini-sd --pairs {root}/pairs-{PAIRS + MORE} --out {folder}/direct-total --iterations {REFLOW + DISTIL} --lr {direct} {student}"]


def error(path, made, n):
    """Mean squared distance, a latent element, of one step of the student at `path` from the end of the path of its own teacher, which made its pairs."""
    theirs = ends(Path(made["model"]), n, 0, "cpu", made["steps"], made["guidance"], made["sampler"])
    return {"error": float((ends(path, n, 0, "cpu", 1, 1.0, "euler") - theirs).square().mean())}


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--root", default="runs/regimes", help="where everything is made")
    parser.add_argument("--seeds", nargs="+", type=cli.seed, default=[0, 1])
    parser.add_argument("--n", type=cli.positive, default=2000, help="captions")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/regimes.json"))
    args = parser.parse_args()
    cli.writable(args.out)
    for regime in REGIMES:
        for seed in args.seeds:
            for line in pipeline(args.root, regime, seed):
                mini.run(line)
    evaluation, wanted = Evaluation(argparse.Namespace(seed=0, judge="models/mini-judge", device="cpu"), args.n, "train"), {}
    for regime in REGIMES:
        for seed in args.seeds:
            for route in ROUTES:
                path = Path(args.root) / f"{regime}-{seed}" / route
                model, name = InstaFlow.load(path), f"{regime}, seed {seed}, {route}"
                wanted[name] = evaluation.row(name, model, 1)
                wanted[f"{name}, error"] = f"{identity(model)}, n {min(args.n, 500)}", functools.partial(error, path, model.info["pairs"], min(args.n, 500))
    kept = keep(args.out, wanted)
    print("| start | route | iterations | exact match, by seed | 1 / 2 / 3 objects, mean | FID (judge), by seed | one-step error, by seed |\n" + "|---" * 7 + "|")
    for regime in REGIMES:
        for route in ROUTES:
            rows = [kept[f"{regime}, seed {seed}, {route}"] for seed in args.seeds]
            by = " / ".join(f"{np.mean([counted['exact'] for counted in level]):.2f}" for level in zip(*(row["by_objects"].values() for row in rows)))
            iterations = {"reflowed": f"{REFLOW} + {DISTIL}", "direct": DISTIL, "direct-total": REFLOW + DISTIL}[route]
            exact, distance = (" ".join(f"{row[key]:{form}}" for row in rows) for key, form in (("exact", ".3f"), ("fid", ".1f")))
            errors = " ".join(f"{kept[f'{regime}, seed {seed}, {route}, error']['error']:.3f}" for seed in args.seeds)
            print(f"| {regime} | {route} | {iterations} | {exact} | {by} | {distance} | {errors} |")


if __name__ == "__main__":
    cli.run(main)
