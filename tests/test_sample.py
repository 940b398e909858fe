import errno
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import flows
import sample
from conftest import one_line
from instaflow import InstaFlow, to_pil

pytestmark = pytest.mark.usefixtures("plain_convolutions")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def draw(command, tiny):
    """sample.py's command line with the tiny flow, one step, on the CPU; later flags win."""
    return lambda *words: command("sample.py",
                                  *(() if "--compare" in words else ("--model", tiny / "flow", "--steps", 1)),
                                  "--device", "cpu", *words)


@pytest.fixture(scope="module")
def flow(tiny):
    return InstaFlow.load(tiny / "flow")


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def facts(path):
    with Image.open(path) as image:
        image.load()
        return dict(image.text)


def same(path, image):
    """Whether a PNG shows this picture, but for rounding (a picture is the same alone and in a batch within 1e-5)."""
    return np.abs(pixels(path).astype(int) - np.array(image)).max() <= 1


# --- pictures ---

def test_the_command_line(tiny, tmp_path):
    """As a user types it: one process of its own, in another folder."""
    line = [sys.executable, ROOT / "sample.py", "--model", tiny / "flow", "--device", "cpu", "--seed", "7",
            "a red circle"]
    done = subprocess.run(line, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    path, summary = done.stdout.splitlines()
    assert (path == "out.png" and summary.startswith("1 picture, 3 steps: text ")
            and "U-Net" in summary and "decoder" in summary)
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    with Image.open(tmp_path / "out.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (16, 16))
    assert facts(tmp_path / "out.png") == {"prompt": "a red circle", "negative": "", "seed": "7", "index": "0",
                                           "model": str(tiny / "flow"), "steps": "3", "guidance": "1.5"}
    assert same(tmp_path / "out.png", InstaFlow.load(tiny / "flow").generate(["a red circle"], seed=7)[0])


def test_a_mistake_in_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--model", tmp_path / "none", "a"],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert one_line((done.returncode, done.stdout, done.stderr), "sample.py: ", tmp_path / "none",
                    "no such model folder")


def test_flags_reach_the_model(draw, flow, tmp_path):
    status, out, err = draw("a red circle", "--steps", 2, "--guidance", 3, "--negative", "blue", "--seed", 4,
                            "--height", 12, "--width", 20, "--out", tmp_path / "deep" / "er" / "a.PNG")
    assert (status, err) == (0, "")
    path = tmp_path / "deep" / "er" / "a.PNG"
    assert out.splitlines()[0] == str(path)
    assert facts(path)["steps"] == "2" and facts(path)["guidance"] == "3.0" and facts(path)["negative"] == "blue"
    assert same(path, flow.generate(["a red circle"], steps=2, guidance=3.0, seed=4, negative="blue",
                                    height=12, width=20)[0])


def test_several_prompts_and_a_labelled_grid(draw, flow, tmp_path):
    prompts = ["a red circle", "ein grüner Ring 🟢", "a star"]
    status, out, err = draw(*prompts, "--batch", 2, "--seed", 5, "--out", tmp_path / "x.png")
    assert (status, err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-000.png", "x-001.png", "x-002.png", "x.png"]
    assert out.splitlines()[:4] == [str(tmp_path / n) for n in ("x-000.png", "x-001.png", "x-002.png", "x.png")]
    wanted = flow.generate(prompts, steps=1, seed=5)
    for i, prompt in enumerate(prompts):
        assert same(tmp_path / f"x-{i:03d}.png", wanted[i])
        assert (facts(tmp_path / f"x-{i:03d}.png")["prompt"] == prompt
                and facts(tmp_path / f"x-{i:03d}.png")["index"] == str(i))
    sheet = pixels(tmp_path / "x.png")
    assert sheet.shape[1] > 3 * 192 and (sheet[:94] < 100).any()             # words above the pictures
    assert facts(tmp_path / "x.png") == {"prompt": str(prompts), "seed": "5",
                                         "model": facts(tmp_path / "x-000.png")["model"],
                                         "steps": "1", "guidance": "1.5"}
    assert not same(tmp_path / "x-000.png", wanted[1])


@pytest.mark.parametrize("side, flags, batches", [(8, (), [3]), (128, (), [1, 1, 1]), (90, (), [2, 1]),
                                                  (128, ("--batch", 2), [2, 1])])
def test_large_pictures_one_at_a_time_on_a_cpu(draw, tmp_path, monkeypatch, side, flags, batches):
    seen, decode = [], InstaFlow.decode
    monkeypatch.setattr(InstaFlow, "decode",
                        lambda self, latents, tile=None: seen.append(len(latents)) or decode(self, latents, tile))
    assert draw("a", "b", "c", "--height", side, "--width", side, *flags, "--out", tmp_path / "x.png")[0] == 0
    assert seen == batches


def test_several_pictures_a_prompt(draw, flow, tmp_path):
    status, out, err = draw("a", "b", "--num", 2, "--out", tmp_path / "x.png")
    assert (status, err) == (0, "") and "4 pictures, 1 step: " in out
    wanted = flow.generate(["a", "a", "b", "b"], steps=1)
    assert all(same(tmp_path / f"x-{i:03d}.png", wanted[i]) for i in range(4))
    assert [facts(tmp_path / f"x-{i:03d}.png")["prompt"] for i in range(4)] == ["a", "a", "b", "b"]
    sheet = pixels(tmp_path / "x.png")
    assert sheet.shape[0] == 2 * 198 and (sheet[:, :150] < 100).any()        # a row a prompt, words at the left


def test_prompts_from_a_file(draw, flow, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n  a red circle  \n\n\tb\n\n", encoding="utf-8")
    status, out, err = draw("first", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "x.png")
    assert (status, err) == (0, "")
    assert [facts(tmp_path / f"x-{i:03d}.png")["prompt"] for i in range(3)] == ["first", "a red circle", "b"]
    assert same(tmp_path / "x-001.png", flow.generate(["a red circle"], steps=1, first=1)[0])


def test_compare_shows_each_model_from_the_same_noise(draw, tiny, tmp_path):
    items = [f"{tiny / 'teacher'}:3", f"{tiny / 'flow'}:2", f"{tiny / 'flow'}:1"]
    status, out, err = draw("a", "b", "--seed", 3, "--compare", ",".join(items), "--out", tmp_path / "x.png")
    assert (status, err) == (0, "") and [p.name for p in tmp_path.iterdir()] == ["x.png"]
    sheet = Image.open(tmp_path / "x.png").convert("RGB")
    assert facts(tmp_path / "x.png") == {"prompt": "['a', 'b']", "seed": "3", "compare": ",".join(items)}
    draw("a", "--compare", items[0], "--guidance", 2, "--negative", "b", "--out", tmp_path / "x.png")
    assert facts(tmp_path / "x.png") == {"prompt": "['a']", "seed": "0", "compare": items[0],
                                         "guidance": "2.0", "negative": "b"}
    for row, (name, steps) in enumerate((("teacher", 3), ("flow", 2), ("flow", 1))):
        model = InstaFlow.load(tiny / name)
        for column, image in enumerate(model.generate(["a", "b"], steps=steps, seed=3)):
            left, top = 150 + column * 198, 94 + row * 198
            shown = np.array(sheet.crop((left, top, left + 192, top + 192)), int)
            wanted = np.array(image.resize((192, 192), Image.Resampling.LANCZOS), int)
            assert np.abs(shown - wanted).max() <= 3
    label = np.array(sheet)[94:, :150]
    assert all((label[i * 198:(i + 1) * 198] < 100).any() for i in range(3))


def test_compare_without_a_list_takes_prompts(monkeypatch, command, tiny, tmp_path):
    """The docstring's own line: `--compare "a prompt" "another"`."""
    monkeypatch.setattr(sample, "COMPARISON", ["teacher:2", "flow:1"])
    monkeypatch.setattr(sample, "MODELS", tiny)
    monkeypatch.chdir(tmp_path)
    for words in (["--compare", "a red circle", "b"], ["--compare", "--out", "x.png", "a red circle", "b"],
                  ["a red circle", "b", "--compare"]):
        assert command("sample.py", "--device", "cpu", *words)[0] == 0
    assert facts("x.png")["prompt"] == "['a red circle', 'b']" and facts("out.png") == facts("x.png")
    command("sample.py", "--device", "cpu", "--compare", "alone")
    assert facts("out.png")["prompt"] == "['alone']"


def test_interpolation_goes_from_one_seed_to_the_other(draw, flow, tmp_path):
    status, out, err = draw("a red circle", "--interpolate", 3, 8, "--frames", 5, "--batch", 2,
                            "--out", tmp_path / "x.png")
    assert (status, err) == (0, "")
    sheet = Image.open(tmp_path / "x.png").convert("RGB")
    assert facts(tmp_path / "x.png")["interpolate"] == "[3, 8]"
    assert sheet.width == 150 + 5 * 134
    for column, seed in ((0, 3), (4, 8)):
        wanted = flow.generate(["a red circle"], steps=1, seed=seed)[0].resize((128, 128), Image.Resampling.LANCZOS)
        shown = sheet.crop((150 + column * 134, 0, 278 + column * 134, 128))
        assert np.abs(np.array(shown, int) - np.array(wanted, int)).max() <= 3


# --- picture to picture ---

@pytest.fixture
def photo(tmp_path):
    """A picture of two colours, 40 x 20: cropped to a square, it keeps its middle."""
    image = Image.new("RGB", (40, 20), (200, 30, 30))
    image.paste((20, 60, 220), (20, 0, 40, 20))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@torch.no_grad()
@pytest.mark.parametrize("strength, steps, taken", [(0.6, 5, 3), (1.0, 4, 4), (0.25, 8, 2), (0.1, 4, 1)])
def test_picture_to_picture_starts_in_the_flows_middle(draw, flow, photo, tmp_path, strength, steps, taken):
    """By hand: X_t = (1 - t) noise + t latent at t = 1 - strength, then Euler's steps from t to 1."""
    assert draw("a red circle", "--image", photo, "--strength", strength, "--steps", steps, "--guidance", 2,
                "--seed", 4, "--out", tmp_path / "x.png")[0] == 0
    image = Image.open(photo).convert("RGB").crop((10, 0, 30, 20)).resize((16, 16), Image.Resampling.LANCZOS)
    mean, _ = flow.vae.encode(torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1)
    t, context, null = 1 - strength, flow.text(["a red circle"]), flow.text([""])
    z = (1 - t) * flow.noise(4, 0, 1) + t * 0.18215 * mean
    for i in range(taken):
        at = t + strength * i / taken
        v = flow.unet(z, torch.tensor([1000 * (1 - at)]), context)
        without = flow.unet(z, torch.tensor([1000 * (1 - at)]), null)
        z = z + strength / taken * (2 * v - without)
    wanted, = to_pil(flow.decode(z))
    assert same(tmp_path / "x.png", wanted)
    assert (facts(tmp_path / "x.png")["image"] == str(photo)
            and facts(tmp_path / "x.png")["strength"] == str(float(strength)))
    if strength == 1:                                      # the picture is forgotten
        assert same(tmp_path / "x.png", flow.generate(["a red circle"], steps=4, guidance=2.0, seed=4)[0])


@torch.no_grad()
def test_strength_0_gives_the_picture_back(draw, flow, tiny, photo, tmp_path):
    for model in ("flow", "teacher"):
        assert draw("a", "--model", tiny / model, "--image", photo, "--strength", 0, "--height", 20, "--width", 40,
                    "--out", tmp_path / "x.png")[0] == 0
        image = torch.tensor(np.array(Image.open(photo)), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
        assert same(tmp_path / "x.png", to_pil(flow.vae.decode(flow.vae.encode(image)[0]).clamp(-1, 1))[0])


def test_a_noise_predictor_goes_from_a_picture_too(draw, tiny, photo, tmp_path):
    """At t_min a whole index's velocity carries it: more strength, farther from the picture."""
    teacher, distance = InstaFlow.load(tiny / "teacher"), []
    draw("a", "--model", tiny / "teacher", "--image", photo, "--strength", 0, "--out", tmp_path / "start.png")
    for strength in (0.2, 0.5, 0.9):
        assert draw("a", "--model", tiny / "teacher", "--image", photo, "--strength", strength, "--steps", 10,
                    "--out", tmp_path / "x.png")[0] == 0
        distance.append(np.abs(pixels(tmp_path / "x.png").astype(float) - pixels(tmp_path / "start.png")).mean())
    assert 0 < distance[0] < distance[1] < distance[2]
    assert teacher.info["prediction"] == "epsilon"


def test_a_one_step_student_warns_of_pictures(draw, flow, tiny, photo, tmp_path):
    InstaFlow(flow.unet, flow.vae, flow.text,
              {"prediction": "velocity", "steps": 1, "guidance": 1.0, "trained_steps": [1]},
              tiny / "teacher").save(tmp_path / "student")
    status, out, err = draw("a", "--model", tmp_path / "student", "--image", photo, "--out", tmp_path / "x.png")
    assert (status == 0 and err.startswith("warning: this model was distilled")
            and "--image" in err and err.count("\n") == 1)


def test_pictures_that_are_none(draw, photo, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:60])
    for name, words in (("none.png", "no such file"), ("words.png", "no picture that Pillow reads"),
                        ("cut.png", "no picture that Pillow reads"), ("", "no picture that Pillow reads")):
        assert one_line(draw("a", "--image", tmp_path / name, "--out", tmp_path / "x.png"),
                        "--image", tmp_path / name, words)
    assert one_line(draw("a", "--image", photo, "--interpolate", 1, 2), "--image starts from a picture")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert one_line(draw("a", "--image", tmp_path / "deep.png"), tmp_path / "deep.png", "convert it to 8 bits")
    assert one_line(draw("a", "--image", photo, "--strength", 1.5), "--strength")


# --- tiles ---

@torch.no_grad()
def test_tiles_of_a_decoder_that_sees_only_its_neighbourhood_are_the_whole(flow):
    """Where nothing looks farther than the overlap, blending equal pictures must give that picture: a decoder of one
    convolution."""
    vae = type(flow.vae)(flow.vae.config)
    vae.decode = lambda latent: torch.nn.functional.interpolate(latent[:, :3] * 2 + 1, scale_factor=2.0)
    for h, w, tile in ((8, 8, 8), (20, 13, 8), (33, 9, 16), (9, 40, 8), (17, 17, 16)):
        latent = torch.randn(2, 4, h, w)
        image = vae.decode_tiled(latent, tile)
        assert image.shape == (2, 3, 2 * h, 2 * w) and (image - vae.decode(latent)).abs().max() <= 1e-5


@torch.no_grad()
def test_tiles_never_see_more_than_a_tile(flow):
    seen, vae = [], type(flow.vae)(flow.vae.config)
    decode = vae.decode
    vae.decode = lambda latent: (seen.append(tuple(latent.shape[2:])), decode(latent))[1]
    vae.decode_tiled(torch.randn(1, 4, 30, 11), 8)
    assert set(seen) == {(8, 8)} and len(seen) == 5 * 2


def test_tiles_when_asked(draw, flow, tmp_path):
    """The picture is near the whole one and not equal; one that fits into a tile is equal."""
    assert draw("a", "--tile", 16, "--height", 40, "--width", 24, "--out", tmp_path / "x.png")[0] == 0
    whole = np.array(flow.generate(["a"], steps=1, height=40, width=24)[0]).astype(int)
    difference = np.abs(pixels(tmp_path / "x.png").astype(int) - whole)
    assert 1 < difference.max() and difference.mean() < np.abs(whole - whole.mean((0, 1))).mean()
    assert draw("a", "--tile", "--out", tmp_path / "y.png")[0] == 0
    assert same(tmp_path / "y.png", flow.generate(["a"], steps=1)[0])
    for tile, words in ((15, "--tile is 15; it must be a multiple of 2"), (8, "at least 16")):
        assert one_line(draw("a", "--tile", tile, "--out", tmp_path / "x.png"), words)


# --- other models ---

def test_random_weights_say_loudly_that_it_is_noise(command, monkeypatch, tmp_path):
    import instaflow
    monkeypatch.setitem(instaflow.CONFIGS, "sd15", instaflow.CONFIGS["mini"])
    status, out, err = command("sample.py", "--random-weights", "sd15", "--steps", 1, "--device", "cpu",
                               "--out", tmp_path / "x.png", "a")
    assert (status == 0 and "1 picture, 1 step" in out and err.startswith("WARNING: RANDOM WEIGHTS")
            and "EVERY PICTURE IS NOISE" in err and err.count("\n") == 1)
    assert facts(tmp_path / "x.png")["model"] == "sd15"
    assert one_line(command("sample.py", "--random-weights", "sd15", "--model", "x", "a"), "stands in place of a model")
    assert one_line(command("sample.py", "--random-weights", "sd21", "a"), "--random-weights")


def test_a_single_file_and_a_lora(draw, flow, tmp_path):
    import lora
    from safetensors.torch import save_file
    flow.save(tmp_path / "one.safetensors")
    tensors = {"lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3),
               "lora_unet_conv_in.lora_up.weight": torch.randn(8, 2, 1, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({k: -v for k, v in tensors.items() if "up" in k} | {k: v for k, v in tensors.items() if "down" in k},
              tmp_path / "b:1.safetensors")
    one = tmp_path / "one.safetensors"
    assert (draw("a", "--model", one, "--out", tmp_path / "x.png")[0] == 0
            and same(tmp_path / "x.png", flow.generate(["a"], steps=1)[0]))
    status, out, err = draw("a", "--model", one, "--lora", f"{tmp_path / 'a.safetensors'}:0.5",
                            "--lora", tmp_path / "b:1.safetensors", "--out", tmp_path / "x.png")
    assert (status, err) == (0, "") and "0.5" in facts(tmp_path / "x.png")["lora"]
    merged = InstaFlow.load(one)
    lora.load_lora(merged, tmp_path / "a.safetensors", -0.5)                 # 0.5 - 1
    assert same(tmp_path / "x.png", merged.generate(["a"], steps=1)[0])
    assert not same(tmp_path / "x.png", flow.generate(["a"], steps=1)[0])
    assert one_line(draw("a", "--lora", tmp_path / "none.safetensors:2"), tmp_path / "none.safetensors", "is missing")


# --- slerp ---

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slerp_on_the_sphere(dtype):
    a, b = (flows.noise(0, s, 0, (4, 16, 16)).to(dtype) for s in (3, 8))
    points = sample.slerp(a, b, 7)
    assert points.shape == (7, 4, 16, 16) and points.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    assert (points[0] - a).abs().max() <= tolerance * 4 and (points[-1] - b).abs().max() <= tolerance * 4
    a, b, points = a.double(), b.double(), points.double()
    cosine = float((a * b).sum() / a.norm() / b.norm())
    # by hand: a point of the plane of a and b, at i/6 of the angle
    for i, point in enumerate(points):
        angle, w = np.arccos(cosine), i / 6
        assert abs(float((point * a).sum() / point.norm() / a.norm()) - np.cos(w * angle)) < 0.03
        assert min(a.norm(), b.norm()) * 0.98 < point.norm() < max(a.norm(), b.norm()) * 1.02
    chord = (a + b) / 2
    assert chord.norm() < 0.8 * a.norm() < points[3].norm()                  # what a straight mean would lose


def test_slerp_of_unit_vectors_by_hand():
    x, y = torch.tensor([1.0, 0.0]).reshape(1, 1, 2), torch.tensor([0.0, 1.0]).reshape(1, 1, 2)
    points = sample.slerp(x, y, 3)[:, 0, 0]
    assert (points - torch.tensor([[1, 0], [0.5 ** 0.5, 0.5 ** 0.5], [0, 1]])).abs().max() < 1e-6


@pytest.mark.parametrize("n", [1, 4])
def test_slerp_from_a_point_to_itself_stays(n):
    a = flows.noise(0, 3, 0, (4, 16, 16))
    points = sample.slerp(a, a, n)
    assert len(points) == n and (points - a).abs().max() < 1e-4


# --- mistakes: exit status 2, one line on stderr ---

def test_a_prompt_is_needed(draw, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n\t\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for words in ([], [""], ["  ", "\t"]):
        assert one_line(draw(*words), "sample.py: no prompt")
    for file, words in (("empty.txt", "holds no prompt"), ("blank.txt", "holds no prompt"),
                        ("none.txt", "no such prompt file"), ("latin.txt", "not UTF-8"), ("", "folder")):
        assert one_line(draw("--prompts", tmp_path / file), tmp_path / file, words)


FLAGS = [
    (["--steps", "0"], "--steps"), (["--steps", "-1"], "--steps"), (["--steps", "1.5"], "--steps"),
    (["--steps", "many"], "many"), (["--steps", ""], "--steps"), (["--step", "1"], "--step"),
    (["--frobnicate"], "--frobnicate"), (["--guidance", "high"], "--guidance"), (["--seed", "-3"], "--seed"),
    (["--seed", str(2 ** 63)], "2^63"), (["--num", "0"], "--num"), (["--batch", "0"], "--batch"),
    (["--dtype", "int8"], "--dtype"), (["--device", "nonsense"], "--device"), (["--device", "meta"], "--device"),
    (["--device", "cuda:99"], "--device"), (["--device", ""], "--device"), (["--out", "x.jpg"], "name a .png file"),
    (["--out", "x"], "name a .png file"), (["--out", "."], "name a .png file"),
    (["--height", "13"], "height is 13; it must be a multiple of 2"),
    (["--width", "1"], "width is 1; it must be a multiple of 2"), (["--height", "0"], "--height"),
    (["--interpolate", "3"], "--interpolate"), (["--interpolate", "3", "b"], "--interpolate"),
    (["--frames", "0"], "--frames"), (["--interpolate", "3", "4", "--num", "2"], "--num"),
    (["--compare", "x:"], "--compare x:"), (["--compare", ":3"], "--compare :3"),
    (["--compare", "x:0"], "--compare x:0"), (["--compare", "none:1"], "none"),
    (["--model", "none"], "none"), (["--model", ""], "no such model folder"),
    (["--strength", "0.5"], "--strength is of --image"), (["--frames", "3"], "--frames is of --interpolate"),
    (["--prediction", "image"], "--prediction"),
]


@pytest.mark.parametrize("words, named", FLAGS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_flag_that_cannot_be(draw, words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert one_line(draw("a red circle", *words), "sample.py: ", named)
    assert list(tmp_path.iterdir()) == []


def test_more_steps_than_the_teachers_schedule(draw, tiny, tmp_path):
    assert one_line(draw("a", "--model", tiny / "teacher", "--steps", 1000, "--out", tmp_path / "x.png"),
                    "steps is 1000")


@pytest.mark.parametrize("file", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors",
                                  "text_encoder/model.safetensors", "instaflow.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_model(draw, tiny, tmp_path, file, damage):
    model = shutil.copytree(tiny / "teacher", tmp_path / "model")
    whole = (model / file).read_bytes()
    (model / file).unlink() if damage == "missing" else (model / file).write_bytes(whole[:len(whole) // 2])
    assert one_line(draw("a", "--model", model), model if file == "instaflow.json" else model / file)


def test_mistakes_found_before_work(draw, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load", lambda *args: pytest.fail("loads a model"))
    (tmp_path / "file").write_text("")
    assert one_line(draw("a", "--out", tmp_path / "file" / "x.png"), tmp_path / "file")
    assert one_line(draw("a", "--compare", "mini-sd"), "write MODEL:STEPS, as in mini-sd:25")
    assert one_line(draw("a", "--compare", "mini-sd:²"), "--compare mini-sd:²")
    assert one_line(draw("red \udcff"), "not UTF-8")
    (tmp_path / "half.jsonl").write_text('"a \\ud83d b"\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    for name in ("half", "deep"):
        assert one_line(draw("--prompts", tmp_path / f"{name}.jsonl"), f"{name}.jsonl, line 1")


def test_prompts_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe").write_text, "a\n\nb\n")
        assert list(cli.Prompts(tmp_path / "pipe")) == ["a", "b"]


def test_pictures_of_no_numbers_are_not_written(draw, tiny, tmp_path):
    assert one_line(draw("a", "--steps", 2, "--guidance", 1e38, "--out", tmp_path / "x.png"), "no numbers", "guidance")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_picture_that_was_there(draw, tmp_path, monkeypatch):
    assert draw("a", "--out", tmp_path / "x.png")[0] == 0
    before = (tmp_path / "x.png").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    assert one_line(draw("b", "--out", tmp_path / "x.png"), tmp_path / "x.png", "free some space")
    assert (tmp_path / "x.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_negative_prompt_without_guidance_warns(draw, tmp_path):
    status, _, err = draw("a", "--guidance", 1, "--negative", "blue", "--out", tmp_path / "x.png")
    assert status == 0 and err.startswith("warning: --negative does nothing at guidance 1") and err.count("\n") == 1


def test_out_that_cannot_be_written(draw, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out in ("file/x.png", "file/deep/er/x.png", "folder.png"):
        assert one_line(draw("a", "--out", tmp_path / out), "sample.py: ", tmp_path / out.split("/")[0])
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid():                                       # root may write anywhere
        assert one_line(draw("a", "--out", tmp_path / "locked" / "x.png"), "Permission denied")


# --- warnings: exit status 0 ---

def test_a_prompt_that_is_too_long_is_cut_and_named(draw, flow, tmp_path):
    prompt = "a red circle " + "and a star " * 30
    status, out, err = draw(prompt, "--out", tmp_path / "x.png")
    assert status == 0
    assert err.startswith("warning: ") and "93 tokens long, and 75 fit" in err and err.count("\n") == 1
    assert err.rstrip().endswith('"' + ("and a star " * 6).strip() + '"')
    assert same(tmp_path / "x.png", flow.generate(["a red circle " + "and a star " * 24], steps=1)[0])


def test_too_many_steps_for_a_student(draw, flow, tiny, tmp_path):
    InstaFlow(flow.unet, flow.vae, flow.text,
              {"prediction": "velocity", "steps": 1, "guidance": 1.0, "trained_steps": [1]},
              tiny / "teacher").save(tmp_path / "student")
    status, out, err = draw("a", "--model", tmp_path / "student", "--steps", 4, "--out", tmp_path / "x.png")
    assert status == 0 and err.startswith("warning: ") and "distilled for 1 step;" in err and err.count("\n") == 1
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("bf16", [True, False])
def test_float16_on_a_cpu_is_replaced_and_said(draw, flow, tmp_path, monkeypatch, device, bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    status, out, err = draw("a", "--dtype", "float16", "--device", device, "--out", tmp_path / "x.png")
    assert status == 0 and err == f"note: float16 is very slow on a CPU; using {'bfloat16' if bf16 else 'float32'}\n"
    wanted = flow.generate(["a"], steps=1)[0]
    difference = np.abs(pixels(tmp_path / "x.png").astype(int) - np.array(wanted))
    assert difference.max() <= (12 if bf16 else 1)


def test_bfloat16_is_used_where_asked(draw, flow, tmp_path):
    assert draw("a", "--dtype", "bfloat16", "--out", tmp_path / "x.png")[0] == 0
    difference = np.abs(pixels(tmp_path / "x.png").astype(int) - np.array(flow.generate(["a"], steps=1)[0]))
    assert difference.max() <= 12


def test_a_gpu_gives_the_same_picture(draw, flow, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert draw("a", "--device", "cuda", "--out", tmp_path / "x.png")[0] == 0
    assert np.abs(pixels(tmp_path / "x.png").astype(int) - np.array(flow.generate(["a"], steps=1)[0])).max() <= 2
