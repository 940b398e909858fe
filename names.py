"""What each naming scheme in the field calls a tensor. U-Net and VAE here have the
diffusers layout's names, the text tower open_clip's. What is renamed:

    ldm            the single files of Stable Diffusion (CompVis' and A1111's layout), U-Net and VAE
    old diffusers  the VAE attention's query, key, value, proj_attn
    transformers   the text tower in every folder; open_clip's query, key and value weights are one tensor

Whole names are matched, never parts of them. Nothing here checks that all are there: weights.py does.
"""
import re

import torch

# --- U-Net and VAE: ours -> the ldm layout's ---

LDM = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}

_UNET_TOP = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
             "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}
_UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
                "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def ldm_unet(key, config):
    """`down_blocks.1.resnets.0.conv1.weight` -> `input_blocks.4.0.in_layers.2.weight`:
    ldm counts blocks through all levels."""
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
    if block:
        way, level, kind, layer, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        if kind == "downsamplers":                         # a block of its own
            return f"input_blocks.{(level + 1) * (config.layers_per_block + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":                           # the last layer of the level's last block
            after = 2 if config.up_block_types[level].startswith("CrossAttn") else 1
            return f"output_blocks.{(level + 1) * (config.layers_per_block + 1) - 1}.{after}.{rest}"
        number = level * (config.layers_per_block + 1) + layer + (way == "down")             # conv_in is input block 0
        head = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
    else:
        ours = next(name for name in _UNET_TOP if key.startswith(name + "."))
        head, kind, rest = _UNET_TOP[ours], "resnets" if "resnets" in ours else "", key.removeprefix(ours + ".")
    if kind == "resnets":
        layer, _, leaf = rest.rpartition(".")
        rest = f"{_UNET_RESNET[layer]}.{leaf}"
    return f"{head}.{rest}"


def ldm_vae(key, config):
    """`decoder.up_blocks.0.resnets.1.conv1.weight` -> `decoder.up.3.block.1.conv1.weight`:
    ldm counts levels from the finest."""
    def level(m):
        number = int(m[2]) if m[1] == "down" else len(config.block_out_channels) - 1 - int(m[2])
        return f"{m[1]}.{number}." + (f"block.{m[4]}" if m[3] == "resnets" else m[3].removesuffix("rs"))
    key = re.sub(r"\b(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)", level, key)
    key = re.sub(r"\bmid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"\bmid_block\.attentions\.0\.(.+)\.(weight|bias)",
                 lambda m: f"mid.attn_1.{_VAE_ATTENTION[m[1]]}.{m[2]}", key)
    return key.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")


def modern_attention(tensors):
    """A VAE's tensors in the diffusers layout, old or new -> new."""
    def new(key):
        return re.sub(r"(?<=\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)",
                      lambda m: _OLD_ATTENTION[m[1]], key)
    return {new(key): value for key, value in tensors.items()}


def flat_attention(tensors):
    """A VAE's attention weights as matrices, [C, C]: ldm has them as convolutions, [C, C, 1, 1]."""
    flat = re.compile(r".*\.(mid\.attn_1\.(q|k|v|proj_out)"
                      r"|mid_block\.attentions\.0\.(to_q|to_k|to_v|to_out\.0))\.weight")
    return {k: v.flatten(1) if v.dim() == 4 and v.shape[2:] == (1, 1) and flat.fullmatch(k) else v
            for k, v in tensors.items()}


# --- the text tower: ours (open_clip's) <-> transformers' ---

_TEXT = [("embeddings.token_embedding.weight", "token_embedding.weight"),
         ("embeddings.position_embedding.weight", "positional_embedding"),
         ("final_layer_norm.", "ln_final."), ("encoder.layers.", "transformer.resblocks."),
         (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."),
         (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."), (".self_attn.out_proj.", ".attn.out_proj.")]


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
        for theirs, ours in _TEXT:
            key = key.replace(theirs, ours)
        out["tower." + key] = value
    return out | {key: torch.cat([value[which] for which in "qkv"]) for key, value in parts.items()}


def text_to_transformers(tensors):
    """TextTower's keys -> transformers', with `text_model.` (which every version reads).
    Query, key and value are views."""
    out = {}
    for key, value in tensors.items():
        key = key.removeprefix("tower.")
        fused = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key)
        if fused:
            for which, part in zip("qkv", value.chunk(3)):
                out[f"text_model.encoder.layers.{fused[1]}.self_attn.{which}_proj.{fused[2]}"] = part
            continue
        for theirs, ours in _TEXT:
            key = key.replace(ours, theirs)
        out["text_model." + key] = value
    return out
