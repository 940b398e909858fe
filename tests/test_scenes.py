import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scenes

ROOT = Path(__file__).parents[1]


def mask(thing, size=64):
    """Where an object's ink lies, found from pictures alone: drawn in black on white, nothing else in the scene."""
    alone = scenes.Scene(
        (scenes.Object(thing.shape, thing.colour, thing.size, thing.x, thing.y, thing.radius, (0, 0, 0)),),
        "light", "plain", "", ((255,) * 3, (255,) * 3), 9.0, 0.0, (0.0, 0.0))
    return np.asarray(scenes.draw(alone, size).convert("L")) < 255


def test_a_scene_depends_on_its_three_numbers_and_on_nothing_else():
    first, captions, drawn = scenes.batch(7, 20, 5)
    again, captions_again, drawn_again = scenes.batch(7, 22, 3)                    # another start, another batch size
    assert (first[2:] == again).all() and captions[2:] == captions_again and drawn[2:] == drawn_again
    assert list(scenes.captions(7, 20, 5)) == captions
    assert len({scenes.scene(7, 0), scenes.scene(7, 1), scenes.scene(8, 0), scenes.scene(7, 0, "held-out")}) == 4
    assert first.shape == (5, 64, 64, 3) and first.dtype == np.uint8
    with pytest.raises(ValueError, match="held-out"):
        scenes.scene(0, 0, "test")


def test_train_never_holds_a_held_out_pair_and_held_out_always_does():
    assert len(scenes.HELD_OUT) == len({c for c, _ in scenes.HELD_OUT}) == len({s for _, s in scenes.HELD_OUT}) == 8
    trained = Counter()
    for i in range(5000):
        pairs = {(o.colour, o.shape) for o in scenes.scene(1, i).objects}
        assert not pairs & scenes.HELD_OUT
        trained.update(pairs)
    assert set(trained) == {(c, s) for c in scenes.COLOURS for s in scenes.SHAPES} - scenes.HELD_OUT
    for i in range(1000):
        assert {(o.colour, o.shape) for o in scenes.scene(1, i, "held-out").objects} & scenes.HELD_OUT
    for caption in scenes.captions(2, 0, 2000):                                    # and by its words alone
        assert not any(f"{colour} {shape}" in caption for colour, shape in scenes.HELD_OUT)


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_parse_is_the_inverse_of_the_caption(split):
    relations = sizes = grounds = 0
    for i in range(2000):
        one = scenes.scene(3, i, split)
        claim = scenes.parse(one.caption)
        assert [o[:2] for o in claim.objects] == [(o.shape, o.colour) for o in one.objects]
        assert all(said in (None, o.size) for (_, _, said), o in zip(claim.objects, one.objects))
        assert claim.tone in (None, one.tone) and claim.texture in (None, one.texture)
        # from the positions, not from the code
        for a, word, b in claim.relations:
            dx, dy = one.objects[b].x - one.objects[a].x, one.objects[b].y - one.objects[a].y
            along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[word]
            assert along >= 9 and along > abs(across)
        # What the words hold, counted without the parser, is what the claim holds.
        words = one.caption.replace(",", "").split()
        assert (sum(w in ("small", "little", "large", "big") for w in words)
                == sum(o[2] is not None for o in claim.objects))
        assert sum(w in ("left", "right", "above", "over", "below", "under") for w in words) == len(claim.relations)
        assert (sum(w in scenes.TONES + scenes.TEXTURES for w in words)
                == (claim.tone is not None) + (claim.texture is not None))
        assert len(claim.relations) in (0, len(one.objects) - 1)
        relations = relations + bool(claim.relations)
        sizes = sizes + sum(o[2] is not None for o in claim.objects) / len(claim.objects)
        grounds = grounds + ("background" in words)
    assert 0.45 < relations / 2000 < 0.6 and 0.45 < sizes / 2000 < 0.55 and 0.35 < grounds / 2000 < 0.45


def test_parse_reads_what_a_person_types():
    circle, square = ("circle", "red", None), ("square", "blue", None)
    for text in ("a red circle left of a blue square", "  A  Red Circle to the LEFT of an blue square.",
                 "red circle left of blue square", "a red circle is on the left of a blue square"):
        assert scenes.parse(text) == scenes.Claim((circle, square), ((0, "left of", 1),), None, None)
    assert scenes.parse("a big red circle over a dark, dotted background") == scenes.Claim(
        (("circle", "red", "large"),), (), "dark", "dotted")
    assert scenes.parse("a red circle over a blue square and a cyan ring under the red circle").relations == (
        (0, "above", 1), (2, "below", 0))
    assert scenes.parse("a red circle, a blue square and a red circle") == scenes.Claim(
        (circle, square, circle), (), None, None)


