"""LPIPS, the perceptual distance (Zhang et al. 2018, section 3), on VGG16's features or on any trunk of its layout.

The widths are read from the weights, so it takes torchvision's VGG16 and the miniature's judge alike.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from cli import UserError

BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))    # VGG16's convolutions; a max pool between blocks


class LPIPS(nn.Module):
    """LPIPS(vgg, linear=None)(a, b): images [B, 3, H, W] in [-1, 1], compared at the size they come in -> distance [B].

    vgg: file of VGG16's weights (keys features.0.weight, ...), .safetensors or .pth. linear: file of the layers'
    weights (lin0.model.1.weight [1, C, 1, 1], ... as in the lpips package); None weighs all channels of a layer
    alike, 1 / C. Raises UserError where a file is missing or another network's.
    """

    def __init__(self, vgg, linear=None):
        super().__init__()
        tensors = read_weights(vgg)
        self.features, channels = nn.ModuleDict(), 3
        for i in (i for block in BLOCKS for i in block):
            weight, bias = (tensors.get(f"features.{i}.{kind}") for kind in ("weight", "bias"))
            if weight is None or bias is None or weight.shape[1:] != (channels, 3, 3) or bias.shape != weight.shape[:1]:
                raise UserError(f"{vgg}: features.{i} is missing or no 3x3 convolution of {channels} channels: "
                                "these are not VGG16's weights, nor the judge's")
            conv = nn.Conv2d(channels, len(weight), 3, padding=1)
            conv.load_state_dict({"weight": weight.float(), "bias": bias.float()})
            self.features[str(i)], channels = conv, len(weight)
        widths = [self.features[str(block[-1])].out_channels for block in BLOCKS]
        given = read_weights(linear) if linear else {}
        for k, width in enumerate(widths):
            lin = given.get(f"lin{k}.model.1.weight", None if linear else torch.full((1, width, 1, 1), 1 / width))
            if lin is None or lin.shape != (1, width, 1, 1):
                raise UserError(f"{linear}: lin{k}.model.1.weight is missing or not [1, {width}, 1, 1]: "
                                "it is for another trunk")
            self.register_buffer(f"lin{k}", lin.float())
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).reshape(1, 3, 1, 1))
        self.requires_grad_(False)

    def maps(self, images):
        """The five feature maps, each position's channels of unit length."""
        x = (images - self.shift) / self.scale
        for k, block in enumerate(BLOCKS):
            if k:
                x = F.max_pool2d(x, 2)
            for i in block:
                x = F.relu(self.features[str(i)](x))
            x32 = x.float()
            # inside the root: outside, the gradient at 0 is NaN
            yield x32 / (x32.square().sum(1, keepdim=True) + 1e-20).sqrt()

    def forward(self, a, b):
        total = 0
        for k, (x, y) in enumerate(zip(self.maps(a), self.maps(b))):
            total = total + ((x - y).square() * getattr(self, f"lin{k}")).sum(1).mean((1, 2))
        return total


def read_weights(path):
    """A network's state_dict, .safetensors or .pth -> dict[str, tensor]. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file of weights")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)    # never a pickle that can run code
    except Exception as error:
        # a damaged pickle raises whatever it likes; torch's own advice is to run its code
        reason = "" if "weights only" in str(error).lower().replace("_", " ") else " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no whole file of tensors ({reason or type(error).__name__}); "
                        "fetch it again") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path} holds no tensors by name; save the network's state_dict()")
    return tensors


def random_vgg(widths=(64, 128, 256, 512, 512)):
    """Tensors named and shaped as VGG16's convolutions, of other widths if you like: for speed, memory and plumbing."""
    tensors, channels = {}, 3
    for block, width in zip(BLOCKS, widths):
        for i in block:
            tensors |= {f"features.{i}.weight": torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5,
                        f"features.{i}.bias": torch.zeros(width)}
            channels = width
    return tensors
