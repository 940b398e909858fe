"""What the experiments measure, as functions: pictures scored by the judge, straightness along t,
distance to a teacher's ends.

Captions and scenes are of a seed that no training drew from, and noise is of stream 0, which no pairs were made from.
All is computed in float32, whatever the device:
one step of a noise predictor from t = 0 multiplies its rounding by 15.
"""
import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fid
import flows
import mini
import scenes
import training
import weights
from checkpoint import crc
from images import finite, to_pil
from instaflow import InstaFlow
from judge import Judge, exact_match

# of the evaluation's scenes; training drew from 0, pairs from 1
SEED = 2
BATCH = 100


def identity(model):
    """All that a model's pictures depend on, but for noise, prompt and steps."""
    return (f"{model.info['sampler']}, guidance {model.info['guidance']:g}, "
            f"weights {crc(model.unet, model.vae, model.text)}")


def keep(path, wanted):
    """wanted {name: (what its number depends on, a function -> dict)} -> {name: dict}. Each is written to `path`, a
    JSON file, as soon as it is measured, and measured again only where what it depends on has changed."""
    kept, rows = weights.read_json(path, "delete it, and all is measured again") if path.exists() else {}, {}
    for name, (of, measure) in wanted.items():
        rows[name] = f"{name}, {of}"
        if rows[name] not in kept:
            print(f"measuring {name}", file=sys.stderr)
            kept[rows[name]] = {**measure(), "measured": f"{training.hardware()}, {time.strftime('%Y-%m-%d')}"}
            training.write(path, (json.dumps(kept, indent=1) + "\n").encode())
    return {name: kept[key] for name, key in rows.items()}


def batches(model, captions, seed, desc=""):
    """Noise (0, seed, i) and text states of caption i, BATCH at a time: x0 [B, 4, h, w], context [B, L, C],
    null [1, L, C]."""
    for start in tqdm(range(0, len(captions), BATCH), desc=desc, leave=False, mininterval=1):
        words = captions[start:start + BATCH]
        text = model.text([*words, ""])
        yield model.noise(seed, start, len(words)), text[:-1], text[-1:]


@torch.no_grad()
def latents(model, captions, seed, steps=None, guidance=None, sampler=None, desc="", finish=()):
    """The ends of a model's paths, one a caption -> [n, 4, h, w]. None: the model's own.
    finish: who draws them (`InstaFlow.solve_with`)."""
    solve = functools.partial(model.solve_with, *finish) if finish else functools.partial(model.solve, sampler=sampler)
    return torch.cat([solve(*batch, steps, guidance) for batch in batches(model, captions, seed, desc)])


def pictures(model, latents):
    """Latents [n, 4, h, w] -> images [n, 3, H, W], on the CPU."""
    return torch.cat([finite(model.decode(batch)).cpu() for batch in latents.split(BATCH)])


def reconstruct(model, images):
    """Through the VAE and back: what no model on its latents can beat."""
    return torch.cat([model.decode(model.encode(batch)).cpu() for batch in images.split(BATCH)])


class Evaluation:
    """Captions of n scenes that no training drew, and the judge. FID is measured against n other such scenes, so that
    real scenes have one too: the least to expect at this n."""

    def __init__(self, args, n, split):
        self.seed, self.judge = args.seed, Judge.load(args.judge, args.device)
        self.images, self.captions = mini.images(SEED, 0, n, split)
        self.real = fid.statistics(self.judge.embed(mini.images(SEED, n, n, split)[0]).cpu().numpy())
        self.of = f"n {n}, split {split}, seed {args.seed}, judge {crc(self.judge)}"

    def scores(self, images):
        """Images [n, 3, 64, 64] -> exact match (overall, without relations, by number of objects)
        and FID to the real scenes."""
        return {**exact_match(self.judge, images, self.captions),
                "fid": fid.frechet_distance(*fid.statistics(self.judge.embed(images).cpu().numpy()), *self.real)}

    def row(self, name, model, steps, guidance=None):
        """For `keep`: the scores of a model's pictures."""
        return f"{identity(model)}, {self.of}", lambda: self.scores(
            pictures(model, latents(model, self.captions, self.seed, steps, guidance, desc=name)))

    def continued(self, name, model, folder, whose, t):
        """For `keep`: the scores of pictures that start at time t on the line between noise and the end of the
        teacher `whose` (its name in `folder`, steps, guidance, sampler), and go on by the model itself, in as many of
        its steps as are left, without guidance. `ends` has captions of the split "train" only,
        so the evaluation must be on that split."""
        def measure():
            x1, drawn = ends(folder / whose[0], len(self.captions), self.seed, model.device, *whose[1:]), []
            for (x0, context, null), end in zip(batches(model, self.captions, self.seed, name), x1.split(BATCH),
                                                strict=True):
                drawn.append(model.solve_from(t, x0, end, context, null, guidance=1.0))
            return self.scores(pictures(model, torch.cat(drawn)))
        return f"unguided, {model.info['steps']} steps, {identity(model)}, teacher {whose}, {self.of}", measure

    def floor(self, model):
        """For `keep`: the scores of reconstructions, which no model beats."""
        return f"VAE {crc(model.vae)}, {self.of}", lambda: self.scores(reconstruct(model, self.images))


