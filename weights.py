"""Weights in folders of the diffusers layout, to and from the modules, and what all weight files have in common.

    folders       the diffusers layout: unet/, vae/, text_encoder/, each config.json and weights, as .safetensors or
                  .bin, whole or in shards with an index, with or without `.fp16.` in the name
    single files  the ldm layout, as .safetensors or .ckpt, with or without EMA

Every key must be used, every shape match and every dtype be floating point, or a UserError names the file and the
key. A pickle that could run code is never loaded. Files are memory-mapped, and weights already in the requested dtype
stay on disk until they are used: they are changed in memory only, and a file must not be overwritten in place
meanwhile (writing a new one and renaming it, as `checkpoint.write` does, is safe).
"""
import json
import os
import re
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

import checkpoint
import names
from cli import UserError
from names import text_from_transformers, text_to_transformers
from text import TextConfig, TextTower
from unet import StackedUNet, UNet, UNetConfig
from vae import VAE, VAEConfig

UNET_FILE = VAE_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "model.safetensors"
PARTS = ("unet", "vae", "text_encoder")
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# --- files ---

def read_json(path, mend="download or train the model again"):
    """A JSON file as a dict. Raises UserError, which says how to mend it."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {mend}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {mend}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; {mend}")
    return value


class _Ignored:
    """Stands in for the trainer's objects in old .ckpt files (callbacks, counters), which are not weights."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def _read_pickle(path):
    """torch.save's file of tensors, or a trainer's checkpoint with `state_dict`,
    through the unpickler that runs no code."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"                 # older ones are a bare pickle, which cannot be memory-mapped
    allowed = []
    if zipped:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()                    # torch itself does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} has another checksum")
        allowed = [(_Ignored, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
                   if re.match(r"(pytorch_lightning|lightning|numpy)\.", name)]
    with torch.serialization.safe_globals(allowed):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    while isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict):
        raise ValueError("it holds no table of tensors")
    return {key: value.detach() for key, value in tensors.items() if torch.is_tensor(value) and isinstance(key, str)}


@contextmanager
def one_line(path):
    """Whatever goes wrong while `path` is read becomes a UserError."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:  # safetensors has the first for both
        # (Path.exists raises where a folder may not be entered)
        if isinstance(error, PermissionError) or os.path.exists(path):
            raise UserError(f"{path} may not be read; change its permissions") from None
        raise UserError(f"{path} is missing; check its name, or download (or train) it again") from None
    except Exception as error:                             # a damaged pickle raises whatever it likes
        # torch's advice is to run the code
        reason = re.sub(r"^Weights only load failed.*(WeightsUnpickler error:|trusted source\.) ", "",
                        " ".join(str(error).split()))
        start = path.read_bytes()[:100] if path.is_file() and path.stat().st_size < 1000 else b""
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a git-lfs pointer, not the weights; "
                            "run `git lfs pull` where you cloned it") from None
        unsafe = re.search(r"[uU]nsupported (?:global: )?GLOBAL (\S+)", reason)
        if unsafe:
            raise UserError(f"{path} holds a Python object, {unsafe[1]}, which could run code, so it is not read; "
                            "get the weights as .safetensors") from None
        kind = "torch.save file" if path.suffix in PICKLES else "safetensors file"
        raise UserError(f"{path} is no whole {kind} ({reason[:150] or type(error).__name__}), "
                        "most likely a cut download; fetch it again") from None


def read_tensors(path):
    """All tensors of a .safetensors, .ckpt, .bin, .pt or .pth file, memory-mapped -> dict[str, tensor].
    Raises UserError."""
    path = Path(path)
    with one_line(path):
        if path.suffix in PICKLES:
            return _read_pickle(path)
        with safe_open(path, "pt") as file:
            keys, tensors = sorted(file.keys()), {}
        # each group has a mapping of its own, and leaves memory with it once converted
        for i in range(0, len(keys), 16):
            with safe_open(path, "pt") as file:
                tensors |= {key: file.get_tensor(key) for key in keys[i:i + 16]}
        return tensors


def weight_file(listed, part, dtype=None):
    """Which of the files `listed` in a folder holds the weights of `part` (or is the index of their shards);
    None where none does. Safetensors before pickles, and whole precision before `.fp16.`,
    but where float16 is asked for."""
    for suffix in (".safetensors", ".bin"):
        stem = ("diffusion_pytorch_model" if part != "text_encoder"
                else "model" if suffix == ".safetensors" else "pytorch_model")
        for variant in (".fp16", "") if dtype == torch.float16 else ("", ".fp16"):
            for name in (f"{stem}{variant}{suffix}", f"{stem}{suffix}.index{variant}.json",
                         f"{stem}{variant}{suffix}.index.json"):
                if name in listed:
                    return name


def weight_files(folder, part, dtype=None):
    """-> (the file or the index of `folder`, its shards' names by key or None). Raises UserError."""
    folder = Path(folder)
    name = weight_file({p.name for p in folder.iterdir()} if folder.is_dir() else (), part, dtype)
    path = folder / (name or (TEXT_FILE if part == "text_encoder" else UNET_FILE))
    if name is None:
        raise UserError(f"{path} is missing; download or train the model again")
    if path.suffix != ".json":
        return path, None
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) and Path(file).name == file
                                               for file in shards.values()):
        raise UserError(f"{path} has no weight_map from tensors to files beside it; download the model again")
    return path, shards


