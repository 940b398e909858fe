import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import judge as J
import scenes

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "models" / "mini-judge"


@pytest.fixture(scope="module")
def shipped():
    if not SHIPPED.exists():
        pytest.skip("models/mini-judge is not here")
    return J.Judge.load(SHIPPED)


def seen(shape, colour, x, y, size="small"):
    return J.Seen(shape, colour, size, x, y, 0.9)


CIRCLE, SQUARE = seen("circle", "red", 15.0, 30.0), seen("square", "blue", 45.0, 34.0, "large")
STAR = seen("star", "green", 40.0, 10.0)


@pytest.mark.parametrize("objects, caption, exact, unordered", [
    ((CIRCLE,), "a red circle", True, True),
    ((CIRCLE,), "a small red circle", True, True),
    ((CIRCLE,), "a large red circle", False, False),                               # size, where said
    ((CIRCLE,), "a blue circle", False, False),                                    # colour
    ((CIRCLE,), "a red ring", False, False),                                       # shape
    ((CIRCLE, SQUARE), "a red circle", False, False),                              # one too many
    ((CIRCLE,), "a red circle and a blue square", False, False),                   # one too few
    ((), "a red circle", False, False),
    ((CIRCLE, SQUARE), "a blue square and a red circle", True, True),              # any order of reading
    ((CIRCLE, SQUARE), "a blue circle and a red square", False, False),            # colours swapped
    ((CIRCLE, SQUARE), "a red circle left of a large blue square", True, True),
    ((CIRCLE, SQUARE), "a blue square to the right of a red circle", True, True),
    ((CIRCLE, SQUARE), "a red circle right of a blue square", False, True),        # the relation swapped
    ((CIRCLE, SQUARE), "a red circle above a blue square", True, True),            # by 4 px
    ((CIRCLE, SQUARE._replace(y=32.0)), "a red circle above a blue square", False, True),              # by 2 px
    ((SQUARE, STAR, CIRCLE), "a red circle left of a blue square and a green star above the blue square", True, True),
    ((SQUARE, STAR, CIRCLE), "a red circle left of a blue square and a green star below the blue square", False, True),
    ((SQUARE, STAR, CIRCLE), "a red circle left of a blue square and a green star left of the red circle", False, True),
    ((CIRCLE, CIRCLE._replace(x=50.0)), "a red circle and a red circle", True, True),
    ((CIRCLE, CIRCLE), "a red circle and a blue square", False, False),            # one object claimed twice
    # Two that look alike: some assignment must satisfy size and place together.
    ((CIRCLE, CIRCLE._replace(x=50.0, size="large")), "a large red circle right of a red circle", True, True),
    ((CIRCLE, CIRCLE._replace(x=50.0, size="large")), "a large red circle left of a red circle", False, True),
    ((CIRCLE,), "a red circle on a dark background", True, True),
    ((CIRCLE,), "a red circle on a light background", False, False),
    ((CIRCLE,), "a red circle on a dark dotted background", True, True),
    ((CIRCLE,), "a red circle on a striped background", False, False),
])
def test_matches(objects, caption, exact, unordered):
    reading, claim = J.Reading(objects, "dark", "dotted"), scenes.parse(caption)
    assert (J.matches(reading, claim), J.matches(reading, claim, relations=False)) == (exact, unordered)


def test_a_true_reading_matches_its_own_caption_and_no_other():
    drawn = [scenes.scene(11, i) for i in range(300)]
    claims = [scenes.parse(one.caption) for one in drawn]
    readings = [J.Reading(tuple(J.Seen(o.shape, o.colour, o.size, o.x, o.y, 1.0) for o in reversed(one.objects)),
                          one.tone, one.texture) for one in drawn]
    assert all(J.matches(r, c) for r, c in zip(readings, claims))
    assert sum(J.matches(r, c) for r, c in zip(readings, claims[1:])) <= 3


def perfect(objects, ground):
    """The maps a judge without fault would give, built by hand cell by cell."""
    out = {name: torch.full((1, n, 16, 16), -8.0) for name, n in (J.PARTS | {"colour": 8}).items()}
    out["offset"][:] = 0
    for x, y, shape, colour, size in objects:
        for r in range(16):
            for c in range(16):
                dx, dy = x / 4 - c - 0.5, y / 4 - r - 0.5
                heat = np.exp(-(dx * dx + dy * dy) / (2 * J.SIGMA ** 2))
                if heat > 1e-3:
                    out["heat"][0, 0, r, c] = max(float(out["heat"][0, 0, r, c]),
                                                  float(np.log(heat / (1 - heat + 1e-6))))
                    out["offset"][0, :, r, c] = torch.tensor([dx, dy])
                    for name, k in (("shape", shape), ("colour", colour), ("size", size)):
                        out[name][0, k, r, c] = 8.0
    return out | {"tone": 16 * torch.eye(2)[ground[0]][None], "texture": 16 * torch.eye(4)[ground[1]][None]}


@pytest.mark.parametrize("x, y", [(32.0, 32.0), (34.0, 32.0), (30.0, 33.99), (13.1, 50.7), (32.01, 31.99)])
def test_an_object_on_a_border_of_cells_is_read_once_and_in_its_place(x, y, monkeypatch):
    judge = J.Judge((2, 2, 2, 2, 2))
    monkeypatch.setattr(judge, "forward", lambda images: perfect(
        [(x, y, 3, 6, 1), (x, y - 22 if y > 40 else y + 14.5, 0, 0, 0)], (1, 2)))
    reading, = judge.read(torch.zeros(1, 3, 64, 64))
    assert sorted((o.shape, o.colour, o.size) for o in reading.objects) == [
        ("circle", "red", "small"), ("star", "pink", "large")]
    star = next(o for o in reading.objects if o.shape == "star")
    assert abs(star.x - x) < 0.01 and abs(star.y - y) < 0.01 and (reading.tone, reading.texture) == ("light", "dotted")


def test_the_loss_is_least_at_the_truth_and_feels_each_fault():
    first, second = (21.0, 40.5, 3, 6, 1), (44.0, 12.0, 5, 2, 0)
    objects = torch.tensor([[(1, *first), (1, *second), (0,) * 6]])
    ground, true = torch.tensor([[1, 2]]), torch.tensor([True])
    loss = lambda seen, where=(1, 2), true=true: float(J.judge_loss(perfect(seen, where), objects, ground, true))
    best = loss([first, second])
    for fault in ((22.5, *first[1:]), (21.0, 40.5, 4, 6, 1), (21.0, 40.5, 3, 5, 1), (21.0, 40.5, 3, 6, 0)):
        assert loss([fault, second]) > best + 0.05
    assert loss([second]) > best + 0.5 and loss([first, second, (52.0, 50.0, 1, 1, 1)]) > best + 0.5
    assert loss([first, second], (0, 2)) > best + 1 and loss([first, second], (1, 1)) > best + 1
    colour_off = [(21.0, 40.5, 3, 5, 1), second]                                   # not asked where colours are untrue
    assert loss(colour_off, true=~true) == pytest.approx(loss([first, second], true=~true))


def test_augment_keeps_labels_true():
    pictures, _, drawn = scenes.batch(12, 0, 60)
    objects = torch.zeros(60, 3, 6)
    for i, one in enumerate(drawn):
        for j, o in enumerate(one.objects):
            objects[i, j] = torch.tensor([1, o.x, o.y, 0, 0, 0])
    x, moved, true = J.augment(J.pixels(pictures), objects, np.random.default_rng(3))
    again = J.augment(J.pixels(pictures), objects, np.random.default_rng(3))[0]
    assert torch.equal(x, again) and x.abs().max() <= 1 and x.shape == (60, 3, 64, 64) and true.sum() == 30
    flipped = 0
    for i, one in enumerate(drawn):
        for j, o in enumerate(one.objects):
            flipped += float(moved[i, j, 1]) != pytest.approx(o.x)
            if true[i] and o.shape not in ("ring",):  # the pixel at the new place has the object's colour
                got = (x[i, :, int(moved[i, j, 2]), int(moved[i, j, 1])] + 1) * 127.5
                assert float((got - torch.tensor(o.rgb)).abs().mean()) < 45
    assert 20 < flipped < 100                                                        # about half of some 115


def test_the_trunk_is_vgg16s():
    torchvision = {0: 2, 5: 2, 10: 3, 17: 3, 24: 3}                                # first convolution: how many
    expected = {f"features.{first + 2 * i}.{part}"
                for first, n in torchvision.items() for i in range(n) for part in ("weight", "bias")}
    judge = J.Judge()
    assert {k for k in judge.state_dict() if k.startswith("features")} == expected
    assert [i for i, layer in enumerate(judge.features) if isinstance(layer, torch.nn.MaxPool2d)] == [4, 9, 16, 23, 30]
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    y = (x - torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1)) / torch.tensor([.458, .448, .450]).view(1, 3, 1, 1)
    assert torch.allclose(judge.trunk(x)[3], judge.features[:30](y), atol=1e-5)
    assert (judge.embed(x).shape == (2, 224)
            and torch.allclose(judge.embed(x)[:, 96:], judge.trunk(x)[3].mean((2, 3)), atol=1e-6))
    with pytest.raises(ValueError, match="64"):
        judge.read(torch.zeros(1, 3, 32, 32))


