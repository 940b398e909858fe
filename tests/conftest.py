import importlib
import os
import sys
from pathlib import Path

# Peers only ever read folders the tests wrote: never let one look on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch

# The nets here are too small to share out, and two threads that wait for each other on a busy machine take ten times
# as long.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@pytest.fixture(autouse=True)
def seeds():
    """Each test draws the same numbers whether it runs alone or among others."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def plain_convolutions(monkeypatch):
    """oneDNN builds a kernel for each new shape, which takes ten times as long as these small convolutions do."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


def relative_error(ours, theirs):
    """Largest absolute difference over the reference's largest value."""
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)} where the reference has {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def gradient_error(ours, theirs):
    """Largest difference of any gradient over the net's largest gradient.

    Relative to the net, since some gradients are zero but for rounding.
    """
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (ours, theirs))
    assert set(ours) == set(theirs)
    missing = [n for n in theirs if ours[n] is None or theirs[n] is None]
    assert not missing, f"no gradient reached {missing}"
    largest = max(g.abs().max() for g in theirs.values())
    assert largest > 0
    return (max((ours[n] - theirs[n]).abs().max() for n in theirs) / largest).item()


@torch.no_grad()
def randomise(module):
    """Nothing stays trivially zero or one: biases and norm scales are drawn, so a forgotten one shows."""
    for name, p in module.named_parameters():
        if p.ndim == 1:
            p.copy_(0.1 * torch.randn_like(p) + (1.0 if name.endswith("weight") else 0.0))
    return module.eval()


# --- a whole model small enough to train in a test, and command lines ---

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with two models of random weights: `teacher` predicts noise, `flow` velocity and borrows teacher's VAE
    and text tower. Latents are [4, 8, 8], pictures 16 x 16. Nobody writes into it."""
    from instaflow import InstaFlow
    from text import TextConfig, TextTower
    from unet import UNet, UNetConfig
    from vae import VAE, VAEConfig
    folder = tmp_path_factory.mktemp("tiny")
    config = UNetConfig(block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, attention_head_dim=2,
                        cross_attention_dim=8, norm_num_groups=2, sample_size=8)
    torch.manual_seed(1)
    vae = randomise(VAE(VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, sample_size=16)))
    text = randomise(TextTower(TextConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                                          num_attention_heads=2)))
    InstaFlow(randomise(UNet(config)), vae, text,
              {"prediction": "epsilon", "steps": 4, "guidance": 2.0}).save(folder / "teacher")
    InstaFlow(randomise(UNet(config)), vae, text,
              {"prediction": "velocity", "steps": 3, "guidance": 1.5}, folder / "teacher").save(folder / "flow")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """A command line, run in this process: command("sample.py", "--steps", 1, ...) -> (exit status, stdout, stderr).
    What would be a traceback is raised."""
    def run(script, *words):
        import cli
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            cli.run(module.main)
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()
    return run


def without_time(lines):
    """Lines of a training's log, but for what no two runs have alike."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_second", "memory_gib", "hours_left")}
            for line in lines]


def one_line(result, *words):
    """Whether a command line's result is what a user's mistake must give: status 2 and one line on stderr, with these
    words."""
    status, out, err = result
    assert status == 2, f"exit status {status}: {err}"
    assert err.count("\n") == 1 and err.endswith("\n"), f"not one line: {err!r}"
    missing = [w for w in map(str, words) if w not in err]
    assert not missing, f"{missing} not in {err!r}"
    return True


# --- Stable Diffusion in small, as its own libraries write it ---

@pytest.fixture(scope="session")
def peers(tmp_path_factory):
    """A folder that diffusers and transformers wrote, with random weights: Stable Diffusion 1.5's architecture with
    fewer channels. It has the fields unet, vae, text: their networks. Nobody writes into it."""
    from types import SimpleNamespace
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    folder = tmp_path_factory.mktemp("peers")
    torch.manual_seed(3)
    unet = randomise(UNet2DConditionModel(
        sample_size=64, block_out_channels=(16, 32, 32, 32), norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3))
    vae = randomise(AutoencoderKL(
        sample_size=512, block_out_channels=(16, 16, 32, 32), norm_num_groups=4, layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4))
    text = randomise(CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407, pad_token_id=1)))
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        module.save_pretrained(folder / part)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return SimpleNamespace(path=folder, unet=unet, vae=vae, text=text)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """transformers' CLIPTokenizer, from vocab.json and merges.txt made of the byte-pair file that open_clip ships."""
    import gzip
    import importlib.util
    import json
    from transformers import CLIPTokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    source = Path(importlib.util.find_spec("open_clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(source.read_bytes()).decode().split("\n")[1:49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = (symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
             + ["<|startoftext|>", "<|endoftext|>"])
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


# --- what an evaluation needs ---

@pytest.fixture(scope="session")
def their_inception(tmp_path_factory):
    """(file of random Inception weights in pytorch-fid's layout, pytorch-fid's network that has loaded it). Its
    constructor reads that file in place of the network for as long as the session lasts."""
    import pytorch_fid.inception as peer
    from torchvision.models import inception_v3
    path, generator = tmp_path_factory.mktemp("inception") / "weights.pth", torch.Generator().manual_seed(5)
    network = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):        # He's: neither vanishes nor blows up over 48 layers
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.weight.normal_(1, 0.2, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    torch.save(network.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "load_state_dict_from_url", lambda url, progress=True: torch.load(path, weights_only=True))
        yield path, peer.InceptionV3([3]).eval()


def paint(folder, n, seed=0, size=(48, 40), tint=0.0):
    """n smooth colourful pictures as 0.png, 1.png, ... (Noise would give a network the same features every time.)"""
    from PIL import Image
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        coarse = (255 * rng.random((*rng.integers(2, 7, 2), 3)) * (1 - tint * np.array([0, 0.5, 1]))).astype(np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder
