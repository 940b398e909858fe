"""The paper's tables and figures, as commands on folders of the miniature's models.

    python experiments.py table                 # models x steps: exact match, FID, S, held-out one-step error, ms
    python experiments.py guidance              # FID against exact match over guidance strengths
    python experiments.py straightness          # how far the velocity is from the straight line, along t
    python experiments.py steps                 # exact match and FID against the number of steps
    python experiments.py where                 # where along t a flow loses what its teacher draws
    python experiments.py shared-noise          # what each model draws from the same noise,
                                                  and how far that is from its teacher's
    python experiments.py interpolation         # what lies between two noises

--models is the folder that holds the models, --rows the ones to take. What is measured is saved at once, in the JSON
file --out or beside the PNG: a killed run resumes when the same line is run again,
and a row is measured again only if the weights have changed.
"""
import functools
import sys
from pathlib import Path

import numpy as np
import torch

import cli
import scenes
from cli import UserError
from images import to_pil
from instaflow import InstaFlow
from measure import SEED, Evaluation, content, identity, keep, milliseconds, straightness, teacher
from sample import slerp

TABLE = ("mini-sd:25,mini-sd:4,mini-sd:2,mini-sd:1,mini-2rf:25,mini-2rf:4,mini-2rf:2,mini-2rf:1,"
         "mini-direct:1,mini-instaflow:1,mini-instaflow:2,mini-instaflow:4")
FLOOR = "VAE reconstructions"                               # what no model on their latents can beat
PROMPTS = ["a red circle left of a blue square", "a large green heart", "a blue ring above a yellow square",
           "a purple circle on a dark background", "a small orange square"]


def chosen(args, counted=True):
    """--rows -> [(item, model's name, model, steps)], where an item is MODEL:STEPS, or just MODEL where steps are not
    counted. All models are loaded before anything is measured."""
    models, rows = {}, []
    for item in args.rows.split(","):
        name, colon, number = item.partition(":")
        if not name or bool(colon) != counted or counted and not (number.isdecimal() and int(number)):
            raise UserError(f"--rows {item}: write "
                            + ("MODEL:STEPS, as in mini-sd:25" if counted else "MODEL, as in mini-sd"))
        if name not in models:
            models[name] = InstaFlow.load(Path(args.models) / name, args.device)
        rows.append((item, name, models[name], int(number or 0)))
    return rows


def beside(args):
    """The JSON file of a figure."""
    return args.out.with_suffix(".json")


def unrelated(kept):
    """How far apart unrelated latents of the teachers are, as text: one number a teacher and guidance,
    "" where none was measured."""
    return " or ".join(sorted({f"{row['unrelated']:.2f}" for row in kept.values() if "unrelated" in row}))


