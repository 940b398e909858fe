"""Weights in the ldm layout, to and from the modules: one .safetensors or .ckpt file, with or without EMA.

Read as strictly as `weights` reads folders.
"""
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

import checkpoint
import names
from cli import UserError
from names import text_to_transformers
from text import TextConfig, TextTower
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import PARTS, PICKLES, build, check, fill, fill_text, one_line, read_tensors

# What a single file may hold beside the weights: their average, the noise schedule, the trainer's loss and counters.
_DROPPED = re.compile(r"model_ema\..*|first_stage_model\.loss\..*|.*\.position_ids"
                      r"|(sqrt_(one_minus_|recip_|recipm1_)?|log_one_minus_)?alphas_cumprod(_prev)?"
                      r"|betas|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|lvlb_weights"
                      r"|scale_factor|cond_stage_model\.(logit_scale|text_projection)")
# Keys by which to recognise a file of something else.
_OTHERS = {"conditioner.embedders.": "a Stable Diffusion XL file",
           "cond_stage_model.model.": "a Stable Diffusion 2 file",
           "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 file",
           "model.diffusion_model.double_blocks.": "a Flux file", "double_blocks.": "a Flux file",
           "control_model.": "a ControlNet",
           "lora_": "a LoRA (give it as --lora)", "unet.": "a LoRA (give it as --lora)",
           "down_blocks.": "one part of a diffusers folder (name that folder)", "decoder.": "a VAE alone"}


def facts(path):
    """What our own single files say of themselves in their header: the three configs,
    and instaflow.json as "info"; {} in others'."""
    path = Path(path)
    if path.suffix in PICKLES:
        return {}
    with one_line(path), safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("instaflow", "{}")
    try:
        told = json.loads(text)
        if all(isinstance(told.get(key, {}), dict) for key in ("info", *PARTS)):
            return told
    except (ValueError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: its header's `instaflow` is damaged; fetch the file again")


def load_single_file(path, dtype=torch.float32):
    """A single file in the ldm layout -> UNet, VAE, TextTower, on the CPU. Sizes are Stable Diffusion 1.x's, but
    where its header says others. An EMA beside the weights is left out, as diffusers does."""
    tensors = {key: value for key, value in read_tensors(path).items() if not _DROPPED.fullmatch(key)}
    parts = {part: {key: value for key, value in tensors.items() if key.startswith(prefix)}
             for part, prefix in names.LDM.items()}
    kind = next((kind for start, kind in _OTHERS.items() if any(key.startswith(start) for key in tensors)), None)
    if kind:
        raise UserError(f"{path} is {kind}, and no Stable Diffusion 1.x file")
    for part, prefix in names.LDM.items():
        if not parts[part]:
            raise UserError(f"{path} has no tensor {prefix}*: it is no whole Stable Diffusion 1.x file")
    unknown = sorted(tensors.keys() - set().union(*parts.values()))
    if unknown:
        raise UserError(f"{path} has an unknown tensor {unknown[0]} ({len(unknown)} in all): "
                        "it is no Stable Diffusion 1.x file")
    told = facts(path)
    unet, vae, text = (build(make, config, told.get(part, {}), path)
                       for part, make, config in (("unet", UNet, UNetConfig), ("vae", VAE, VAEConfig),
                                                  ("text_encoder", TextTower, TextConfig)))
    words = {"asks": "its header asks for" if told else "Stable Diffusion 1.x has"}
    for module, part, rename in ((unet, "unet", names.ldm_unet), (vae, "vae", names.ldm_vae)):
        state, found = module.state_dict(), names.flat_attention(parts[part])
        called = {key: names.LDM[part] + rename(key, module.config) for key in state}
        check({called[key]: value for key, value in state.items()}, found, path, **words)
        fill(module, {key: found[name] for key, name in called.items()}, dtype)
    return unet, vae, fill_text(text, parts["text_encoder"], path, dtype, names.LDM["text_encoder"], **words)


def save_single_file(path, unet, vae, text, info, dtype=None):
    """One .safetensors file in the ldm layout, which diffusers' from_single_file and the usual programs read. Its
    header holds the configs and `info` (instaflow.json's fields) too. Raises UserError for a stacked U-Net."""
    if unet.config.stacked:
        raise UserError(f"{path}: a stacked U-Net has no single-file layout; save it as a folder")
    tensors = {names.LDM["unet"] + names.ldm_unet(key, unet.config): value for key, value in unet.state_dict().items()}
    for key, value in vae.state_dict().items():
        matrix = ".attentions." in key and value.dim() == 2
        tensors[names.LDM["vae"] + names.ldm_vae(key, vae.config)] = value[:, :, None, None] if matrix else value
    tensors |= {names.LDM["text_encoder"] + key: value
                for key, value in text_to_transformers(text.state_dict()).items()}
    told = {"info": info, "unet": unet.config.to_dict(), "vae": vae.config.to_dict(),
            "text_encoder": text.config.to_dict()}
    checkpoint.write_tensors(path, tensors, {"instaflow": json.dumps(told)}, dtype)
