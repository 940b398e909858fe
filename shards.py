"""Pairs on disk: shards, made in parts, and read back.

A shard is a safetensors file of about 1 GB at full size: latents in float16, the noise's name (seed, index) with a
checksum in place of the noise itself, and the prompts. A GPU needs hours for one, so it is made in parts of PART
pairs, by whichever process comes to them: a kill loses a part of each process, minutes. When the last part of a shard
is there, they become the shard. Shards and parts are whole, or they are not there.
"""
import bisect
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

import checkpoint
import flows
import hub
import weights
from cli import UserError

# bytes of pairs, as float32, that a process keeps in memory once it has read them
KEPT = 2 ** 30
STREAM = 1                                                 # sampling and evaluation have stream 0
# pairs a part: an A100 makes 200,000 a day (the paper's cost), so some four minutes
PART = 512
TENSORS = ("checksum", "index", "latent", "prompt", "prompt_end", "seed")
SHARD = 2 ** 30                                            # bytes of latents, where --shard does not say otherwise


def checksum(noise):
    """CRC-32 of the noise's float32 bytes: numpy does not promise the same numbers in every future version."""
    return zlib.crc32(noise.numpy().tobytes())


def shard_path(folder, number):
    """Of shard `number`, from 0 on."""
    return Path(folder) / f"shard-{number:05d}.safetensors"


def part_path(folder, number, part, parts):
    """Of a shard in several parts; the shard itself where it has but one."""
    return Path(folder) / f"shard-{number:05d}-part-{part:05d}.safetensors" if parts > 1 else shard_path(folder, number)


def plan(number, shard):
    """How the work is divided, by index alone -> for each shard, the range of pairs of each of its parts."""
    for start in range(0, number, shard):
        yield [range(i, min(i + PART, start + shard, number)) for i in range(start, min(start + shard, number), PART)]


def open_shard(path):
    """Memory-mapped. Raises UserError where it is damaged."""
    try:
        shard = safe_open(path, "pt")
        info, tensors = json.loads(shard.metadata()["json"]), set(shard.keys())
        if (tensors != set(TENSORS)
                or not {"number", "shard"} <= {key for key, value in info.items() if type(value) is int}):
            raise ValueError("it holds something else")
        return shard
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no whole shard ({error}); delete it and run the same pairs.py line again") from None


def merge(folder, k, parts):
    """Merge the parts of shard k into it. If killed before the parts are gone, the shard is there,
    and the next run removes them."""
    paths = [part_path(folder, k, j, len(parts)) for j in range(len(parts))]
    opened = [open_shard(path) for path in paths]
    for path, file, rows in zip(paths, opened, parts):
        if file.get_tensor("index").tolist() != list(rows):
            raise UserError(f"{path} holds other pairs than {rows.start} to {rows.stop - 1}; "
                            "delete it and run the same line again")
    tensors = {key: torch.cat([file.get_tensor(key) for file in opened]) for key in opened[0].keys()}
    # bytes of prompts in the parts before
    before = np.cumsum([0] + [len(file.get_tensor("prompt")) for file in opened[:-1]])
    tensors["prompt_end"] = torch.cat([file.get_tensor("prompt_end") + int(n) for file, n in zip(opened, before)])
    checkpoint.write_tensors(shard_path(folder, k), tensors, opened[0].metadata())
    for path in paths:
        path.unlink()


