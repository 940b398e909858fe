"""Inception-v3 as FID uses it (Szegedy et al. 2015; the weights of Heusel et al. 2017, ported by pytorch-fid):
images -> features [B, 2048].

Attribute names are the file's key paths. It differs from torchvision's Inception-v3 in its weights, in average pools
that do not count the padding, and in Mixed_7c, whose pool is a max (an oddity of the original graph, and part of
every published FID).
"""
import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError
from lpips import read_weights

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SIDE = 299


def conv(c_in, c_out, kernel, stride=1, padding=None):
    """A convolution with BatchNorm folded in, hence the bias. padding None: what keeps the size at stride 1."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.Conv2d(c_in, c_out, kernel, stride, tuple(k // 2 for k in kernel) if padding is None else padding)


def chain(x, *layers):
    for layer in layers:
        x = F.relu(layer(x), inplace=True)
    return x


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
    def __init__(self, c, pool):
        super().__init__()
        self.branch1x1 = conv(c, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = conv(c, 48, 1), conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = conv(c, 64, 1), conv(64, 96, 3), conv(96, 96, 3)
        self.branch_pool = conv(c, pool, 1)

    def forward(self, x):
        return torch.cat([chain(x, self.branch1x1), chain(x, self.branch5x5_1, self.branch5x5_2),
                          chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
                          chain(average(x), self.branch_pool)], 1)


class B(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch3x3 = conv(c, 384, 3, 2, 0)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(c, 64, 1), conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3, 2, 0)

    def forward(self, x):
        return torch.cat([chain(x, self.branch3x3),
                          chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
                          F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    def __init__(self, c, m):
        super().__init__()
        self.branch1x1 = conv(c, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = conv(c, m, 1), conv(m, m, (1, 7)), conv(m, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = conv(c, m, 1), conv(m, m, (7, 1))
        self.branch7x7dbl_3 = conv(m, m, (1, 7))
        self.branch7x7dbl_4, self.branch7x7dbl_5 = conv(m, m, (7, 1)), conv(m, 192, (1, 7))
        self.branch_pool = conv(c, 192, 1)

    def forward(self, x):
        return torch.cat([chain(x, self.branch1x1), chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
                          chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3,
                                self.branch7x7dbl_4, self.branch7x7dbl_5),
                          chain(average(x), self.branch_pool)], 1)


class D(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = conv(c, 192, 1), conv(192, 320, 3, 2, 0)
        self.branch7x7x3_1, self.branch7x7x3_2 = conv(c, 192, 1), conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = conv(192, 192, (7, 1)), conv(192, 192, 3, 2, 0)

    def forward(self, x):
        return torch.cat([chain(x, self.branch3x3_1, self.branch3x3_2),
                          chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4),
                          F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    def __init__(self, c, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = conv(c, 320, 1)
        self.branch3x3_1 = conv(c, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(c, 448, 1), conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.branch_pool = conv(c, 192, 1)

    def forward(self, x):
        y, z = chain(x, self.branch3x3_1), chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        return torch.cat([chain(x, self.branch1x1), chain(y, self.branch3x3_2a), chain(y, self.branch3x3_2b),
                          chain(z, self.branch3x3dbl_3a), chain(z, self.branch3x3dbl_3b),
                          chain(self.pool(x), self.branch_pool)], 1)


class Inception(nn.Module):
    """Inception(path)(images): float [B, 3, H, W] in [0, 1], of any size -> float32 [B, 2048], the last average pool.

    path: pytorch-fid's file. Raises UserError where it is missing or another network's,
    ValueError on images of another kind.
    """

    def __init__(self, path):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = conv(3, 32, 3, 2, 0), conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = conv(64, 80, 1), conv(80, 192, 3, 1, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = B(288), C(768, 128), C(768, 160)
        self.Mixed_6d, self.Mixed_6e = C(768, 160), C(768, 192)
        self.Mixed_7a, self.Mixed_7b = D(768), E(1280, average)
        self.Mixed_7c = E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        fold(self, read_weights(path), path)
        self.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; "
                             "floating point [B, 3, H, W] in [0, 1] is needed")
        x = (2 * resize(images.float()) - 1).contiguous(memory_format=torch.channels_last)       # [B, 3, 299, 299]
        x = chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)                 # [B, 64, 147, 147]
        x = chain(F.max_pool2d(x, 3, 2), self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)                 # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))                   # [B, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))         # [B, 768, 17, 17]
        return (self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                                   # [B, 2048, 8, 8]
                .mean((2, 3)))                                                                   # -> [B, 2048]


def resize(images):
    """[B, 3, H, W] -> [B, 3, 299, 299] as FID does it: bilinear without antialiasing.
    (Of 299 px already: unchanged.)"""
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)


@torch.no_grad()
def fold(network, tensors, path):
    """Load convolution + BatchNorm (eps 1e-3) as one convolution:
    at inference w / s and beta - mean / s, with s = sqrt(var + eps) / gamma."""
    if "fc.weight" in tensors and len(tensors["fc.weight"]) != 1008:
        raise UserError(f"{path} knows {len(tensors['fc.weight'])} classes, and FID's Inception 1008: "
                        f"these weights give another number; fetch {URL}")
    left = {k: v for k, v in tensors.items()
            if k not in ("fc.weight", "fc.bias") and not k.endswith(".num_batches_tracked")}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            shapes = ({"conv.weight": layer.weight.shape}
                      | dict.fromkeys(("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), layer.bias.shape))
            parts = [left.pop(f"{name}.{key}", torch.empty(0)).double() for key in shapes]
            for part, (key, shape) in zip(parts, shapes.items()):
                if part.shape != shape:
                    raise UserError(f"{path}: {name}.{key} is missing or not {list(shape)}: "
                                    f"these are not FID's Inception weights; fetch {URL}")
            weight, gamma, beta, mean, var = parts
            scale = gamma / (var + 1e-3).sqrt()
            layer.weight.copy_(weight * scale[:, None, None, None])
            layer.bias.copy_(beta - mean * scale)
    if left:
        raise UserError(f"{path} has an unknown tensor {sorted(left)[0]} ({len(left)} in all): "
                        f"these are not FID's Inception weights; fetch {URL}")
