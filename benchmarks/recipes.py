"""What other recipes of reflow bring beside the paper's: other times, Lee et al. 2024's loss, and a second reflow.

    python benchmarks/recipes.py     # after benchmarks/regimes.py, whose 2-rectified flows it shares; some four hours

All from the exact start, in regimes.py's budgets. At the paper's recipe's cost:
  u-shaped      t is drawn mostly near 0 and 1 (Lee et al. 2024)
  huber         pseudo-Huber loss in place of the square (Lee et al. 2024)
  early         t is drawn mostly near 0
  early-huber   early and huber; then distilled by L2 as the others are, by pseudo-Huber ("hubered"), and by L2 from
                pairs of its own at guidance 3, where all other flows make theirs at 1.5 ("strong")
  direct-huber  not a reflow at all: regimes.py's direct-total, by pseudo-Huber
  "perceived"   half of what distillation after reflow costs goes to LPIPS on the judge's features, as in the paper:
                in the paper's recipe; in early-huber, by pseudo-Huber and from pairs at guidance 3, all that helped;
                and in direct-huber, as much. "perceived-alone" is LPIPS without the small L2 between latents,
                "perceived-0.01" and "-0.003" with less of it than 0.05;
                "perceived-41" and "-167" are a quarter and all of the time
                "finished" is early-huber's "perceived" from pairs whose ends its teacher drew (pairs.py --finish):
                from a few times, at two guidances
                "few" is the last of those by distill.py --steps 4, measured in one, two and four steps
and beyond it, at the same cost as each other:
  3rf           the 2-rectified flow reflowed on its own pairs, and then distilled from new ones
  longer        what that costs given to distillation: REFLOW + DISTIL iterations,
                on PAIRS + PAIRS pairs of the 2-rectified flow
and so again where the teacher draws the ends of all those pairs, all that helped included:
  3rf-finished  early-huber's flow reflowed on its own pairs, and then distilled ("perceived") from new ones
  longer-finished  what that costs given to distillation
"""
from pathlib import Path

# first: it knows the way to what follows
from regimes import (DISTIL, FLOW_STEPS, PAIRS, REFLOW, REGIMES, arguments, generate, line, measured, more, pipeline,
                     train)

import cli
import mini

FLAGS = {"u-shaped": "--density u-shaped", "huber": "--huber", "early": "--density early",
         "early-huber": "--density early --huber"}
# folder, and steps it is measured in
WHAT = {"flow, 4 steps": ("?rf", 4), "flow, 1 step": ("?rf", 1), "distilled": ("reflowed", 1),
        "hubered": ("hubered", 1), "strong": ("strong", 1), "perceived": ("perceived", 1)}
