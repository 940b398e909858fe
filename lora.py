"""LoRA and weight differences, merged into an InstaFlow's weights: nothing is slower afterwards, and `save` keeps them.

    lora.load_lora(model, "style.safetensors", 0.8)                        # several, one after the other
    lora.add_difference(model, "dreamshaper.safetensors", "v1-5.ckpt")     # how InstaFlow's authors personalise it

A LoRA is a pair of thin matrices a layer: W += scale * alpha / rank * up @ down (Hu et al. 2021, section 4.1), for a
convolution the same with `down` of its kernel's size and `up` of 1 x 1. Spellings: kohya's (lora_unet_..., by
diffusers' or ldm's names), diffusers' and peft's (lora_A, lora_B), and diffusers' older ones. A flow fine-tuned from
Stable Diffusion 1.x takes a LoRA made for it.
"""
import copy
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

import hub
import names
import weights
from cli import UserError
from instaflow import InstaFlow

# How a key ends, in each spelling, for the two matrices and their scale.
_ENDS = [(".lora_down.weight", "down"), (".lora_up.weight", "up"), (".lora_A.weight", "down"), (".lora_B.weight", "up"),
         (".lora.down.weight", "down"), (".lora.up.weight", "up"),
         (".lora_linear_layer.down.weight", "down"), (".lora_linear_layer.up.weight", "up"),
         ("_lora.down.weight", "down"), ("_lora.up.weight", "up"), (".alpha", "alpha")]
_OTHER_KINDS = {"dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA", "hada_w": "a LoHa", "lokr_w": "a LoKr",
                "lora_mid": "a Tucker LoCon", "lora_te2_": "a LoRA for Stable Diffusion XL"}


def _layers(model):
    """Every name a LoRA file may have for a layer -> that layer's weight, a view into the model. Names are kohya's,
    with dots turned into underscores: no two layers' names differ by just that."""
    layers = {}
    for key, value in model.unet.state_dict().items():
        if key.endswith(".weight") and value.dim() > 1:
            path = key.removesuffix(".weight")
            layers[f"lora_unet_{path}"] = layers[
                "lora_unet_" + names.ldm_unet(key, model.unet.config).removesuffix(".weight")] = value
    for key, value in names.text_to_transformers(model.text.state_dict()).items():
        if key.endswith("_proj.weight") or ".mlp.fc" in key and key.endswith(".weight"):
            layers["lora_te_" + key.removesuffix(".weight")] = value
    return {name.replace(".", "_"): value for name, value in layers.items()}


def _layer_name(key):
    """A LoRA file's key -> (the layer's name as `_layers` has it, the layer's path, "down" | "up" | "alpha");
    None where it is of no known spelling."""
    end, kind = next(((end, kind) for end, kind in _ENDS if key.endswith(end)), (None, None))
    if kind is None:
        return None
    path = key.removesuffix(end)
    if not path.startswith(("lora_unet_", "lora_te_", "lora_te1_")):
        path = re.sub(r"^(base_model\.model\.)?(unet|text_encoder)\.(base_model\.model\.)?|^base_model\.model\.",
                      lambda m: f"{m[2] or 'unet'}.", path)
        path = path if path.startswith(("unet.", "text_encoder.")) else f"unet.{path}"
        path = re.sub(r"\.processor\.to_(q|k|v|out)$|\.processor\.(?=to_)",
                      lambda m: f".to_{m[1]}" if m[1] else ".", path)
        path = (re.sub(r"(?<=\.to_out)$", ".0", path) if path.startswith("unet.")
                else re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", path))
    where, _, rest = path.partition("." if "." in path else "_")
    if path.startswith("lora_"):
        name = re.sub("^lora_te1_", "lora_te_", path)
    elif where == "unet":
        name = f"lora_unet_{rest}"
    else:
        name = "lora_te_text_model." + rest.removeprefix("text_model.")
    return name.replace(".", "_"), path, kind


def _header(path):
    """peft's settings, by "unet." and "text_encoder." or, where one network has them all, without: those of
    diffusers' `lora_adapter_metadata`, or of the adapter_config.json that peft writes beside its file;
    {} where there are none."""
    if path.name.startswith("adapter_model.") and (path.parent / "adapter_config.json").exists():
        return weights.read_json(path.parent / "adapter_config.json")
    if path.suffix in weights.PICKLES:
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise UserError(f"{path}: its header's lora_adapter_metadata is damaged; fetch the file again") from None


def _strength(header, path, rank, alpha):
    """alpha / rank of the layer `path`: as the file's tensors say, else as its header does,
    else 1 (alpha is the rank)."""
    if alpha is not None:
        return alpha / rank
    part, _, layer = path.partition(".")
    said = lambda key, default=None: header.get(f"{part}.{key}", header.get(key, default))
    alpha, patterns = said("lora_alpha", rank), said("alpha_pattern") or {}
    # peft's rule
    alpha = next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer)), alpha)
    return float(alpha) / (rank ** 0.5 if said("use_rslora") else rank)


