import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import unet
from conftest import gradient_error, randomise, relative_error

pytestmark = pytest.mark.usefixtures("plain_convolutions")

SD15 = dict(
    sample_size=64, in_channels=4, out_channels=4, center_input_sample=False, flip_sin_to_cos=True, freq_shift=0,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, downsample_padding=1, mid_block_scale_factor=1,
    act_fn="silu", norm_num_groups=32, norm_eps=1e-5, cross_attention_dim=768, attention_head_dim=8)

# Every group of a norm has at least four channels. attention_head_dim is the number of heads, as in SD 1.5.
CONFIGS = {
    "sd": SD15 | dict(block_out_channels=[32, 64, 96, 96], norm_num_groups=8, cross_attention_dim=32,
                      attention_head_dim=8, sample_size=8),
    "plain top": SD15 | dict(
        block_out_channels=[32, 64, 64], norm_num_groups=8, cross_attention_dim=24, attention_head_dim=4,
        layers_per_block=1, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], sample_size=8),
}
# The last four are odd below the top, where the way up must meet the way down's sizes.
SIZES = [(8, 8), (16, 16), (16, 24), (10, 14), (5, 7), (9, 8), (12, 20)]
TIMESTEPS = [1000.0, 999.0, 500.25, 0.5, 0.0]


@pytest.fixture(scope="module", params=CONFIGS)
def nets(request, tmp_path_factory):
    """diffusers' net and ours, joined only by the folder that diffusers wrote."""
    torch.manual_seed(1)
    theirs = randomise(UNet2DConditionModel(**CONFIGS[request.param]))
    folder = tmp_path_factory.mktemp("unet")
    theirs.save_pretrained(folder)
    config = unet.UNetConfig.from_dict(json.loads((folder / "config.json").read_text()))
    ours = unet.UNet(config)
    ours.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    return ours.eval(), theirs


def inputs(net, batch, size, length=7):
    return torch.randn(batch, 4, *size), torch.randn(batch, length, net.config.cross_attention_dim)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_output(nets, size, batch):
    ours, theirs = nets
    x, context = inputs(theirs, batch, size)
    timestep = torch.tensor([999.0, 421.7, 3.0])[:batch]
    assert relative_error(ours(x, timestep, context), theirs(x, timestep, context).sample) <= 2e-5


@torch.no_grad()
@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_timestep(nets, timestep):
    ours, theirs = nets
    x, context = inputs(theirs, 3, (8, 8))
    expected = theirs(x, timestep, context).sample
    for form in (timestep, torch.tensor(timestep), torch.full((3,), timestep)):
        assert relative_error(ours(x, form, context), expected) <= 2e-5


@torch.no_grad()
def test_each_image_has_its_own_timestep(nets):
    ours, theirs = nets
    x, context = inputs(theirs, 3, (8, 8))
    for timestep in (torch.tensor([1000.0, 0.5, 0.0]), torch.tensor([999, 20, 0])):
        assert relative_error(ours(x, timestep, context), theirs(x, timestep, context).sample) <= 2e-5


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 77])
def test_context_length(nets, length):
    ours, theirs = nets
    x, context = inputs(theirs, 2, (8, 8), length)
    assert relative_error(ours(x, 321.0, context), theirs(x, 321.0, context).sample) <= 2e-5


@torch.no_grad()
def test_channels_last_through_onednn(nets, monkeypatch):
    ours, theirs = nets
    x, context = inputs(theirs, 2, (8, 12))
    expected = theirs(x, 321.0, context).sample
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    got = ours(x.to(memory_format=torch.channels_last), 321.0, context)
    assert relative_error(got, expected) <= 2e-5


@torch.no_grad()
def test_quiet_features(nets):
    # Where features are small the norms' eps decides, and the net has two of them.
    ours, theirs = (copy.deepcopy(net) for net in nets)
    for net in (ours, theirs):
        for name, p in net.named_parameters():
            if "conv" in name or "time_emb_proj" in name or "proj_out" in name:
                p.mul_(0.05 if "norm" not in name else 1)
    x, context = inputs(theirs, 2, (8, 8))
    assert relative_error(ours(0.1 * x, 321.0, context), theirs(0.1 * x, 321.0, context).sample) <= 2e-5


@pytest.mark.parametrize("size", [(8, 8), (5, 7)], ids=str)
def test_gradients(nets, size):
    ours, theirs = nets
    x, context = inputs(theirs, 2, size)
    timestep, projection = torch.tensor([900.0, 12.5]), torch.randn(2, 4, *size)
    grads = []
    for net, output in ((ours, lambda *a: ours(*a)), (theirs, lambda *a: theirs(*a).sample)):
        net.zero_grad(set_to_none=True)
        leaves = [x.clone().requires_grad_(), context.clone().requires_grad_()]
        (output(leaves[0], timestep, leaves[1]) * projection).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert gradient_error(ours, theirs) <= 2e-4
    for a, b in zip(*grads):
        assert relative_error(a, b) <= 2e-4


def test_stacked_parameters(nets):
    stacked = unet.StackedUNet.from_unet(nets[0])
    assert stacked.config.stacked
    single, keys = nets[1].state_dict(), set(stacked.state_dict())
    dropped = {"first": ("conv_norm_out.", "conv_out."), "second": ("conv_in.",)}
    expected = {f"{half}.{k}" for half, drop in dropped.items() for k in single if not k.startswith(drop)}
    assert keys == expected
    weights = stacked.state_dict()
    assert all(torch.equal(weights[k], single[k.split(".", 1)[1]]) for k in keys)
    halves = sum(single[k.split(".", 1)[1]].numel() for k in expected)
    assert sum(p.numel() for p in stacked.parameters()) == halves


def test_stacked_halves_are_copies(nets):
    before = nets[0].conv_in.weight.clone()
    stacked = unet.StackedUNet.from_unet(nets[0])
    with torch.no_grad():
        for p in stacked.parameters():
            p.zero_()
    assert torch.equal(nets[0].conv_in.weight, before)
    stacked = unet.StackedUNet.from_unet(nets[0])
    with torch.no_grad():
        stacked.first.time_embedding.linear_1.weight.zero_()
    assert stacked.second.time_embedding.linear_1.weight.any(), "the halves share weights"


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (5, 7)], ids=str)
def test_stacked_output(nets, size):
    # Two of the peer's nets: the features before the first's out block go in after the second's conv_in.
    ours, theirs = nets
    x, context = inputs(theirs, 2, size)
    timestep = torch.tensor([1000.0, 30.5])
    features = []
    handle = theirs.conv_norm_out.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    theirs(x, timestep, context)
    handle.remove()
    second = UNet2DConditionModel.from_config(theirs.config).eval()
    stacked = unet.StackedUNet.from_unet(ours).eval()
    stacked.second.load_state_dict({k: v for k, v in second.state_dict().items() if not k.startswith("conv_in.")})
    second.conv_in = torch.nn.Identity()
    got = stacked(x, timestep, context)
    assert got.isfinite().all()
    assert relative_error(got, second(features[0], timestep, context).sample) <= 4e-5  # two nets' rounding


def test_stacked_saves_and_loads(nets):
    stacked = unet.StackedUNet.from_unet(nets[0])
    config = unet.UNetConfig.from_dict(json.loads(json.dumps(stacked.config.to_dict())))
    assert config == stacked.config
    unet.StackedUNet(config).load_state_dict(stacked.state_dict(), strict=True)
    # from a single U-Net's config too
    assert not nets[0].config.stacked and unet.StackedUNet(nets[0].config).config == config


def test_config_is_the_peers(nets):
    ours, theirs = nets
    again = UNet2DConditionModel.from_config(ours.config.to_dict())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert unet.UNetConfig.from_dict(ours.config.to_dict()) == ours.config


@pytest.mark.parametrize("other", [
    dict(use_linear_projection=True), dict(attention_head_dim=[5, 10, 20, 20]), dict(addition_embed_type="text_time"),
    dict(resnet_out_scale_factor=2.0), dict(timestep_post_act="silu"), dict(mid_block_only_cross_attention=True),
    dict(down_block_types=["AttnDownBlock2D"] * 4)], ids=lambda d: next(iter(d)))
def test_another_network_is_refused(other):
    with pytest.raises(ValueError):
        unet.UNetConfig.from_dict(SD15 | other)


def test_sd15_has_its_parameters():
    with torch.device("meta"):
        ours, theirs = unet.UNet(unet.UNetConfig.from_dict(SD15)), UNet2DConditionModel(**SD15)
    shapes = [{name: p.shape for name, p in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
