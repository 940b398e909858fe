"""The pictures and captions of an evaluation, from disk or drawn:
what is odd about them is handled with a warning, or named."""
import json
import os
import re
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import checkpoint
import cli
import processes
import training
import weights
from cli import UserError
from images import to_pil

SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}     # pytorch-fid's


def warn(message):
    """On stderr, clear of a progress bar, and under torchrun once."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"warning: {message}", file=sys.stderr)


def list_pictures(folder):
    """The picture files of a folder, not of its sub-folders: 9.png before 10.png.
    Raises UserError where there is none."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of pictures, nor an .npz file of statistics")
    files = [p for p in Path(folder).iterdir() if p.is_file() and not p.name.startswith(".") and p.name != "fid.json"]
    files.sort(key=lambda p: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", p.name)])
    pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
    if not pictures:
        raise UserError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))}; sub-folders are not looked at)")
    if len(files) > len(pictures):
        other = next(p for p in files if p.suffix.lower() not in SUFFIXES)
        warn(f"left out of {folder}, as no pictures: {other.name}"
             + f" and {len(files) - len(pictures) - 1} more" * (len(files) > len(pictures) + 1))
    return pictures


def read_picture(path, seen):
    """A picture file -> PIL image, RGB. `seen` keeps the first file of each kind that is worth a warning.
    Raises UserError."""
    try:
        with Image.open(path) as image:
            deep, transparent, kind = image.mode[0] in "IF", image.has_transparency_data, image.format
            rgb = image if deep else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no whole picture ({error}); fetch or make it again, or move it away") from None
    if deep:
        raise UserError(f"{path} has more than 8 bits a pixel; convert it to 8 bits")
    black = not any(most for _, most in rgb.getextrema())
    for name, found in (("alpha", transparent), ("jpeg", kind == "JPEG"), ("black", black),
                        ("mixed", seen.setdefault("size", rgb.size) != rgb.size)):
        if found:
            seen.setdefault(name, path)
    return rgb


def fit(image, side):
    """Short side to `side` px (Lanczos), then the centre `side` x `side`. None: the picture as it is."""
    if side is None or image.size == (side, side):
        return image
    short = min(image.size)
    width, height = (int(side * pixels / short) for pixels in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))


