"""Every spelling of the same weights gives the same tensors; what is wrong is one line."""
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import single_file
import weights
from cli import UserError
from conftest import relative_error
from hub import locate, needed
from instaflow import InstaFlow
from unet import StackedUNet

pytestmark = pytest.mark.usefixtures("plain_convolutions")
POINTER = (b"version https://git-lfs.github.com/spec/v1\n"
           b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n")


def tensors_of(model):
    return {f"{part}.{k}": v for part in ("unet", "vae", "text") for k, v in getattr(model, part).state_dict().items()}


def same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


@pytest.fixture(scope="module")
def model(peers):
    return InstaFlow.load(peers.path)


@pytest.fixture
def copy(peers, tmp_path):
    return shutil.copytree(peers.path, tmp_path / "model")


def outputs(peers_unet, peers_vae, peers_text):
    """What three of the peers' networks compute of fixed inputs."""
    from text import tokenize
    torch.manual_seed(7)
    x, image = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        states = peers_text(tokenize(["a red circle", "日本の桜"])).last_hidden_state
        return [states, peers_unet(x, 421.5, states).sample, peers_vae.decode(x[:1]).sample,
                peers_vae.encode(image).latent_dist.mean]


# --- folders ---

@torch.no_grad()
def test_a_folder_of_the_peers_computes_what_they_compute(model, peers):
    from text import tokenize
    torch.manual_seed(7)
    x, image = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 32, 32) * 2 - 1
    states = model.text(tokenize(["a red circle", "日本の桜"]))
    ours = [states, model.unet(x, 421.5, states), model.vae.decode(x[:1]), model.vae.encode(image)[0]]
    for got, expected in zip(ours, outputs(peers.unet, peers.vae, peers.text), strict=True):
        assert relative_error(got, expected) <= 2e-5
    assert (model.info["prediction"], model.info["sampler"], model.info["steps"], model.info["guidance"]) == (
        "epsilon", "dpm", 25, 7.5)


def to_bin(folder, part):
    """The part's weights as a pickle, as repositories before safetensors had them."""
    path = folder / part / (weights.TEXT_FILE if part == "text_encoder" else weights.UNET_FILE)
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(path), folder / part / name)
    path.unlink()


def old_names(folder):
    """What early repositories have: `query` in the VAE, `text_model.` and position_ids in the text tower."""
    path = folder / "vae" / weights.VAE_FILE
    tensors, old = load_file(path), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in tensors.items()}
    assert sum(".query." in k for k in tensors) == 4
    save_file(tensors, path)
    path = folder / "text_encoder" / weights.TEXT_FILE
    tensors = {"text_model." + k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)


def bare_text(folder):
    path = folder / "text_encoder" / weights.TEXT_FILE
    save_file({k.removeprefix("text_model."): v for k, v in load_file(path).items()}, path)


def shards(folder, peers, **settings):
    for part, module in (("unet", peers.unet), ("vae", peers.vae), ("text_encoder", peers.text)):
        shutil.rmtree(folder / part)
        module.save_pretrained(folder / part, max_shard_size="400KB", **settings)
        assert len(list((folder / part).glob("*-of-*"))) > 1


