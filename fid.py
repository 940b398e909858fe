"""FID and CLIP score: pictures, or a model that draws them, against pictures or a statistics file.

    python fid.py pictures/ real/                 # two folders, or .npz statistics in pytorch-fid's format
    python fid.py real/ --save real.npz           # statistics of a folder, for later
    python fid.py --model models/mini-instaflow --captions captions.txt --features judge scenes/
    python fid.py --model instaflow --steps 1 --guidance 1 --protocol coco2017-5k --captions captions_val2017.json \\
        --out pictures/ --clip open_clip_pytorch_model.bin val2017/
    torchrun --nproc-per-node 8 fid.py ... (the same): processes take whole batches, and the figures are the same

Picture i is drawn for caption i from noise(0, seed, i). With --out an interrupted run resumes where it stopped.
FID falls with the number of pictures: compare only at equal numbers.
"""
import io
import os
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from scipy.linalg.lapack import dpstrf
from tqdm import tqdm

import cli
import inception
import training
from checkpoint import crc
from cli import UserError
from clip_score import Clip
from inception import Inception
from instaflow import InstaFlow
from judge import Judge
from pictures import fit, from_folder, from_model, list_pictures, matched, pair, read_captions, resume, warn, warn_of

PROTOCOLS = {"coco2017-5k": (5_000, 512), "coco2014-30k": (30_000, 256)}     # pictures, and pixels a side of both sets
ENOUGH = 2_048                            # pictures: with fewer, the covariance of Inception's features is singular
JUDGE = Path(__file__).resolve().parent / "models" / "mini-judge"
Picture = namedtuple("Picture", "pixels clip")      # uint8 [H, W, 3], and what CLIP sees: float [3, S, S] or None


# --- the numbers ---

def statistics(features):
    """Features [N, D] -> (mu [D], sigma [D, D]), float64, the covariance with ddof 1. Raises ValueError for N < 2."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features are of shape {list(features.shape)}; [N, D] with N of at least 2 is needed")
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) -> float (Heusel et al. 2017, equation 6).
    With S1 = W W^T, S1 S2 has the eigenvalues of the symmetric W^T S2 W: real, and as many as S1 has rank.
    Raises ValueError on other shapes, NaN, infinity."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or {sigma1.shape, sigma2.shape} != {mu1.shape * 2}:
        raise ValueError(f"mu and sigma are of shapes {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}; "
                         "[D], [D, D] twice is needed")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("mu or sigma holds NaN or infinity")
    roots = factor(sigma1), factor(sigma2)
    # By the root of lower rank: with the other, an eigenvalue that ought to be zero comes out at 1e-16,
    # and its root at 1e-8.
    root, other = (roots[0], sigma2) if roots[0].shape[1] <= roots[1].shape[1] else (roots[1], sigma1)
    values = np.linalg.eigvalsh(root.T @ other @ root)
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2)
                     - 2 * np.sqrt(values.clip(0)).sum()), 0.0)        # rounding can make it negative


def factor(sigma):
    """W [D, rank] with W W^T = sigma [D, D], by pivoted Cholesky: it stops at the rank,
    and takes a fifth of the time of a root by eigenvectors."""
    lower, pivots, rank, _ = dpstrf(sigma, lower=1)
    root = np.zeros_like(sigma)
    root[pivots - 1] = np.tril(lower)
    return root[:, :rank]


class Running:
    """Mean and covariance of features by batches, none of which is kept; float64 (Chan, Golub & LeVeque 1979)."""

    def __init__(self, width, device="cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device       # which has no float64
        self.n, self.mean = 0, torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)    # sum of (x - mean)(x - mean)^T

    def add(self, features):
        """Features [B, D], B of at least 1."""
        x = features.to(self.mean.device, torch.float64)
        mean, n = x.mean(0), len(x)
        delta, x = mean - self.mean, x - mean
        self.scatter.addmm_(x.T, x).addr_(delta, delta, alpha=self.n * n / (self.n + n))
        self.mean += delta * (n / (self.n + n))
        self.n += n

    def merge(self):
        """Over all processes: exact, each one's scatter moved to the common mean."""
        if dist.is_initialized():
            n, mean = torch.tensor([self.n], dtype=torch.float64, device=self.mean.device), self.n * self.mean
            dist.all_reduce(n)
            dist.all_reduce(mean)
            mean /= n
            self.scatter.addr_(self.mean - mean, self.mean - mean, alpha=self.n)
            dist.all_reduce(self.scatter)
            self.n, self.mean = int(n), mean

    def statistics(self):
        """-> (mu, sigma) as `statistics` gives them."""
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()


