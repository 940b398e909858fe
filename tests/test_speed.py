"""Fast paths give the slow paths' pictures, importing no more than they need; and the benchmark beside diffusers
runs."""
import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fast
import lora
import sample
import unet
import vae
import weights
from conftest import one_line, relative_error
from instaflow import InstaFlow

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "models" / "mini-instaflow"
spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks" / "speed.py")
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)


def drawn(path):
    with Image.open(path) as image:
        return np.array(image).astype(int)


# --- one module ---

@torch.no_grad()
@pytest.mark.parametrize("kind, size", [(dict(kernel_size=3, padding=1), (2, 24, 9, 7)),
                                        (dict(kernel_size=3, stride=2, padding=1), (1, 24, 8, 8)),
                                        (dict(kernel_size=1, bias=False), (1, 24, 8, 8))], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_packed_convolution_is_the_convolution(kind, size, layout):
    layer = torch.nn.Conv2d(24, 40, **kind)
    x, other = torch.randn(size).to(memory_format=layout), torch.randn(1, 24, 12, 16)
    expected, more = layer(x), layer(other)
    assert type(fast.pack(layer)) is fast.PackedConv
    assert relative_error(layer(x), expected) <= 1e-5 and layer.weight.numel() == 0
    assert relative_error(layer(other), more) <= 1e-5                        # packed for another size
    assert layer(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_the_product(bias):
    layer, x = torch.nn.Linear(48, 80, bias=bias).bfloat16(), torch.randn(2, 7, 48).bfloat16()
    expected, more = layer(x), layer(x[:, :3])
    assert type(fast.pack(layer)) is (fast.PackedLinear if torch.ops.mkldnn._is_mkldnn_bf16_supported()
                                      else torch.nn.Linear)
    assert (relative_error(layer(x).float(), expected.float()) <= 1e-2
            and relative_error(layer(x[:, :3]).float(), more.float()) <= 1e-2)
    assert type(fast.pack(torch.nn.Linear(48, 80))) is torch.nn.Linear      # float32 products are as fast as they are


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("kind", [unet.Upsample, vae.Upsample], ids=["unet", "vae"])
def test_a_packed_upsampling_is_the_upsampling(kind, dtype, tolerance):
    layer, x = kind(24), torch.randn(2, 24, 5, 7)
    # even and odd ones in turns
    sizes = [(10, 14), (9, 14), (10, 14), (9, 13)] if kind is unet.Upsample else [()]
    expected = [layer(x, size) if size else layer(x) for size in sizes]
    fast.pack(layer, dtype)
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert type(layer) is fast.PackedUpsample
    x = x.to(dtype, memory_format=torch.channels_last)
    for size, y in zip(sizes, expected):
        got = layer(x, size) if size else layer(x)
        assert got.dtype == dtype and relative_error(got.float(), y) <= tolerance
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("there", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("here", (torch.float16, torch.float32))
def test_a_converted_weight_is_what_torch_makes_of_it(here, there, layout):
    # float16's smallest, and past its largest
    weight = (torch.randn(70, 5, 3, 3) * 10.0 ** torch.arange(-6, 8).repeat(5)[:, None, None, None]).to(here)
    ours, theirs = fast.converted(weight, there, layout), weight.to(there)
    assert ours.dtype == there and torch.equal(ours, theirs) and ours.is_contiguous(memory_format=layout)


@torch.no_grad()
def test_packing_twice_and_a_part_before_the_whole():
    layer, x = vae.Upsample(8), torch.randn(1, 8, 4, 4)
    expected = layer(x)
    for part in (layer.conv, layer, layer):
        fast.pack(part)
        assert relative_error(layer(x), expected) <= 1e-5


def test_a_packed_model_is_not_saved_nor_changed(tiny, tmp_path):
    model, plain = InstaFlow.load(tiny / "flow"), InstaFlow.load(tiny / "flow")
    fast.pack(model.unet)
    for use in (lambda: model.save(tmp_path / "model"), lambda: lora.load_lora(model, tmp_path / "style.safetensors"),
                lambda: lora.add_difference(model, plain, plain), lambda: lora.add_difference(plain, plain, model)):
        with pytest.raises(ValueError, match="packed for sampling"):
            use()
    assert not (tmp_path / "model").exists()


@torch.no_grad()
def test_weights_stay_in_their_dtype_until_they_are_packed():
    layer, x = torch.nn.Conv2d(8, 8, 3).half(), torch.randn(1, 8, 6, 6)
    expected, weight = torch.nn.functional.conv2d(x, layer.weight.float(), layer.bias.float()), layer.weight
    fast.pack(layer, torch.float32)
    assert layer.plain.data_ptr() == weight.data_ptr() and layer.weight.dtype == layer.bias.dtype == torch.float32
    assert relative_error(layer(x), expected) <= 1e-5 and layer.plain is None


def test_nothing_is_packed_where_onednn_is_not(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert type(fast.pack(torch.nn.Conv2d(4, 4, 3))) is torch.nn.Conv2d


@torch.no_grad()
def test_graphs_are_recorded_once_a_size_and_their_output_is_not_overwritten(monkeypatch):
    """Without a GPU: what is recorded computes into memory of its own, the same every time, as a CUDA graph does."""
    recorded = []

    def record(call, inputs):
        recorded.append([x.shape for x in inputs])
        memory = call(*inputs)
        return lambda *given: memory.copy_(call(*given))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    layer = torch.nn.Linear(3, 5)
    x, y, z = torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 3)
    expected = [layer(inputs) for inputs in (x, y, z)]
    fast.graphed(layer)
    # all of them, after the last
    assert all(torch.equal(*both) for both in zip([layer(inputs) for inputs in (x, y, z)], expected))
    layer(x)
    assert recorded == [[x.shape], [z.shape]]


@torch.no_grad()
def test_in_place_norms_only_where_no_gradient_is_wanted(tiny):
    """With gradients the VAE gives the same picture and leaves what autograd kept alone."""
    model = InstaFlow.load(tiny / "flow")
    latent = torch.randn(1, 4, 8, 8)
    image = model.vae.decode(latent)
    with torch.enable_grad():
        leaf = latent.clone().requires_grad_()
        again = model.vae.decode(leaf)
        again.square().sum().backward()
    assert torch.equal(image, again.detach()) and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0


# --- whole pictures of the shipped model: plain modules in float32 against what sample.py does ---

@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_fast_paths_give_the_slow_ones_picture(dtype, tolerance):
    """One step of a velocity. (At t = 0 a noise predictor's rounding is multiplied by 1 / a = 15.)"""
    model, prompt = InstaFlow.random("mini"), ["a large green heart"]
    x = model.noise(3, 0, 1)
    # contiguous, unpacked, float32, straight from the modules
    slow = x + model.unet(x.contiguous(), torch.tensor([1000.0]), model.text(prompt))
    for module in (model.text, model.unet, model.vae):
        fast.pack(module, dtype)
    assert relative_error(model.latents(prompt, steps=1, guidance=1.0, seed=3).float(), slow) <= tolerance


@torch.no_grad()
def test_the_shipped_models_picture():
    """In float32, packed: the picture that the plain modules draw."""
    plain, packed = InstaFlow.load(MINI), InstaFlow.load(MINI)
    for module in (packed.text, packed.unet, packed.vae):
        fast.pack(module)
    pictures = [np.array(model.generate(["a large green heart"], seed=3)[0]).astype(int) for model in (plain, packed)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_low_memory_draws_the_same(command, tiny, tmp_path):
    (tmp_path / "p.png").write_bytes((ROOT / "benchmarks" / "compare.png").read_bytes())
    for words in (["a", "b", "a", "--guidance", 2], ["a", "--image", tmp_path / "p.png", "--num", 3],
                  ["a", "--interpolate", 1, 2, "--frames", 3], ["a", "b", "a", "--dtype", "bfloat16"]):
        words += ["--batch", 2]                            # a single batch is drawn in low memory anyway
        for flags in ([], ["--low-memory"]):
            status, out, err = command("sample.py", "--model", tiny / "flow", "--device", "cpu", "--steps", 2,
                                       *words, *flags, "--out", tmp_path / f"{len(flags)}.png")
            assert (status, err) == (0, "")
        assert np.array_equal(drawn(tmp_path / "0.png"), drawn(tmp_path / "1.png")), words


@pytest.mark.parametrize("words, alone", [
    (["a"], True), (["a", "b", "--num", "8"], True), (["a", "--num", "17"], False),
    (["a", "--interpolate", "1", "2", "--frames", "17"], False), (["a", "--compile"], False),
    (["a", "--lora", "x.safetensors"], False), (["a", "--num", "17", "--low-memory"], True)], ids=str)
def test_one_batch_on_a_cpu_frees_what_it_has_used(monkeypatch, tmp_path, words, alone):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--out", str(tmp_path / "x.png"), *words])
    assert sample.arguments().low_memory is alone


def settings(**changed):
    return Namespace(**{**dict(batch=2, image=None, tile=None, guidance=None, negative="", seed=0, device="cpu",
                               dtype=torch.float32, compile=False, low_memory=False, height=None, width=None,
                               random_weights=None, prediction=None, lora=[], strength=0.6), **changed})


@pytest.mark.parametrize("image", (None, ROOT / "benchmarks" / "compare.png"), ids=("noise", "picture"))
def test_modules_come_one_after_the_other_and_leave(tiny, image):
    # whose modules are in memory has args.dtype
    args = settings(low_memory=True, image=image, dtype=torch.bfloat16)
    model, seen = sample.load(tiny / "flow", args, 1), []
    modules = {"encoder": model.vae.encoder, "text": model.text, "unet": model.unet, "decoder": model.vae.decoder}
    where = lambda module: ("gone" if (p := next(module.parameters())).device.type == "meta"
                            else "there" if p.dtype == args.dtype else "on file")
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append((name, *map(where, modules.values()))))
    list(sample.pictures(model, ["a", "b", "c"], args, 1))
    encoder = "gone" if image else "on file"
    assert list(dict.fromkeys(seen)) == [("encoder", "there", "on file", "on file", "on file")][:bool(image)] + [
        ("text", encoder, "there", "on file", "on file"), ("unet", encoder, "gone", "there", "on file"),
        ("decoder", encoder, "gone", "gone", "there")]
    assert [where(module) for module in modules.values()] == [encoder, "gone", "gone", "gone"]


@pytest.mark.parametrize("guidance, texts", [(1.0, ["a", "b"]), (2.0, ["a", "b", ""])])
def test_each_different_prompt_is_read_once(tiny, guidance, texts):
    model, args, read = InstaFlow.load(tiny / "flow"), settings(guidance=guidance), []
    model.text.register_forward_pre_hook(lambda module, words: read.extend(words[0]))
    images = list(sample.pictures(model, ["a", "b", "a", "b", "b"], args, 1))
    assert read == texts and len(images) == 5


def test_compiled_batches_are_all_of_one_size(tiny):
    """The last one is filled up, and what fills it is not drawn."""
    model, args, sizes = InstaFlow.load(tiny / "flow"), settings(guidance=1.0, compile=True), []
    model.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    drawn = [np.array(image) for image in sample.pictures(model, ["a", "b", "c"], args, 1)]
    assert sizes == [2, 2] and len(drawn) == 3
    plain = [np.array(image) for image in sample.pictures(model, ["a", "b", "c"], settings(guidance=1.0), 1)]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(drawn, plain))


# --- files and imports ---

def test_a_file_that_was_converted_leaves_memory(peers):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    unet = weights.load_unet(peers.path / "unet", torch.bfloat16)
    assert unet.conv_in.weight.dtype == torch.bfloat16
    assert str(peers.path / "unet" / weights.UNET_FILE) not in maps.read_text()


def test_a_picture_imports_no_more_than_it_needs(tiny, tmp_path):
    code = ("import sys, sample, cli\ncli.run(sample.main)\n"
            "print('MODULES', *{name.partition('.')[0] for name in sys.modules})")
    line = [sys.executable, "-c", code, "--model", tiny / "flow", "--device", "cpu", "--steps", "1",
            "--out", tmp_path / "x.png", "a"]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split("MODULES ")[1].split()) & {"scipy", "matplotlib", "pandas", "diffusers"}


# --- the benchmark ---

def bench(monkeypatch, capsys, *words):
    import cli
    monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, words)])
    status = 0
    try:
        cli.run(speed.main)
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_the_benchmark_in_small(monkeypatch, capsys, tmp_path):
    status, out, err = bench(monkeypatch, capsys, "--config", "mini", "--device", "cpu", "--rounds", 1,
                             "--dtypes", "float32", "--batches", "1,2",
                             "--out", tmp_path, "--folder", tmp_path / "model")
    assert status == 0, err
    told = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert ([(row["stage"], row["batch"]) for row in told["rows"]]
            == [("process start to PNG", 1), ("load", 1)]
            + [(s, b) for b in (1, 2) for s in ("text", "U-Net", "decoder", "picture")])
    for row in told["rows"]:
        assert {"ours", "diffusers"} <= row["times"].keys() and all(t["s"] > 0 for t in row["times"].values())
        if row["stage"] in ("text", "U-Net", "decoder"):   # the same weights, the same inputs
            assert row["largest_difference"] <= 1e-4
    assert told["rows"][0]["times"]["ours"]["peak_gib"] > 0.1 and out.count("| picture |") == 2
    with Image.open(tmp_path / "speed-cpu.png") as image:
        assert image.width > 500
    assert bench(monkeypatch, capsys, "--config", "mini", "--device", "cpu", "--rounds", 1, "--dtypes", "float32",
                 "--batches", 4, "--out", tmp_path, "--folder", tmp_path / "model")[0] == 0
    more = json.loads((tmp_path / "speed-cpu.json").read_text())["rows"]     # beside what was measured before
    assert ([(row["stage"], row["batch"]) for row in more if row["batch"] < 4 and row["stage"] in ("text", "U-Net")]
            == [(s, b) for b in (1, 2) for s in ("text", "U-Net")])
    assert sum(row["batch"] == 4 for row in more) == 4