SPELLINGS = {
    "pickles": lambda folder, peers: [to_bin(folder, part) for part in weights.PARTS],
    "old names": lambda folder, peers: old_names(folder),
    "old names in pickles": lambda folder, peers: (old_names(folder), [to_bin(folder, part) for part in weights.PARTS]),
    "no text_model.": lambda folder, peers: bare_text(folder),
    "shards": shards,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_folder_gives_the_same_tensors(copy, peers, model, spelling):
    SPELLINGS[spelling](copy, peers)
    assert same(InstaFlow.load(copy), model)


@pytest.mark.parametrize("sharded", [False, True])
def test_fp16_variants(peers, model, tmp_path, sharded):
    """Alone they are read; beside whole precision, only where float16 is asked for."""
    folder = shutil.copytree(peers.path, tmp_path / "model")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        settings = {"max_shard_size": "200KB"} if sharded else {}
        kind.from_pretrained(peers.path / part).half().save_pretrained(folder / part, variant="fp16", **settings)
    files = sorted(p.name for p in (folder / "unet").iterdir())
    assert any("fp16" in name for name in files) and weights.UNET_FILE in files
    assert same(InstaFlow.load(folder), model)
    for part in weights.PARTS:
        assert "fp16" in weights.weight_files(folder / part, part, torch.float16)[0].name
        (folder / part / (weights.TEXT_FILE if part == "text_encoder" else weights.UNET_FILE)).unlink()
    half = tensors_of(InstaFlow.load(folder))
    assert all(v.dtype == torch.float32 and torch.equal(v, tensors_of(model)[k].half().float())
               for k, v in half.items())
    assert {v.dtype for v in tensors_of(InstaFlow.load(folder, dtype=torch.float16)).values()} == {torch.float16}


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "RectifiedFlowPipeline"])
def test_a_model_that_predicts_something_else_is_refused(copy, kind):
    """Stable Diffusion's scheduler tells what it predicts; the one left over in a rectified flow's folder means
    nothing."""
    (copy / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (copy / "scheduler").mkdir()
    (copy / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    assert InstaFlow.load(copy).info["prediction"] == {"StableDiffusionPipeline": "epsilon",
                                                       "RectifiedFlowPipeline": "velocity"}[kind]
    (copy / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    if kind == "RectifiedFlowPipeline":
        assert InstaFlow.load(copy).info["prediction"] == "velocity"
    else:
        with pytest.raises(UserError, match="scheduler_config.json says that the U-Net predicts v_prediction") as error:
            InstaFlow.load(copy)
        assert "\n" not in str(error.value)


def test_weights_in_the_asked_dtype_stay_on_their_file(peers):
    """Memory-mapped: a tensor is the file's own bytes, and yet the file is never written to."""
    path = peers.path / "unet" / weights.UNET_FILE
    before = path.read_bytes()
    unet = weights.load_unet(peers.path / "unet")
    maps = Path("/proc/self/maps")
    if maps.exists():
        spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(str(path))]
        address = unet.conv_in.weight.data_ptr()
        assert any(int(a, 16) <= address < int(b, 16) for a, b in spans)
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    assert path.read_bytes() == before


def test_the_mask_of_a_loaded_text_tower(model):
    """A buffer that is in no file."""
    mask = model.text.tower.attn_mask
    assert mask.device.type == "cpu" and (mask == torch.full((77, 77), float("-inf")).triu(1)).all()


# --- what we write, the peers read ---

def test_diffusers_and_transformers_open_our_folder_strictly(model, peers, tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    model.save(tmp_path / "ours", self_contained=True)
    unet, loading = UNet2DConditionModel.from_pretrained(tmp_path / "ours" / "unet", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    vae, loading = AutoencoderKL.from_pretrained(tmp_path / "ours" / "vae", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    text, loading = CLIPTextModel.from_pretrained(tmp_path / "ours" / "text_encoder", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    for got, expected in zip(outputs(unet, vae, text), outputs(peers.unet, peers.vae, peers.text), strict=True):
        # the same weights; where in memory they lie may change the last digit
        assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_diffusers_reads_our_single_file(model, peers, tmp_path, dtype):
    """diffusers folder -> ours -> ldm single file -> diffusers' own single-file loader -> the same outputs."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint
    file = tmp_path / "model.safetensors"
    model.save(file, dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    unet = UNet2DConditionModel.from_single_file(str(file), config=str(peers.path), subfolder="unet")
    vae = AutoencoderKL.from_single_file(str(file), config=str(peers.path), subfolder="vae")
    text = type(peers.text)(peers.text.config).eval()
    converted = convert_ldm_clip_checkpoint(load_file(file))
    prefix = "text_model." if any(k.startswith("text_model.") for k in text.state_dict()) else ""
    text.load_state_dict({prefix + k.removeprefix("text_model."): v for k, v in converted.items()}, strict=True)
    for got, expected in zip(outputs(unet.float(), vae.float(), text), outputs(peers.unet, peers.vae, peers.text),
                             strict=True):
        assert relative_error(got, expected) <= (1e-5 if dtype is None else 0.02)
    again = InstaFlow.load(file)
    assert again.info == model.info and again.base is None
    if dtype is None:
        assert same(again, model)


def test_a_whole_pipeline_from_our_single_file(model, peers, tokenizer, tmp_path):
    from diffusers import StableDiffusionPipeline
    tokenizer.save_pretrained(tmp_path / "config" / "tokenizer")
    shutil.copytree(peers.path, tmp_path / "config", dirs_exist_ok=True)
    (tmp_path / "config" / "scheduler").mkdir()
    (tmp_path / "config" / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, '
        '"skip_prk_steps": true, "steps_offset": 1}')
    (tmp_path / "config" / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}))
    model.save(tmp_path / "model.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(str(tmp_path / "model.safetensors"),
                                                    config=str(tmp_path / "config"), local_files_only=True)
    for got, expected in zip(outputs(pipe.unet, pipe.vae, pipe.text_encoder),
                             outputs(peers.unet, peers.vae, peers.text), strict=True):
        # the same weights; where in memory they lie may change the last digit
        assert relative_error(got, expected) <= 1e-5


def test_a_stacked_model_saves_and_loads(model, tmp_path):
    stacked = InstaFlow(StackedUNet.from_unet(model.unet), model.vae, model.text,
                        {"prediction": "velocity", "steps": 1, "guidance": 1.0})
    with torch.no_grad():
        stacked.unet.second.conv_out.weight.mul_(2)
    stacked.save(tmp_path / "stacked")
    keys = set(load_file(tmp_path / "stacked" / "unet" / weights.UNET_FILE))
    assert ({key.split(".")[0] for key in keys} == {"first", "second"}
            and not keys & {"first.conv_out.weight", "first.conv_norm_out.weight", "second.conv_in.weight"})
    assert json.loads((tmp_path / "stacked" / "unet" / "config.json").read_text())["stacked"] is True
    again = InstaFlow.load(tmp_path / "stacked")
    assert same(again, stacked)
    assert relative_error(again.latents(["a"], height=64, width=64),
                          stacked.latents(["a"], height=64, width=64)) <= 1e-5
    with pytest.raises(UserError, match="a stacked U-Net has no single-file layout"):
        stacked.save(tmp_path / "one.safetensors")


# --- single files of others ---

def ldm(model):
    """An ldm file's tensors, as our writer makes them (diffusers reads it: above)."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "m.safetensors")
        return {k: v.clone() for k, v in load_file(Path(folder) / "m.safetensors").items()}


@pytest.fixture(scope="module")
def single(model):
    return ldm(model)


@pytest.fixture
def sizes(model, monkeypatch):
    """Others' files say nothing of their sizes, which then are Stable Diffusion's: here, the small ones."""
    told = {"unet": model.unet.config.to_dict(), "vae": model.vae.config.to_dict(),
            "text_encoder": model.text.config.to_dict()}
    monkeypatch.setattr(single_file, "facts", lambda path: told)


def with_baggage(tensors):
    """What the released files hold beside the weights."""
    more = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1
            for k, v in tensors.items() if k.startswith("model.diffusion_model.")}
    more |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7),
             "logvar": torch.zeros(1000), "betas": torch.zeros(1000, dtype=torch.float64)}
    more |= {k: torch.zeros(1000) for k in (
        "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
        "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")}
    return tensors | more | {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
                             "first_stage_model.loss.logvar": torch.zeros(())}


def nai(tensors):
    """Some files' text tower has no `text_model.`, and some VAEs' attention is a matrix already."""
    out = {k.replace("transformer.text_model.", "transformer."): v for k, v in tensors.items()}
    return {k: v.flatten(1) if ".attn_1." in k and v.dim() == 4 else v for k, v in out.items()}


@pytest.mark.parametrize("change", [dict, with_baggage, nai],
                         ids=["plain", "with EMA and buffers", "bare text, flat attention"])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "ckpt of a trainer", "old ckpt"])
def test_single_files_of_others(model, single, sizes, tmp_path, monkeypatch, kind, change):
    tensors, file = change(single), tmp_path / ("m.safetensors" if kind == "safetensors" else "m.ckpt")
    if kind == "safetensors":
        save_file(tensors, file)
    elif kind == "ckpt":
        torch.save(tensors, file)
    elif kind == "old ckpt":
        torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=False)
    else:
        # Stable Diffusion 1.4's holds its trainer's classes and numpy's numbers
        module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            monkeypatch.setitem(sys.modules, name, module)
        torch.save({"state_dict": tensors, "global_step": np.int64(470000),
                    "callbacks": {module.ModelCheckpoint: {"best": np.float64(0.5)}},
                    "hook": module.ModelCheckpoint()}, file)
        monkeypatch.undo()
        told = {"unet": model.unet.config.to_dict(), "vae": model.vae.config.to_dict(),
                "text_encoder": model.text.config.to_dict()}
        monkeypatch.setattr(single_file, "facts", lambda path: told)
        assert "pytorch_lightning" not in sys.modules
    with pytest.raises(UserError, match="does not say what its U-Net predicts") as error:
        InstaFlow.load(file)
    assert str(file) in str(error.value)
    assert same(InstaFlow.load(file, prediction="epsilon"), model)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_could_run_code_is_not_run(single, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": single, "callbacks": Harmful()}, "m.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"m\.ckpt holds a Python object, (posix|os)\.system, "
                                        r"which could run code.*\.safetensors") as error:
        InstaFlow.load("m.ckpt", prediction="epsilon")
    assert "\n" not in str(error.value) and not Path("harmed").exists()


