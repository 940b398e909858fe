"""The miniature: a small Stable Diffusion, trained from scratch on captioned scenes, and the whole pipeline on it.

    python mini.py teacher --out runs/mini-sd           # VAE, then text tower and noise-predicting U-Net
    python mini.py all                                  # every stage from scratch, printing each command line it runs

A killed stage resumes where it stopped: run the same line again.
"""
import copy
import dataclasses
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import cli
import scenes
import training
from checkpoint import crc
from diffusion import Schedule
from images import grid
from instaflow import CONFIGS, PROMPTS, InstaFlow
from text import TextTower, tokenize
from unet import UNet
from vae import VAE

UNET, AUTOENCODER, TEXT = CONFIGS["mini"]                  # factor 4
LATENT = (AUTOENCODER.latent_channels, scenes.SIZE // AUTOENCODER.factor, scenes.SIZE // AUTOENCODER.factor)
VAE_TRAINING = Namespace(
    iterations=10000,
    batch=8,
    lr=2e-3,              # cosine to zero
    warmup=100,
    ema=0.995,
    kl=1e-5,              # weight of the KL per latent: just enough that latents keep a scale
    seed=0,               # scenes (seed, 0, 1, ...): every picture is new
    log_every=50,
    save_every=500,
)
TEACHER_TRAINING = Namespace(
    scenes=64_000,        # encoded once; seen 40 times
    iterations=40_000,
    # the first iterations see only scenes of two objects whose caption says which is where. Among others
    # the words of place take many times as long to learn (Teacher)
    related=4_000,
    batch=64,
    lr=6e-4,              # constant, so that a run can be made longer from any checkpoint of that part,
    warmup=200,
    decay=6_000,          # and over the last of the iterations straight down to zero (Hägele et al. 2024)
    cosine=False,
    ema=0.999,
    # weigh by min(SNR, this) / SNR, else faint textures have most of the gradient (Hang et al. 2023)
    min_snr=5.0,
    # timestep 1000 u^skew, u uniform: more of the strong noise, where the scene's layout is decided
    skew=0.5,
    # and by min(1 + 1 / SNR, this), which makes it a velocity error (Salimans & Ho 2022):
    # layout has little weight in a noise error
    velocity=10.0,
    where=0.5,            # weight of the loss that has the tower know where things are (Teacher)
    drop=0.1,             # of the prompts become NULL, so that guidance has something to guide away from
    seed=0,
    log_every=50,
    save_every=250,
    sample_every=500,
)
GUIDANCE = 1.5            # of the teacher, on noise: chosen on a small grid
SHORT = dict(iterations=4, batch=4, scenes=100, related=2, decay=2, save_every=2, log_every=2)       # --short


def images(seed, start, n, split="train"):
    """Scenes as a network takes them -> (float32 [n, 3, 64, 64] in [-1, 1], captions)."""
    pixels, captions, _ = scenes.batch(seed, start, n, split)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, captions


def train_vae(out, world):
    """L1 + 2 L2 and a light KL (Rombach et al. 2022, appendix G, without the adversary) -> the EMA weights as a VAE.
    L1 alone keeps faint textures at the cost of small objects' shapes; L2 weighs those, where the error is large."""
    s = VAE_TRAINING
    torch.manual_seed(s.seed)
    vae = VAE(AUTOENCODER).to(world.device, memory_format=torch.channels_last)
    ema, optimizer = copy.deepcopy(vae), training.adamw(vae, s.lr)
    net = training.distributed(_Autoencode(vae), world)
    for step, log, lr in training.steps(s, world, f"{out}/training/vae", vae, ema, optimizer, training.recipe(s),
                                        cosine=True):
        start, share = step * s.batch, s.batch // world.size
        image, _ = images(s.seed, start + world.rank * share, share)
        noise = training.step_generator(s.seed, step).standard_normal((s.batch, *LATENT), dtype=np.float32)
        image, noise = image.to(world.device), torch.from_numpy(world.share(noise)).to(world.device)
        with training.autocast(world.device):
            decoded, mean, logvar = net(image.contiguous(memory_format=torch.channels_last), noise)
        difference = decoded.float() - image
        error = (difference.abs() + 2 * difference.square()).mean((1, 2, 3))
        kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean((1, 2, 3))
        (error + s.kl * kl).mean().backward()
        log.add(error, kl=float(kl.detach().mean()), gradient=training.optimiser_step(optimizer, vae, lr))
    return ema.eval()


class _Autoencode(nn.Module):
    """Both halves in one forward call, as DistributedDataParallel wants it."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, image, noise):
        mean, logvar = self.vae.encode(image)
        return self.vae.decode(mean + (0.5 * logvar).exp() * noise), mean, logvar


class Teacher(nn.Module):
    """Text tower and U-Net, trained together: (x [B, 4, h, w], timestep [B], token ids [B, 77]) -> noise, and for
    each token [B, 77, 2] where in the picture the thing that it names is. That second task is for training only.
    Stable Diffusion's tower comes from CLIP, which was long trained on pictures; with only the noise to learn from,
    this one soon no longer lets words of place change the states of what follows them, since that disturbs the
    reading of colours, and never finds out what they are for."""

    def __init__(self):
        super().__init__()
        self.unet, self.text, self.where = UNet(UNET), TextTower(TEXT), nn.Linear(TEXT.hidden_size, 2)
        # Token and position embeddings at one scale: with open_clip's 0.02 and 0.01, small beside what the tokens
        # grow to, the tower stays a bag of words, and "left of" is never learned.
        nn.init.normal_(self.text.tower.token_embedding.weight, std=0.5)
        nn.init.normal_(self.text.tower.positional_embedding, std=0.5)

    def forward(self, x, index, ids):
        states = self.text(ids)
        return self.unet(x, index, states), self.where(states)


@torch.no_grad()
def standardise(vae):
    """Give each latent channel mean 0 and deviation 1 over the scenes, by folding that into the 1x1 convolutions on
    both sides of the latents: one channel had five times the deviation of another,
    and a loss between latents saw it alone."""
    means = torch.cat([vae.encode(images(VAE_TRAINING.seed, start, 100)[0])[0] for start in range(0, 2000, 100)])
    mu, sigma, c = means.mean((0, 2, 3)), means.std((0, 2, 3)), means.shape[1]
    into, out = vae.quant_conv, vae.post_quant_conv        # before: mean = W h + b; after: (W h + b - mu) / sigma
    into.weight[:c] /= sigma.reshape(-1, 1, 1, 1)
    into.bias[:c] = (into.bias[:c] - mu) / sigma
    into.bias[c:] -= 2 * sigma.log()                       # the log of the variance
    out.bias += out.weight[:, :, 0, 0] @ mu
    out.weight *= sigma.reshape(1, -1, 1, 1)
    vae.config = dataclasses.replace(vae.config, scaling_factor=1.0)
    return vae


def places(drawn, ids):
    """Where each object of Scenes is named, as the position of its shape's word among the caption's token ids
    [N, 77], 0 where there is no object, and where it is shown, as its centre in [-1, 1] -> int64 [N, 3],
    float32 [N, 3, 2]."""
    words = dict(zip(scenes.SHAPES, tokenize(scenes.SHAPES)[:, 1].tolist()))
    named, shown = torch.zeros(len(ids), 3, dtype=torch.long), torch.zeros(len(ids), 3, 2)
    for i, (scene, row) in enumerate(zip(drawn, ids.tolist())):
        at = 0
        # in the caption's order; "the red star", the second time, is none of them
        for k, thing in enumerate(scene.objects):
            named[i, k] = at = row.index(words[thing.shape], at + 1)
            shown[i, k] = torch.tensor([thing.x, thing.y]) / (scenes.SIZE / 2) - 1
    return named, shown


WORLD = ("latents", "ids", "named", "shown", "related")


@torch.no_grad()
def encode_world(vae, out, world):
    """The teacher's data, made once, of `scenes` captioned pictures -> (latents [N, 4, h, w] float16, token ids
    [N, 77], and `places`: named [N, 3], shown [N, 3, 2]; and which of them are of two objects,
    with their relation said, int64 [M])."""
    s = TEACHER_TRAINING
    # another VAE's latents are another world
    path = Path(out) / "training" / f"world-{s.seed}-{s.scenes}-by-{crc(vae)}.safetensors"
    if world.rank == 0 and not path.exists():
        rows = []
        for start in tqdm(range(0, s.scenes, 100), desc="encoding scenes", mininterval=1):
            image, captions = images(s.seed, start, 100)
            with training.autocast(world.device):
                mean, _ = vae.encode(image.to(world.device).contiguous(memory_format=torch.channels_last))
            ids = tokenize(captions)
            related = [start + i for i, claim in enumerate(map(scenes.parse, captions))
                       if len(claim.objects) == 2 and claim.relations]
            rows.append((mean.half().cpu(), ids, *places([scenes.scene(s.seed, start + i) for i in range(100)], ids),
                         torch.tensor(related)))
        training.write_tensors(path, dict(zip(WORLD, map(torch.cat, zip(*rows)))))
    training.barrier()
    data = load_file(path)
    return [data[key] for key in WORLD]


def train_teacher(out, world, compiled=False):
    """Noise prediction as Stable Diffusion's (Ho et al. 2020, equation 14), text tower included -> the saved model."""
    s = TEACHER_TRAINING
    cli.fresh(out)
    vae = standardise(train_vae(out, world).cpu()).to(world.device)
    latents, ids, named, shown, related = encode_world(vae, out, world)
    torch.manual_seed(s.seed)
    teacher = Teacher().to(world.device, memory_format=torch.channels_last)
    ema, optimizer = copy.deepcopy(teacher), training.adamw(teacher, s.lr)
    if compiled:
        teacher.compile()
    net, null = training.distributed(teacher, world), tokenize([""])
    bar = Schedule.stable_diffusion().alphas_cumprod.float()

    def draw(step):
        """This process's share of a batch: x, noise, timestep, token ids, SNR, and of each named object: place in the
        caption, in the picture, whether asked for."""
        rows = torch.from_numpy(world.share(training.batch_indices(
            s.seed, step, s.batch, len(related) if step < s.related else len(latents))))
        rows = related[rows] if step < s.related else rows
        rng = training.step_generator(s.seed, step)
        index = torch.from_numpy(world.share((1000 * rng.random(s.batch) ** s.skew).astype(int)))
        dropped = torch.from_numpy(world.share(rng.random(s.batch) < s.drop))
        noise = torch.from_numpy(world.share(rng.standard_normal((s.batch, *latents.shape[1:]), dtype=np.float32)))
        a, b = bar[index].sqrt()[:, None, None, None], (1 - bar[index]).sqrt()[:, None, None, None]
        return (a * latents[rows].float() + b * noise, noise, index, torch.where(dropped[:, None], null, ids[rows]),
                (a / b).flatten().square(), named[rows], shown[rows], (named[rows] > 0) & ~dropped[:, None])

    batch = training.ahead(draw)
    info = {"prediction": "epsilon", "sampler": "dpm", "steps": 25, "guidance": GUIDANCE}
    for step, log, lr in training.steps(s, world, f"{out}/training/teacher", teacher, ema, optimizer,
                                        training.recipe(s)):
        x, noise, index, words, snr, said, where, asked = (y.to(world.device) for y in batch(step))
        with training.autocast(world.device):
            eps, found = net(x.contiguous(memory_format=torch.channels_last), index, words)
        losses = (eps.float() - noise).square().mean((1, 2, 3))
        loss = (losses * (s.min_snr / snr).clamp(max=1) * (1 + 1 / snr).clamp(max=s.velocity)).mean()
        found = found.float().gather(1, said[:, :, None].expand(-1, -1, 2))
        miss = ((found - where).square().sum(2) * asked).sum(1).mean()
        (loss + s.where * miss).backward()
        lr *= min(1, (s.iterations - step) / s.decay)
        log.add(losses, 1 - index / 1000, where=float(miss.detach()),
                gradient=training.optimiser_step(optimizer, teacher, lr))
        if world.rank == 0 and (step + 1) % s.sample_every == 0:
            drawn = InstaFlow(ema.unet, vae, ema.text, info).generate(PROMPTS)
            training.write_by(grid([drawn], None, PROMPTS).save, f"{out}/training/teacher/samples-{step + 1:06d}.png")
    made = [training.made(f"{out}/training/{stage}", s.seed) for stage in ("vae", "teacher")]
    model = InstaFlow(ema.unet.eval(), vae, ema.text.eval(),
                      {**info, "made": {**made[1], "seconds": made[0]["seconds"] + made[1]["seconds"]}})
    if world.rank == 0:
        model.save(out, dtype=torch.float16)
    return model