def load_statistics(path, width=None):
    """mu and sigma of an .npz file, pytorch-fid's or ours -> (mu, sigma, pictures or None).
    width: of the other set, if known. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma, n = np.float64(file["mu"]), np.float64(file["sigma"]), int(file["n"]) if "n" in file else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such statistics file; make one with --save {path}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError,
            zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is no whole statistics file with mu and sigma ({error}); "
                        "make it again with --save") from None
    if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} holds mu {list(mu.shape)} and sigma {list(sigma.shape)}, "
                        "where finite [D] and [D, D] are needed; make it again with --save")
    if width not in (None, len(mu)):
        raise UserError(f"{path} holds statistics of {len(mu)} features, and the other set has {width}: "
                        "they are of two networks; give the right --features")
    return mu, sigma, n


def save_statistics(path, mu, sigma, n):
    """An .npz file as `load_statistics` reads it, and pytorch-fid."""
    file = io.BytesIO()
    np.savez_compressed(file, mu=mu, sigma=sigma, n=n)
    training.write(path, file.getvalue())


# --- the networks ---

def features(args, device):
    """-> (function of uint8 pictures, a list of [H, W, 3] -> float32 [B, D]; D)."""
    if args.features == "judge":
        judge = Judge.load(args.judge, device)

        def embed(pictures):
            side = next((p.shape for p in pictures if p.shape[:2] != (64, 64)), None)
            if side:
                raise UserError(f"--features judge reads pictures of 64 x 64 px, and one is {side[1]} x {side[0]}; "
                                "give --size 64, or --features inception")
            return judge.embed(np.stack(pictures))
        return embed, sum(judge.channels[3:])
    if not Path(args.inception).is_file():
        raise UserError(f"--inception {args.inception}: no such file; fetch {inception.URL}, "
                        "or give --features judge for the miniature")
    network = Inception(args.inception).to(device)

    def embed(pictures):
        alike = len({p.shape for p in pictures}) == 1
        groups = [torch.from_numpy(g).to(device).permute(0, 3, 1, 2).float() / 255
                  for g in ([np.stack(pictures)] if alike else [p[None] for p in pictures])]
        return network(groups[0] if alike else torch.cat([inception.resize(g) for g in groups]))
    return embed, 2048


# --- the measurement ---

def measure(batches, total, network, clip, world, name):
    """Batches of (Pictures, captions) -> ((mu, sigma, pictures) or None, mean cosine or None), over all processes.
    Raises UserError."""
    if network and total < 2:
        raise UserError(f"{name}: {total} picture has no covariance; "
                        "FID needs at least 2, and thousands to mean something")
    embed, width = network or (None, 0)
    running, cosines = Running(width, world.device), 0.0
    with tqdm(total=total, desc=Path(name).name, unit="picture", disable=world.rank > 0, mininterval=1) as bar:
        for pictures, captions in batches:
            if network:
                running.add(embed([p.pixels for p in pictures]))
            if clip:
                cosines += float(clip(torch.stack([p.clip for p in pictures]), captions).double().sum())
            bar.update(min(len(pictures) * world.size, total - bar.n))
    if network:
        running.merge()
        if not running.scatter.isfinite().all():
            raise UserError(f"{name}: the features hold NaN or infinity, so the network's weights are damaged; "
                            "fetch them again")
    cosines = torch.tensor(cosines, dtype=torch.float64, device=running.mean.device)
    if clip and dist.is_initialized():
        dist.all_reduce(cosines)
    return (*running.statistics(), total) if network else None, float(cosines) / total if clip else None


def of_folder(path, args, world, network, clip=None, captions=None, only=None):
    """-> as `measure`. only: the names of the pictures to take (None: all). Warns of what is odd."""
    files, seen = list_pictures(path), {}
    if only is not None:
        files = matched(files, only, path, args.captions)
    batches = from_folder(files, pair(files, captions) if clip else None,
                          preparer(args, network, clip), args, world, seen)
    result = measure(batches, len(files), network, clip, world, path)
    warn_of(seen, path, args.size, generated=path == args.pictures and args.reference)
    return result


def of_model(model, args, captions, world, network, clip):
    """-> as `measure`."""
    captions, native = [caption for _, caption in captions], model.unet.config.sample_size * model.vae.config.factor
    if args.size and native < args.size:
        warn(f"{args.model} draws {native} px, and its pictures are enlarged to {args.size}")
    if args.out:
        resume(args, {"model": args.model, "weights": crc(model.unet, model.vae, model.text),
                      "sampler": model.info["sampler"], "steps": args.steps, "guidance": args.guidance,
                      "seed": args.seed, "float32": args.float32,
                      "captions": zlib.crc32("\n".join(captions).encode()), "number": len(captions)}, world)
    return measure(from_model(model, captions, preparer(args, network, clip), args, world),
                   len(captions), network, clip, world, args.model)


def preparer(args, network, clip):
    """The function PIL image -> Picture that reading threads call. CLIP sees the whole picture, whatever --size."""
    return lambda image: Picture(np.asarray(fit(image, args.size)) if network else None,
                                 clip.prepare(image) if clip else None)


def arguments():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH",
        help="the pictures (unless --model draws them) and the reference: "
             "folders of pictures or .npz files of statistics")
    add("--features", choices=("inception", "judge"), default="inception",
        help="judge: the miniature's, for its 64 px scenes")
    add("--inception", metavar="FILE", default=inception.FILE, help="weights (default: %(default)s in this folder)")
    add("--judge", metavar="FOLDER", default=str(JUDGE), help="default: the shipped one")
    add("--protocol", choices=PROTOCOLS,
        help="number of captions, and size of both sets: 5,000 at 512 px, 30,000 at 256 px")
    add("--size", type=cli.positive,
        help="bring both sets to this many pixels: short side (Lanczos), then centre crop "
             "(default: as they are, or the protocol's)")
    add("--matched", action="store_true",
        help="of the reference folder take only the pictures that the captions describe (default: all)")
    add("--save", type=Path, metavar="FILE.npz", help="write the statistics of the pictures, in pytorch-fid's format")
    add("--captions", metavar="FILE",
        help="COCO's captions_*.json (first caption of each image), JSON lines (.jsonl), or text, one a line")
    add("--number", type=cli.positive, help="of captions (default: all, or the protocol's)")
    add("--clip", metavar="FILE", help="also the CLIP score: open_clip's weights")
    add("--clip-model", default="ViT-g-14", help="open_clip's name of the network in that file (default: %(default)s)")
    add("--clip-prefix", default="", help='before each caption, as in "A photo depicts " (default: none)')
    add("--model", help="a model folder, which draws a picture a caption")
    add("--prediction", choices=cli.PREDICTIONS, help=cli.PREDICTION)
    add("--steps", type=cli.positive, help="of the sampler (default: the model's own)")
    add("--guidance", type=cli.number(), help="default: the model's own; 1 is none")
    add("--seed", type=cli.seed, default=0, help="of the noise")
    add("--out", type=Path, metavar="FOLDER", help="keep the drawn pictures, and go on from those that are there")
    add("--float32", action="store_true", help="draw without bf16")
    add("--batch", type=cli.positive, default=50, help="pictures at a time")
    add("--workers", type=cli.positive, default=min(8, os.cpu_count() or 1), help="threads that read pictures")
    add("--device", type=cli.device, help="default: the GPU where there is one")
    args = parser.parse_intermixed_args()
    if len(args.paths) > 2 - bool(args.model):
        parser.error("two sets are compared: PICTURES REFERENCE, or --model and REFERENCE")
    args.pictures, args.reference = [*([None] if args.model else []), *args.paths, None, None][:2]
    if not (args.reference or args.save or args.clip or args.out and args.model) or not (args.model or args.pictures):
        parser.error("nothing to compare; give PICTURES and REFERENCE (folders or .npz files), "
                     "or --model and REFERENCE")
    if (args.model or args.clip or args.matched or args.number) and not args.captions:
        parser.error("--model, --clip, --matched and --number need --captions")
    if args.out and not args.model:
        parser.error("--out keeps what --model draws; give --model")
    if (args.pictures or "").endswith(".npz") and (args.clip or args.save):
        parser.error(f"{args.pictures} holds no pictures; give their folder for --clip or --save")
    if args.matched and (not args.reference or args.reference.endswith(".npz")):
        parser.error("--matched needs a reference folder")
    if args.save and args.save.suffix != ".npz":
        parser.error(f"--save {args.save}: statistics are written as .npz; name a .npz file")
    if args.save:
        cli.writable(args.save)
    args.number, args.size = (given or usual for given, usual
                              in zip((args.number, args.size), PROTOCOLS.get(args.protocol, (None, None))))
    return args


def main():
    args = arguments()
    world = training.start(args.device)
    captions = read_captions(args.captions, args.number) if args.captions else None
    if captions and args.number and len(captions) < args.number and not args.protocol:
        raise UserError(f"{args.captions} holds {len(captions)} captions, and --number asks for {args.number}; "
                        "give fewer, or more captions")
    folders = [path for path in (args.pictures, args.reference) if path and not path.endswith(".npz")]
    network = features(args, world.device) if (folders or args.model) and (args.reference or args.save) else None
    clip = Clip(args.clip, args.clip_model, world.device, args.clip_prefix) if args.clip else None
    if args.model:
        model = InstaFlow.load(args.model, world.device, prediction=args.prediction)
        args.steps = args.steps or model.info["steps"]
        args.guidance = model.info["guidance"] if args.guidance is None else args.guidance
        if world.rank == 0:
            model.check_steps(args.steps)
    real = score = None
    if args.reference in folders:                          # first: a mistake in it shows before hours of drawing
        real, _ = of_folder(args.reference, args, world, network,
                            only={name for name, _ in captions} if args.matched else None)
    elif args.reference:
        real = load_statistics(args.reference, network and network[1])
    if args.model:
        ours, score = of_model(model, args, captions, world, network, clip)
    elif args.pictures in folders:
        ours, score = of_folder(args.pictures, args, world, network, clip, captions)
    else:
        ours = load_statistics(args.pictures, len(real[0]))
    if world.rank == 0:
        report(args, ours, real, score)
    training.finish()


def report(args, ours, real, score):
    """Write --save, warn where the sets are too small or not the protocol's, print the figures."""
    drawn = (f"{args.model} ({args.steps} step{'s' * (args.steps > 1)}, guidance {args.guidance:g}, seed {args.seed})"
             if args.model else args.pictures)
    for (mu, _, n), name in ((ours, drawn), (real, args.reference)) if real else ((ours, drawn),) if ours else ():
        if n and n < ENOUGH:
            singular = ", and their covariance is singular" * (n <= len(mu))
            warn(f"{n} pictures of {name}, fewer than {ENOUGH:,}{singular}: "
                 "FID comes out too high; compare only at equal numbers")
    if ours and args.protocol and ours[2] not in (None, PROTOCOLS[args.protocol][0]):
        warn(f"--protocol {args.protocol} is of {PROTOCOLS[args.protocol][0]:,} pictures, and these are {ours[2]}: "
             "not comparable")
    if args.save:
        save_statistics(args.save, *ours)
        print(f"{args.save}: {ours[2]} pictures of {drawn}")
    if real:
        # no network was asked for
        kept = not args.model and args.pictures.endswith(".npz") and args.reference.endswith(".npz")
        how = ((f"{len(real[0])} features" if kept else f"{args.features} features")
               + f", at {args.size} px" * bool(args.size) + f", {args.protocol}" * bool(args.protocol)
               + ", matched" * args.matched)
        first, second = (f"{n} of {name}" if n else name for n, name in ((ours[2], drawn), (real[2], args.reference)))
        print(f"FID {frechet_distance(*ours[:2], *real[:2]):.4f}: {first} against {second} ({how})")
    if score is not None:
        print(f"CLIP score {score:.4f}: {drawn}, {args.clip_model}"
              + f', prefix "{args.clip_prefix}"' * bool(args.clip_prefix))


if __name__ == "__main__":
    cli.run(main)