OTHERS = {
    "Stable Diffusion XL": {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
                            "first_stage_model.decoder.conv_in.bias": (8,),
                            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (8,)},
    "Stable Diffusion 2": {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
                           "first_stage_model.decoder.conv_in.bias": (8,),
                           "cond_stage_model.model.ln_final.bias": (1024,)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias": (8,)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (8, 8)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "LoRA": {"lora_unet_mid_block_attentions_0_proj_in.alpha": ()},
    "part of a diffusers folder": {"down_blocks.0.resnets.0.conv1.bias": (8,), "conv_in.weight": (8, 4, 3, 3)},
    "a VAE alone": {"decoder.conv_in.bias": (8,), "encoder.conv_in.bias": (8,)},
    r"no tensor first_stage_model\.\*": {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    r"no tensor model\.diffusion_model\.\*": {"anything": (8,)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_something_else_are_named(tmp_path, what):
    save_file({k: torch.zeros(shape) for k, shape in OTHERS[what].items()}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=what) as error:
        InstaFlow.load(tmp_path / "m.safetensors", prediction="epsilon")
    assert str(tmp_path / "m.safetensors") in str(error.value) and "\n" not in str(error.value)


def first(tensors, start):
    return next(k for k in tensors if k.startswith(start))


WRONG = {
    "missing": (lambda t: t.pop("model.diffusion_model.input_blocks.1.1.proj_in.weight"),
                r"lacks tensor model\.diffusion_model\.input_blocks\.1\.1\.proj_in\.weight \(1 in all\)"),
    "missing text": (
        lambda t: t.pop("cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.k_proj.bias"),
        r"lacks tensor cond_stage_model\.transformer\.text_model\.encoder\.layers\.1\.self_attn\.k_proj\.bias"),
    "unknown": (lambda t: t.update({"first_stage_model.more": torch.zeros(1)}),
                r"has an unknown tensor first_stage_model\.more"),
    "unknown at the root": (lambda t: t.update({"embedding_manager.x": torch.zeros(1)}),
                            r"has an unknown tensor embedding_manager\.x"),
    "inpainting": (lambda t: t.update({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}),
                   r"input_blocks\.0\.0\.weight is \[16, 9, 3, 3\], but .* \[16, 4, 3, 3\]"),
    "attention": (lambda t: t.update({"first_stage_model.decoder.mid.attn_1.q.weight": torch.zeros(32, 32, 3, 3)}),
                  r"attn_1\.q\.weight is \[32, 32, 3, 3\]"),
    "whole numbers": (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int32)}),
                      r"out\.2\.bias is torch\.int32"),
    "8 bits": (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(4).to(torch.float8_e4m3fn)}),
               r"out\.2\.bias is torch\.float8_e4m3fn"),
    "two halves": (lambda t: t.update({k: v.bfloat16() if k.endswith("out.2.bias") else v.half()
                                       for k, v in t.items()}), "damaged"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_single_file_that_does_not_fit_is_one_line_in_its_own_names(single, sizes, tmp_path, wrong):
    edit, words = WRONG[wrong]
    tensors = dict(single)
    edit(tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=words) as error:
        InstaFlow.load(tmp_path / "m.safetensors", prediction="epsilon")
    assert str(tmp_path / "m.safetensors") in str(error.value) and "\n" not in str(error.value)


def test_stable_diffusions_own_size_is_asked_for_where_nothing_is_said(single, tmp_path):
    save_file(single, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"lacks tensor|but Stable Diffusion 1\.x has \["):
        InstaFlow.load(tmp_path / "m.safetensors", prediction="epsilon")


# --- damage ---

def test_shards_that_do_not_agree_with_their_index(copy, peers):
    shards(copy, peers)
    index = copy / "unet" / (weights.UNET_FILE + ".index.json")
    whole = json.loads(index.read_text())
    files = sorted(set(whole["weight_map"].values()))
    key = next(k for k, v in whole["weight_map"].items() if v == files[0])

    def fails(words):
        with pytest.raises(UserError, match=words) as error:
            InstaFlow.load(copy)
        assert str(copy / "unet") in str(error.value) and "\n" not in str(error.value)
    for edit, words in (({key: files[1]}, f"{files[0]} holds tensor {key}, which .* has in {files[1]}"),
                        ({"more": files[0]}, f"{files[0]} lacks tensor more"),
                        ({key: "../x.safetensors"}, "no weight_map"), ({key: 3}, "no weight_map"),
                        ({key: "none.safetensors"}, "holds tensor|none.safetensors is missing")):
        index.write_text(json.dumps(whole | {"weight_map": whole["weight_map"] | edit}))
        fails(words)
    index.write_text(json.dumps(whole))
    tensors = load_file(copy / "unet" / files[1])
    save_file(tensors | {key: torch.zeros(1)}, copy / "unet" / files[1])     # one tensor in two shards
    fails(f"{files[1]} holds tensor {key}")
    (copy / "unet" / files[1]).unlink()
    fails(f"{files[1]} is missing")
    index.write_text("[]")
    fails("holds no JSON object")


def split(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + length]), raw[8 + length:]


