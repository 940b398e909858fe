"""The miniature's own stages; the whole pipeline in small is slow."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli
import mini
from text import tokenize
from vae import VAE

ROOT = Path(__file__).resolve().parent.parent


def test_standardised_latents_have_unit_channels_and_the_same_pictures():
    torch.manual_seed(0)
    vae = VAE(mini.AUTOENCODER).requires_grad_(False).eval()
    image, _ = mini.images(9, 0, 8)
    mean, _ = vae.encode(image)
    picture = vae.decode(mean)
    vae = mini.standardise(vae)
    means = torch.cat([vae.encode(mini.images(mini.VAE_TRAINING.seed, i, 100)[0])[0] for i in range(0, 2000, 100)])
    assert means.mean((0, 2, 3)).abs().max() < 1e-3
    assert (means.std((0, 2, 3)) - 1).abs().max() < 1e-3
    again, logvar = vae.encode(image)
    assert (vae.decode(again) - picture).abs().max() <= 1e-4 * picture.abs().max()
    assert vae.config.scaling_factor == 1.0


def test_images_are_the_scenes():
    image, captions = mini.images(5, 3, 2)
    assert image.shape == (2, 3, 64, 64) and image.dtype == torch.float32
    assert -1 <= image.min() and image.max() <= 1 and len(captions) == 2
    pixels, words, _ = mini.scenes.batch(5, 3, 2)
    assert words == captions
    assert ((image + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).equal(torch.from_numpy(pixels))


def test_places_are_those_of_the_objects_that_a_caption_names():
    _, captions, drawn = mini.scenes.batch(5, 0, 300)
    ids = tokenize(captions)
    named, shown = mini.places(drawn, ids)
    assert named.shape == (300, 3) and shown.shape == (300, 3, 2)
    for i, scene in enumerate(drawn):
        assert (named[i] > 0).sum() == len(scene.objects) and named[i, :len(scene.objects)].diff().gt(0).all()
        for k, thing in enumerate(scene.objects):          # "colour shape" stand side by side, and are its own
            name, at = tokenize([f"{thing.colour} {thing.shape}"])[0], named[i, k] + 1
            name = name[1:name.argmax()]                   # the start and the end, the largest token, are no part of it
            assert ids[i, at - len(name):at].equal(name)
            assert shown[i, k].tolist() == pytest.approx([thing.x / 32 - 1, thing.y / 32 - 1], abs=1e-6)
    # a second mention, which is passed over
    assert sum(caption.count(" the ") > 0 for caption in captions) > 20


def test_every_line_of_the_pipeline_is_understood():
    """Each script's own parser takes its line: an unknown flag or a wrong value would exit with 2."""
    import distill
    import judge
    import pairs
    import train_reflow
    scripts = {"distill.py": distill, "judge.py": judge, "pairs.py": pairs, "train_reflow.py": train_reflow}
    checked = 0
    for short in (False, True):
        for line in mini.pipeline("nowhere", short):
            script, *words = line.split()
            if script in scripts and script != "judge.py":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", [script, *words])
                    # past the parser: the first file is missing
                    with pytest.raises(cli.UserError, match="nowhere"):
                        scripts[script].main()
                checked += 1
    assert checked == 2 * 10


@pytest.mark.slow
def test_the_whole_pipeline_in_short(tmp_path):
    line = [sys.executable, str(ROOT / "mini.py"), "all", "--short", "--root", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| mini-instaflow:1 |" in done.stdout
    for name in ("mini-sd", "mini-2rf", "mini-direct", "mini-instaflow"):
        assert (tmp_path / "models" / name / "instaflow.json").exists()
