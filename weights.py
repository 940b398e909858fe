"""Weights on disk, to and from the modules: folders in the diffusers layout (config.json and safetensors).

U-Net and VAE need no renaming: their attribute names are the layout's key paths. The text tower is open_clip's, whose
query, key and value weights are one tensor, so it alone is renamed. Every key is used and every shape is equal, or
it is a UserError that names the file and the key.
"""
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import training
from cli import UserError
from text import TextConfig, TextTower
from unet import StackedUNet, UNet, UNetConfig
from vae import VAE, VAEConfig

UNET_FILE = VAE_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "model.safetensors"


def read_json(path):
    """A JSON file as a dict. Raises UserError."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download or train the model again") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); download or train the model again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; download or train the model again")
    return value


def read_tensors(path):
    """All tensors of a safetensors file (memory-mapped) -> dict[str, tensor]. Raises UserError."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download or train the model again") from None
    except (SafetensorError, ValueError, OSError) as error:
        start = Path(path).read_bytes()[:100] if Path(path).is_file() else b""
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` where you cloned it") from None
        raise UserError(f"{path} is no whole safetensors file ({error}), most likely a cut download; fetch it again") from None


def fill(module, tensors, path):
    """Load strictly, keeping the module's own dtype. Raises UserError naming the file and the first key that is wrong."""
    wanted = module.state_dict()
    for wrong, what in ((wanted.keys() - tensors.keys(), "lacks"), (tensors.keys() - wanted.keys(), "has an unknown")):
        if wrong:
            raise UserError(f"{path} {what} tensor {sorted(wrong)[0]} ({len(wrong)} in all): it is another model's, or config.json is")
    for key, value in tensors.items():
        if value.shape != wanted[key].shape:
            raise UserError(f"{path}: {key} is {list(value.shape)}, but config.json asks for {list(wanted[key].shape)}")
        if not value.is_floating_point():
            raise UserError(f"{path}: {key} is {value.dtype}, not floating point")
    module.load_state_dict(tensors)
    return module.eval()


def _build(module, config, folder):
    """The module that `folder`/config.json asks for."""
    path = Path(folder) / "config.json"
    try:
        return module(config.from_dict(read_json(path)))
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(f"{path}: {error}") from None


def load_unet(folder):
    """`folder` = .../unet -> UNet or StackedUNet, float32, on the CPU."""
    path = Path(folder) / UNET_FILE
    return fill(_build(lambda config: (StackedUNet if config.stacked else UNet)(config), UNetConfig, folder), read_tensors(path), path)


def load_vae(folder):
    """`folder` = .../vae -> VAE, float32, on the CPU."""
    path = Path(folder) / VAE_FILE
    return fill(_build(VAE, VAEConfig, folder), read_tensors(path), path)


def load_text(folder):
    """`folder` = .../text_encoder -> TextTower, float32, on the CPU."""
    path = Path(folder) / TEXT_FILE
    return fill(_build(TextTower, TextConfig, folder), text_from_transformers(read_tensors(path)), path)


def save_module(module, folder, file, dtype=None):
    """config.json and weights, contiguous, in `dtype` (None: the module's own)."""
    tensors = module.state_dict() if not isinstance(module, TextTower) else text_to_transformers(module.state_dict())
    training.write(Path(folder) / "config.json", (json.dumps(module.config.to_dict(), indent=2) + "\n").encode())
    training.write_tensors(Path(folder) / file, tensors, dtype=dtype)


# --- the text tower: transformers' names <-> open_clip's ---

_TEXT_NAMES = [("embeddings.token_embedding.weight", "token_embedding.weight"),
               ("embeddings.position_embedding.weight", "positional_embedding"),
               ("final_layer_norm.", "ln_final."), ("encoder.layers.", "transformer.resblocks."),
               (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."),
               (".self_attn.out_proj.", ".attn.out_proj.")]


def text_from_transformers(tensors):
    """transformers' keys (with or without `text_model.`) -> TextTower's. Query, key and value become one tensor."""
    out, parts = {}, {}
    for key, value in tensors.items():
        key = key.removeprefix("text_model.")
        if key.endswith("position_ids"):                   # a buffer of older files: 0, 1, 2, ...
            continue
        fused = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", key)
        if fused:
            layer, which, kind = fused.groups()
            parts.setdefault(f"tower.transformer.resblocks.{layer}.attn.in_proj_{kind}", {})[which] = value
            continue
        for theirs, ours in _TEXT_NAMES:
            key = key.replace(theirs, ours)
        out["tower." + key] = value
    for key, value in parts.items():
        if value.keys() == set("qkv"):                     # else `fill` says which tensor is lacking
            out[key] = torch.cat([value[which] for which in "qkv"])
    return out


def text_to_transformers(tensors):
    """TextTower's keys -> transformers', with `text_model.` (which every version reads)."""
    out = {}
    for key, value in tensors.items():
        key = key.removeprefix("tower.")
        fused = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key)
        if fused:
            for which, part in zip("qkv", value.chunk(3)):
                out[f"text_model.encoder.layers.{fused[1]}.self_attn.{which}_proj.{fused[2]}"] = part
            continue
        for theirs, ours in _TEXT_NAMES:
            key = key.replace(ours, theirs)
        out["text_model." + key] = value
    return out
