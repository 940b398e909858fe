"""The miniature's judge: reads a scene back from a picture, so that "does the picture show its caption?" is counted.

    python judge.py train --out models/mini-judge                   # some forty minutes of one CPU core
    python judge.py check --model models/mini-judge --n 5000        # its own error, on fresh scenes

The trunk is VGG16 with few channels, under VGG16's key names: LPIPS is built on it, and its averages are the
features of the miniature's FID. The head is a small CenterNet (Zhou et al. 2019): a heat map with one peak an
object, and the object's shape, colour, size and place read off at the peak. A killed training resumes where it stopped.
"""
import copy
import json
from collections import namedtuple
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import cli
import scenes
import training

TRAIN = dict(
    images=60_000,            # rendered once, kept in memory (0.7 GiB)
    iterations=2_000,
    batch=96,
    lr=1.5e-3,                # AdamW, cosine to zero
    warmup=150,
    ema=0.995,                # over some 200 iterations
    log_every=50,
    save_every=200,
    seed=0,
)
CHANNELS = (16, 32, 64, 96, 128)
LAYERS = (2, 2, 3, 3, 3)      # VGG16's convolutions in each of its five blocks
GRID, CELL = 16, 4.0          # cells a side, and pixels a cell, of the map of objects
SIGMA = 0.8                   # cells, of the gaussian peak an object has in the heat map
# on the heat: at worst an object lies between four cells, each at exp(-0.25 / 0.64) = 0.68
THRESHOLD = 0.4
APART = 9.0                   # pixels, along the larger axis: any two objects of a scene are farther apart
PARTS = {"heat": 1, "offset": 2, "shape": len(scenes.SHAPES), "size": len(scenes.SIZES)}
COLOURS = tuple(scenes.COLOURS)
# side in pixels of the window a colour is read from: small enough that no other object is in it
WINDOW = 14

Seen = namedtuple("Seen", "shape colour size x y heat")            # x, y in pixels; heat in [0, 1]: how sure
Reading = namedtuple("Reading", "objects tone texture")            # what a picture shows: Seen objects, strongest first