# --- everything, from nothing ---

STUDENT = "--batch 32 --warmup 100 --cosine --ema 0.998 --save-every 200 --sample-every 500"


def lpips(models, l2=0.05):
    """Flags of the LPIPS stage, on the features of the judge in the folder `models`."""
    return f"--loss lpips --vgg {models}/mini-judge/judge.safetensors --lpips-size 0 --l2 {l2}"


def pipeline(root, short=False):
    """The command lines of the whole miniature, in order: the paper's stages, and beside them direct distillation at
    no less total cost: as many iterations as reflow and the first distillation have together, pairs from more U-Net
    passes (36454 x 20, not 10240 x 20 + 32768 x 12), and the same LPIPS: that is mini-instaflow-lpips's match.
    mini-instaflow then learns two and four steps too."""
    n = (lambda full, little: little if short else full)
    root = shlex.quote(str(root))
    models, pairs = f"{root}/models", f"{root}/pairs"
    last = f"{lpips(models)} --iterations {n(2500, 4)} --lr 1e-4 {STUDENT} --exact"
    text = f"""
        judge.py train --out {models}/mini-judge {n("", "--images 200 --iterations 4 --check 50")}
        mini.py teacher --out {models}/mini-sd {n("", "--short")}
        scenes.py --captions {n(36864, 64)} --seed 1 --out {pairs}/captions.txt
        pairs.py --model {models}/mini-sd --prompts {pairs}/captions.txt --steps {n(10, 2)} --guidance {GUIDANCE}
            {n("--number 10240", "")} --out {pairs}/sd
        train_reflow.py --model {models}/mini-sd --pairs {pairs}/sd --out {models}/mini-2rf
            --iterations {n(2400, 4)} --lr 5e-4 {STUDENT} --exact --density early --huber
        pairs.py --model {models}/mini-2rf --prompts {pairs}/captions.txt --steps {n(6, 3)} --guidance 3
            {n("--number 32768", "")} --out {pairs}/2rf --finish {models}/mini-sd --finish-at 0.3 --finish-guidance 3
        distill.py --model {models}/mini-2rf --pairs {pairs}/2rf --out {models}/mini-instaflow-l2
            --iterations {n(6000, 4)} --lr 3e-4 {STUDENT} --exact --loss huber
        distill.py --model {models}/mini-instaflow-l2 --pairs {pairs}/2rf --out {models}/mini-instaflow-lpips {last}
        distill.py --model {models}/mini-instaflow-lpips --pairs {pairs}/2rf --out {models}/mini-few-l2
            --iterations {n(1000, 4)} --lr 2e-4 {STUDENT} --exact --loss huber --steps 4
        distill.py --model {models}/mini-few-l2 --pairs {pairs}/2rf --out {models}/mini-instaflow
            {lpips(models)} --iterations {n(2000, 4)} --lr 1e-4 {STUDENT} --exact --steps 4
        pairs.py --model {models}/mini-sd --prompts {pairs}/captions.txt --steps {n(10, 2)} --guidance {GUIDANCE}
            {n("--number 36454", "")} --out {pairs}/sd-more
        distill.py --model {models}/mini-sd --pairs {pairs}/sd-more --out {models}/mini-direct-l2
            --iterations {n(8400, 4)} --lr 3e-4 {STUDENT} --exact --loss huber
        distill.py --model {models}/mini-direct-l2 --pairs {pairs}/sd-more --out {models}/mini-direct {last}
        experiments.py table --models {models} --judge {models}/mini-judge --out {root}/benchmarks/miniature.json
            {n("", "--n 100 --rows mini-2rf:1,mini-instaflow:1")}
        """
    lines = text.replace("\n            ", " ").splitlines()        # a line indented further goes on from the last
    return [" ".join(line.split()) for line in lines if line.strip()]