_, GUIDANCE, LR, DIRECT, AFTER, _ = REGIMES["exact"]
# iterations of LPIPS, each of which takes as long as three of L2: a picture needs the decoder twice and the judge
PERCEIVED = DISTIL // 6
SHARES = [DISTIL // 12, round(DISTIL / 3)]                 # others that were tried: 41, and 167, which is all of it
L2S = [0.01, 0.003]                                        # other weights of that L2
# the time from which the teacher draws, steps in all, and the teacher's guidance
FINISHED = [(0.1075, 9, mini.GUIDANCE), (0.1075, 9, 3), (0.1643, 8, 3), (0.231, 8, 3), (0.3, 8, 3)]
WHAT |= {what: (what, 1) for what in ("perceived-alone", *(f"perceived-{n}" for n in SHARES + L2S),
                                      *("finished-{0}-{2}".format(*how) for how in FINISHED))}
WHAT |= {f"few, {n} step{'s' * (n > 1)}": ("few", n) for n in (1, 2, 4)}


def lpips(start, pairs, out, lr, seed, n=PERCEIVED, l2=0.05, steps=1):
    return train("distill.py", start, pairs, out, n, lr, seed,
                 f"--exact --warmup 20 --steps {steps} {mini.lpips('models', l2)}")


def perceived(start, pairs, out, length, lr, seed, flags="", n=PERCEIVED, steps=1):
    """Command lines of a distillation at the cost of `length` iterations of L2, whose last n are LPIPS."""
    if 3 * n > length:
        return [lpips(start, pairs, out, lr, seed, n, steps=steps)]
    return [train("distill.py", start, pairs, f"{out}-l2", length - 3 * n, lr, seed,
                  f"--exact --steps {steps} {flags}"),
            lpips(f"{out}-l2", pairs, out, lr, seed, n, steps=steps)]


def finished(root, flow, guidance, number, out, seed, t, steps, theirs):
    """Pairs of `flow` whose ends the teacher draws from time t, at guidance `theirs`."""
    return (f"{generate(root, flow, steps, guidance, number, out, seed)} "
            f"--finish models/mini-sd --finish-at {t} --finish-guidance {theirs}")


def lines(root, seed):
    """Command lines of all recipes of one seed, in order, after the paper's."""
    paper, own = f"{root}/exact-{seed}", lambda recipe, what: f"{root}/{recipe}-{seed}/{what}"
    made = pipeline(root, "exact", seed)

    def student(recipe, start, pairs, flags, flow="2rf"):
        return [train("train_reflow.py", start, pairs, own(recipe, flow), REFLOW, LR, seed, f"--exact {flags}"),
                generate(root, own(recipe, flow), FLOW_STEPS, mini.GUIDANCE, PAIRS, own(recipe, "pairs"), seed),
                train("distill.py", own(recipe, flow), own(recipe, "pairs"), own(recipe, "reflowed"), DISTIL, AFTER,
                      seed, "--exact")]
    for recipe, flags in FLAGS.items():
        made += student(recipe, "models/mini-sd", f"{root}/pairs-{GUIDANCE}-{PAIRS}", flags)
    flow, strong = own("early-huber", "2rf"), own("early-huber", "pairs-3")
    theirs = f"{root}/pairs-{GUIDANCE}-{PAIRS + more(PAIRS)}"
    made += [train("distill.py", flow, own("early-huber", "pairs"), own("early-huber", "hubered"), DISTIL, AFTER, seed,
                   "--exact --loss huber"),
             generate(root, flow, FLOW_STEPS, 3, PAIRS, strong, seed),
             train("distill.py", flow, strong, own("early-huber", "strong"), DISTIL, AFTER, seed, "--exact"),
             train("distill.py", "models/mini-sd", theirs, own("direct-huber", "hubered"), REFLOW + DISTIL, DIRECT,
                   seed, "--exact --loss huber"),
             *perceived(f"{paper}/2rf", f"{paper}/pairs", f"{paper}/perceived", DISTIL, AFTER, seed),
             *perceived(flow, strong, own("early-huber", "perceived"), DISTIL, AFTER, seed, "--loss huber"),
             *perceived("models/mini-sd", theirs, own("direct-huber", "perceived"), REFLOW + DISTIL, DIRECT, seed,
                        "--loss huber"),
             lpips(f"{paper}/perceived-l2", f"{paper}/pairs", f"{paper}/perceived-alone", AFTER, seed, l2=0),
             lpips(own("early-huber", "perceived-l2"), strong, own("early-huber", "perceived-alone"), AFTER, seed,
                   l2=0)]
    made += [lpips(own("early-huber", "perceived-l2"), strong, own("early-huber", f"perceived-{l2}"), AFTER, seed,
                   l2=l2) for l2 in L2S]
    for how in FINISHED:
        name = "{0}-{2}".format(*how)
        pairs = own("early-huber", f"pairs-{name}")
        made += [finished(root, flow, 3, PAIRS, pairs, seed, *how),
                 *perceived(flow, pairs, own("early-huber", f"finished-{name}"), DISTIL, AFTER, seed, "--loss huber")]
    how = FINISHED[-1]
    pairs, third = own("early-huber", "pairs-{0}-{2}".format(*how)), own("3rf-finished", "3rf")
    longer = own("longer-finished", "pairs")
    made += [*perceived(flow, pairs, own("early-huber", "few"), DISTIL, AFTER, seed, "--loss huber", steps=4),
             train("train_reflow.py", flow, pairs, third, REFLOW, LR, seed, f"--exact {FLAGS['early-huber']}"),
             finished(root, third, mini.GUIDANCE, PAIRS, own("3rf-finished", "pairs"), seed, *how),
             *perceived(third, own("3rf-finished", "pairs"), own("3rf-finished", "perceived"), DISTIL, AFTER, seed,
                        "--loss huber"),
             finished(root, flow, 3, 2 * PAIRS, longer, seed, *how),
             *perceived(flow, longer, own("longer-finished", "perceived"), REFLOW + DISTIL, AFTER, seed,
                        "--loss huber")]
    for n in SHARES:
        made += perceived(flow, strong, own("early-huber", f"perceived-{n}"), DISTIL, AFTER, seed, "--loss huber", n)
    return made + student("3rf", f"{paper}/2rf", f"{paper}/pairs", "", "3rf") + [
        generate(root, f"{paper}/2rf", FLOW_STEPS, mini.GUIDANCE, 2 * PAIRS, own("longer", "pairs"), seed),
        train("distill.py", f"{paper}/2rf", own("longer", "pairs"), own("longer", "reflowed"), REFLOW + DISTIL, AFTER,
              seed, "--exact")]


def main():
    args = arguments(__doc__, "benchmarks/recipes.json")
    for seed in args.seeds:
        for words in lines(args.root, seed):
            mini.run(words)
    recipes = ["paper", *FLAGS, "direct-huber", "3rf", "longer", "3rf-finished", "longer-finished"]
    name = "{}, seed {}, {}".format
    students = {name(recipe, seed, what): (path, steps)
                for recipe in recipes for seed in args.seeds for what, (model, steps) in WHAT.items()
                for path in (Path(args.root) / f"{'exact' if recipe == 'paper' else recipe}-{seed}").glob(model)}
    rows = measured(args.out, students, args.n)
    print("| recipe | what | exact match, by seed | 1 / 2 / 3 objects, mean | FID (judge), by seed "
          "| one-step error, by seed |\n" + "|---" * 6 + "|")
    for recipe in recipes:
        for what in WHAT:
            if name(recipe, args.seeds[0], what) in students:
                print(line(f"{recipe} | {what}", [rows[name(recipe, seed, what)] for seed in args.seeds]))


if __name__ == "__main__":
    cli.run(main)
