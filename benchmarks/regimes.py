"""When does reflow before distillation pay? Against direct distillation at equal distillation and at equal total cost.

    python benchmarks/regimes.py                 # trains what is missing below runs/regimes, then measures: an hour and a half of two cores
    python benchmarks/regimes.py --seeds 1       # of the trainings; two seeds by two processes take no longer than one by one

From the shipped teacher, with an eighth of its students' budgets, L2 alone, all in one step. Three routes from the same teacher's pairs:
  reflowed      REFLOW iterations of reflow, PAIRS pairs of the 2-rectified flow, DISTIL iterations on those
  direct        DISTIL iterations on the teacher's PAIRS pairs
  direct-total  what the first costs in all: REFLOW + DISTIL iterations, and as many more of the teacher's pairs as the U-Net
                passes of the 2-rectified flow's would have paid for
A regime is where a student starts and what guidance the teacher's pairs had. What is measured is kept in --out.
"""
import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cli
from instaflow import InstaFlow
from measure import Evaluation, ends, identity, keep

PAIRS, REFLOW, DISTIL, BATCH = 3072, 500, 500, 32
TEACHER_STEPS, FLOW_STEPS = 10, 8                          # of the samplers that make the pairs; all pairs are guided: two passes a step
MORE = PAIRS * FLOW_STEPS // TEACHER_STEPS                 # pairs of the teacher that cost what PAIRS of the 2-rectified flow do
# Flags, the teacher's guidance, and learning rates: of what starts at the teacher (reflow; direct), and of distillation after reflow.
# As the pipeline has them, and for the raw start as found best for it in the README's table.
REGIMES = {"raw": ("", 1.5, "1e-3", "1e-3", "5e-4"), "exact": ("--exact", 1.5, "5e-4", "3e-4", "3e-4")}
ROUTES = ("reflowed", "direct", "direct-total")


def pipeline(models, root, regime, seed):
    """Command lines of one regime and seed, in order. Seeds share the teacher's pairs."""
    flags, w, reflow, direct, after = REGIMES[regime]
    folder = f"{root}/{regime}-{seed}"
    student = f"--batch {BATCH} --warmup 100 --cosine --ema 0.998 --save-every 200 --sample-every 1000000 --seed {seed} {flags}"
    pairs = {n: f"pairs.py --model {models}/mini-sd --prompts {root}/captions.txt --steps {TEACHER_STEPS} --guidance {w} --number {n} --out {root}/pairs-{w}-{n}" for n in (PAIRS, PAIRS + MORE)}
    return [f"scenes.py --captions {PAIRS + MORE} --seed 1 --out {root}/captions.txt", *pairs.values(),
            f"train_reflow.py --model {models}/mini-sd --pairs {root}/pairs-{w}-{PAIRS} --out {folder}/2rf --iterations {REFLOW} --lr {reflow} {student}",
            f"pairs.py --model {folder}/2rf --prompts {root}/captions.txt --steps {FLOW_STEPS} --guidance 1.5 --number {PAIRS} --seed {seed} --out {folder}/pairs",
            f"distill.py --model {folder}/2rf --pairs {folder}/pairs --out {folder}/reflowed --iterations {DISTIL} --lr {after} {student}",
            f"distill.py --model {models}/mini-sd --pairs {root}/pairs-{w}-{PAIRS} --out {folder}/direct --iterations {DISTIL} --lr {direct} {student}",
            f"distill.py --model {models}/mini-sd --pairs {root}/pairs-{w}-{PAIRS + MORE} --out {folder}/direct-total --iterations {REFLOW + DISTIL} --lr {direct} {student}"]


def run(line):
    """A line that is done already ends at once: each goes on where it was."""
    script, *words = shlex.split(line)
    if script == "scenes.py" and Path(words[-1]).exists():
        return
    print(f"\n$ python {line}", flush=True)
    if subprocess.run([sys.executable, ROOT / script, *words], check=False).returncode:
        raise cli.UserError(f"`python {line}` failed; mend what it says, and run the same line again: it goes on from there")


def error(path, n):
    """For `keep`: mean squared distance, a latent element, of one step from the end of its own teacher's path."""
    made = InstaFlow.load(path).info["pairs"]

    def measure():
        student = ends(path, n, 0, "cpu", 1, 1.0, "euler")
        return {"error": float((student - ends(Path(made["model"]), n, 0, "cpu", made["steps"], made["guidance"], made["sampler"])).square().mean())}
    return measure


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--models", default="models", help="the folder with mini-sd and mini-judge")
    parser.add_argument("--root", default="runs/regimes", help="where everything is made")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--seeds", nargs="+", type=cli.seed, default=[0, 1])
    parser.add_argument("--n", type=cli.positive, default=2000, help="captions")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/regimes.json"))
    args = parser.parse_args()
    cli.writable(args.out)
    for regime in args.regimes:
        for seed in args.seeds:
            for line in pipeline(args.models, args.root, regime, seed):
                run(line)
    evaluation, wanted = Evaluation(argparse.Namespace(seed=0, judge=f"{args.models}/mini-judge", device="cpu"), args.n, "train"), {}
    for regime in args.regimes:
        for seed in args.seeds:
            for route in ROUTES:
                path = Path(args.root) / f"{regime}-{seed}" / route
                model, name = InstaFlow.load(path), f"{regime}, seed {seed}, {route}"
                wanted[name] = evaluation.row(name, model, 1)
                wanted[f"{name}, error"] = f"{identity(model)}, n {min(args.n, 500)}", error(path, min(args.n, 500))
    kept = keep(args.out, wanted)
    print("| start | route | iterations | exact match, by seed | 1 / 2 / 3 objects, mean | FID (judge), by seed | one-step error, by seed |\n" + "|---" * 7 + "|")
    for regime in args.regimes:
        for route in ROUTES:
            rows = [kept[f"{regime}, seed {seed}, {route}"] for seed in args.seeds]
            by = " / ".join(f"{np.mean([counted['exact'] for counted in level]):.2f}" for level in zip(*(row["by_objects"].values() for row in rows)))
            iterations = {"reflowed": f"{REFLOW} + {DISTIL}", "direct": DISTIL, "direct-total": REFLOW + DISTIL}[route]
            exact, distance = (" ".join(f"{row[key]:{form}}" for row in rows) for key, form in (("exact", ".3f"), ("fid", ".1f")))
            errors = " ".join(f"{kept[f'{regime}, seed {seed}, {route}, error']['error']:.3f}" for seed in args.seeds)
            print(f"| {regime} | {route} | {iterations} | {exact} | {by} | {distance} | {errors} |")


if __name__ == "__main__":
    cli.run(main)
