"""The paper's tables and figures, as commands on folders of the miniature's models.

    python experiments.py table --out benchmarks/miniature.json            # the main table of the miniature
    python experiments.py guidance --model models/mini-sd --n 500          # exact match and FID over guidance strengths
"""
import json
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cli
import fid
import flows
import mini
import scenes
import training
import weights
from cli import UserError
from instaflow import InstaFlow
from judge import Judge, exact_match

ROWS = "mini-sd:25,mini-sd:4,mini-sd:2,mini-sd:1,mini-2rf:25,mini-2rf:4,mini-2rf:2,mini-2rf:1,mini-direct:1,mini-instaflow:1,mini-instaflow:2,mini-instaflow:4"
SEED = 2                                                   # of the evaluation's scenes; training drew from 0, pairs from 1


class Evaluation:
    """Captions of n scenes that no training drew, and the judge. FID is to n other such scenes, so that real scenes have
    one too: what is left of it at this n."""

    def __init__(self, args):
        self.args, self.judge = args, Judge.load(args.judge)
        self.images, self.captions = mini.images(SEED, 0, args.n, args.split)
        self.real = fid.statistics(self.judge.embed(mini.images(SEED, args.n, args.n, args.split)[0]).numpy())

    def scores(self, images):
        """Images [n, 3, 64, 64] -> exact match (overall, without relations, by number of objects) and FID to the real scenes."""
        return {**exact_match(self.judge, images, self.captions), "fid": fid.frechet_distance(*fid.statistics(self.judge.embed(images).numpy()), *self.real)}

    def row(self, path, steps):
        model = InstaFlow.load(path)
        scores = self.scores(self.generate(model, steps, desc=f"{path.name}:{steps}"))
        return {**scores, "straightness": straightness(model, self.captions[:100], self.args.seed), "ms": milliseconds(model, steps), "guidance": model.info["guidance"]}

    @torch.no_grad()
    def generate(self, model, steps, guidance=None, desc=""):
        """One picture a caption, picture i from noise(0, seed, i) -> [n, 3, 64, 64]."""
        out, batch = [], 100
        for start in tqdm(range(0, len(self.captions), batch), desc=desc, leave=False, mininterval=1):
            with training.autocast(model.device):
                latents = model.latents(self.captions[start:start + batch], steps, guidance, self.args.seed, start)
                out.append(model.decode(latents))
        return torch.cat(out)


@torch.no_grad()
def reconstruct(model, images):
    """Through the VAE and back: what no model on its latents can beat."""
    return torch.cat([model.vae.decode(model.vae.encode(batch)[0]).clamp(-1, 1) for batch in images.split(100)])


@torch.no_grad()
def straightness(model, captions, seed=0, steps=100):
    """S over the part of [0, 1] that Stable Diffusion's schedule reaches, time stretched to [0, 1], at the model's own
    guidance: so a noise predictor and a flow are measured alike (Liu et al. 2022, section 2.2)."""
    lo, hi = model.schedule.range()
    text = model.text([*captions, ""])
    velocity = flows.guided(model.velocity, text[:-1], text[-1:], model.info["guidance"])
    z = model.noise(seed, 0, len(captions))
    if model.info["prediction"] == "epsilon":
        z = z * (lo ** 2 + (1 - lo) ** 2) ** 0.5           # its noisiest point, in the flow's coordinates
    else:
        z = z + lo * velocity(z, torch.zeros(len(z)))
    return float(flows.straightness(lambda x, u: (hi - lo) * velocity(x, lo + (hi - lo) * u), z, steps)) / (hi - lo) ** 2


def milliseconds(model, steps, repeats=7):
    """Median time of one picture alone, prompt to pixels, float32."""
    times = []
    for i in range(repeats + 2):
        started = time.perf_counter()
        model.generate(["a red circle left of a blue square"], steps, seed=i)
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[2:]))


def crc(path):
    try:
        return f"{zlib.crc32(path.read_bytes()):08x}"
    except FileNotFoundError:
        raise UserError(f"{path} is missing; train that model, or leave it out of --rows") from None


