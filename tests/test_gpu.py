"""What a GPU would refuse or wait for, found without one: fake tensors (shapes, dtypes and devices, no numbers) on a
device "cuda".

Two devices in one operation is an error there, and so is every look at a number, which on a GPU waits for all that
came before."""
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import distill
import train_reflow
import training
from diffusion import Schedule
from fid import Running
from instaflow import CONFIGS, InstaFlow
from judge import Judge
from text import TextTower
from unet import StackedUNet, UNet
from vae import VAE

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


SCALES = Schedule.stable_diffusion().scales()


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(Schedule, "scales", lambda self: SCALES)  # numbers on the CPU, which a sampler may look at
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)         # autograd asks the GPU itself
    with FakeTensorMode(allow_non_fake_inputs=True):       # what is not fake is on the CPU
        yield


def model(prediction, dtype=torch.float32, **info):
    """Of the miniature's size, on the GPU."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            modules = [kind(config).eval().requires_grad_(False)
                       for kind, config in zip((UNet, VAE, TextTower), CONFIGS["mini"])]
    finally:
        torch.set_default_dtype(torch.float32)
    return InstaFlow(*modules, {"prediction": prediction, **info})


def test_two_devices_and_a_look_at_a_number_are_errors_here(fake):
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(DataDependentOutputException):
        float(x.sum())


@pytest.mark.parametrize("prediction, dtype", [("velocity", torch.float32), ("velocity", torch.float16),
                                               ("epsilon", torch.bfloat16)])
def test_sampling_stays_on_the_gpu_and_never_waits(fake, prediction, dtype):
    flow = model(prediction, dtype)
    for sampler in ("euler", "heun") + ("ddim", "dpm") * (prediction == "epsilon"):
        for steps, guidance in ((1, 1.0), (3, 1.5)):
            flow.info["sampler"] = sampler
            latents = flow.latents(["a red circle", "a ring"], steps, guidance)
            assert latents.device.type == "cuda" and latents.dtype == dtype and latents.shape == (2, 4, 16, 16)
    if dtype != torch.float16:                             # there the picture is looked at, since some VAEs overflow
        images = flow.decode(latents)
        assert images.device.type == "cuda" and images.dtype == torch.float32 and images.shape == (2, 3, 64, 64)
        assert flow.decode(latents, tile=8).device.type == "cuda"


def test_from_a_picture(fake):
    for flow in (model("velocity"), model("epsilon", sampler="dpm")):
        start, context = flow.encode(torch.zeros(1, 3, 64, 64)), flow.text(["a ring", ""])
        assert flow.solve_from(0.4, flow.noise(0, 0, 1), start, context[:1], context[1:], 5, 1.5).device.type == "cuda"


def test_features_and_their_statistics(fake):
    with torch.device("cuda"):
        judge, running = Judge(), Running(100, "cuda")
    for n in (5, 3):
        features = judge.embed(torch.zeros(n, 3, 64, 64))
        assert features.device.type == "cuda"
        running.add(features[:, :100])
    assert running.n == 8 and running.scatter.device.type == "cuda"


class Pairs:
    """Zeros, on the CPU, as PairDataset hands pairs out."""
    info = {"model": "teacher", "number": 64}

    def __init__(self, folder):
        pass

    def check(self, *args, **settings):
        pass

    def __len__(self):
        return 64

    def batch(self, indices):
        return (torch.zeros(len(indices), 4, 16, 16), torch.zeros(len(indices), 4, 16, 16),
                ["a red circle"] * len(indices))


class Log:
    def __init__(self):
        self.losses = []

    def add(self, losses, t=None, **values):
        assert t is None or t.shape == losses.shape
        self.losses.append(losses)


@pytest.mark.parametrize("script, words", [
    (script, [*words, *exact]) for exact in ([], ["--exact"]) for script, words in [
        (train_reflow, []), (train_reflow, ["--density", "u-shaped", "--huber", "--accumulate", "2"]),
        (train_reflow, ["--checkpoint", "--float32"]),
        (distill, []), (distill, ["--steps", "4", "--accumulate", "2", "--loss", "huber"]),
        (distill, ["--checkpoint", "--float32"]), (distill, ["--loss", "lpips", "--vgg", "file", "--l2", "0.05"]),
        (distill, ["--loss", "lpips", "--vgg", "file", "--lpips-size", "0"])]] + [(distill, ["--stacked"])], ids=str)
def test_a_training_step_stays_on_the_gpu_and_never_waits(fake, monkeypatch, command, tmp_path, script, words):
    """The loops themselves, from the batch to the loss. What looks at numbers by purpose (the gradient's norm, log,
    checkpoints) is left out."""
    flow, log, seen = model("epsilon"), Log(), []
    flow.unet.conv_out.register_forward_hook(lambda layer, args, output: seen.append(output.dtype))

    class Perceptual(torch.nn.Module):
        """VGG16's place is taken by one convolution, on the GPU like it."""
        def __init__(self, *files):
            super().__init__()
            with torch.device("cuda"):
                self.first = torch.nn.Conv2d(3, 4, 3)

        def to(self, device):                              # a fake module cannot be moved
            assert torch.device(device).type == "cuda"
            return self

        def forward(self, a, b):
            assert a.dtype == torch.float32
            return (self.first(a) - self.first(b)).square().mean((1, 2, 3))

    def steps(args, world, folder, unet, ema, optimizer, *rest):
        for step in range(2):
            yield step, log, args.lr
            training.update_ema(ema, unet, step)

    def stacked(unet):                                     # copies of a fake module's numbers cannot be made
        with torch.device("cuda"):
            return StackedUNet(dataclasses.replace(unet.config, stacked=True))
    monkeypatch.setattr(script, "PairDataset", Pairs)
    monkeypatch.setattr(script.InstaFlow, "load", lambda *args, **named: flow)
    monkeypatch.setattr(script.InstaFlow, "save", lambda *args, **settings: None)
    monkeypatch.setattr(script.InstaFlow, "operations", lambda self: {"unet": 1, "decoder": 1})
    monkeypatch.setattr(distill, "LPIPS", Perceptual)
    monkeypatch.setattr(StackedUNet, "from_unet", staticmethod(stacked))
    monkeypatch.setattr(training, "start", lambda *args, **settings: training.World(0, 1, torch.device("cuda")))
    monkeypatch.setattr(training, "adamw", lambda *args: None)
    monkeypatch.setattr(training, "steps", steps)
    monkeypatch.setattr(training, "optimiser_step", lambda *args: 1.0)
    monkeypatch.setattr(training, "made", lambda *args: {})
    assert command(f"{script.__name__}.py", "--model", "teacher", "--pairs", "pairs", "--out", tmp_path / "out",
                   "--batch", 8, *words)[0] == 0
    assert "--stacked" in words or set(seen) == {torch.float32 if "--float32" in words else torch.bfloat16}
    assert len(log.losses) == 2 and all(losses.device.type == "cuda" and losses.shape == (8,) for losses in log.losses)
