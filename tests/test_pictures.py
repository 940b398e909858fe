"""Pictures and captions as an evaluation reads them."""
import json
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torchvision.transforms as T
from PIL import Image

import pictures
from cli import UserError
from training import World


def picture(width, height, seed=0, mode="RGB"):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


# --- pictures ---

@pytest.mark.parametrize("size", [(640, 480), (427, 640), (513, 512), (500, 375), (90, 91), (64, 64), (33, 200)])
@pytest.mark.parametrize("side", [64, 63])
def test_fit_is_torchvisions_resize_and_centre_crop(size, side):
    image = picture(*size)
    theirs = T.CenterCrop(side)(T.Resize(side, T.InterpolationMode.LANCZOS)(image))
    assert np.array_equal(np.asarray(pictures.fit(image, side)), np.asarray(theirs))
    assert pictures.fit(image, None) is image


def test_a_folder_is_listed_in_the_order_of_its_numbers(tmp_path, capsys):
    for name in ("10.png", "9.png", "b1.jpeg", "a.PNG", "2.webp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below").mkdir()
    picture(4, 4).save(tmp_path / "below" / "1.png")
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert [p.name for p in pictures.list_pictures(tmp_path)] == ["2.webp", "9.png", "10.png", "a.PNG", "b1.jpeg"]
    assert capsys.readouterr().err == ""
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "x.csv").write_text("")
    assert len(pictures.list_pictures(tmp_path)) == 5
    assert "as no pictures: notes.txt and 1 more\n" in capsys.readouterr().err
    for path, named in ((tmp_path / "none", "no such folder"), (tmp_path / "notes.txt", "no such folder")):
        with pytest.raises(UserError, match=named):
            pictures.list_pictures(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        pictures.list_pictures(tmp_path / "empty")


def test_grey_alpha_palette_and_jpeg_are_read_as_rgb(tmp_path, capsys):
    colour, seen = picture(20, 10), {}
    colour.convert("L").save(tmp_path / "grey.png")
    transparent = colour.copy()
    transparent.putalpha(picture(20, 10, 1, "L"))
    transparent.save(tmp_path / "alpha.png")
    colour.quantize(16).save(tmp_path / "palette.png")
    colour.save(tmp_path / "photo.jpg")
    read = {name: pictures.read_picture(tmp_path / name, seen)
            for name in ("grey.png", "palette.png", "alpha.png", "photo.jpg")}
    assert all(image.mode == "RGB" for image in read.values())
    assert np.array_equal(read["grey.png"], colour.convert("L").convert("RGB"))
    # what pytorch-fid's convert("RGB") gives
    assert np.array_equal(read["alpha.png"], colour)
    assert np.array_equal(read["palette.png"], colour.quantize(16).convert("RGB"))
    assert np.array_equal(read["photo.jpg"], Image.open(tmp_path / "photo.jpg").convert("RGB"))
    assert seen == {"size": (20, 10), "alpha": tmp_path / "alpha.png", "jpeg": tmp_path / "photo.jpg"}
    picture(20, 11).save(tmp_path / "tall.png")
    pictures.read_picture(tmp_path / "tall.png", seen)
    pictures.warn_of(seen, "F", None, generated=True)
    lines = capsys.readouterr().err.splitlines()
    assert ([word in line for word, line in zip(("alpha.png", "photo.jpg", "tall.png"), lines, strict=True)]
            == [True] * 3)
    pictures.warn_of(seen, "F", 32, generated=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "alpha.png" in lines[0] and "20 x 10 px and are enlarged to 32" in lines[1]


def test_what_is_no_picture_is_named(tmp_path):
    picture(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80)).save(tmp_path / "deep.png")
    for name, named in (("cut.png", "is no whole picture"), ("text.png", "is no whole picture"),
                        ("empty.jpg", "is no whole picture"), ("deep.png", "more than 8 bits")):
        with pytest.raises(UserError, match=named) as error:
            pictures.read_picture(tmp_path / name, {})
        assert str(tmp_path / name) in str(error.value)


def test_threads_read_ahead_in_order_and_no_further():
    begun, lock = [], threading.Lock()

    def slow(i):
        with lock:
            begun.append(i)
        time.sleep(0.002 * (i % 3))
        return i
    with ThreadPoolExecutor(4) as pool:
        results = pictures.ahead(pool, slow, range(60), 8)
        for i in range(30):
            assert next(results) == i and max(begun) <= i + 8
        assert list(results) == list(range(30, 60))
        with pytest.raises(ZeroDivisionError):
            list(pictures.ahead(pool, lambda i: 1 / (5 - i), range(9), 2))


@pytest.mark.parametrize("n, batch", [(10, 4), (12, 4), (3, 50), (1, 1)])
def test_batches_are_the_same_for_any_number_of_processes(n, batch):
    whole = pictures.shares(n, batch, World(0, 1, "cpu"))
    assert [i for share in whole for i in share] == list(range(n)) and all(len(share) == batch for share in whole[:-1])
    for size in (2, 3, 5):
        parts = [share for rank in range(size) for share in pictures.shares(n, batch, World(rank, size, "cpu"))]
        assert sorted(parts, key=lambda share: share[0]) == whole


def test_batches_of_a_folder(tmp_path):
    for i in range(7):
        picture(4, 4, i).save(tmp_path / f"{i}.png")
    files, args = pictures.list_pictures(tmp_path), Namespace(batch=3, workers=2)
    for rank, wanted in ((0, [[0, 1, 2], [6]]), (1, [[3, 4, 5]])):
        batches = list(pictures.from_folder(files, list("abcdefg"), np.asarray, args, World(rank, 2, "cpu"), {}))
        assert [captions for _, captions in batches] == [["abcdefg"[i] for i in batch] for batch in wanted]
        for (images, _), batch in zip(batches, wanted):
            assert all(np.array_equal(image, picture(4, 4, i)) for image, i in zip(images, batch, strict=True))


# --- captions ---

COCO = {"images": [{"id": 30, "file_name": "000000000030.jpg"}, {"id": 7, "file_name": "000000000007.jpg"},
                   {"id": 12, "file_name": "000000000012.jpg"}, {"id": 99, "file_name": "x.jpg"}],
        "annotations": [{"id": 5, "image_id": 7, "caption": " seven, first \n"},
                        {"id": 1, "image_id": 30, "caption": "thirty"},
                        {"id": 2, "image_id": 7, "caption": "seven, second"},
                        {"id": 3, "image_id": 12, "caption": "twelve"}]}


def test_coco_gives_the_first_caption_of_each_image(tmp_path):
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps(COCO))
    whole = pictures.read_captions(path)
    assert whole == [("000000000007", "seven, first"), ("000000000012", "twelve"), ("000000000030", "thirty")]
    assert pictures.read_captions(path, 5_000) == whole