def table(args):
    """Exact match, FID in the judge's features, S and ms for each model and number of steps. A row is kept as soon as it
    is measured, and measured again only when the weights it is of have changed."""
    path, folder = Path(args.out), Path(args.models)
    kept = weights.read_json(path) if path.exists() else {}
    evaluation, base = Evaluation(args), InstaFlow.load(folder / "mini-sd")
    frozen = f"judge {crc(Path(args.judge) / 'judge.safetensors')}, VAE {crc(folder / 'mini-sd' / 'vae' / weights.VAE_FILE)}"
    measures = {"real scenes": (frozen, lambda: evaluation.scores(evaluation.images)),
                "their VAE reconstructions": (frozen, lambda: evaluation.scores(reconstruct(base, evaluation.images)))}
    for item in args.rows.split(","):
        name, _, steps = item.rpartition(":")
        if not name or not steps.isdigit() or int(steps) < 1:
            raise UserError(f"--rows {item}: write MODEL:STEPS, as in mini-sd:25")
        measures[item] = f"{frozen}, U-Net {crc(folder / name / 'unet' / weights.UNET_FILE)}", lambda name=name, steps=int(steps): evaluation.row(folder / name, steps)
    rows = {}
    for item, (of, measure) in measures.items():
        key = f"{item}, n {args.n}, split {args.split}, seed {args.seed}, {of}"
        if key not in kept:
            print(f"measuring {item}", file=sys.stderr)
            kept[key] = {**measure(), "measured": f"{training.hardware()}, {time.strftime('%Y-%m-%d')}"}
        rows[key] = kept[key]
        training.write(path, (json.dumps(kept | rows, indent=1) + "\n").encode())
    training.write(path, (json.dumps(rows, indent=1) + "\n").encode())
    print("| model : steps | exact match | 1 / 2 / 3 objects | order ignored | FID (judge) | S | ms |\n|---|---|---|---|---|---|---|")
    for item, row in zip(measures, rows.values()):
        by = " / ".join(f"{counted['exact']:.2f}" for counted in row["by_objects"].values())
        speed = f"{row['straightness']:.3f} | {row['ms']:.0f}" if "ms" in row else "|"
        print(f"| {item} | {row['exact']:.3f} | {by} | {row['unordered']:.3f} | {row['fid']:.2f} | {speed} |")
    print(f"\n{args.n} captions, split {args.split}, seed {args.seed}, {training.hardware()}, {time.strftime('%Y-%m-%d')}: `python {' '.join(sys.argv)}`")


def guidance(args):
    """Exact match and FID over guidance strengths: pairs bake the choice in, so look before generating them."""
    evaluation, model = Evaluation(args), InstaFlow.load(args.model)
    for alpha in args.values:
        scores = evaluation.scores(evaluation.generate(model, args.steps, alpha, f"guidance {alpha}"))
        print(f"guidance {alpha}: exact match {scores['exact']:.3f}, FID {scores['fid']:.2f}", flush=True)


def main():
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(required=True)
    for function, n in ((table, 2000), (guidance, 500)):
        command = commands.add_parser(function.__name__, doc=function.__doc__)
        command.set_defaults(run=function)
        command.add_argument("--n", type=cli.positive, default=n, help="captions")
        command.add_argument("--split", choices=scenes.SPLITS, default="train", help="held-out: scenes with colour-shape pairs that no training has")
        command.add_argument("--seed", type=cli.seed, default=0, help="of the noise")
        command.add_argument("--judge", default="models/mini-judge")
        if function is table:
            command.add_argument("--models", default="models", help="the folder that holds the models")
            command.add_argument("--rows", default=ROWS, help="MODEL:STEPS,...")
            command.add_argument("--out", default="benchmarks/miniature.json", help="where rows are kept")
        else:
            command.add_argument("--model", required=True)
            command.add_argument("--steps", type=cli.positive)
            command.add_argument("--values", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    args = parser.parse_args()
    if args.n < 2:
        parser.error("--n must be at least 2")
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