def run(line):
    """Run one command line of the pipeline. One that is done already ends at once: each resumes where it stopped."""
    print(f"\n$ python {line}", flush=True)
    script, *words = shlex.split(line)
    code = subprocess.run([sys.executable, Path(__file__).parent / script, *words], check=False).returncode
    if code:
        raise cli.UserError(f"`python {line}` ended with status {code}; "
                            "fix what it reports, and run the same line again: it resumes from there")


def run_all(args, world):
    """Every line of `pipeline`, one after another."""
    for line in pipeline(args.root, args.short):
        run(line)


def main():
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(required=True, parser_class=cli.Parser)
    teacher = commands.add_parser("teacher", doc=train_teacher.__doc__)
    teacher.set_defaults(run=lambda args, world: train_teacher(args.out, world, args.compile))
    teacher.add_argument("--out", type=cli.folder, required=True, help="folder of the model")
    teacher.add_argument("--compile", action="store_true",
                         help="torch.compile: two minutes, then faster or slower by the processor; "
                              "needs a C++ compiler")
    everything = commands.add_parser("all", doc="The whole pipeline from nothing: some eleven hours of two CPU cores.")
    everything.set_defaults(run=run_all)
    everything.add_argument("--root", default="runs/mini", help="where models/ and pairs/ are made")
    for command in (teacher, everything):
        command.add_argument("--short", action="store_true",
                             help="a few steps of everything, to test the plumbing: its pictures show nothing")
    args = parser.parse_args()
    if args.short:
        for settings in (VAE_TRAINING, TEACHER_TRAINING):
            vars(settings).update({k: v for k, v in SHORT.items() if hasattr(settings, k)})
    world = training.start()
    args.run(args, world)
    training.finish()


if __name__ == "__main__":
    cli.run(main)