class Judge(nn.Module):
    """Images [B, 3, 64, 64] in [-1, 1] -> maps of objects and logits of the background."""

    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.channels = tuple(channels)
        layers, width = [], 3
        for wider, count in zip(channels, LAYERS):
            for _ in range(count):
                layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
                width = wider
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)                     # VGG16's indices: 0, 2, 5, 7, 10, ... 28
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.objects = nn.Sequential(nn.Conv2d(channels[3] + channels[4], 128, 3, padding=1), nn.ReLU(),
                                     nn.Conv2d(128, 4 * sum(PARTS.values()), 1), nn.PixelShuffle(2))
        self.ink = nn.Conv2d(channels[0], 1 + len(COLOURS), 1)  # how much a pixel counts, and its colour
        self.ground = nn.Sequential(nn.Linear(sum(channels[2:]), 64), nn.ReLU(),
                                    nn.Linear(64, len(scenes.TONES) + len(scenes.TEXTURES)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):                      # 13 layers without normalisation need it
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def trunk(self, images):
        """-> relu1_2 [B, c1, 64, 64], relu3_3 [B, c3, 16, 16], relu4_3 [B, c4, 8, 8], relu5_3 [B, c5, 4, 4]."""
        if images.shape[1:] != (3, scenes.SIZE, scenes.SIZE):
            raise ValueError(f"the judge reads images [B, 3, {scenes.SIZE}, {scenes.SIZE}], not {list(images.shape)}")
        x, taps = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.features[:30]):             # the last pool is not used
            x = layer(x)
            if i in (3, 15, 22, 29):
                taps.append(x)
        return taps

    def forward(self, images):
        """-> {part: [B, n, 16, 16]} of PARTS (heat as a logit) and "colour",
        plus "tone" [B, 2] and "texture" [B, 4]."""
        fine, *taps = self.trunk(images)
        both = torch.cat([taps[1], F.interpolate(taps[2], scale_factor=2)], dim=1)          # [B, c4 + c5, 8, 8]
        out = dict(zip(PARTS, self.objects(both).float().split(list(PARTS.values()), dim=1)))      # [B, ..., 16, 16]
        # Colour is read from features that see no shape, else the judge learns that no ring is orange: an average over
        # the pixels that look like ink, in a window around each cell.
        weight, colour = self.ink(fine).float().split([1, len(COLOURS)], dim=1)             # [B, ..., 64, 64]
        weight = F.softplus(weight) + 1e-4
        pool = lambda x: F.avg_pool2d(x, WINDOW, int(CELL), padding=(WINDOW - int(CELL)) // 2, count_include_pad=False)
        out["colour"] = pool(weight * colour) / pool(weight)                                # [B, 8, 16, 16]
        ground = self.ground(torch.cat([tap.mean((2, 3)) for tap in taps], dim=1)).float()
        return out | {"tone": ground[:, :2], "texture": ground[:, 2:]}

    @torch.no_grad()
    def embed(self, images, batch=128):
        """The features in which the miniature's FID is computed: averages of relu4_3 and relu5_3 over the
        picture -> float32 [B, c4 + c5]. Images as `pixels` takes them."""
        chunks = [self.trunk(x)[2:] for x in pixels(images).to(self.shift.device).split(batch)]
        return torch.cat([torch.cat([tap.mean((2, 3)) for tap in taps], dim=1) for taps in chunks]).float()

    @torch.no_grad()
    def read(self, images, batch=128):
        """What each picture shows -> list of Reading. Images as `pixels` takes them."""
        readings = []
        for x in pixels(images).to(self.shift.device).split(batch):
            out = {name: value.cpu() for name, value in self(x).items()}
            heat = out["heat"].sigmoid()[:, 0]                                              # [B, 16, 16]
            words = {name: out[name].argmax(1) for name in ("shape", "colour", "size", "tone", "texture")}
            for b in range(len(x)):
                rows, columns = (heat[b] > THRESHOLD).nonzero(as_tuple=True)
                found = []
                for i in heat[b, rows, columns].argsort(descending=True).tolist():
                    r, c = int(rows[i]), int(columns[i])
                    px, py = ((torch.tensor([c, r]) + 0.5 + out["offset"][b, :, r, c]) * CELL).tolist()
                    # Strongest first, and nothing near it again: a peak between cells, a tie, counts once.
                    if all(max(abs(px - o.x), abs(py - o.y)) >= APART for o in found):
                        found.append(Seen(scenes.SHAPES[words["shape"][b, r, c]], COLOURS[words["colour"][b, r, c]],
                                          scenes.SIZES[words["size"][b, r, c]], px, py, float(heat[b, r, c])))
                readings.append(Reading(tuple(found), scenes.TONES[words["tone"][b]],
                                        scenes.TEXTURES[words["texture"][b]]))
        return readings

    def save(self, folder, **made):
        """Write judge.safetensors (float16) and judge.json (channels, and `made`: how it came to be)."""
        training.write_tensors(Path(folder) / "judge.safetensors", self.state_dict(), dtype=torch.float16)
        training.write(Path(folder) / "judge.json",
                       (json.dumps({"channels": self.channels} | made, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder, device="cpu"):
        """The judge in a folder, frozen, float32. Raises cli.UserError."""
        try:
            judge = cls(json.loads((Path(folder) / "judge.json").read_text())["channels"])
            judge.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "judge.safetensors").items()})
        except FileNotFoundError as error:
            raise cli.UserError(f"{folder} holds no judge ({Path(error.filename or folder).name} is missing); "
                                "make one with: python judge.py train") from None
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            raise cli.UserError(f"{folder}: damaged judge ({error}); "
                                "make it again with: python judge.py train") from None
        return judge.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


def pixels(images):
    """Float tensor [B, 3, H, W] in [-1, 1] of: such a tensor, a uint8 array [B, H, W, 3], or PIL images."""
    if isinstance(images, torch.Tensor):
        return images.float()
    array = (np.asarray(images) if isinstance(images, np.ndarray)
             else np.stack([np.asarray(i.convert("RGB")) for i in images]))
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def matches(reading, claim, relations=True, margin=3.0):
    """Whether a Reading shows a scenes.Claim exactly: as many objects, each claimed one among them, every said
    relation true by at least `margin` pixels, the background as said. relations=False ignores who is where."""
    if (len(reading.objects) != len(claim.objects) or claim.tone not in (None, reading.tone)
            or claim.texture not in (None, reading.texture)):
        return False
    towards = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for order in permutations(reading.objects):
        if all((o.shape, o.colour) == (shape, colour) and size in (None, o.size)
               for o, (shape, colour, size) in zip(order, claim.objects)):
            ahead = [(order[i].x - order[j].x) * towards[word][0] + (order[i].y - order[j].y) * towards[word][1]
                     for i, word, j in claim.relations]
            if not relations or all(pixel >= margin for pixel in ahead):
                return True
    return False