def read_folder(folder, part, dtype=None):
    """The tensors of one part's folder -> (dict[str, tensor], the file's path for messages). Raises UserError."""
    (path, shards), tensors = weight_files(folder, part, dtype), {}
    if shards is None:
        return read_tensors(path), path
    for file in sorted(set(shards.values())):
        shard = read_tensors(path.parent / file)
        for key in shard:
            if shards.get(key) != file:
                raise UserError(f"{path.parent / file} holds tensor {key}, which {path.name} "
                                f"{f'has in {shards[key]}' if key in shards else 'does not know'}; "
                                "download the model again")
        tensors |= shard
    lacking = sorted(shards.keys() - tensors.keys())
    if lacking:
        raise UserError(f"{path.parent / shards[lacking[0]]} lacks tensor {lacking[0]} ({len(lacking)} in all), "
                        f"which {path.name} has there; download the model again")
    return tensors, path


def checksum(path, *parts):
    """CRC-32 of the file or files that hold a model's U-Net, or `parts` of it: a name does not do, as a folder may be
    trained again. Raises UserError."""
    path, crc = Path(path), 0
    for part in parts or ["unet"]:
        file, shards = (path, None) if path.is_file() else weight_files(path / part, part)
        for name in [file] if shards is None else [file.parent / name for name in sorted(set(shards.values()))]:
            with open(name, "rb") as opened:
                while block := opened.read(1 << 24):
                    crc = zlib.crc32(block, crc)
    return crc


def same(a, b):
    """Whether two modules have the same weights in float16, in which a student's folder may have its teacher's."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[key].shape == b[key].shape
                                        and torch.equal(a[key].half().cpu(), b[key].half().cpu()) for key in a)


def holds(folder, vae, text):
    """Whether VAE and text tower still are those of a model folder."""
    read = lambda load, part, module: load(folder / part, next(module.parameters()).dtype)
    return same(vae, read(load_vae, "vae", vae)) and same(text, read(load_text, "text_encoder", text))


# --- tensors into modules ---

def build(module, config, given, path):
    """The module that the config.json `given` (a dict, read from `path`) asks for, without memory for its weights."""
    try:
        with torch.device("meta"):
            return module(config.from_dict(given))
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path}: {error}") from None


def check(wanted, tensors, path, asks="config.json asks for"):
    """Raises UserError naming the file and the first tensor that is lacking, unknown or wrong;
    both are by the file's own names."""
    for wrong, what in ((wanted.keys() - tensors.keys(), "lacks"), (tensors.keys() - wanted.keys(), "has an unknown")):
        if wrong:
            raise UserError(f"{path} {what} tensor {sorted(wrong)[0]} ({len(wrong)} in all): "
                            "it is another model's, or damaged")
    for key, value in tensors.items():
        if value.shape != wanted[key].shape:
            raise UserError(f"{path}: {key} is {list(value.shape)}, but {asks} {list(wanted[key].shape)}")
        if value.dtype not in FLOATS:
            raise UserError(f"{path}: {key} is {value.dtype}, not floating point of 16, 32 or 64 bits")
    # one flipped in a header reads as noise
    if {torch.float16, torch.bfloat16} <= {value.dtype for value in tensors.values()}:
        raise UserError(f"{path} has tensors in float16 and others in bfloat16: it is damaged; fetch it again")


def fill(module, tensors, dtype):
    """A module built without memory takes its tensors out of the dict, in `dtype` (None: their own):
    without a copy where they have it."""
    module.load_state_dict({key: tensors.pop(key).to(dtype=dtype) for key in list(tensors)}, assign=True)
    return module.eval()


def _unet(config):
    return (StackedUNet if config.stacked else UNet)(config)


def fill_text(tower, tensors, path, dtype, prefix="", **words):
    """TextTower from transformers' names, with or without `text_model.`."""
    tensors = {key: value for key, value in tensors.items() if not key.endswith("position_ids")}
    bare = not any(key.startswith(prefix + "text_model.") for key in tensors)
    wanted = {prefix + (key.removeprefix("text_model.") if bare else key): value
              for key, value in text_to_transformers(tower.state_dict()).items()}
    check(wanted, tensors, path, **words)
    fill(tower, text_from_transformers({key.removeprefix(prefix): value for key, value in tensors.items()}), dtype)
    # a buffer that is in no file
    tower.tower.attn_mask = tower.tower.build_causal_mask().to(dtype=next(tower.parameters()).dtype)
    return tower


def load_unet(folder, dtype=torch.float32):
    """`folder` = .../unet -> UNet or StackedUNet, on the CPU, in `dtype` (None: the file's).
    Raises UserError, as all below."""
    config = Path(folder) / "config.json"
    unet = build(_unet, UNetConfig, read_json(config), config)
    tensors, path = read_folder(folder, "unet", dtype)
    check(unet.state_dict(), tensors, path)
    return fill(unet, tensors, dtype)


def load_vae(folder, dtype=torch.float32):
    """`folder` = .../vae -> VAE, on the CPU."""
    config = Path(folder) / "config.json"
    vae = build(VAE, VAEConfig, read_json(config), config)
    tensors, path = read_folder(folder, "vae", dtype)
    tensors = names.flat_attention(names.modern_attention(tensors))
    check(vae.state_dict(), tensors, path)
    return fill(vae, tensors, dtype)


def load_text(folder, dtype=torch.float32):
    """`folder` = .../text_encoder -> TextTower, on the CPU."""
    config = Path(folder) / "config.json"
    tower = build(TextTower, TextConfig, read_json(config), config)
    return fill_text(tower, *read_folder(folder, "text_encoder", dtype), dtype)


def save_module(module, folder, file, dtype=None):
    """config.json and weights, contiguous, in `dtype` (None: the module's own)."""
    tensors = module.state_dict() if not isinstance(module, TextTower) else text_to_transformers(module.state_dict())
    checkpoint.write(Path(folder) / "config.json", (json.dumps(module.config.to_dict(), indent=2) + "\n").encode())
    checkpoint.write_tensors(Path(folder) / file, tensors, dtype=dtype)


# --- single files ---

