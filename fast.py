"""Memory layout, packed weights and compilation: the same numbers, sooner.

For sampling alone: gradients are switched off, and after `pack` and `compiled` a module is no longer one to be saved or trained.
"""
import torch
from torch import nn


def place(module, device, dtype=None):
    """Put a module where it computes -> module, without gradients. On a GPU its weights are channels-last, as its convolutions are
    fastest; on a CPU they stay as the file has them: `pack` has a better layout, and channels-last inputs decide the rest."""
    module.to(device).to(dtype=dtype).requires_grad_(False)                  # in this order: a GPU converts in no time
    return module.to(memory_format=torch.channels_last) if torch.device(device).type == "cuda" else module


def _free(layer):
    """The plain weights go; an empty one stays, since open_clip asks it for its dtype."""
    layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


class PackedConv(nn.Conv2d):
    """A convolution on a CPU whose weights are brought into oneDNN's own layout once, in the first call, and not again in every
    one: at 8 x 8 latents that takes many times as long as the convolution (benchmarks/README.md)."""
    packed = None

    def forward(self, x):
        if self.packed is None:                            # which layout is best depends on the input's size
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, self.padding, self.stride, self.dilation, self.groups, x.shape)
            _free(self)
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], "")


class PackedLinear(nn.Linear):
    """The same for a matrix product."""
    packed = None

    def forward(self, x):
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, x.numel() // x.shape[-1])
            _free(self)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(module):
    """Have a module's convolutions and bf16 matrix products pack their weights when they are first used -> module. Only on a CPU
    where oneDNN computes in the module's dtype; elsewhere nothing happens. (These are the operators that torch.compile calls:
    PyTorch has no public names for them.)"""
    p = next(module.parameters())
    known = p.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    half = known and p.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for layer in module.modules() if half or known and p.dtype == torch.float32 else ():
        if type(layer) is nn.Conv2d:
            layer.__class__ = PackedConv
        elif type(layer) is nn.Linear and half:
            layer.__class__ = PackedLinear
    return module


def leave(module):
    """Free the memory of a module's weights, packed ones too."""
    for layer in module.modules():
        if isinstance(layer, (PackedConv, PackedLinear)):
            layer.packed = None
    module.to("meta")


def compiled(module, device, graphs=True):
    """torch.compile, in place, for the sizes it meets; device: where it will run -> module. graphs: on a GPU, replay CUDA graphs:
    an output is overwritten by the next call. torch itself caches the compiled code on disk, and the next process finds it there."""
    torch._dynamo.config.recompile_limit = 64              # sizes and dtypes, over all modules of a class; past its default of 8 torch runs uncompiled
    module.compile(mode="reduce-overhead" if torch.device(device).type == "cuda" and graphs else None, dynamic=False)
    return module


def graphed(module):
    """Record a network's calls on a GPU, once for each size and dtype of its inputs and dtype of autocast, and replay them from then on -> module.
    For networks so small that launching their kernels from Python takes longer than running them; all inputs are tensors, and there are no gradients."""
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