def table(args):
    """Models x steps: exact match (overall, by number of objects, order ignored, the share with the stated relation
    among two-object pictures otherwise right, and on scenes with pairs of colour and shape that are in no training),
    FID in the judge's features, S, held-out one-step error, ms."""
    rows, seen = chosen(args), Evaluation(args, args.n, args.split)
    unseen = Evaluation(args, args.held_out or max(args.n // 4, 2), "held-out")
    models = {name: model for _, name, model, _ in rows}
    wanted, few = {}, seen.captions[:100]
    for which, evaluation in (("", seen), (", held-out pairs", unseen)):
        wanted[f"real scenes{which}"] = (evaluation.of,
                                         lambda evaluation=evaluation: evaluation.scores(evaluation.images))
        wanted[f"their VAE reconstructions{which}"] = evaluation.floor(rows[0][2])
        for item, _, model, steps in rows:
            wanted[f"{item}{which}"] = evaluation.row(item, model, steps)
    for name, model in models.items():
        curve = lambda model=model: {"straightness": float(straightness(model, few, args.seed)[1].mean())}
        wanted[f"{name}, S"] = f"{identity(model)}, {args.split}, {len(few)} captions, seed {args.seed}", curve
        if model.info.get("pairs"):
            wanted[f"{name}, one step"] = content(args.models, name, model, 1, min(args.n, 500), args.seed)
    for item, _, model, steps in rows:
        wanted[f"{item}, ms"] = identity(model), lambda model=model, steps=steps: {"ms": milliseconds(model, steps)}
    kept = keep(args.out, wanted)
    print("| model : steps | exact match | 1 / 2 / 3 objects | order ignored | relations | unseen combinations "
          "| FID (judge) | S | one-step error | ms |\n" + "|---" * 10 + "|")
    for item in ("real scenes", "their VAE reconstructions", *(row[0] for row in rows)):
        row, name = kept[item], item.partition(":")[0]
        by = " / ".join(f"{counted['exact']:.2f}" for counted in row["by_objects"].values())
        related = next((counted.get("related") for count, counted in row["by_objects"].items() if str(count) == "2"),
                       None)
        error = kept.get(f"{name}, one step", {}).get("error")
        speed = (f"{kept[f'{name}, S']['straightness']:.3f} | {'' if error is None else f'{error:.3f}'} "
                 f"| {kept[f'{item}, ms']['ms']:.0f}" if name in models else "| |")
        print(f"| {item} | {row['exact']:.3f} | {by} | {row['unordered']:.3f} "
              f"| {'' if related is None else f'{related:.2f}'} | {kept[f'{item}, held-out pairs']['exact']:.3f} "
              f"| {row['fid']:.2f} | {speed} |")
    apart = unrelated(kept)
    machines, _, dates = zip(*(row["measured"].rpartition(", ") for row in kept.values()))
    origin = f"{' and '.join(sorted(set(machines)))}, {' to '.join(sorted({min(dates), max(dates)}))}"
    print(f"\n{args.n} captions, split {args.split}, seed {args.seed}, measured on {origin}: "
          f"`python {' '.join(sys.argv)}`"
          + f"\nUnrelated latents of a teacher have a squared distance of {apart}." * bool(apart))


def guidance(args):
    """FID against exact match over guidance strengths: pairs bake the choice in, so look before generating them."""
    rows, evaluation = chosen(args), Evaluation(args, args.n, args.split)
    point, wanted = lambda item, alpha: f"{item}, guidance {alpha:g}", {FLOOR: evaluation.floor(rows[0][2])}
    for item, _, model, steps in rows:
        wanted |= {point(item, alpha): evaluation.row(point(item, alpha), model, steps, alpha) for alpha in args.values}
    kept = keep(beside(args), wanted)
    for name, row in kept.items():
        print(f"{name}: exact match {row['exact']:.3f}, FID {row['fid']:.2f}")
    import figures                                         # matplotlib, only where a figure is drawn
    figures.curves(
        {item: [[[kept[point(item, alpha)][measure] for alpha in args.values] for measure in ("exact", "fid")]]
         for item, *_ in rows},
        [dict(title=f"Beside each point: the guidance\n{args.n} captions; "
                    f"VAE reconstructions: {kept[FLOOR]['exact']:.3f}, {kept[FLOOR]['fid']:.2f}",
              xlabel="exact match (share of captions drawn exactly; right is better)",
              ylabel="FID in the judge's features (low is better)", yscale="log")],
        args.out, notes=[f"{alpha:g}" for alpha in args.values])


def along_time(args):
    """How far the velocity is from the straight line between the path's ends, along t, and S,
    which is the curve's mean."""
    rows, captions = chosen(args, counted=False), list(scenes.captions(SEED, 0, args.n))

    def measure(model):
        t, curve = straightness(model, captions, args.seed)
        return {"straightness": float(curve.mean()), "t": t.tolist(), "curve": curve.tolist()}
    kept = keep(beside(args), {
        name: (f"{identity(model)}, n {args.n}, seed {args.seed}", functools.partial(measure, model))
        for _, name, model, _ in rows})
    for name, row in kept.items():
        print(f"{name}: S {row['straightness']:.4f}")
    import figures
    figures.curves({f"{name} (S = {row['straightness']:.3f})": [(row["t"], row["curve"])]
                    for name, row in kept.items()},
                   [dict(title=f"How far from straight: S is the mean over t; {args.n} captions",
                         xlabel="flow time t (0: noise, 1: image)",
                         ylabel="E ‖(Z₁ − Z₀) − v(Zₜ, t)‖² per latent element", yscale="log")], args.out)


def against(args, kept, points, values, title, **axis):
    """Draws exact match, and FID, against `values`, at the rows of `kept` named by points {line: names}, of which a
    line may have fewer than there are values, and prints them."""
    for name, row in kept.items():
        print(f"{name}: exact match {row['exact']:.3f}, FID {row['fid']:.2f}")
    import figures
    points = points | {FLOOR: [FLOOR] * len(values)}
    lines = {line: [(values[:len(names)], [kept[name][measure] for name in names]) for measure in ("exact", "fid")]
             for line, names in points.items()}
    figures.curves(lines, [
        dict(axis, title=title, ylabel="exact match (share of captions drawn exactly)", ylim=(-0.02, 1.02)),
        dict(axis, ylabel="FID in the judge's features (low is better)", yscale="log")], args.out, FLOOR)


def steps(args):
    """Exact match and FID against the number of steps, each model at its own guidance."""
    rows, evaluation = chosen(args, counted=False), Evaluation(args, args.n, args.split)
    points = {name: [f"{name}:{number}" for number in args.steps] for _, name, *_ in rows}
    wanted = {FLOOR: evaluation.floor(rows[0][2])}
    for _, name, model, _ in rows:
        wanted |= {point: evaluation.row(point, model, number) for point, number in zip(points[name], args.steps)}
    against(args, keep(beside(args), wanted), points, args.steps, f"{args.n} captions, each model at its own guidance",
            xlabel="steps of the sampler (a guided step calls the U-Net twice)", xscale="log", xticks=args.steps)


def where(args):
    """Where along t a flow loses what its teacher draws: exact match and FID of pictures that start at time t, on the
    line between noise and the teacher's end, and follow the flow's own velocity from there, in as many of its steps
    as remain, without guidance, as it was trained."""
    rows = chosen(args, counted=False)
    teachers = [teacher(args.models, name, model) for _, name, model, _ in rows]
    for whose, (_, name, model, _) in zip(teachers, rows):
        if whose is None:
            raise UserError(f"{name} was trained on pairs of {model.info['pairs']['model']}, and {args.models} "
                            "has no model of that name and weights; put it there")
    evaluation, times, points = Evaluation(args, args.n, "train"), sorted(args.times), {}
    wanted = {FLOOR: evaluation.floor(rows[0][2])}
    for whose, (_, name, model, _) in zip(teachers, rows):
        point = {t: f"{name} from t = {t:g}" for t in times}
        wanted |= {point[t]: evaluation.continued(point[t], model, Path(args.models), whose, t) for t in times}
        points[name] = [point[t] for t in times if t < 1]
        if 1 in point:                                     # nothing is left to the flow
            points[f"the ends of {name}'s pairs, by its teacher"] = [point[1]] * len(times)
    against(args, keep(beside(args), wanted), points, times, f"{args.n} captions, the flow without guidance",
            xlabel="where the flow starts: t, on the line to its teacher's end")


@torch.no_grad()
def draw(model, prompts, x0, number):
    """One picture a prompt, from noise x0 [B, 4, h, w] in `number` steps -> list of PIL images."""
    text = model.text([*prompts, ""])
    return to_pil(model.decode(model.solve(x0, text[:-1], text[-1:], number)))


def label(name, number):
    return f"{name}\n{number} step{'s' * (number > 1)}"


def shared_noise(args):
    """What each model draws from the same noise, and the mean squared distance of its latents from its teacher's."""
    rows, prompts = chosen(args), args.prompt or PROMPTS
    kept = keep(beside(args), {item: content(args.models, name, model, number, args.n, args.seed)
                               for item, name, model, number in rows})
    labels = []
    for item, name, _, number in rows:
        row = kept[item]
        labels.append(label(name, number)
                      + (f"\n{row['error']:.3f} from\n{row['teacher']}" if row.get("teacher", item) != item else ""))
        print(item, row)
    import figures
    apart = unrelated(kept)
    title = "Each column: one noise, one prompt, for all models"
    if apart:
        title += ("\nleft: mean squared distance of the latents from the teacher's (MODEL:STEPS), "
                  f"over {args.n} held-out captions;"
                  f"\nunrelated latents of a teacher have {apart}")
    figures.sheet([draw(model, prompts, model.noise(args.seed, 0, len(prompts)), number)
                   for _, _, model, number in rows], labels, prompts, title, args.out)


def interpolation(args):
    """What each model draws between two noises, along the sphere."""
    drawn = []
    for _, name, model, number in chosen(args):
        noise = slerp(*(model.noise(seed, 0, 1)[0] for seed in args.between), args.frames)
        drawn.append((draw(model, [args.prompt] * args.frames, noise, number), label(name, number)))
    import figures
    columns = [f"{w:.2f}" for w in np.linspace(0, 1, args.frames)]
    figures.sheet(*zip(*drawn), columns, f"“{args.prompt}”: from noise {args.between[0]} to noise {args.between[1]}, "
                                         "along the sphere", args.out)


COMMANDS = {                                               # function, default of --rows, and of --n
    "table": (table, TABLE, 2000),
    "guidance": (guidance, "mini-sd:25,mini-2rf:25,mini-2rf:1", 500),
    "straightness": (along_time, "mini-sd,mini-2rf,mini-direct,mini-instaflow", 100),
    "steps": (steps, "mini-sd,mini-2rf,mini-instaflow", 500),
    "where": (where, "mini-2rf", 1000),
    "shared-noise": (shared_noise, "mini-sd:25,mini-sd:1,mini-2rf:25,mini-2rf:1,mini-direct:1,mini-instaflow:1", 500),
    "interpolation": (interpolation, "mini-sd:25,mini-2rf:1,mini-instaflow:1", None),
}


def main():
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(required=True, parser_class=cli.Parser)
    for name, (function, rows, n) in COMMANDS.items():
        command = commands.add_parser(name, doc=function.__doc__)
        add = command.add_argument
        command.set_defaults(run=function, png=name != "table")
        add("--models", default="models", help="the folder that holds the models")
        add("--rows", default=rows,
            help=("MODEL,..." if name in ("straightness", "steps", "where") else "MODEL:STEPS,...")
                 + " (default: %(default)s)")
        add("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu")
        add("--out", type=Path, default=Path("benchmarks") / ("miniature.json" if name == "table" else f"{name}.png"),
            help="default: %(default)s")
        if n:
            add("--n", type=cli.positive, default=n, help="captions (default: %(default)s)")
            add("--seed", type=cli.seed, default=0, help="of the noise")
        if name in ("table", "guidance", "steps"):
            add("--split", choices=scenes.SPLITS, default="train",
                help="held-out: scenes with pairs of colour and shape that no training has")
        if name in ("table", "guidance", "steps", "where"):
            add("--judge", default="models/mini-judge")
        if name == "table":
            add("--held-out", type=cli.positive, metavar="N",
                help="captions of the column of unseen combinations (default: a quarter of --n)")
        if name == "guidance":
            add("--values", type=cli.number(), nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0],
                help="of the guidance strength")
        if name == "steps":
            add("--steps", type=cli.positive, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
        if name == "where":
            add("--times", type=cli.number(0, 1), nargs="+", default=[0.0, 0.04, 0.08, 0.16, 0.24, 0.4, 0.6, 0.8, 1.0],
                help="t to start from")
        if name == "shared-noise":
            add("prompt", nargs="*", help="the columns")
        if name == "interpolation":
            add("prompt", nargs="?", default=PROMPTS[0])
            add("--between", type=cli.seed, nargs=2, default=[3, 8], metavar="SEED", help="of the two noises")
            add("--frames", type=cli.positive, default=8)
    args = parser.parse_args()
    if min(getattr(args, "n", 2), getattr(args, "held_out", None) or 2) < 2:
        parser.error("--n and --held-out must be at least 2")
    if args.png and args.out.suffix != ".png":
        parser.error(f"--out {args.out}: figures are written as PNG; name a .png file")
    cli.writable(args.out)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
