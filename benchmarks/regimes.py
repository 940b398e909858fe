"""When does reflow before distillation pay? Against direct distillation at equal distillation and at equal total cost.

    python benchmarks/regimes.py                              # trains what is missing below runs/regimes; measures
    python benchmarks/regimes.py --seeds 1 --out seed-1.json  # one seed alone

That takes five hours of two cores. Seeds can be made side by side once the teacher's pairs, which they share, are made.

From the shipped teacher, L2 alone, all in one step. Three routes from the same teacher's pairs:
  reflowed      REFLOW iterations of reflow, PAIRS pairs of the 2-rectified flow, DISTIL iterations on those
  direct        DISTIL iterations on the teacher's PAIRS pairs
  direct-total  what the first costs in all: REFLOW + DISTIL iterations, and as many more of the teacher's pairs as
                the U-Net passes of the 2-rectified flow's would have paid for
A regime is where a student starts, how far the teacher's pairs were guided, how long it is trained, and how large the
one-step student is: "stacked" distils raw-long's flow, or its teacher, into two U-Nets in series.
What is measured is kept in --out.
"""
import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
import cli
import figures
import mini
from instaflow import InstaFlow
from measure import Evaluation, ends, identity, keep

PAIRS, REFLOW, DISTIL = SHORT = 3072, 500, 500             # an eighth of the shipped students' iterations before LPIPS
# enough for a U-Net that predicted noise to learn what a velocity is
LONG = 6144, 3000, 1500
# of the samplers that make the pairs; all pairs are guided: two passes a step
TEACHER_STEPS, FLOW_STEPS = 10, 8
# Flags, guidance of the teacher's pairs, learning rates of what starts at the teacher (reflow; direct) and of
# distillation after reflow, and budget. As the pipeline has them, but with the paper's time, losses and guidance of
# the second pairs, and with larger rates for the raw start.
REGIMES = {"raw": ("", 1.5, "1e-3", "1e-3", "5e-4", SHORT),
           "exact": ("--exact", 1.5, "5e-4", "3e-4", "3e-4", SHORT),
           "guided": ("--exact", 3, "5e-4", "3e-4", "3e-4", SHORT),
           "raw-long": ("", 1.5, "1e-3", "1e-3", "5e-4", LONG),
           "stacked": ("--stacked", 1.5, "1e-3", "1e-3", "5e-4", LONG)}
# the first has less of all than direct-total; the second would take as long as all other long ones
LEFT_OUT = {"raw-long": "direct", "stacked": "direct-total"}


def more(pairs):
    """How many pairs of the teacher cost what so many of the 2-rectified flow do."""
    return pairs * FLOW_STEPS // TEACHER_STEPS


def routes(regime):
    """{route: iterations, as a table names them}."""
    _, reflow, distil = REGIMES[regime][-1]
    lengths = {"reflowed": f"{reflow:,} + {distil:,}", "direct": f"{distil:,}", "direct-total": f"{reflow + distil:,}"}
    return {route: length for route, length in lengths.items() if route != LEFT_OUT.get(regime)}


def generate(root, model, steps, guidance, number, out, seed=0, captions="captions.txt"):
    return (f"pairs.py --model {model} --prompts {root}/{captions} --steps {steps} --guidance {guidance} "
            f"--number {number} --out {out} --seed {seed}")


def train(script, model, pairs, out, length, lr, seed, flags):
    return (f"{script} --model {model} --pairs {pairs} --out {out} --iterations {length} --lr {lr} {mini.STUDENT} "
            f"--seed {seed} {flags}")


def pipeline(root, regime, seed):
    """Command lines of one regime and seed, in order."""
    flags, guidance, reflow, direct, after, (pairs, first, last) = REGIMES[regime]
    total, captions = pairs + more(pairs), "captions.txt" if pairs == PAIRS else "captions-long.txt"
    folder, theirs = f"{root}/{regime}-{seed}", {n: f"{root}/pairs-{guidance}-{n}" for n in (pairs, total)}
    single = "raw-long" if regime == "stacked" else regime                 # whose flow it is
    flow = f"{root}/{single}-{seed}"
    lines = {"2rf": train("train_reflow.py", "models/mini-sd", theirs[pairs], f"{flow}/2rf", first, reflow, seed,
                          REGIMES[single][0]),
             "pairs": generate(root, f"{flow}/2rf", FLOW_STEPS, mini.GUIDANCE, pairs, f"{flow}/pairs", seed, captions),
             "reflowed": train("distill.py", f"{flow}/2rf", f"{flow}/pairs", f"{folder}/reflowed", last, after, seed,
                               flags),
             "direct": train("distill.py", "models/mini-sd", theirs[pairs], f"{folder}/direct", last, direct, seed,
                             flags),
             "direct-total": train("distill.py", "models/mini-sd", theirs[total], f"{folder}/direct-total",
                                   first + last, direct, seed, flags)}
    return [f"scenes.py --captions {total} --seed 1 --out {root}/{captions}",
            *(generate(root, "models/mini-sd", TEACHER_STEPS, guidance, n, out, captions=captions)
              for n, out in theirs.items()),
            *(line for what, line in lines.items() if what in ("2rf", "pairs", *routes(regime)))]


