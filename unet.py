"""The U-Net of Stable Diffusion (Rombach et al. 2022, appendix E), and two of them stacked (InstaFlow-1.7B).

Attribute names are the key paths of the diffusers layout, so its files load with `load_state_dict(strict=True)`.
Classes go from small to large: ResnetBlock and Transformer make the blocks, the blocks make the U-Net.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class UNetConfig:
    """The defaults are Stable Diffusion 1.x. Field names are those of diffusers' config.json."""
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    attention_head_dim: int = 8                  # the number of heads: diffusers' name for it is an old mistake
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64                        # height and width of the latents it was trained on
    stacked: bool = False

    # Settings that a U-Net of this family may have in its config.json, each with the only value implemented here.
    FIXED = {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
             "mid_block_scale_factor": 1, "center_input_sample": False, "use_linear_projection": False,
             "only_cross_attention": False, "dual_cross_attention": False, "class_embed_type": None,
             "addition_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None,
             "time_embedding_type": "positional", "resnet_time_scale_shift": "default",
             "transformer_layers_per_block": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "conv_in_kernel": 3,
             "conv_out_kernel": 3, "time_cond_proj_dim": None, "resnet_skip_time_act": False,
             "upcast_attention": False, "num_attention_heads": None, "attention_type": "default",
             "resnet_out_scale_factor": 1, "timestep_post_act": None, "time_embedding_act_fn": None,
             "time_embedding_dim": None, "cross_attention_norm": None, "mid_block_only_cross_attention": None}

    @classmethod
    def from_dict(cls, config):
        """From diffusers' config.json as a dict. Raises ValueError where it asks for a network that this is not."""
        for key, value in cls.FIXED.items():
            given = config.get(key, value)
            if given != value and not (given in (None, False) and value in (None, False)):
                raise ValueError(f"U-Net config: {key} is {given!r}, but a Stable Diffusion 1.x U-Net has {value!r} "
                                 "(Stable Diffusion 2 and XL are other networks)")
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in cls.__dataclass_fields__}
        made = cls(**known)
        if not isinstance(made.attention_head_dim, int) or not isinstance(made.cross_attention_dim, int):
            raise ValueError("U-Net config: attention_head_dim and cross_attention_dim must be one number each "
                             "(Stable Diffusion 2 and XL are other networks)")
        if (len(made.down_block_types) != len(made.block_out_channels)
                or len(made.up_block_types) != len(made.block_out_channels)):
            raise ValueError("U-Net config: block_out_channels, down_block_types and up_block_types differ in length")
        levels = [*zip(made.down_block_types, made.block_out_channels),
                  *zip(made.up_block_types, reversed(made.block_out_channels)),
                  ("CrossAttn", made.block_out_channels[-1])]
        if made.attention_head_dim < 1 or any(width % made.attention_head_dim for kind, width in levels
                                              if kind.startswith("CrossAttn")):
            raise ValueError("U-Net config: attention_head_dim, the number of heads, is "
                             f"{made.attention_head_dim}, which does not divide block_out_channels")
        if type(made.sample_size) is not int or made.sample_size < 1:
            raise ValueError(f"U-Net config: sample_size is {made.sample_size!r}; it must be one whole number, "
                             "the latents' height and width")
        unknown = (set(made.down_block_types + made.up_block_types)
                   - {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"})
        if unknown:
            raise ValueError(f"U-Net config: unknown block {sorted(unknown)[0]}")
        return made

    def to_dict(self):
        """The config.json that diffusers' UNet2DConditionModel reads."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in self.__dict__.items() if k != "stacked" or v}
        return {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0,
                **fields}


def timestep_embedding(timestep, width):
    """Sinusoids of a float timestep [B] -> [B, width], cosines first (Vaswani et al. 2017, section 3.5)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32, device=timestep.device)
                          / (width // 2))
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """x [B, channels, H, W], time [B, 4 C0] -> [B, out, H, W]."""

    def __init__(self, channels, out, time, config):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, out)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.conv_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Multi-head attention: to itself where `context` is None, else to the context [B, L, context width]."""

    def __init__(self, width, heads, context=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2)                          # [B, heads, N, C/heads]
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))        # [B, N, C]


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020)."""

    def __init__(self, width, out):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        # 1 is diffusers' dropout
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """x [B, N, width], context [B, L, context] -> [B, N, width]."""

    def __init__(self, width, heads, context):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A spatial transformer: every position attends to all others, then to the text."""

    def __init__(self, width, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)                    # not norm_eps, here alone
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(width, config.attention_head_dim, config.cross_attention_dim)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))
        size = h.shape[2:]
        h = self.transformer_blocks[0](h.flatten(2).transpose(1, 2), context)                # [B, H W, C]
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, size))                       # [B, C, H, W]


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest, to the size of the skip connection that comes next: it may be odd."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class DownBlock(nn.Module):
    """x [B, channels, H, W] -> [B, out, H, W], or half the size; `skips` gets what the way up needs."""

    def __init__(self, channels, out, time, attention, downsample, config):
        super().__init__()
        widths = [channels] + [out] * (config.layers_per_block - 1)
        if attention:
            self.attentions = nn.ModuleList(Transformer(out, config) for _ in widths)
        self.resnets = nn.ModuleList(ResnetBlock(width, out, time, config) for width in widths)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(out)])

    def forward(self, x, time, context, skips):
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, width, time, config):
        super().__init__()
        self.attentions = nn.ModuleList([Transformer(width, config)])
        self.resnets = nn.ModuleList(ResnetBlock(width, width, time, config) for _ in range(2))

    def forward(self, x, time, context):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class UpBlock(nn.Module):
    """One layer more than the way down; each takes the latest skip connection beside its input."""

    def __init__(self, channels, skips, out, time, attention, upsample, config):
        super().__init__()
        if attention:
            self.attentions = nn.ModuleList(Transformer(out, config) for _ in skips)
        self.resnets = nn.ModuleList(ResnetBlock((out if i else channels) + skip, out, time, config)
                                     for i, skip in enumerate(skips))
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(out)])

    def forward(self, x, time, context, skips):
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """Noise or velocity of latents, given the timestep and the text.

    forward(x [B, C, H, W], timestep float [B] or scalar in [0, 1000], context [B, L, cross_attention_dim])
    -> [B, C, H, W]. H and W are any sizes: where a level's is odd, the way up follows the skip connections.
    """

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        widths, time = config.block_out_channels, 4 * config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time)

        self.down_blocks, skips, channels = nn.ModuleList(), [widths[0]], widths[0]
        for i, (kind, width) in enumerate(zip(config.down_block_types, widths)):
            last = i == len(widths) - 1
            self.down_blocks.append(DownBlock(channels, width, time, kind == "CrossAttnDownBlock2D", not last, config))
            skips += [width] * (config.layers_per_block + (not last))
            channels = width

        self.mid_block = MidBlock(channels, time, config)

        self.up_blocks = nn.ModuleList()
        for i, (kind, width) in enumerate(zip(config.up_block_types, reversed(widths))):
            last = i == len(widths) - 1
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(channels, taken, width, time, kind == "CrossAttnUpBlock2D", not last, config))
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, x, timestep, context):
        return self.head(self.trunk(self.conv_in(x), timestep, context))

    def trunk(self, x, timestep, context):
        """Everything between conv_in and conv_norm_out: [B, block_out_channels[0], H, W] -> the same shape."""
        timestep = torch.as_tensor(timestep, device=x.device).expand(len(x))
        time = timestep_embedding(timestep, self.config.block_out_channels[0])                # [B, C0]
        time = self.time_embedding(time.to(x.dtype))                                         # [B, 4 C0]
        context = context.to(x.dtype)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time, context, skips)
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, time, context, skips)
        return x

    def head(self, x):
        """What `trunk` gives -> [B, out_channels, H, W]."""
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class StackedUNet(nn.Module):
    """InstaFlow-1.7B: two U-Nets in series, weights not shared. The first one's out block and the second one's
    conv_in are dropped, and features pass between them at full latent size, where the widths match. (The paper's
    wiring was never published: this is our reading.)"""

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = replace(config, stacked=True)
        self.first, self.second = UNet(config), UNet(config)
        del self.first.conv_norm_out, self.first.conv_out, self.second.conv_in

    @classmethod
    def from_unet(cls, unet):
        """Both halves start as copies of `unet`."""
        with torch.device("meta"):
            stacked = cls(unet.config)
        weights = unet.state_dict()
        for half in (stacked.first, stacked.second):
            half.load_state_dict({k: weights[k].clone() for k in half.state_dict()}, assign=True)
        return stacked.train(unet.training)

    def forward(self, x, timestep, context):
        x = self.first.trunk(self.first.conv_in(x), timestep, context)
        return self.second.head(self.second.trunk(x, timestep, context))