def join(header, data, length=None):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def damaged(raw, draw):
    """One of the ways a file goes bad."""
    kind = draw.choice(["cut", "header bit", "length bit", "huge length", "dtype", "shape", "dropped", "doubled",
                        "renamed", "offsets", "grown", "data cut"])
    header, data = split(raw)
    keys = [k for k in header if k != "__metadata__"]
    key, other = draw.sample(keys, 2)
    if kind == "cut":
        return raw[:draw.randrange(len(raw))]
    if kind == "data cut":
        return raw[:-draw.randrange(1, 9)]
    if kind == "header bit":
        at = draw.randrange(8, len(raw) - len(data))
        return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1:]
    if kind == "length bit":
        at = draw.randrange(64)
        return (int.from_bytes(raw[:8], "little") ^ 1 << at).to_bytes(8, "little") + raw[8:]
    if kind == "huge length":
        return join(header, data, draw.choice([2 ** 63, 2 ** 64 - 1, 2 ** 40, 99_999_999, len(raw) - 7]))
    if kind == "grown":
        return raw + draw.randbytes(draw.randrange(1, 100))
    if kind == "dtype":
        header[key]["dtype"] = draw.choice(["I32", "U32", "F16", "BF16", "F64", "F8_E4M3", "BOOL", "I64", "C64",
                                            "F128", ""])
    elif kind == "shape":
        header[key]["shape"] = draw.choice([header[other]["shape"], header[key]["shape"][::-1] + [1],
                                            [-1], [2 ** 62, 4], []])
    elif kind == "dropped":
        del header[key]
    elif kind == "doubled":
        header[draw.choice([key + ".again", "." + key, key + "_orig"])] = header[key]
    elif kind == "renamed":
        header[key], header[other] = (
            (header[other], header[key]) if draw.random() < 0.5 and header[key]["shape"] != header[other]["shape"]
            else (header[key], header[key]))
    elif kind == "offsets":
        at = draw.randrange(2)
        header[key]["data_offsets"][at] = max(0, header[key]["data_offsets"][at]
                                              + draw.choice([-4, 4, 2 ** 40, 2 ** 62]))
    return join(header, data)