def test_fewer_of_coco_are_drawn_once_and_for_all(tmp_path):
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps({"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(300)],
                                "annotations": [{"image_id": i, "caption": f"c{i}"} for i in range(300)]}))
    drawn = pictures.read_captions(path, 100)
    numbers = [int(name) for name, _ in drawn]
    assert len(drawn) == 100 and numbers == sorted(set(numbers)) and drawn == pictures.read_captions(path, 100)
    assert 50 < np.mean(numbers) < 250 and max(numbers) > 250                    # not the first hundred
    assert all(caption == f"c{name}" for name, caption in drawn)


def test_json_lines_and_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"caption": "ein grüner Ring"}\n\n{"prompt": "b", "seed": 3}\n'
                                      '{"text": "c", "file_name": "d/x.png"}\n"plain"\n', encoding="utf-8")
    assert pictures.read_captions(tmp_path / "a.jsonl") == [
        (None, "ein grüner Ring"), (None, "b"), ("x", "c"), (None, "plain")]
    assert pictures.read_captions(tmp_path / "a.jsonl", 2) == [(None, "ein grüner Ring"), (None, "b")]
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert pictures.read_captions(tmp_path / "a.txt") == [(None, "one"), (None, "two")]


@pytest.mark.parametrize("name, text, named", [
    ("a.json", "{", "no COCO captions file"), ("a.json", '["a"]', "no COCO captions file"),
    ("a.json", '{"images": []}', "'annotations'"), ("a.json", '{"images": [], "annotations": []}', "holds no caption"),
    ("a.jsonl", '"a"\n{"label": 3}\n', "line 2"), ("a.jsonl", "a red circle\n", "line 1"),
    ("a.txt", "\n", "holds no prompt"), ("none.json", None, "no such file"), ("none.txt", None, "no such")])
def test_captions_that_cannot_be_read_are_named(tmp_path, name, text, named):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=named) as error:
        pictures.read_captions(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_captions_go_to_pictures_by_name_or_by_order(tmp_path):
    files = [tmp_path / name for name in ("b.jpg", "a.png")]
    assert pictures.pair(files, [("a", "an a"), ("b", "a b"), ("c", "a c")]) == ["a b", "an a"]
    assert pictures.pair(files, [(None, "first"), (None, "second")]) == ["first", "second"]
    assert pictures.pair(files, [("x", "first"), ("y", "second")]) == ["first", "second"]
    with pytest.raises(UserError, match="2 pictures, and there are 3 captions"):
        pictures.pair(files, [("x", "1"), ("y", "2"), ("z", "3")])
