"""(noise, prompt, latent) triplets: a model's own pairs X0, X1 = ODE[v](X0 | T), which reflow and distillation train on.

    python pairs.py --model models/mini-sd --prompts captions.txt --steps 25 --guidance 2 --out pairs/sd
    torchrun --nproc-per-node 8 pairs.py --model ... (the same): processes take whole shards; any number of them may go on

Pair i holds prompt i of the file and noise(1, seed, i). A shard is a safetensors file: latents in float16, the noise's
name (seed, index) with a checksum in place of the noise itself, and the prompts. It is whole, or it is not there.
"""
import bisect
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import cli
import flows
import training
import weights
from cli import UserError
from instaflow import InstaFlow

STREAM = 1                                                 # sampling and evaluation have stream 0


def checksum(noise):
    """CRC-32 of the noise's float32 bytes: numpy does not promise the same numbers in every future version."""
    return zlib.crc32(noise.numpy().tobytes())


def shard_path(folder, number):
    return Path(folder) / f"shard-{number:05d}.safetensors"


def open_shard(path):
    """Memory-mapped. Raises UserError where it is damaged."""
    try:
        shard = safe_open(path, "pt")
        shard.metadata()["json"]
        return shard
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole shard ({error}); delete it and run the same pairs.py line again") from None


def generate(model, prompts, indices, args):
    """The pairs `indices` (a range) -> one shard's tensors."""
    shape, latents, sums = model.latent_shape(), [], []
    for start in range(0, len(indices), args.batch):
        batch = indices[start:start + args.batch]
        noise = torch.stack([flows.noise(STREAM, args.seed, i, shape) for i in batch])
        sums += [checksum(x) for x in noise]
        with torch.no_grad(), training.autocast(model.device, args.float32):
            text = model.text([prompts[i % len(prompts)] for i in batch] + [""])
            x1 = model.solve(noise.to(model.device), text[:-1], text[-1:], args.steps, args.guidance)
        latents.append(x1.half().cpu())
    words = [prompts[i % len(prompts)].encode() for i in indices]
    return {"latent": torch.cat(latents), "seed": torch.full((len(indices),), args.seed), "index": torch.tensor(list(indices)),
            "checksum": torch.tensor(sums), "prompt": torch.frombuffer(bytearray(b"".join(words)), dtype=torch.uint8),
            "prompt_end": torch.tensor(np.cumsum([len(w) for w in words]))}


