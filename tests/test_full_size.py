"""Whole pictures against diffusers' pipeline, and what Stable Diffusion's own size costs. Reduced configs always;
full size with --slow."""
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import single_file
import weights
from conftest import randomise, relative_error
from instaflow import CONFIGS, InstaFlow
from lpips import random_vgg
from text import TextTower
from unet import StackedUNet, UNet
from vae import VAE

ROOT = Path(__file__).resolve().parent.parent
SD15 = dict(sample_size=64, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
SMALL = dict(sample_size=64,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
             block_out_channels=(16, 16, 32, 32), cross_attention_dim=32,
             attention_head_dim=4, norm_num_groups=4, layers_per_block=1)
PROMPTS = ["a red circle left of a blue square", "日本の桜, 4k"]


def pipeline(folder, tokenizer, vae=None):
    """diffusers' StableDiffusionPipeline with DPM-Solver++ on the folder's U-Net and text tower."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel
    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                            num_train_timesteps=1000, steps_offset=1)
    pipe = StableDiffusionPipeline(vae or AutoencoderKL.from_pretrained(folder / "vae"),
                                   CLIPTextModel.from_pretrained(folder / "text_encoder"), tokenizer,
                                   UNet2DConditionModel.from_pretrained(folder / "unet"), scheduler, None, None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(model, pipe, prompts, h, w):
    ours = model.latents(prompts, seed=5, height=8 * h, width=8 * w)
    theirs = pipe(prompts, height=8 * h, width=8 * w, num_inference_steps=25, guidance_scale=7.5,
                  negative_prompt=[""] * len(prompts), latents=model.noise(5, 0, len(prompts), 8 * h, 8 * w),
                  output_type="latent").images
    return ours, theirs


@pytest.fixture(scope="module")
def small(peers, tmp_path_factory):
    """The peers' folder with a U-Net that attends from the second level on: 25 steps of 96 x 64 latents take
    seconds."""
    from diffusers import UNet2DConditionModel
    folder = tmp_path_factory.mktemp("small") / "model"
    folder.mkdir()
    for part in ("vae", "text_encoder", "model_index.json"):
        (folder / part).symlink_to(peers.path / part)
    torch.manual_seed(6)
    randomise(UNet2DConditionModel(**SMALL)).save_pretrained(folder / "unet")
    return folder


@pytest.mark.filterwarnings("ignore")
# the last two are odd below the top, the last at it too
@pytest.mark.parametrize("h, w", [(64, 64), (96, 64), (40, 72), (36, 20), (41, 27)])
def test_a_whole_picture_is_diffusers(small, tokenizer, plain_convolutions, h, w):
    """Tokens, text tower, guidance, U-Net and DPM-Solver++ together: 25 steps, guidance 7.5, the same noise."""
    prompts = PROMPTS[:1] if h > 64 else PROMPTS
    ours, theirs = both(InstaFlow.load(small), pipeline(small, tokenizer), prompts, h, w)
    assert ours.shape == (len(prompts), 4, h, w) and ours.isfinite().all()
    assert relative_error(ours, theirs) <= 1e-3
    if len(prompts) > 1:
        assert relative_error(ours[:1], theirs[1:]) > 0.05


def test_the_sizes_of_stable_diffusion_and_of_the_stacked_model():
    with torch.device("meta"):
        unet, vae, stacked = UNet(CONFIGS["sd15"][0]), VAE(CONFIGS["sd15"][1]), StackedUNet(CONFIGS["stacked"][0])
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert (count(unet), count(vae)) == (859_520_964, 83_653_863)
    out_block = 2 * 320 + 320 * 4 * 9 + 4
    assert count(stacked) == 2 * count(unet) - out_block - (4 * 320 * 9 + 320)               # 1.7 B


# --- full size ---

LOAD = ("""
import re, sys, time, torch
sys.path.insert(0, {root!r})
{imports}
def memory(kind):                                      # the kernel's own count; getrusage's begins with the parent's
    return int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
started = time.perf_counter()
{load}
seconds = time.perf_counter() - started
total = sum(float(p.detach().view(torch.int16).flatten()[::2048].sum()) for p in parameters)"""
        """            # every page is read
print(seconds, memory("VmHWM") - before, sum(p.numel() * p.element_size() for p in parameters))
""")
OURS = ("from instaflow import InstaFlow; import open_clip.transformer",
        "m = InstaFlow.load({folder!r}, dtype=torch.float16)\n"
        "parameters = [p for x in (m.unet, m.vae, m.text) for p in x.parameters()]")
THEIRS = ("from diffusers import AutoencoderKL, UNet2DConditionModel; from transformers import CLIPTextModel",
          "m = [UNet2DConditionModel.from_pretrained({folder!r} + '/unet', torch_dtype=torch.float16), "
          "AutoencoderKL.from_pretrained({folder!r} + '/vae', torch_dtype=torch.float16), "
          "CLIPTextModel.from_pretrained({folder!r} + '/text_encoder', dtype=torch.float16)]\n"
          "parameters = [p for x in m for p in x.parameters()]")


def float16_parts():
    """U-Net, VAE and text tower of Stable Diffusion's size in float16, one after the other."""
    for i, (kind, config) in enumerate(zip((UNet, VAE, TextTower), CONFIGS["sd15"])):
        with torch.device("meta"):
            module = kind(config).half()
        module.to_empty(device="cpu").requires_grad_(False)
        for n, p in enumerate(module.parameters()):
            p.fill_(0.01 * (i + 1) + 1e-4 * (n % 50))
        yield module


@pytest.mark.slow
def test_a_float16_set_loads_lean_and_fast(tmp_path):
    """Peak resident memory less that after imports is at most 1.15 x the weights, every page read; time is at most
    1.05 x diffusers'."""
    for module, part, file in zip(float16_parts(), weights.PARTS,
                                  (weights.UNET_FILE, weights.VAE_FILE, weights.TEXT_FILE)):
        weights.save_module(module, tmp_path / part, file)
        del module
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')

    def run(imports, load):
        code = LOAD.format(root=str(ROOT), imports=imports, load=load.format(folder=str(tmp_path)))
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [float(x) for x in done.stdout.split()[-3:]]
    ours, theirs = [], []
    for _ in range(3):                                     # side by side, in turns
        ours.append(run(*OURS))
        theirs.append(run(*THEIRS))
    seconds, others = min(x[0] for x in ours), min(x[0] for x in theirs)
    memory = max(x[1] for x in ours) / ours[0][2]
    print(f"\nours {seconds:.2f} s, diffusers {others:.2f} s; peak {memory:.3f} x {ours[0][2] / 1e9:.2f} GB "
          f"(theirs {max(x[1] for x in theirs) / theirs[0][2]:.3f})")
    assert ours[0][2] > 2.1e9 and memory <= 1.15
    assert seconds <= 1.05 * others


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_of_stable_diffusions_size(tmp_path, suffix):
    """As v1-5-pruned-emaonly is: it says nothing of its sizes, which are Stable Diffusion 1.5's."""
    from safetensors.torch import load_file, save_file
    unet, vae, text = float16_parts()
    single_file.save_single_file(tmp_path / "told.safetensors", unet, vae, text, {"prediction": "velocity"})
    tensors = load_file(tmp_path / "told.safetensors")
    assert len(tensors) == 686 + 248 + 196
    (save_file if suffix == ".safetensors" else torch.save)(
        tensors if suffix == ".safetensors" else {"state_dict": tensors}, tmp_path / f"m{suffix}")
    del tensors
    model = InstaFlow.load(tmp_path / f"m{suffix}", dtype=torch.float16, prediction="epsilon")
    for got, wanted in ((model.unet, unet), (model.vae, vae), (model.text, text)):
        wanted = wanted.state_dict()
        assert (got.config == dict(zip((UNet, VAE, TextTower), CONFIGS["sd15"]))[type(got)]
                and all(torch.equal(v, wanted[k]) for k, v in got.state_dict().items()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_stable_diffusion_itself_with_random_weights(peers, tokenizer, tmp_path):
    """859,520,964 parameters that diffusers wrote; 25 guided steps of latents that are odd at two levels (20 x 28:
    5 x 7, 3 x 4)."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    UNet2DConditionModel(**SD15).save_pretrained(tmp_path / "unet")
    CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407,
        pad_token_id=1)).save_pretrained(tmp_path / "text_encoder")
    gc.collect()
    (tmp_path / "vae").symlink_to(peers.path / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    ours, theirs = both(InstaFlow.load(tmp_path), pipeline(tmp_path, tokenizer), PROMPTS[:1], 20, 28)
    assert relative_error(ours, theirs) <= 1e-3


@pytest.mark.slow
def test_one_training_step_of_each_script_fits_in_22_gib(tmp_path):
    """Stable Diffusion's size at 512 px, random weights, batch 1, on a CPU: the scripts as they are typed, checkpoint
    and model written too."""
    InstaFlow.random("sd15").save(tmp_path / "sd15", dtype=torch.float16)
    save_file(random_vgg(), tmp_path / "vgg.safetensors")
    (tmp_path / "prompts.txt").write_text("a red circle left of a blue square\n")
    gc.collect()
    step = "--model sd15 --pairs pairs --out out --iterations 1 --batch 1 --checkpoint --device cpu"
    for line in (
            "pairs.py --model sd15 --prompts prompts.txt --steps 1 --guidance 5 --batch 1 --out pairs --device cpu",
            f"train_reflow.py {step}", f"distill.py {step}", f"distill.py {step} --loss lpips --vgg vgg.safetensors"):
        script, *words = line.split()
        with open(tmp_path / "output.txt", "w") as output:
            process = subprocess.Popen([sys.executable, ROOT / script, *words], cwd=tmp_path,
                                       stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        print(f"\n{line}: {usage.ru_maxrss / 2 ** 20:.1f} GiB")
        assert status == 0, (tmp_path / "output.txt").read_text()
        assert usage.ru_maxrss <= 22 * 2 ** 20
        if script != "pairs.py":
            logged, = map(json.loads, (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines())
            assert logged["step"] == 1 and 0 < logged["loss"] < 100 and logged["gradient"] > 0
            shutil.rmtree(tmp_path / "out")                # 14 GB of checkpoint
