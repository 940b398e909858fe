"""What other recipes of reflow bring beside the paper's: other times, Lee et al. 2024's loss, and a second reflow.

    python benchmarks/recipes.py         # after benchmarks/regimes.py, whose 2-rectified flows it shares: two hours of two cores more

All from the exact start, in regimes.py's budgets. At the paper's recipe's cost:
  u-shaped      t is drawn mostly near 0 and 1 (Lee et al. 2024)
  huber         pseudo-Huber loss in place of the square (Lee et al. 2024)
  early         t is drawn mostly near 0
  early-huber   early and huber
and beyond it, at the same cost as each other:
  3rf           the 2-rectified flow reflowed on its own pairs, and then distilled from new ones
  longer        what that costs given to distillation: REFLOW + DISTIL iterations, on PAIRS + PAIRS pairs of the 2-rectified flow
"""
from pathlib import Path

from regimes import DISTIL, FLOW_STEPS, PAIRS, REFLOW, REGIMES, arguments, generate, line, measured, pipeline, train      # first: it knows the way to what follows

import cli
import mini

FLAGS = {"u-shaped": "--density u-shaped", "huber": "--huber", "early": "--density early", "early-huber": "--density early --huber"}
_, GUIDANCE, LR, _, AFTER = REGIMES["exact"]


def lines(root, seed):
    """Command lines of all recipes of one seed, in order, after the paper's."""
    paper, own = f"{root}/exact-{seed}", lambda recipe, what: f"{root}/{recipe}-{seed}/{what}"
    made = pipeline(root, "exact", seed)

    def student(recipe, start, pairs, flags, flow="2rf"):
        return [train("train_reflow.py", start, pairs, own(recipe, flow), REFLOW, LR, seed, f"--exact {flags}"),
                generate(root, own(recipe, flow), FLOW_STEPS, mini.GUIDANCE, PAIRS, own(recipe, "pairs"), seed),
                train("distill.py", own(recipe, flow), own(recipe, "pairs"), own(recipe, "reflowed"), DISTIL, AFTER, seed, "--exact")]
    for recipe, flags in FLAGS.items():
        made += student(recipe, "models/mini-sd", f"{root}/pairs-{GUIDANCE}-{PAIRS}", flags)
    return made + student("3rf", f"{paper}/2rf", f"{paper}/pairs", "", "3rf") + [
        generate(root, f"{paper}/2rf", FLOW_STEPS, mini.GUIDANCE, 2 * PAIRS, own("longer", "pairs"), seed),
        train("distill.py", f"{paper}/2rf", own("longer", "pairs"), own("longer", "reflowed"), REFLOW + DISTIL, AFTER, seed, "--exact")]


def main():
    args = arguments(__doc__, "benchmarks/recipes.json")
    for seed in args.seeds:
        for words in lines(args.root, seed):
            mini.run(words)
    recipes, name = ["paper", *FLAGS, "3rf", "longer"], "{}, seed {}, {}".format
    students = {}
    for recipe in recipes:
        for seed in args.seeds:
            folder = Path(args.root) / f"{recipe.replace('paper', 'exact')}-{seed}"
            students[name(recipe, seed, "distilled")] = folder / "reflowed", 1
            if recipe != "longer":                         # whose flow is the paper's
                flow = folder / ("3rf" if recipe == "3rf" else "2rf")
                students |= {name(recipe, seed, "flow, 1 step"): (flow, 1), name(recipe, seed, "flow, 4 steps"): (flow, 4)}
    rows = measured(args.out, students, args.n)
    print("| recipe | what | exact match, by seed | 1 / 2 / 3 objects, mean | FID (judge), by seed | one-step error, by seed |\n" + "|---" * 6 + "|")
    for recipe in recipes:
        for what in ("flow, 4 steps", "flow, 1 step", "distilled"):
            if name(recipe, args.seeds[0], what) in students:
                print(line(f"{recipe} | {what}", [rows[name(recipe, seed, what)] for seed in args.seeds]))


if __name__ == "__main__":
    cli.run(main)