class PairDataset:
    """Read pairs back: dataset[i] -> {"noise": [4, h, w], "latent": [4, h, w], "prompt": str}, float32, on the CPU.
    Shards are memory-mapped. `info`: how they were made. Raises UserError where a shard is missing or damaged,
    or the noise made here is not the noise they were made from."""

    def __init__(self, folder):
        self.folder, self.shards, self.kept, self.ends = Path(folder), {}, {}, []
        numbers = sorted(int(m[1]) for p in self.folder.glob("shard-*.safetensors")
                         if (m := re.fullmatch(r"shard-(\d+)", p.stem)))
        if not numbers:
            raise UserError(f"{folder} holds no pairs; make them with pairs.py --out {folder}")
        self.info = json.loads(open_shard(shard_path(folder, numbers[0])).metadata()["json"])
        count, size = self.info["number"], self.info["shard"]
        missing = sorted(set(range(-(-count // size))) - set(numbers))
        if missing:
            raise self._missing(missing[0], f" ({len(missing)} shards in all)")
        for number in numbers:                             # a cut file shows now, not hours into a training
            info = json.loads(open_shard(shard_path(folder, number)).metadata()["json"])
            if info != self.info or int(self._open(number)["index"][0]) != number * size or number * size >= count:
                raise UserError(f"{shard_path(folder, number)} is of other pairs than the shards beside it; "
                                "delete it, or give each its own folder")
        self.ends = [min((k + 1) * size, count) for k in range(len(numbers))]

    def _missing(self, number, more=""):
        return UserError(f"{shard_path(self.folder, number)} is missing{more}; "
                         "run the same pairs.py line again to make what is missing")

    def _open(self, number):
        """A shard's tensors by name: views of the file, nothing is read before it is looked at."""
        try:
            if number not in self.shards:
                path = str(shard_path(self.folder, number))
                file = open_shard(path)
                self.shards[number] = {key: file.get_tensor(key) for key in TENSORS}, path, os.stat(path).st_size
            tensors, path, size = self.shards[number]
            # reading past a mapped file's end would kill the process without a message
            if os.stat(path).st_size != size:
                raise UserError(f"{path} was changed while it was in use; "
                                "delete it and run the same pairs.py line again")
        except FileNotFoundError:
            raise self._missing(number) from None
        return tensors

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect.bisect_right(self.ends, i)
        shard, row = self._open(number), i - (self.ends[number - 1] if number else 0)
        seed, index, end = (int(shard[key][row]) for key in ("seed", "index", "prompt_end"))
        latent = shard["latent"][row].float()
        noise = flows.noise(STREAM, seed, index, tuple(latent.shape))
        if checksum(noise) != int(shard["checksum"][row]):
            raise UserError(f"{shard_path(self.folder, number)}: pair {i} was made from another noise than numpy "
                            f"{np.__version__} makes; make the pairs again, or install the numpy they were made with")
        start = int(shard["prompt_end"][row - 1]) if row else 0
        try:
            prompt = bytes(shard["prompt"][start:end].numpy()).decode()
        except UnicodeDecodeError:
            raise UserError(f"{shard_path(self.folder, number)}: a prompt is not UTF-8 text; "
                            "delete it and run the same pairs.py line again") from None
        return {"noise": noise, "latent": latent, "prompt": prompt}

    def batch(self, indices):
        """-> (noise [B, 4, h, w], latent [B, 4, h, w], prompts list[str]). The pairs of a small set are kept (KEPT):
        a GPU trains a small network faster than their noise is made."""
        rows = []
        for i in map(int, indices):
            rows.append(self.kept.get(i) or self[i])
            if len(self) * 2 * 4 * rows[-1]["noise"].numel() <= KEPT:
                self.kept[i] = rows[-1]
        return (torch.stack([r["noise"] for r in rows]), torch.stack([r["latent"] for r in rows]),
                [r["prompt"] for r in rows])

    def check(self, model, path=None, seen=True):
        """Raises UserError where these pairs' latents are not of `model`'s shape, or (path: its folder) were made
        by other weights. seen: what was trained on these very pairs may go on with them."""
        shape = tuple(self[0]["latent"].shape)
        if shape != model.latent_shape():
            raise UserError(f"{self.folder} holds latents of shape {list(shape)}, "
                            f"but the model's are {list(model.latent_shape())}; make pairs with this model's teacher")
        made_by, trained_on = self.info.get("weights"), (model.info.get("pairs") or {}).get("weights")
        if path and made_by not in (None, weights.checksum(hub.locate(path))) and not (seen and trained_on == made_by):
            raise UserError(f"{self.folder} was made by {self.info['model']} as its weights were then, "
                            f"and --model {path} has others; give the model that made the pairs, "
                            "or make pairs with this one")