def exact_match(judge, images, captions):
    """How many pictures show their captions -> {"n", "exact", "unordered" (relations ignored), "related" (of those
    with a relation in the caption that are right apart from relations, the share with these right too; None where
    there are none. Placed at random, one relation holds in some 0.4), "by_objects": {1: {the same}, ...}},
    rates in [0, 1]. ValueError on a caption outside the grammar."""
    claims = [scenes.parse(caption) for caption in captions]
    hits = [(len(c.objects), matches(r, c), matches(r, c, relations=False), bool(c.relations))
            for r, c in zip(judge.read(images), claims, strict=True)]

    def rates(rows):
        share, related = (lambda which: sum(which) / max(len(which), 1)), [row[1] for row in rows if row[2] and row[3]]
        return {"n": len(rows), "exact": share([row[1] for row in rows]), "unordered": share([row[2] for row in rows]),
                "related": share(related) if related else None}
    counts = sorted({row[0] for row in hits})
    return rates(hits) | {"by_objects": {count: rates([row for row in hits if row[0] == count]) for count in counts}}


# --- training ---

def render(seed, n):
    """n scenes of split "train" -> uint8 [n, 64, 64, 3], objects float32 [n, 3, 6] (there, x, y, shape, colour,
    size; zeros where there is none), ground int64 [n, 2] (tone, texture)."""
    images = np.empty((n, scenes.SIZE, scenes.SIZE, 3), np.uint8)
    objects, ground = np.zeros((n, 3, 6), np.float32), np.empty((n, 2), np.int64)
    for i in tqdm(range(n), desc="render", mininterval=1, leave=False):
        one = scenes.scene(seed, i)
        images[i] = scenes.draw(one)
        ground[i] = scenes.TONES.index(one.tone), scenes.TEXTURES.index(one.texture)
        for j, o in enumerate(one.objects):
            objects[i, j] = (1, o.x, o.y, scenes.SHAPES.index(o.shape), COLOURS.index(o.colour),
                             scenes.SIZES.index(o.size))
    return torch.from_numpy(images), torch.from_numpy(objects), torch.from_numpy(ground)