def test_a_thousand_damaged_files(tiny, tmp_path):
    """Each is a one-line error or exactly the right tensors: no traceback, no hang, no memory."""
    folder = shutil.copytree(tiny / "teacher" / "vae", tmp_path / "vae")
    file, draw = folder / weights.VAE_FILE, random.Random(0)
    raw, right = file.read_bytes(), weights.load_vae(folder).state_dict()
    right = {k: v.clone() for k, v in right.items()}
    before, slowest, whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0
    for i in range(1000):
        (folder / "next").write_bytes(damaged(raw, draw))
        os.replace(folder / "next", file)
        started = time.perf_counter()
        try:
            got = weights.load_vae(folder).state_dict()
            assert (got.keys() == right.keys()
                    and all(torch.equal(v, right[k]) for k, v in got.items())), f"file {i} was read as other tensors"
            whole += 1
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error) and len(str(error)) < 500
        slowest = max(slowest, time.perf_counter() - started)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert 0 < whole < 200 and slowest < 10 and grown < 100, (
        f"{whole} whole, slowest {slowest:.1f} s, {grown:.0f} MiB more")


def test_damaged_pickles(tiny, tmp_path):
    folder = shutil.copytree(tiny / "teacher" / "vae", tmp_path / "vae")
    right = {k: v.clone() for k, v in load_file(folder / weights.VAE_FILE).items()}
    (folder / weights.VAE_FILE).unlink()
    file, draw = folder / "diffusion_pytorch_model.bin", random.Random(0)
    for zipped in (True, False):
        torch.save(right, file, _use_new_zipfile_serialization=zipped)
        raw, failed = file.read_bytes(), 0
        for i in range(100):
            at = draw.randrange(len(raw))
            # an old file has no checksum
            bad = (raw[:at] if i % 2 or not zipped
                   else raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1:])
            (folder / "next").write_bytes(bad)
            os.replace(folder / "next", file)
            try:
                got = weights.load_vae(folder).state_dict()
                assert all(torch.equal(v, right[k]) for k, v in got.items())
            except UserError as error:
                failed += 1
                assert str(file) in str(error) and "\n" not in str(error)
        assert failed >= 70