def ahead(pool, function, items, n):
    """function(item) for each item, in order, computed by the pool at most n items ahead:
    memory does not grow with their number."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > n:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def shares(n, batch, world):
    """The batches of this process, as ranges of 0 ... n - 1: whole ones, the same for any number of processes."""
    return [range(start, min(start + batch, n)) for start in range(0, n, batch)][world.rank::world.size]


def from_folder(files, captions, prepare, args, world, seen):
    """Yield (Pictures, captions or None) batch by batch."""
    mine = shares(len(files), args.batch, world)
    with ThreadPoolExecutor(args.workers) as pool:
        read = ahead(pool, lambda i: prepare(read_picture(files[i], seen)),
                     (i for batch in mine for i in batch), 2 * args.batch)
        for batch in mine:
            yield list(islice(read, len(batch))), captions and [captions[i] for i in batch]


def warn_of(seen, folder, size, generated):
    """Say what was odd in a folder: `seen` of all processes, as read_picture filled it;
    size: px they were brought to, or None."""
    parts = [seen]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, seen)
    seen = {key: value for part in parts for key, value in part.items()}
    if "alpha" in seen:
        warn(f"{seen['alpha']} (and maybe more) has an alpha channel, which is dropped, as pytorch-fid does")
    if "jpeg" in seen and generated:
        warn(f"{seen['jpeg']} is a JPEG, and its compression shifts FID; write generated pictures as PNG")
    if "black" in seen:
        warn(f"{seen['black']} (and maybe more) is all black, as a safety checker leaves a picture; "
             "such pictures raise FID")
    if "mixed" in seen and not size:
        warn(f"the pictures of {folder} have different sizes (as {seen['mixed']}), "
             "and each is squeezed into Inception's square; --size N crops them to squares")
    if size and min(seen["size"]) < size:
        warn(f"the pictures of {folder} are {seen['size'][0]} x {seen['size'][1]} px and are enlarged to {size}")


def read_captions(path, number=None):
    """-> list of (picture's file name without suffix, or None; caption). COCO's captions_*.json: the first caption of
    each image, by image id; where fewer are asked for, a fixed random subset of the images. JSON lines: "caption",
    "prompt" or "text", and "file_name" if any. Else a text file, one a line. Raises UserError."""
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        first = {}
        try:
            coco = json.loads(Path(path).read_text(encoding="utf-8"))
            for note in coco["annotations"]:
                first.setdefault(note["image_id"], note["caption"].strip())
            rows = [(Path(image["file_name"]).stem, first[image["id"]])
                    for image in sorted(coco["images"], key=lambda image: image["id"]) if image["id"] in first]
        except FileNotFoundError:
            raise UserError(f"{path}: no such file of captions; COCO's are in annotations_trainval2017.zip") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no COCO captions file ({error!r}); "
                            "give captions_val2017.json, JSON lines (.jsonl) or a text file") from None
        if number and number < len(rows):
            rows = [rows[i] for i in np.sort(np.random.default_rng(0).permutation(len(rows))[:number])]
    elif suffix in (".jsonl", ".ndjson"):
        rows = []
        for i, line in enumerate(cli.read_prompts(path), 1):
            try:
                row = json.loads(line)
                row = {"caption": row} if isinstance(row, str) else row
                name = row.get("file_name")
                rows.append((Path(name).stem if name else None,
                             next(row[key] for key in ("caption", "prompt", "text") if key in row).strip()))
                rows[-1][1].encode()                       # JSON can hold a lone surrogate
            except (ValueError, AttributeError, TypeError, StopIteration):
                raise UserError(f'{path}: line {i} is no JSON object with "caption", "prompt" or "text"') from None
    else:
        rows = [(None, line) for line in cli.read_prompts(path)]
    if not rows:
        raise UserError(f"{path} holds no caption")
    return rows[:number]


def pair(files, captions):
    """The caption of each picture: by its name where the captions tell names (COCO's do), else by order.
    Raises UserError."""
    named = {name: caption for name, caption in captions if name}
    if named.keys() >= {file.stem for file in files}:
        return [named[file.stem] for file in files]
    if len(files) != len(captions):
        raise UserError(f"{files[0].parent} holds {len(files)} pictures, and there are {len(captions)} captions, "
                        "so they cannot be paired; give one caption a picture, or --number")
    return [caption for _, caption in captions]


def matched(files, names, folder, captions):
    """Of a folder's files those called `names` (without suffix), as the file `captions` has them. Raises UserError."""
    if None in names:
        raise UserError(f"{captions} does not name its pictures; "
                        "give COCO's captions_*.json, or leave out --matched")
    lacking = sorted(names - {file.stem for file in files})
    if lacking:
        raise UserError(f"{folder} lacks the picture {lacking[0]} ({len(lacking)} in all) of {captions}; "
                        "give that file's pictures, or leave out --matched")
    return [file for file in files if file.stem in names]


def resume(args, settings, world):
    """Check that --out holds these settings' pictures, or none, and write fid.json. Raises UserError."""
    note = args.out / "fid.json"
    if note.exists():
        old = weights.read_json(note, "delete that folder, and its pictures are drawn again")
        changed = [key for key in settings if old.get(key) != settings[key]]
        if changed:
            raise UserError(f"--out {args.out} holds pictures made otherwise ({', '.join(changed)} differ); "
                            "give the same settings, or another --out")
    elif args.out.is_dir() and any(args.out.glob("*.png")):
        raise UserError(f"--out {args.out} holds pictures that are not of such a run; give another folder")
    processes.barrier()                                     # nobody writes before all have looked
    if world.rank == 0:
        checkpoint.write(note, (json.dumps(settings, indent=2) + "\n").encode())
        for leftover in args.out.glob("*.tmp"):
            leftover.unlink()
    processes.barrier()


def from_model(model, captions, prepare, args, world):
    """Yield (Pictures, captions), drawn batch by batch; batches whose pictures all lie in --out are read from there."""
    with ThreadPoolExecutor(args.workers) as pool:
        for batch in shares(len(captions), args.batch, world):
            texts, paths = [captions[i] for i in batch], [args.out / f"{i:06d}.png" for i in batch] if args.out else []
            if paths and all(path.exists() for path in paths):
                images = list(pool.map(lambda path: read_picture(path, {}), paths))
            else:
                with torch.no_grad(), training.autocast(model.device, args.float32):
                    states = model.text([*texts, ""])
                    images = to_pil(model.decode(model.solve(model.noise(args.seed, batch[0], len(batch)),
                                                             states[:-1], states[-1:], args.steps, args.guidance)))
                list(pool.map(lambda path, image: checkpoint.write_by(image.save, path), paths, images))
            yield list(pool.map(prepare, images)), texts