@torch.no_grad()
def load_lora(model, path, scale=1.0):
    """Merge a LoRA's file into model's U-Net and text tower, at `scale`, in place; all of it or, on an error, nothing
    -> model. Raises UserError where a tensor is unknown, lacks its partner or does not fit."""
    path = Path(path)
    model.check_weights("merge a LoRA")
    if model.unet.config.stacked:
        raise UserError(f"{path}: a LoRA is made for one U-Net, and this model has two stacked; "
                        "merge it into the model it was made from")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the LoRA's .safetensors file")
    tensors, layers, found = weights.read_tensors(path), _layers(model), {}
    header = _header(path)
    for key, value in tensors.items():
        other = next((what for part, what in _OTHER_KINDS.items() if part in key), None)
        if other:
            raise UserError(f"{path} is {other} ({key}), which is not read here; only LoRA for Stable Diffusion 1.x is")
        named = _layer_name(key)
        if named is None or named[0] not in layers:
            raise UserError(f"{path}: {key} is of no layer of this model; is it a LoRA for Stable Diffusion 1.x?")
        if value.dtype not in weights.FLOATS and named[2] != "alpha":
            raise UserError(f"{path}: {key} is {value.dtype}, not floating point of 16, 32 or 64 bits")
        name, layer, kind = named
        if kind in found.setdefault(name, {"path": layer}):
            raise UserError(f"{path} has {key} twice, in two spellings")
        found[name][kind] = value
    if not found:
        raise UserError(f"{path} holds no tensors")
    merged = []
    for name, parts in found.items():
        if "up" not in parts or "down" not in parts:
            raise UserError(f"{path}: {parts['path']} has no {'up' if 'down' in parts else 'down'} matrix; "
                            "fetch the file again")
        weight, up, down = layers[name], parts["up"].float(), parts["down"].float()
        rank = len(down) if down.dim() > 1 else 0
        if (up.dim() < 2 or rank < 1 or up.shape[:2] != (len(weight), rank) or up[0, 0].numel() != 1
                or down[0].numel() != weight[0].numel()
                or weight.dim() == 4 == down.dim() and down.shape[1:] != weight.shape[1:]):
            raise UserError(f"{path}: {parts['path']} is {list(up.shape)} times {list(down.shape)}, "
                            f"but the model's layer is {list(weight.shape)}; is it a LoRA for Stable Diffusion 1.x?")
        if "alpha" in parts and parts["alpha"].numel() != 1:
            raise UserError(f"{path}: {parts['path']}.alpha is {list(parts['alpha'].shape)}, not one number")
        try:
            strength = _strength(header, parts["path"], rank, float(parts["alpha"]) if "alpha" in parts else None)
        except (TypeError, ValueError, AttributeError, re.error):
            raise UserError(f"{path}: its header's lora_adapter_metadata is damaged; fetch the file again") from None
        merged.append((weight, scale * strength, up.flatten(1), down.flatten(1)))
    for weight, strength, up, down in merged:
        delta = (up.to(weight.device) @ down.to(weight.device)).reshape(weight.shape)
        weight.copy_(weight.float() + strength * delta)
    if any(name.startswith("lora_te_") for name in found):
        # its text tower is no longer the base's: `save` writes it too
        model.base = None
    model.info = {**model.info, "lora": [*model.info.get("lora", []), {"file": path.name, "scale": scale}]}
    return model


def _opened(model):
    """An InstaFlow as it is, or loaded from anything InstaFlow.load takes, each tensor in its own dtype.
    (What it predicts does not matter.)"""
    if isinstance(model, InstaFlow):
        return model
    known = hub.told(hub.locate(model))[0].get("prediction")
    return InstaFlow.load(model, dtype=None, prediction=None if known else "epsilon")


@torch.no_grad()
def add_difference(model, custom, base, scale=1.0):
    """U-Net += scale * (W(custom) - W(base)), and custom's VAE and text tower in place of model's -> model. custom: a
    fine-tuned Stable Diffusion 1.x; base: the one it was tuned from; each an InstaFlow or what InstaFlow.load takes.
    Raises UserError where sizes differ."""
    custom, base = _opened(custom), _opened(base)
    for each in (model, custom, base):
        each.check_weights("add a difference")
    ours, plus, minus = (m.unet.state_dict() for m in (model, custom, base))
    for name, theirs in (("custom", plus), ("base", minus)):
        wrong = sorted(k for k in ours.keys() | theirs.keys()
                       if k not in ours or k not in theirs or ours[k].shape != theirs[k].shape)
        if wrong:
            raise UserError(f"the {name} model's U-Net is another network than the model's "
                            f"({wrong[0]}, {len(wrong)} tensors in all)")
    if custom.text.config != model.text.config or custom.vae.config.factor != model.vae.config.factor:
        raise UserError("the custom model's text tower or VAE is another network than the model's")
    for key, weight in ours.items():
        weight.copy_(weight.float()
                     + scale * (plus[key].to(weight.device).float() - minus[key].to(weight.device).float()))
    dtype, device = next(model.unet.parameters()).dtype, model.device
    new = InstaFlow(model.unet, copy.deepcopy(custom.vae), copy.deepcopy(custom.text), model.info).to(device, dtype)
    model.vae, model.text, model.base = new.vae, new.text, None
    model.info = {**model.info, "difference": scale}
    return model
