"""CLIP score against open_clip's own encoders called by hand, on a small random network."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cli import UserError
from clip_score import Clip
from conftest import one_line, paint

open_clip = pytest.importorskip("open_clip")
NAME = "tiny-for-tests"
CONFIG = {"embed_dim": 24,
          "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
          "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
CAPTIONS = ["a red circle", "Two dogs & a cat, on a beach.", "ein grüner Ring", " ".join(["word"] * 100)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(3)
    model = open_clip.create_model(NAME, pretrained_text=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    torch.save(model.state_dict(), folder / "weights.bin")
    return folder / "weights.bin"


@pytest.fixture
def folder(tmp_path):
    return paint(tmp_path / "pictures", 4, size=(70, 48))


@torch.no_grad()
def by_hand(weights, images, captions):
    """Cosines, with open_clip's constructor, preprocessing and encoders."""
    model = open_clip.model.CLIP(**CONFIG).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    prepare = open_clip.image_transform(32, is_train=False, mean=(.48145466, .4578275, .40821073),
                                        std=(.26862954, .26130258, .27577711))
    a = model.encode_image(torch.stack([prepare(image) for image in images]))
    b = model.encode_text(open_clip.tokenize(captions))
    return [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a.double(), b.double())]


def test_cosines_are_open_clips(weights, folder):
    images = [Image.open(folder / f"{i}.png") for i in range(4)]
    wanted = by_hand(weights, images, CAPTIONS)
    assert np.ptp(wanted) > 0.01                           # they tell the pairs apart
    clip = Clip(weights, NAME)
    found = clip(torch.stack([clip.prepare(image) for image in images]), CAPTIONS)
    assert found.shape == (4,) and np.abs(found.numpy() - wanted).max() <= 1e-5
    prefixed = Clip(weights, NAME, prefix="A photo depicts ")(
        torch.stack([clip.prepare(image) for image in images]), CAPTIONS[:4])
    assert np.abs(prefixed.numpy() - by_hand(weights, images, ["A photo depicts " + c for c in CAPTIONS])).max() <= 1e-5
    assert np.abs(prefixed.numpy() - wanted).max() > 1e-4


def test_the_command_line_prints_their_mean(weights, folder, command, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    wanted = np.mean(by_hand(weights, [Image.open(folder / f"{i}.png") for i in range(4)], CAPTIONS))
    line = ["--captions", tmp_path / "captions.txt", "--clip", weights, "--clip-model", NAME,
            "--device", "cpu", "--batch", 3]
    status, out, err = command("fid.py", folder, *line)
    assert (status, out) == (0, f"CLIP score {wanted:.4f}: {folder}, {NAME}\n")
    assert command("fid.py", folder, *line, "--size", 16)[1] == out               # CLIP sees the whole picture
    (tmp_path / "captions.jsonl").write_text("".join(
        json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i]}) + "\n" for i in (2, 0, 3, 1)))
    assert command("fid.py", folder, *line, "--captions", tmp_path / "captions.jsonl")[1] == out  # paired by name
    assert "A photo depicts" in command("fid.py", folder, *line, "--clip-prefix", "A photo depicts ")[1]


def test_mistakes_are_named(weights, folder, command, tmp_path):
    with pytest.raises(UserError, match="none.bin: no such file"):
        Clip(tmp_path / "none.bin")
    with pytest.raises(UserError, match="no such model"):
        Clip(weights, "ViT-Z-99")
    torch.save({"state_dict": {"visual.proj": torch.zeros(3, 3)}}, tmp_path / "other.bin")
    (tmp_path / "cut.bin").write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "text.bin").write_text("a red circle\na blue square\n")
    for name in ("other.bin", "cut.bin", "text.bin"):
        with pytest.raises(UserError, match=f"{name} does not hold the weights of {NAME}"):
            Clip(tmp_path / name, NAME)
    (tmp_path / "captions.txt").write_text("one\ntwo\n")
    assert one_line(command("fid.py", folder, "--clip", weights), "need --captions")
    assert one_line(command("fid.py", folder, "--captions", tmp_path / "captions.txt", "--clip", weights,
                            "--clip-model", NAME, "--device", "cpu"), "4 pictures, and there are 2 captions")