def test_ratios_are_to_the_peers_best():
    times = {"ours": {"s": 3.0}, "ours, compiled": {"s": 1.5},
             "diffusers": {"s": 4.0}, "diffusers, compiled": {"s": 2.0}}
    assert speed.ratio(times, "s") == 0.75


def test_without_diffusers_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert one_line(bench(monkeypatch, capsys, "--config", "mini"), "diffusers", "pip install -r requirements-dev.txt")


def test_a_dtype_that_is_none(monkeypatch, capsys):
    assert one_line(bench(monkeypatch, capsys, "--dtypes", "int8"), "--dtypes int8")


# --- slow ---

@pytest.mark.slow
def test_compiled_gives_the_same_picture(command, tiny, tmp_path):
    for flags in ([], ["--compile"]):
        assert command("sample.py", "--model", tiny / "flow", "--device", "cpu", "--steps", 2, "a", *flags,
                       "--out", tmp_path / f"{len(flags)}.png")[0] == 0
    assert np.abs(drawn(tmp_path / "0.png") - drawn(tmp_path / "1.png")).max() <= 1


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_fast_paths_at_full_size(dtype, tolerance):
    model = InstaFlow.random("sd15")
    x, text = model.noise(0, 0, 1), model.text(["a red circle"])
    slow = x + model.unet(x.contiguous(), torch.tensor([1000.0]), text)
    model.to("cpu", dtype)
    fast.pack(model.unet)
    assert relative_error(model.solve(x.to(dtype), text.to(dtype), None, 1, 1.0).float(), slow) <= tolerance