@pytest.mark.parametrize("text, said", [
    ("a dog", "names no object"), ("", "names no object"), ("a red dog near a blue square", "red dog near"),
    ("a red circle beside a blue square", "beside"), ("a red circle in the snow", "in the snow"),
    ("left of a red circle", "left of"), ("a red circle a blue square", "a blue square"),
    ("a red circle on a pink background", "on a pink background")])
def test_parse_refuses_with_one_line(text, said):
    with pytest.raises(ValueError) as error:
        scenes.parse(text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_objects_are_distinct_apart_and_inside():
    counts = Counter()
    for i in range(400):
        one = scenes.scene(4, i)
        counts[len(one.objects)] += 1
        assert len({(o.shape, o.colour) for o in one.objects}) == len(one.objects)
        inked = [mask(o) for o in one.objects]
        assert sum(m.astype(int) for m in inked).max() == 1                        # no pixel belongs to two
        border = np.ones((64, 64), bool)
        border[1:-1, 1:-1] = False
        assert not any((m & border).any() for m in inked)
    assert counts[1] > 100 and counts[2] > 120 and counts[3] > 60


def test_shapes_differ_and_sizes_do():
    for radius in scenes.RADIUS.values():
        drawn = [mask(scenes.Object(shape, "red", "small", 32.0, 32.0, radius, (0, 0, 0))) for shape in scenes.SHAPES]
        for i, a in enumerate(drawn):
            assert (2 * radius - 2.5 <= np.ptp(np.nonzero(a)[0]) + 1 <= 2 * radius + 2
                    or scenes.SHAPES[i] in ("square", "triangle", "heart"))
            assert all((a != b).sum() > 0.1 * a.sum() for b in drawn[:i])
    # a hole even when small
    assert not mask(scenes.Object("ring", "red", "small", 32.0, 32.0, 7.0, (0, 0, 0)))[32, 32]


def test_edges_are_antialiased_and_positions_are_finer_than_pixels():
    def alone(x):
        return scenes.Scene((scenes.Object("circle", "red", "large", x, 32.0, 11.5, (0, 0, 0)),),
                            "light", "plain", "", ((255,) * 3,) * 2, 9.0, 0.0, (0.0, 0.0))
    picture = np.asarray(scenes.draw(alone(32.0)).convert("L")).astype(float)
    between = (picture > 20) & (picture < 235)
    assert 30 < between.sum() < 150                                                # about the circumference, 72 px
    area = (255 - picture).sum() / 255
    assert abs(area / (np.pi * 11.5 ** 2) - 1) < 0.02
    for x in (32.0, 32.25, 32.5, 30.75):                                           # the ink's centre of gravity is x
        ink = 255 - np.asarray(scenes.draw(alone(x)).convert("L")).astype(float)
        assert abs((ink.sum(0) * (np.arange(64) + 0.5)).sum() / ink.sum() - x) < 0.06
    # Twice the size, averaged down, is the same picture: nothing depends on the pixel grid.
    for i in range(20):
        one = scenes.scene(5, i)
        small = np.asarray(scenes.draw(one)).astype(float)
        big = np.asarray(scenes.draw(one, 128).reduce(2)).astype(float)
        assert abs(small - big).mean() < 1.5


def test_every_object_stands_out_from_every_background():
    for i in range(300):
        one = scenes.scene(6, i)
        assert all(np.mean(c) < 110 if one.tone == "dark" else np.mean(c) > 160 for c in one.ground)
        for o in one.objects:
            assert all(np.linalg.norm(np.subtract(o.rgb, c)) > 60 for c in one.ground)
            named = min(scenes.COLOURS, key=lambda name: np.linalg.norm(np.subtract(o.rgb, scenes.COLOURS[name])))
            assert named == o.colour


def test_command_line(tmp_path):
    run = lambda *flags: subprocess.run([sys.executable, "scenes.py", *map(str, flags)], cwd=ROOT,
                                        capture_output=True, text=True)
    assert run("--captions", 30, "--seed", 1, "--out", tmp_path / "c.txt", "--grid", tmp_path / "g.png").returncode == 0
    assert (tmp_path / "c.txt").read_text().splitlines() == list(scenes.captions(1, 0, 30))
    assert Image.open(tmp_path / "g.png").width > 800
    assert run("--pictures", 3, "--seed", 1, "--start", 5, "--out", tmp_path / "scenes").returncode == 0
    assert sorted(p.name for p in (tmp_path / "scenes").iterdir()) == [f"{i:06d}.png" for i in range(3)]
    assert np.array_equal(Image.open(tmp_path / "scenes" / "000002.png"), scenes.draw(scenes.scene(1, 7)))
    for flags in ((), ("--captions", 3, "--pictures", 3), ("--captions", "many"), ("--capshuns", 3)):
        wrong = run(*flags)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr
