import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import vae
from conftest import gradient_error, randomise, relative_error

pytestmark = pytest.mark.usefixtures("plain_convolutions")

SD15 = dict(
    in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=32, act_fn="silu",
    block_out_channels=[128, 256, 512, 512], sample_size=512, scaling_factor=0.18215,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)

# Every group of a norm has at least four channels.
CONFIGS = {
    levels: SD15 | dict(
        block_out_channels=channels, norm_num_groups=8, layers_per_block=layers, sample_size=32,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    for levels, channels, layers in ((3, [32, 64, 64], 1), (4, [32, 32, 64, 64], 2))
}


def ours_from(theirs, folder):
    """Our VAE, joined to diffusers' only by the folder that diffusers wrote."""
    theirs.save_pretrained(folder)
    ours = vae.VAE(vae.VAEConfig.from_dict(json.loads((folder / "config.json").read_text())))
    ours.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    return ours.eval()


@pytest.fixture(scope="module", params=CONFIGS, ids="{} levels".format)
def vaes(request, tmp_path_factory):
    torch.manual_seed(1)
    theirs = randomise(AutoencoderKL(**CONFIGS[request.param]))
    return ours_from(theirs, tmp_path_factory.mktemp("vae")), theirs, 2 ** (request.param - 1)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (6, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_encode(vaes, size, batch):
    ours, theirs, factor = vaes
    image = torch.rand(batch, 3, size[0] * factor, size[1] * factor) * 2 - 1
    mean, logvar = ours.encode(image)
    assert mean.shape == (batch, 4, *size)
    expected = theirs.encode(image).latent_dist
    assert relative_error(mean, expected.mean) <= 2e-5
    assert relative_error(logvar, expected.logvar) <= 2e-5


@torch.no_grad()
def test_encode_a_size_the_factor_does_not_divide(vaes):
    ours, theirs, factor = vaes
    image = torch.rand(1, 3, 4 * factor + 3, 3 * factor + 1) * 2 - 1
    expected = theirs.encode(image).latent_dist
    assert relative_error(ours.encode(image)[0], expected.mean) <= 2e-5


@torch.no_grad()
def test_logvar_is_clamped(vaes, tmp_path):
    _, theirs, factor = vaes
    loud = AutoencoderKL.from_config(theirs.config).eval()
    loud.load_state_dict(theirs.state_dict())
    loud.quant_conv.bias[4:].copy_(torch.tensor([-60.0, 50.0, 0.0, 0.0]))
    image = torch.rand(1, 3, 4 * factor, 4 * factor) * 2 - 1
    logvar = ours_from(loud, tmp_path).encode(image)[1]
    assert relative_error(logvar, loud.encode(image).latent_dist.logvar) <= 2e-5
    assert logvar.min() == -30 and logvar.max() == 20


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (6, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_decode(vaes, size, batch):
    ours, theirs, factor = vaes
    latent = torch.randn(batch, 4, *size)
    image = ours.decode(latent)
    assert image.shape == (batch, 3, size[0] * factor, size[1] * factor)
    assert relative_error(image, theirs.decode(latent).sample) <= 2e-5


@torch.no_grad()
def test_quiet_features(vaes):
    # Where features are small the norms' eps decides.
    ours, theirs, factor = copy.deepcopy(vaes)
    for net in (ours, theirs):
        for name, p in net.named_parameters():
            if "conv" in name and "norm" not in name and "quant" not in name:
                p.mul_(0.05)
    image, latent = torch.rand(1, 3, 4 * factor, 4 * factor) * 2 - 1, torch.randn(1, 4, 4, 4)
    assert relative_error(ours.encode(image)[0], theirs.encode(image).latent_dist.mean) <= 2e-5
    assert relative_error(ours.decode(latent), theirs.decode(latent).sample) <= 2e-5


def test_gradients_of_both_halves(vaes):
    ours, theirs, factor = vaes
    image = torch.rand(2, 3, 4 * factor, 2 * factor) * 2 - 1
    latent = torch.randn(2, 4, 4, 2)
    weights = [torch.randn(2, 4, 4, 2), torch.randn(2, 4, 4, 2), torch.randn_like(image)]

    def their_encode(image):
        distribution = theirs.encode(image).latent_dist
        return distribution.mean, distribution.logvar

    grads = []
    for net, encode, decode in (
            (ours, ours.encode, ours.decode), (theirs, their_encode, lambda latent: theirs.decode(latent).sample)):
        net.zero_grad(set_to_none=True)
        leaves = [image.clone().requires_grad_(), latent.clone().requires_grad_()]
        outputs = [*encode(leaves[0]), decode(leaves[1])]
        sum((w * out).sum() for w, out in zip(weights, outputs)).backward()
        grads.append([leaf.grad for leaf in leaves])
    # each half against its own largest, so that neither hides behind the other
    for half in (("encoder", "quant_conv"), ("decoder", "post_quant_conv")):
        assert gradient_error(*(torch.nn.ModuleList(getattr(net, name) for name in half)
                                for net in (ours, theirs))) <= 2e-4
    for a, b in zip(*grads):
        assert relative_error(a, b) <= 2e-4


def test_config_is_the_peers(vaes):
    ours, theirs, factor = vaes
    again = AutoencoderKL.from_config(ours.config.to_dict())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert vae.VAEConfig.from_dict(ours.config.to_dict()) == ours.config
    assert again.config.scaling_factor == theirs.config.scaling_factor


def test_sd15_has_its_parameters():
    with torch.device("meta"):
        ours, theirs = vae.VAE(vae.VAEConfig.from_dict(SD15)), AutoencoderKL(**SD15)
    shapes = [{name: p.shape for name, p in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