@torch.no_grad()
def straightness(model, captions, seed=0, steps=100):
    """E ||(Z_1 - Z_0) - v(Z_t, t)||^2 (Liu et al. 2022, section 2.2), the mean over latent elements, along the times
    [t_min, t_max] that Stable Diffusion's schedule reaches -> (t [steps], curve [steps]); S is the curve's mean. Z_0
    and Z_1 are the path's points at t_min and t_max, and Z_1 - Z_0 is per unit of t. At the model's own guidance: a
    noise predictor and a flow are measured alike."""
    lo, hi = model.schedule.range()
    total = torch.zeros(steps)
    for x0, context, null in batches(model, captions, seed, "S"):
        velocity = flows.guided(model.velocity, context, null, model.info["guidance"])
        if model.info["sampler"] in ("euler", "heun"):
            z = x0 + lo * velocity(x0, torch.zeros(len(x0), device=x0.device))
        else:
            # the noise that a sampler of the diffusion model starts from, in the flow's coordinates
            z = x0 * (lo ** 2 + (1 - lo) ** 2) ** 0.5
        stretched = lambda x, u: (hi - lo) * velocity(x, lo + (hi - lo) * u)
        total += len(z) * flows.straightness(stretched, z, steps, curve=True).cpu()
    return lo + (hi - lo) * torch.arange(steps) / steps, total / len(captions) / (hi - lo) ** 2


@functools.cache
def ends(path, n, seed, device, steps, guidance, sampler, finish=None):
    """Where a model's paths end, for n captions that no training drew: kept, since several students have one teacher.
    finish: the name of the folder beside it whose model draws the ends, the time from which, and its guidance."""
    finish = finish and (InstaFlow.load(path.parent / finish[0], device), *finish[1:])
    return latents(InstaFlow.load(path, device), list(scenes.captions(SEED, 0, n)), seed, steps, guidance, sampler,
                   f"ends of {path.name}", finish)


def teacher(folder, name, model):
    """The teacher whose path's end a model is to reach: the model in `folder` that made its training pairs, solved as
    for those; without pairs, the model itself -> what `ends` takes (its name, steps, guidance, sampler, and who
    finished), or None where that very model is not there."""
    made = model.info.get("pairs")
    if not made:
        return name, *(model.info[key] for key in ("steps", "guidance", "sampler"))
    finish = made.get("finish")
    for one in filter(None, (made, finish)):
        path = Path(folder) / Path(one["model"]).name
        if not path.is_dir() or one.get("weights") not in (None, weights.checksum(path)):
            return None
    return (Path(made["model"]).name, *(made[key] for key in ("steps", "guidance", "sampler")),
            *([(Path(finish["model"]).name, finish["at"], finish["guidance"])] if finish else []))


def content(folder, name, model, steps, n, seed=0):
    """For `keep`: how far `steps` steps keep the teacher's content, over n captions. "error": the mean squared
    distance, a latent element, between what the model and its teacher ("teacher", solved as its pairs were made)
    reach from the same noise and prompt, which no training saw. "unrelated": the same between two of the teacher's of
    other noises and prompts: what keeping nothing would give."""
    whose = teacher(folder, name, model)
    if whose is None:
        print(f"note: {folder} has not the model that made the pairs {name} was trained on, "
              "so no distance to its teacher is measured", file=sys.stderr)

    def measure():
        if whose is None:
            return {}
        settings = steps, model.info["guidance"], model.info["sampler"]
        theirs = ends(Path(folder) / whose[0], n, seed, model.device, *whose[1:])
        # of the model in memory, which `identity` names, not of what may lie in its folder by now
        ours = theirs if (name, *settings) == whose else latents(
            model, list(scenes.captions(SEED, 0, n)), seed, *settings, f"ends of {name}")
        return {"teacher": f"{whose[0]}:{whose[1]}", "error": float((ours - theirs).square().mean()),
                "unrelated": float((theirs - theirs.roll(1, 0)).square().mean())}
    return f"{identity(model)}, teacher {whose}, n {n}, seed {seed}", measure


@torch.no_grad()
def milliseconds(model, steps, repeats=7):
    """Median time of one picture alone, prompt to pixels, float32."""
    times = []
    for i in range(repeats + 2):
        started = time.perf_counter()
        text = model.text(["a red circle left of a blue square", ""])
        to_pil(model.decode(model.solve(model.noise(i, 0, 1), text[:-1], text[-1:], steps)))
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[2:]))
