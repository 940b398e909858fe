"""Memory layout, packed weights and compilation: the same numbers, sooner.

For sampling alone: gradients are switched off, and after `pack` and `compiled` a module is no longer one
to be saved or trained.
"""
import torch
import torch.nn.functional as F
from torch import nn

import unet
import vae


def place(module, device, dtype=None):
    """Put a module where it computes -> module, without gradients. On a GPU its weights are channels-last, as its
    convolutions are fastest; on a CPU they stay as the file has them: `pack` has a better layout, and channels-last
    inputs decide the rest."""
    module.to(device).to(dtype=dtype).requires_grad_(False)                  # in this order: a GPU converts in no time
    return module.to(memory_format=torch.channels_last) if torch.device(device).type == "cuda" else module


class PackedConv(nn.Conv2d):
    """A convolution on a CPU whose weights are brought into oneDNN's own layout once, in the first call, and not
    again in every one: at 8 x 8 latents that takes many times as long as the convolution (benchmarks/README.md)."""
    plain = packed = None

    def forward(self, x):
        if self.packed is None:                            # which layout is best depends on the input's size
            # from here oneDNN's is reached in half the time
            weight = converted(self.plain, x.dtype, torch.channels_last)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(
                weight, self.padding, self.stride, self.dilation, self.groups, x.shape)
            self.plain = None
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.packed, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], "")


class PackedLinear(nn.Linear):
    """The same for a matrix product."""
    plain = packed = None

    def forward(self, x):
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(
                converted(self.plain, x.dtype), x.numel() // x.shape[-1])
            self.plain = None
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PackedUpsample(nn.Module):
    """Upsampling by two to the nearest neighbour, and the 3 x 3 convolution after it, as one operator. The
    convolution's nine inputs are copies of only four pixels, so weights of the same pixel can be added up beforehand.
    That makes a transposed convolution of 4 x 4 and stride 2: four products where there were nine, and no large
    picture in between."""
    plain = packed = None

    def forward(self, x, size=None):
        # an odd size is not quite a double: for it self.conv keeps its weights
        if size is not None and tuple(size) != (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, size=size, mode="nearest"))
        shape = (1, 1), (0, 0), (2, 2), (1, 1), 1          # padding, output padding, stride, dilation, groups
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                summed(self.plain, x.dtype), *shape, x.shape)
            self.plain = None
        return torch.ops.mkldnn._convolution_transpose_pointwise(x, self.packed, self.conv.bias, *shape, "none", [], "")


def converted(weight, dtype, layout=torch.contiguous_format):
    """A weight in another dtype and memory layout, as by `to`; from float16 to bf16 in about half its time:
    by way of float32, a few rows at a time."""
    if (weight.dtype, dtype) != (torch.float16, torch.bfloat16):
        return weight.to(dtype, memory_format=layout)
    out = torch.empty_like(weight, dtype=dtype, memory_format=layout)
    for some, rows in zip(out.split(32), weight.split(32)):
        some.copy_(rows.float().to(dtype))
    return out


def summed(weight, dtype):
    """A convolution's weights [O, I, 3, 3] -> those of the transposed one [I, O, 4, 4] that takes the place of it and
    of the upsampling before it: along each axis w2, w2 + w1, w1 + w0, w0. They are rounded to `dtype` first, as all
    weights are, and added in float32."""
    kernel = torch.empty(weight.shape[1], 4, 4, weight.shape[0], dtype=dtype)
    # a few at a time: touching new memory takes longer than the sums
    for k in range(0, len(kernel), 32):
        part = converted(weight[:, k:k + 32], dtype).float().permute(1, 2, 3, 0)
        for axis in (1, 2):
            w0, w1, w2 = part.unbind(axis)
            part = torch.stack((w2, w2 + w1, w1 + w0, w0), axis)
        kernel[k:k + 32] = part
    return kernel.permute(0, 3, 1, 2)


PACKED = {nn.Conv2d: PackedConv, nn.Linear: PackedLinear, unet.Upsample: PackedUpsample, vae.Upsample: PackedUpsample}


def pack(module, dtype=None):
    """Have a module's convolutions, upsamplings and bf16 matrix products pack their weights when they are first used
    -> module. Only on a CPU where oneDNN computes in the dtype; elsewhere they stay as they are. dtype: what the
    module is to compute in, None what it has. Weights that will be packed are converted only then, and until then may
    stay in their file; the others are converted here. (These are the operators that torch.compile calls: PyTorch has
    no public names for them.)"""
    p = next(module.parameters())
    dtype = dtype or p.dtype
    known = p.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    half = known and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    kinds = [kind for kind in PACKED if half or known and dtype == torch.float32 and kind is not nn.Linear]
    for layer in module.modules():                         # an upsampling comes before the convolution in it
        weight = getattr(layer, "conv", layer).weight if type(layer) in kinds else None
        if weight is not None and weight.numel():          # (0 where that convolution was packed alone, earlier)
            layer.__class__, layer.plain = PACKED[type(layer)], weight.detach()
            if hasattr(layer, "weight"):                   # an empty one stays: others ask for its dtype
                layer.weight = nn.Parameter(weight.new_empty(0, dtype=dtype), requires_grad=False)
    return module.to(dtype=dtype)


def leave(module):
    """Free the memory of a module's weights, packed ones too."""
    for layer in module.modules():
        if type(layer) in PACKED.values():
            layer.plain = layer.packed = None
    module.to("meta")


def compiled(module, device, graphs=True):
    """torch.compile, in place, for the sizes it meets; device: where it will run -> module. graphs: on a GPU, replay
    CUDA graphs: an output is overwritten by the next call. torch itself caches the compiled code on disk, and the
    next process finds it there."""
    # sizes and dtypes, over all modules of a class; past its default of 8 torch runs uncompiled
    torch._dynamo.config.recompile_limit = 64
    module.compile(mode="reduce-overhead" if torch.device(device).type == "cuda" and graphs else None, dynamic=False)
    return module


def graphed(module):
    """Record a network's calls on a GPU, once for each size and dtype of its inputs and dtype of autocast, and replay
    them from then on -> module. For networks so small that launching their kernels from Python takes longer than
    running them; all inputs are tensors, and there are no gradients."""
    forward, graphs = module.forward, {}

    def replay(*inputs):
        half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (half, *((x.shape, x.dtype) for x in inputs))
        if key not in graphs:
            with torch.autocast("cuda", half or None, enabled=bool(half), cache_enabled=False):
                graphs[key] = torch.cuda.make_graphed_callables(forward, tuple(x.clone() for x in inputs))
        return graphs[key](*inputs).clone()                # what comes out is overwritten by the next replay
    module.forward = replay
    return module
