"""The autoencoder of Stable Diffusion: images [B, 3, H, W] in [-1, 1] <-> latents [B, 4, H/f, W/f], unscaled.

f = 2 ** (levels - 1): 8 at full size. (The 0.18215 that latents are scaled by is InstaFlow's business.)
Attribute names are the key paths of the diffusers layout. Rombach et al. 2022, section 3.1;
the architecture is VQGAN's (Esser et al. 2021).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    """The defaults are Stable Diffusion 1.x. Field names are those of diffusers' config.json."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215

    @classmethod
    def from_dict(cls, config):
        """From diffusers' config.json as a dict. Raises ValueError where it asks for a network that this is not."""
        fixed = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True,
                 "mid_block_add_attention": True, "shift_factor": None}
        for key, value in fixed.items():
            if config.get(key, value) != value:
                raise ValueError(f"VAE config: {key} is {config[key]!r}, but Stable Diffusion 1.x's VAE has {value!r}")
        scale = config.get("scaling_factor", cls.scaling_factor)
        if type(scale) not in (int, float) or not 0 < scale < float("inf"):
            raise ValueError(f"VAE config: scaling_factor is {scale!r}; it must be a number above 0")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
                      if k in cls.__dataclass_fields__})

    def to_dict(self):
        """The config.json that diffusers' AutoencoderKL reads."""
        levels = len(self.block_out_channels)
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in self.__dict__.items()}
        return {"_class_name": "AutoencoderKL", "act_fn": "silu", "down_block_types": ["DownEncoderBlock2D"] * levels,
                "up_block_types": ["UpDecoderBlock2D"] * levels, **fields}

    @property
    def factor(self):
        """How many pixels, along a side, one latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)


def silu(x):
    """SiLU of a norm's output, in place: nothing else reads it, and on a CPU fresh memory costs more than the
    arithmetic. With gradients enabled autograd would keep a copy, so then it is not in place."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def group_norm(channels, config):
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)          # 1e-6 here; the U-Net's blocks have 1e-5


class ResnetBlock(nn.Module):
    """[B, channels, H, W] -> [B, out, H, W]."""

    def __init__(self, channels, out, config):
        super().__init__()
        self.norm1 = group_norm(channels, config)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = group_norm(out, config)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.conv_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x):
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        # in place too; no gradient needs what h was
        return h.add_(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """One head as wide as the features, over all positions."""

    def __init__(self, width, config):
        super().__init__()
        self.group_norm = group_norm(width, config)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)                    # [B, H W, C]
        q, k, v = (to(h)[:, None] for to in (self.to_q, self.to_k, self.to_v))           # [B, 1, H W, C]
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])               # [B, C, H, W]


class MidBlock(nn.Module):
    def __init__(self, width, config):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, config)])
        self.resnets = nn.ModuleList(ResnetBlock(width, width, config) for _ in range(2))

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        # right and bottom only: symmetric padding shifts the image
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2 H, 2 W]."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """Residual blocks of one level, then down or up to the next one."""

    def __init__(self, channels, out, layers, config, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(out if i else channels, out, config) for i in range(layers))
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(out)])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(out)])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for resize in getattr(self, "downsamplers", None) or getattr(self, "upsamplers", []):
            x = resize(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Block(widths[max(i - 1, 0)], width, config.layers_per_block, config, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = group_norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))  # [B, 2 latent, H/f, W/f]


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = nn.ModuleList(
            Block(widths[max(i - 1, 0)], width, config.layers_per_block + 1, config, upsample=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.conv_norm_out = group_norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))                  # [B, 3, H, W]


class VAE(nn.Module):
    """encode: image [B, 3, H, W] in [-1, 1], H and W multiples of f -> (mean, logvar), each [B, latent, H/f, W/f].
    decode: latent [B, latent, h, w], unscaled -> image [B, 3, f h, f w], about [-1, 1], not clipped."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image):
        """-> mean and logvar of the latent's distribution."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent):
        """-> image."""
        return self.decoder(self.post_quant_conv(latent))

    def decode_tiled(self, latent, tile=64):
        """As `decode`, in tiles of tile x tile latents that overlap by a quarter and are blended linearly: memory is
        a tile's, whatever the picture's size. It is not the same picture: every tile has its own GroupNorm statistics
        and attends to itself alone."""
        h, w = latent.shape[2:]
        if h <= tile and w <= tile:
            return self.decode(latent)
        overlap, f = tile // 4, self.config.factor

        def windows(size):
            """Each tile's start, side and weights along this axis [f side]: weights rise and fall over the overlaps."""
            side = min(tile, size)
            starts = [*range(0, size - side, side - overlap), size - side]
            ramp = torch.linspace(0, 1, f * overlap + 2)[1:-1]
            for i, start in enumerate(starts):
                weight = torch.ones(f * side)
                if i:
                    weight[:len(ramp)] = ramp
                if i < len(starts) - 1:
                    weight[len(weight) - len(ramp):] = ramp.flip(0)
                yield start, side, weight
        image = torch.zeros(len(latent), self.config.out_channels, f * h, f * w)             # on the CPU, float32
        total = torch.zeros(f * h, f * w)
        for top, high, down in windows(h):
            for left, wide, across in windows(w):
                weight = down[:, None] * across                                              # [f high, f wide]
                part = (..., slice(f * top, f * (top + high)), slice(f * left, f * (left + wide)))
                image[part] += weight * self.decode(latent[..., top:top + high, left:left + wide]).float().cpu()
                total[part] += weight
        return (image / total).to(latent.device)