class PairDataset:
    """Read pairs back: dataset[i] -> {"noise": [4, h, w], "latent": [4, h, w], "prompt": str}, float32, on the CPU.

    Shards are memory-mapped, opened when first read. `info`: how they were made. Raises UserError where a shard is
    missing or damaged, or the noise made here is not the noise they were made from.
    """

    def __init__(self, folder):
        self.folder, self.shards, self.ends = Path(folder), {}, []
        numbers = sorted(int(m[1]) for p in self.folder.glob("shard-*.safetensors") if (m := re.fullmatch(r"shard-(\d+)", p.stem)))
        if not numbers:
            raise UserError(f"{folder} holds no pairs; make them with pairs.py --out {folder}")
        self.info = json.loads(self._open(numbers[0]).metadata()["json"])
        count, size = self.info["number"], self.info["shard"]
        missing = sorted(set(range(-(-count // size))) - set(numbers))
        if missing:
            raise UserError(f"{shard_path(folder, missing[0])} is missing ({len(missing)} shards in all); run the same pairs.py line again to make what is missing")
        for number in numbers:
            self._open(number)                             # a cut file shows now, not hours into a training
        self.ends = [min((k + 1) * size, count) for k in range(len(numbers))]

    def _open(self, number):
        if number not in self.shards:
            self.shards[number] = open_shard(shard_path(self.folder, number))
        return self.shards[number]

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect.bisect_right(self.ends, i)
        shard, row = self._open(number), i - (self.ends[number - 1] if number else 0)
        seed, index, end = (int(shard.get_slice(key)[row]) for key in ("seed", "index", "prompt_end"))
        latent = shard.get_slice("latent")[row].float()
        noise = flows.noise(STREAM, seed, index, tuple(latent.shape))
        if checksum(noise) != int(shard.get_slice("checksum")[row]):
            raise UserError(f"{shard_path(self.folder, number)}: pair {i} was made from another noise than numpy {np.__version__} makes; make the pairs again, or install the numpy they were made with")
        start = int(shard.get_slice("prompt_end")[row - 1]) if row else 0
        return {"noise": noise, "latent": latent, "prompt": bytes(shard.get_slice("prompt")[start:end].tolist()).decode()}

    def batch(self, indices):
        """-> (noise [B, 4, h, w], latent [B, 4, h, w], prompts list[str])."""
        rows = [self[int(i)] for i in indices]
        return torch.stack([r["noise"] for r in rows]), torch.stack([r["latent"] for r in rows]), [r["prompt"] for r in rows]

    def check(self, model):
        """Raises UserError where these pairs' latents are not of `model`'s shape."""
        shape = tuple(self[0]["latent"].shape)
        if shape != model.latent_shape():
            raise UserError(f"{self.folder} holds latents of shape {list(shape)}, but the model's are {list(model.latent_shape())}; make pairs with this model's teacher")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="the model whose ODE is solved")
    parser.add_argument("--prompts", required=True, help="a text file, one prompt a line")
    parser.add_argument("--out", required=True, help="folder of shards; what is there is not made again")
    parser.add_argument("--number", type=cli.positive, help="pairs in all (default: one a prompt; more go round the file again)")
    parser.add_argument("--steps", type=cli.positive, help="of the sampler (the paper: 25; default: the model's own)")
    parser.add_argument("--guidance", type=cli.number(), help="the paper: 5.0 on Stable Diffusion's noise, 1.5 on the 2-rectified flow's velocity")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the noise, in stream 1")
    parser.add_argument("--batch", type=cli.positive, default=64, help="pictures at a time")
    parser.add_argument("--shard", type=cli.positive, default=1024, help="pairs a file: what a kill loses at most")
    parser.add_argument("--float32", action="store_true", help="no bf16")
    parser.add_argument("--device", type=cli.device, help="default: the GPU where there is one")
    args = parser.parse_args()

    world = training.start(args.device)
    prompts = cli.read_prompts(args.prompts)
    model = InstaFlow.load(args.model, world.device)
    args.steps = args.steps or model.info["steps"]
    args.guidance = model.info["guidance"] if args.guidance is None else args.guidance
    number = args.number or len(prompts)
    info = {"model": args.model, "weights": weights.checksum(weights.locate(args.model)), "sampler": model.info["sampler"], "steps": args.steps, "guidance": args.guidance, "number": number,
            "shard": args.shard, "seed": args.seed, "prompts": zlib.crc32("\n".join(prompts).encode())}
    first = next(iter(sorted(Path(args.out).glob("shard-*.safetensors"))), None)
    if first and (old := json.loads(open_shard(first).metadata()["json"])) != info:
        changed = [k for k in info if old.get(k) != info[k]]
        raise UserError(f"{args.out} holds pairs made otherwise ({', '.join(changed)} differ); give the same settings, or another --out")
    todo = [k for k in range(-(-number // args.shard)) if not shard_path(args.out, k).exists()]
    training.barrier()                                     # nobody writes before all have looked
    done = number - sum(min(args.shard, number - k * args.shard) for k in todo)
    bar = tqdm(total=number, initial=done, desc="pairs", unit="pair", disable=world.rank > 0, mininterval=1)
    for k in todo[world.rank::world.size]:
        indices = range(k * args.shard, min((k + 1) * args.shard, number))
        training.write_tensors(shard_path(args.out, k), generate(model, prompts, indices, args), {"json": json.dumps(info)})
        bar.update(len(indices) * world.size)
    training.barrier()
    bar.close()
    training.finish()


if __name__ == "__main__":
    cli.run(main)