@pytest.mark.parametrize("name", ("weights.safetensors", "weights.ckpt"))
def test_a_file_that_may_not_be_read_is_not_called_missing(name):
    with tempfile.TemporaryDirectory() as folder:
        path, root = Path(folder) / name, os.geteuid() == 0
        path.write_bytes(b"weights")
        path.chmod(0)
        os.chmod(folder, 0o755)
        if root:                                           # who may read everything, and so is somebody else here
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=f"{path} may not be read; change its permissions"):
                weights.read_tensors(path)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("name, content, words", [
    ("m.safetensors", POINTER, "git lfs pull"), ("m.ckpt", POINTER, "git lfs pull"),
    ("m.safetensors", b"", "cut download"), ("m.ckpt", b"", "cut download"), ("m.ckpt", b"PK\3\4", "cut download"),
    ("m.ckpt", b"<html>not found</html>", "cut download"),
    ("m.safetensors", b"<html>not found</html>" * 9, "cut download")])
def test_what_is_no_weights_at_all(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        InstaFlow.load(tmp_path / name, prediction="epsilon")
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


# --- the hub ---

class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub, for one repository whose files lie in `folder`."""
    folder, asked, revision = None, [], "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        import hashlib
        path = self.path.split("?")[0]
        files = {str(p.relative_to(self.folder)): p for p in sorted(self.folder.rglob("*")) if p.is_file()}
        headers, status, data = {"X-Repo-Commit": self.revision}, 200, b""
        if not path.startswith(("/api/models/some/model", "/some/model/")):
            status, headers["X-Error-Code"] = 404, "RepoNotFound"
        elif "/tree/" in path:
            data = json.dumps([{"type": "file", "path": name, "size": p.stat().st_size,
                                "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                               for name, p in files.items()]).encode()
        elif path.startswith("/api/"):
            data = json.dumps({"id": "some/model", "modelId": "some/model", "sha": self.revision,
                               "siblings": [{"rfilename": name} for name in files],
                               "tags": [], "private": False}).encode()
        else:
            name = path.partition(f"/resolve/{self.revision}/")[2] or path.partition("/resolve/main/")[2]
            data = files[name].read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            self.asked.append(name)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(data), "Content-Type": "application/json"}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data if body else b"")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """ask(name, dtype, online): where `name` is found, on a hub with the files of tmp_path/repository and with a cache
    of its own."""
    from huggingface_hub import constants
    Hub.folder, Hub.asked = tmp_path / "repository", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def ask(name="some/model", dtype=torch.float32, online=True, endpoint=None):
        url = endpoint or f"http://127.0.0.1:{server.server_port}"
        for key, value in {"ENDPOINT": url,
                           "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
                           "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": not online,
                           "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, key, value)
        try:
            return str(locate(name, dtype))
        except UserError as error:
            return f"one line: {error}"
    yield ask
    server.shutdown()


def test_a_hub_name_is_fetched_once_and_only_what_is_needed(hub, peers, model, tmp_path):
    shutil.copytree(peers.path, tmp_path / "repository")
    repository = tmp_path / "repository"
    half = shutil.copytree(peers.path / "unet", tmp_path / "half")
    save_file({k: v.half() for k, v in load_file(half / weights.UNET_FILE).items()},
              repository / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for name in ("v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin",
                 "unet/diffusion_pytorch_model.non_ema.safetensors", "safety_checker/model.safetensors", "README.md"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"large")
    found = hub()
    assert same(InstaFlow.load(found), model)
    assert set(Hub.asked) == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors"}
    assert hub(online=False) == found                      # its cache, off-line
    assert hub(endpoint="http://127.0.0.1:9") == found     # nobody answers there
    assert hub(dtype=torch.float16) == found
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in Hub.asked


def test_a_model_of_the_hub_leans_on_no_cache(peers, monkeypatch, tmp_path):
    monkeypatch.setattr("hub.locate", lambda path, dtype=None: peers.path)
    model = InstaFlow.load("some/model")
    model.save(tmp_path / "mine")
    assert ((tmp_path / "mine" / "vae").is_dir()
            and "base" not in json.loads((tmp_path / "mine" / "instaflow.json").read_text()))


def test_a_hub_name_that_cannot_be_fetched_is_one_line(hub, tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "v1-5.safetensors").write_bytes(b"large")
    for line, words in ((hub("some/other"), "as a hub name it cannot be fetched"),
                        (hub("some/model", online=False), "as a hub name it cannot be fetched"),
                        (hub(), "no unet/ with config.json and weights")):
        assert line.startswith("one line: some/") and words in line and "\n" not in line
    assert Hub.asked == []


def test_which_files_of_a_repository_are_needed():
    listed = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json",
              "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
              "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
              "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
              "unet/diffusion_pytorch_model-00001-of-00001.fp16.safetensors",
              "vae/config.json", "vae/diffusion_pytorch_model.bin", "text_encoder/config.json",
              "text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors", "model_index.json",
              "feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json"]
    rest = ["vae/config.json", "vae/diffusion_pytorch_model.bin", "text_encoder/config.json",
            "text_encoder/model.fp16.safetensors"]
    assert needed(listed) == ["model_index.json", "scheduler/scheduler_config.json",
                              *[listed[i] for i in (0, 1, 2, 3)], *rest]
    assert needed(listed, torch.float16) == ["model_index.json", "scheduler/scheduler_config.json",
                                             *[listed[i] for i in (0, 4, 5)], *rest]