def error(path, made, n):
    """Mean squared distance, a latent element, of one step of the student at `path` from the end of the path of its
    own teacher, which made its pairs."""
    finish = made.get("finish")
    theirs = ends(Path(made["model"]), n, 0, "cpu", made["steps"], made["guidance"], made["sampler"],
                  finish and (Path(finish["model"]).resolve(), finish["at"], finish["guidance"]))
    return {"error": float((ends(path, n, 0, "cpu", 1, 1.0, "euler") - theirs).square().mean())}


def measured(kept, students, n):
    """students {name: (folder, steps)} -> {name: scores over n captions,
    with the one-step "error" where steps is 1}, kept in the file `kept`."""
    evaluation, wanted = Evaluation(argparse.Namespace(seed=0, judge="models/mini-judge", device="cpu"), n, "train"), {}
    for name, (path, steps) in students.items():
        model = InstaFlow.load(path)
        wanted[name] = evaluation.row(name, model, steps)
        if steps == 1:
            wanted[f"{name}, error"] = (f"{identity(model)}, n {min(n, 500)}",
                                        functools.partial(error, path, model.info["pairs"], min(n, 500)))
    rows = keep(kept, wanted)
    return {name: {**rows[name], **rows.get(f"{name}, error", {})} for name in students}


def line(name, rows):
    """A line of a table: a measured student, a row a seed."""
    by = " / ".join(f"{np.mean([counted['exact'] for counted in level]):.2f}"
                    for level in zip(*(row["by_objects"].values() for row in rows)))
    exact, distance, errors = (" ".join(f"{row[key]:{form}}" for row in rows if key in row)
                               for key, form in (("exact", ".3f"), ("fid", ".1f"), ("error", ".3f")))
    return f"| {name} | {exact} | {by} | {distance} | {errors} |"


def escape(root, seeds, path):
    """The raw start's loss near the noise against iterations, out of the trainings' logs, reflow's beside direct
    distillation's, into one U-Net and two -> `path`, a PNG, and the same numbers as .json."""
    lines = {}
    for seed in seeds:
        for name, regime, model in (("reflow", "raw-long", "2rf"), ("direct", "raw-long", "direct-total"),
                                    ("direct, two U-Nets", "stacked", "direct")):
            rows = [json.loads(text) for text in
                    (Path(root) / f"{regime}-{seed}" / model / "training" / "log.jsonl").read_text().splitlines()]
            lines[f"{name}, seed {seed}"] = [([row["step"] for row in rows],
                                              [row["loss_by_t"][0] if model == "2rf" else row["loss"] for row in rows])]
    checkpoint.write(path.with_suffix(".json"), json.dumps(lines).encode())
    figures.curves(lines, [dict(
        xlabel="iterations", ylabel="squared error, a latent element", ylim=(0, 1.7),
        title="U-Nets that predicted noise learn velocity:\n"
              "reflow's loss at t < 0.1, direct distillation's at t = 0")], path)


def arguments(doc, out):
    parser = cli.Parser(doc)
    parser.add_argument("--root", default="runs/regimes", help="where everything is made")
    parser.add_argument("--seeds", nargs="+", type=cli.seed, default=[0, 1])
    parser.add_argument("--n", type=cli.positive, default=2000, help="captions")
    parser.add_argument("--out", type=Path, default=Path(out))
    args = parser.parse_args()
    cli.writable(args.out)
    return args


def main():
    args = arguments(__doc__, "benchmarks/regimes.json")
    for regime in REGIMES:
        for seed in args.seeds:
            for words in pipeline(args.root, regime, seed):
                mini.run(words)
    name = "{}, seed {}, {}".format
    rows = measured(args.out, {name(regime, seed, route): (Path(args.root) / f"{regime}-{seed}" / route, 1)
                               for regime in REGIMES for seed in args.seeds for route in routes(regime)}, args.n)
    print("| start | route | iterations | exact match, by seed | 1 / 2 / 3 objects, mean | FID (judge), by seed "
          "| one-step error, by seed |\n" + "|---" * 7 + "|")
    for regime in REGIMES:
        for route, length in routes(regime).items():
            print(line(f"{regime} | {route} | {length}", [rows[name(regime, seed, route)] for seed in args.seeds]))
    escape(args.root, args.seeds, args.out.with_name("raw.png"))


if __name__ == "__main__":
    cli.run(main)