def test_pixels_takes_tensors_arrays_and_pictures():
    array, _, drawn = scenes.batch(13, 0, 3)
    tensor = J.pixels(array)
    assert tensor.shape == (3, 3, 64, 64) and tensor.min() >= -1 and tensor.max() <= 1
    assert torch.equal(tensor, J.pixels([scenes.draw(one) for one in drawn])) and torch.equal(tensor, J.pixels(tensor))
    assert float(tensor[1, 2, 5, 7]) == pytest.approx(array[1, 5, 7, 2] / 127.5 - 1)


def test_save_load_and_damage(tmp_path):
    judge = J.Judge((4, 4, 8, 8, 8))
    judge.save(tmp_path, seed=5)
    back = J.Judge.load(tmp_path)
    assert json.loads((tmp_path / "judge.json").read_text()) == {"channels": [4, 4, 8, 8, 8], "seed": 5}
    for name, value in judge.state_dict().items():
        assert (back.state_dict()[name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-7
    assert not any(p.requires_grad for p in back.parameters())
    data = (tmp_path / "judge.safetensors").read_bytes()
    (tmp_path / "judge.safetensors").write_bytes(data[:-10])
    with pytest.raises(cli.UserError, match="damaged"):
        J.Judge.load(tmp_path)
    with pytest.raises(cli.UserError, match="holds no judge"):
        J.Judge.load(tmp_path / "nowhere")


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    def train(out, iterations=4, batch=8):
        flags = ["--images", 40, "--iterations", iterations, "--batch", batch, "--save-every", 2,
                 "--warmup", 1, "--check", 8]
        monkeypatch.setattr(sys, "argv", ["judge.py", "train", "--out", *map(str, [tmp_path / out, *flags])])
        J.main()
    train("whole")
    (tmp_path / "resumed" / "training").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "training" / "step-00000002.safetensors", tmp_path / "resumed" / "training")
    train("resumed")
    assert ((tmp_path / "whole" / "judge.safetensors").read_bytes()
            == (tmp_path / "resumed" / "judge.safetensors").read_bytes())
    assert capsys.readouterr().out.count("exact match") == 4                       # two trainings, two splits
    with pytest.raises(cli.UserError, match="batch"):                              # a run with other settings
        train("whole", batch=4)


@pytest.mark.parametrize("flags, said", [
    (["check", "--model", "nowhere"], "nowhere holds no judge"), (["train"], "--out"), (["judge"], "judge"),
    (["check", "--model", "nowhere", "--n", "0"], "--n"), (["train", "--out", "x", "--epochs", "3"], "--epochs")])
def test_errors_are_one_line_and_status_2(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["judge.py", *flags])
    with pytest.raises(SystemExit) as exit:
        cli.run(J.main)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and said in error


def test_the_shipped_judge_reads_unseen_combinations(shipped):
    images, captions, _ = scenes.batch(2_000_003, 0, 1000, "held-out")
    rates = J.exact_match(shipped, images, captions)
    assert (rates["n"] == 1000 and rates["exact"] >= 0.99 and rates["unordered"] >= rates["exact"]
            and rates["related"] >= 0.99)
    assert rates["by_objects"][1]["related"] is None       # one object tells of no place
    assert sum(part["n"] for part in rates["by_objects"].values()) == 1000
    assert sum(part["n"] * part["exact"] for part in rates["by_objects"].values()) == pytest.approx(
        1000 * rates["exact"])


def test_the_shipped_judge_sees_what_is_wrong(shipped):
    images, captions, drawn = scenes.batch(2_000_004, 0, 200)
    assert J.exact_match(shipped, images, captions[1:] + captions[:1])["exact"] < 0.02  # another's caption
    swap = {"red": "blue", "blue": "red", "green": "yellow", "yellow": "green",
            "orange": "purple", "purple": "orange", "pink": "cyan", "cyan": "pink"}
    wrong = [" ".join(swap.get(word, word) for word in caption.split()) for caption in captions]
    assert J.exact_match(shipped, images, wrong)["exact"] == 0
    related = [i for i, caption in enumerate(captions) if scenes.parse(caption).relations]
    turned = images[related][:, ::-1, ::-1].copy()  # upside down: every relation is false
    rates = J.exact_match(shipped, turned, [captions[i] for i in related])
    assert len(related) > 60 and rates["exact"] == 0 and rates["unordered"] > 0.2 and rates["related"] == 0
    places = [(abs(o.x - t.x) + abs(o.y - t.y)) for r, one in zip(shipped.read(images), drawn)
              for o in r.objects for t in one.objects if (o.shape, o.colour) == (t.shape, t.colour)]
    assert len(places) > 300 and max(places) < 4