def augment(images, objects, rng):
    """Images [B, 3, 64, 64] in [-1, 1] spoilt as an autoencoder or a generator might -> images, objects, and
    [B] bool: which still have the colours of their labels."""
    n, g = len(images), torch.Generator().manual_seed(int(rng.integers(2 ** 31)))
    flip = torch.rand(n, generator=g) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    x = torch.where(flip[:, None], scenes.SIZE - objects[..., 1], objects[..., 1])
    objects = torch.cat([objects[..., :1], x[..., None], objects[..., 2:]], dim=2)
    # Shuffled colour channels in half of the pictures: else a shape is known only in the colours it was trained in.
    odd = torch.arange(n) % 2 == 0
    mixed = images.gather(1, torch.rand(n, 3, generator=g).argsort(1)[:, :, None, None].expand_as(images))
    images = torch.where(odd[:, None, None, None], mixed, images)
    images = images * (1 + 0.06 * torch.randn(n, 3, 1, 1, generator=g)) + 0.04 * torch.randn(n, 3, 1, 1, generator=g)
    blurred = F.interpolate(images[:n // 2], size=int(rng.integers(28, 60)), mode="bilinear", antialias=True)
    images = torch.cat([F.interpolate(blurred, size=scenes.SIZE, mode="bicubic"), images[n // 2:]])
    for size, most in ((64, 0.12), (16, 0.08)):                    # grain, and the blotches of a latent's cells
        noise = F.interpolate(torch.randn(n, 3, size, size, generator=g), size=scenes.SIZE, mode="bilinear")
        images = images + most * torch.rand(n, 1, 1, 1, generator=g) ** 2 * noise
    return images.clamp(-1, 1), objects, ~odd


def judge_loss(out, objects, ground, true):
    """Losses [B] of the judge's maps. All cells near an object are trained on its attributes, weighted by their heat:
    whichever of them turns out to be the peak knows the answer."""
    centre = (torch.arange(GRID, device=objects.device) + 0.5)                              # in cells
    dx = objects[:, :, 1, None, None] / CELL - centre[None, None, None, :]                  # [B, 3, 1, 16]
    dy = objects[:, :, 2, None, None] / CELL - centre[None, None, :, None]                  # [B, 3, 16, 1]
    heat = torch.exp(-(dx ** 2 + dy ** 2) / (2 * SIGMA ** 2)) * objects[:, :, 0, None, None]     # [B, 3, 16, 16]
    heat, owner = heat.max(1)                                                               # [B, 16, 16]
    near = heat * (heat > 0.2)
    near = near / near.sum((1, 2), keepdim=True)
    mine = {name: objects[:, :, 3 + i].gather(1, owner.flatten(1)).view_as(owner).long()
            for i, name in enumerate(("shape", "colour", "size"))}
    offset = torch.stack([d.expand(-1, -1, GRID, GRID).gather(1, owner[:, None])[:, 0]
                          for d in (dx, dy)], dim=1)                                        # [B, 2, 16, 16]
    loss = 40 * F.binary_cross_entropy_with_logits(out["heat"][:, 0], heat, reduction="none").mean((1, 2))
    loss = loss + (near * F.smooth_l1_loss(out["offset"], offset, reduction="none", beta=0.2).sum(1)).sum((1, 2))
    for name, weight in (("shape", 1.0), ("colour", true.float()), ("size", 1.0)):
        loss = loss + weight * (near * F.cross_entropy(out[name], mine[name], reduction="none")).sum((1, 2))
    for i, name in enumerate(("tone", "texture")):
        loss = loss + F.cross_entropy(out[name], ground[:, i], reduction="none")
    return loss


def train(args):
    world, folder = training.start(), f"{args.out}/training"
    if world.size > 1:
        raise cli.UserError("the judge trains in one process; start it with python, not torchrun")
    cli.fresh(args.out, "judge.json")
    torch.manual_seed(args.seed)
    judge = Judge().to(world.device)
    ema, optimizer = copy.deepcopy(judge).requires_grad_(False), training.adamw(judge, args.lr)
    images, objects, ground = render(args.seed, args.images)
    for step, log, lr in training.steps(args, world, folder, judge, ema, optimizer, training.recipe(args), cosine=True):
        rows = torch.from_numpy(training.batch_indices(args.seed, step, args.batch, args.images))
        clean = images[rows].permute(0, 3, 1, 2).float() / 127.5 - 1                        # [B, 3, 64, 64]
        x, targets, true = augment(clean, objects[rows], training.step_generator(args.seed, step))
        x = x.to(world.device, memory_format=torch.channels_last)
        with training.autocast(world.device):
            out = judge(x)
        losses = judge_loss(out, targets.to(world.device), ground[rows].to(world.device), true.to(world.device))
        losses.mean().backward()
        log.add(losses, gradient=training.optimiser_step(optimizer, judge, lr, clip=5.0))
    ema.save(args.out, **training.made(folder, args.seed))
    report(args.out, args.check, world.device)


def report(folder, n, device, seed=1_000_003):
    """Print the judge's exact match on n fresh scenes of each split, which nobody trains on under that seed."""
    judge = Judge.load(folder, device)
    for split in scenes.SPLITS:
        images, captions, drawn = scenes.batch(seed, 0, n, split)
        rates, readings = exact_match(judge, images, captions), judge.read(images)
        whole = sum(sorted((o.shape, o.colour, o.size) for o in r.objects)
                    == sorted((o.shape, o.colour, o.size) for o in s.objects)
                    and (r.tone, r.texture) == (s.tone, s.texture) for r, s in zip(readings, drawn))
        print(f"{split:9s} {n} scenes: exact match {rates['exact']:.4f} "
              f"(order ignored {rates['unordered']:.4f}), by objects "
              + ", ".join(f"{k}: {v['exact']:.4f} of {v['n']}" for k, v in rates["by_objects"].items())
              + f"; all of the scene, said or not: {whole / n:.4f}")


def main():
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a judge from nothing", doc="Train a judge from nothing.")
    command.add_argument("--out", type=cli.folder, required=True,
                         help="folder of the judge; checkpoints and log in its training/")
    for name, value in TRAIN.items():
        kind = cli.number(0) if isinstance(value, float) else cli.seed if name == "seed" else cli.positive
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=f"default {value}")
    command.add_argument("--check", type=cli.positive, default=5_000,
                         help="fresh scenes of each split to be measured on at the end; default 5000")
    command = commands.add_parser("check", help="measure a judge on fresh scenes",
                                  doc="Measure a judge on fresh scenes.")
    command.add_argument("--model", type=Path, required=True, help="folder of the judge")
    command.add_argument("--n", type=cli.positive, default=5_000, help="scenes of each split; default 5000")
    args = parser.parse_args()
    if args.command == "train":
        train(args)
    else:
        report(args.model, args.n, training.start().device)


if __name__ == "__main__":
    cli.run(main)
