import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cli
import pairs
import shards
import training
import weights
from cli import UserError
from conftest import one_line
from instaflow import InstaFlow

pytestmark = pytest.mark.usefixtures("plain_convolutions")
ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a red circle", "ein grüner Ring 🟢", "日本の桜", "a \"quoted\" & <tagged> one", "x" * 300,
           "a small yellow star", "b"]
NUMBER, SHARD = 42, 8                                      # six shards, the last of 2


def line(tiny, folder, *words):
    """The flags of one pairs.py command line; later ones win."""
    return [str(w) for w in ("--model", tiny / "teacher", "--prompts", folder / "prompts.txt",
                             "--out", folder / "pairs", "--steps", 3, "--guidance", 2, "--seed", 11, "--number", NUMBER,
                             "--shard", SHARD, "--batch", 5, "--device", "cpu", "--float32", *words)]


def write_prompts(folder):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")


def shard(number, folder):
    return folder / "pairs" / f"shard-{number:05d}.safetensors"


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()["json"]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A folder whose pairs/ one process made. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("made")
    write_prompts(folder)
    with pytest.MonkeyPatch.context() as patch:
        # as plain_convolutions: the same arithmetic as in the tests
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        patch.setattr(sys, "argv", ["pairs.py", *line(tiny, folder)])
        pairs.main()
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """The same, of one's own."""
    (tmp_path / "prompts.txt").write_bytes((made / "prompts.txt").read_bytes())
    (tmp_path / "pairs").mkdir()
    for path in (made / "pairs").iterdir():
        (tmp_path / "pairs" / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def again(command, tiny, copy):
    """The same pairs.py line on the copy, with more flags."""
    return lambda *words: command("pairs.py", *line(tiny, copy, *words))


# --- what a pair is ---

def test_an_item(made):
    data = pairs.PairDataset(made / "pairs")
    assert len(data) == NUMBER
    for i in (0, 7, 8, 41):
        item = data[i]
        assert item.keys() == {"noise", "latent", "prompt"} and type(item["prompt"]) is str
        for key in ("noise", "latent"):
            assert item[key].shape == (4, 8, 8) and item[key].dtype == torch.float32 and item[key].device.type == "cpu"
    for i in (-1, NUMBER):
        with pytest.raises(IndexError):
            data[i]


def test_noise_is_stream_1_by_index_and_prompts_go_round(made):
    data = pairs.PairDataset(made / "pairs")
    for i in range(NUMBER):
        assert np.array_equal(data[i]["noise"],
                              np.random.default_rng([1, 11, i]).standard_normal((4, 8, 8), dtype=np.float32))
        assert data[i]["prompt"] == PROMPTS[i % 7]


def test_latents_are_the_models_ode_from_that_noise(made, tiny):
    model, data = InstaFlow.load(tiny / "teacher"), pairs.PairDataset(made / "pairs")
    for i in (0, 12, 41):                                  # alone: neither the shard nor the batch matters
        wanted = model.solve(data[i]["noise"][None], model.text([data[i]["prompt"]]), model.text([""]), 3, 2.0)[0]
        # one step of float16
        assert (data[i]["latent"] - wanted).abs().max() <= wanted.abs().max() * 2 ** -10
    assert not torch.allclose(data[0]["latent"], data[7]["latent"])          # same prompt, other noise


def test_a_teacher_draws_the_ends_of_a_flows_paths(command, tiny, tmp_path):
    write_prompts(tmp_path)
    words = lambda *more: ("pairs.py", "--model", tiny / "flow", "--prompts", tmp_path / "prompts.txt",
                           "--out", tmp_path / "pairs", "--device", "cpu", "--float32", "--steps", 5,
                           "--guidance", 2, *more)
    finish = "--finish", tiny / "teacher", "--finish-at", 0.3, "--finish-guidance", 3
    status, out, err = command(*words(*finish))
    assert status == 0, err
    flow, teacher = InstaFlow.load(tiny / "flow"), InstaFlow.load(tiny / "teacher")
    data = pairs.PairDataset(tmp_path / "pairs")
    assert data.info["finish"] == {"model": str(tiny / "teacher"), "weights": weights.checksum(tiny / "teacher"),
                                   "sampler": "dpm", "at": 0.3, "guidance": 3.0}
    for i in (0, 3):
        path = data[i]["noise"][None], flow.text([data[i]["prompt"]]), flow.text([""])
        wanted = flow.solve_with(teacher, 0.3, 3.0, *path, 5, 2.0)
        assert (data[i]["latent"] - wanted[0]).abs().max() <= wanted.abs().max() * 2 ** -10
        assert not torch.allclose(wanted, flow.solve(*path, 5, 2.0), rtol=0.1)
    data.check(flow, tiny / "flow")                        # they are the flow's own, and its student's to learn
    status, out, err = command("pairs.py", "verify", "--pairs", tmp_path / "pairs")
    assert status == 0 and out.rstrip().endswith(
        f"guidance 2.0; from t = 0.3 on by {tiny / 'teacher'}, dpm, guidance 3.0")
    for other in (finish[:4], (), (*finish[:3], 0.4, *finish[4:])):
        status, out, err = command(*words(*other))
        assert status == 2 and "(finish differ)" in err and err.count("\n") == 1
    for wrong in (("--finish-guidance", 3), ("--finish-at", 0.3), finish[:2], (*finish[:3], 0), (*finish[:3], 1)):
        status, out, err = command(*words(*wrong))
        assert status == 2 and "go together" in err and err.count("\n") == 1
    status, out, err = command(*words(*finish, "--steps", 2, "--out", tmp_path / "new"))
    assert status == 2 and "give at least 3" in err


@pytest.mark.parametrize("part", ["text", "vae", "prediction", "student", "itself", "rounded"])
def test_only_the_teacher_itself_finishes(command, tiny, tmp_path, part):
    """Other weights, no noise predictor, a student and --model itself are refused; weights that were rounded to
    float16, as a student's folder has them, are not."""
    write_prompts(tmp_path)
    teacher = InstaFlow.load(tiny / "teacher")
    if part in ("text", "vae"):
        with torch.no_grad():
            next(getattr(teacher, part).parameters()).add_(0.1)
    if part == "prediction":
        teacher.info |= {"prediction": "velocity", "sampler": "euler"}
    if part == "student":
        teacher.info |= {"trained_steps": [1]}
    teacher.save(tmp_path / "other", self_contained=True, dtype=torch.float16 if part == "rounded" else None)
    result = command("pairs.py", "--model", tmp_path / "other" if part == "itself" else tiny / "flow",
                     "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "pairs", "--device", "cpu",
                     "--finish", tmp_path / "other", "--finish-at", 0.3)
    if part == "rounded":
        assert result[0] == 0
    else:
        assert one_line(result, *(["predicts velocity, not epsilon"] if part == "prediction"
                                  else ["--finish", "is no teacher of --model"]))


def test_a_batch_is_its_items(made):
    data = pairs.PairDataset(made / "pairs")
    noise, latent, prompts = data.batch(np.array([41, 0, 8]))
    assert noise.shape == latent.shape == (3, 4, 8, 8)
    for row, i in enumerate((41, 0, 8)):
        assert (torch.equal(noise[row], data[i]["noise"]) and torch.equal(latent[row], data[i]["latent"])
                and prompts[row] == data[i]["prompt"])


def test_a_shard_holds_a_name_and_a_checksum_in_place_of_noise(made):
    tensors = load_file(shard(5, made))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items() if not k.startswith("prompt")} == {
        "latent": (torch.float16, (2, 4, 8, 8)), "seed": (torch.int64, (2,)), "index": (torch.int64, (2,)),
        "checksum": (torch.int64, (2,))}
    assert tensors["seed"].tolist() == [11, 11] and tensors["index"].tolist() == [40, 41]
    assert tensors["checksum"].tolist() == [
        zlib.crc32(np.random.default_rng([1, 11, i]).standard_normal((4, 8, 8), dtype=np.float32).tobytes())
        for i in (40, 41)]
    info = pairs.PairDataset(made / "pairs").info
    assert ((info["number"], info["shard"], info["steps"], info["guidance"], info["sampler"], info["seed"])
            == (NUMBER, SHARD, 3, 2.0, "dpm", 11))


def test_one_pair_a_prompt_and_the_models_own_settings_by_default(command, tiny, tmp_path):
    write_prompts(tmp_path)
    status, out, err = command("pairs.py", "--model", tiny / "flow", "--prompts", tmp_path / "prompts.txt",
                               "--out", tmp_path / "pairs", "--device", "cpu", "--float32")
    assert status == 0
    data, model = pairs.PairDataset(tmp_path / "pairs"), InstaFlow.load(tiny / "flow")
    assert len(data) == 7 and [data[i]["prompt"] for i in range(7)] == PROMPTS
    assert (data.info["steps"], data.info["guidance"], data.info["sampler"]) == (3, 1.5, "euler")
    x0, text, null = data[2]["noise"][None], model.text([PROMPTS[2]]), model.text([""])
    x = x0
    for step in range(3):                                  # equations 1 and 8, by hand
        t = 1000 * (1 - torch.tensor([step / 3]))
        with torch.no_grad():
            x = x + (1.5 * model.unet(x, t, text) - 0.5 * model.unet(x, t, null)) / 3
    assert (data[2]["latent"] - x[0]).abs().max() <= x.abs().max() * 2 ** -10


def test_pairs_of_another_size_are_refused(made):
    data = pairs.PairDataset(made / "pairs")
    with pytest.raises(UserError, match=r"holds latents of shape \[4, 8, 8\], but the model's are \[4, 16, 16\]"):
        data.check(InstaFlow.random("mini"))


# --- any number of processes ---

def test_three_processes_make_what_one_makes(made, tiny, tmp_path):
    write_prompts(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3",
                str(ROOT / "pairs.py")]
    done = subprocess.run(torchrun + line(tiny, tmp_path), env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # nothing else left, too
    assert sorted(p.name for p in (tmp_path / "pairs").iterdir()) == sorted(p.name for p in (made / "pairs").iterdir())
    indices = [i for k in range(6) for i in load_file(shard(k, tmp_path))["index"].tolist()]
    assert indices == list(range(NUMBER))                  # none lost, none twice, each where it belongs
    ours, one = pairs.PairDataset(tmp_path / "pairs"), pairs.PairDataset(made / "pairs")
    assert len(ours) == NUMBER
    for i in range(NUMBER):
        assert torch.equal(ours[i]["noise"], one[i]["noise"]) and ours[i]["prompt"] == one[i]["prompt"]
        assert (ours[i]["latent"] - one[i]["latent"]).abs().max() <= one[i]["latent"].abs().max() * 2 ** -10
    strip = lambda text: {k: v for k, v in text.items() if k != "prompts"}
    assert strip(ours.info) == strip(one.info)


# --- what is missing is made again; what is wrong is named ---

@pytest.mark.parametrize("gone", [[0], [3], [5], [0, 1, 4]])
def test_a_deleted_shard_is_named_and_made_again(made, copy, again, command, gone):
    for number in gone:
        shard(number, copy).unlink()
    with pytest.raises(UserError, match="is missing") as error:
        pairs.PairDataset(copy / "pairs")
    assert (f"{shard(gone[0], copy)} is missing ({len(gone)} shards in all)" in str(error.value)
            and "\n" not in str(error.value))
    kept = {p.name: p.stat().st_mtime_ns for p in (copy / "pairs").iterdir()}
    assert again()[0] == 0
    for number in range(6):
        ours, first = load_file(shard(number, copy)), load_file(shard(number, made))
        assert ours.keys() == first.keys() and all(torch.equal(v, first[k]) for k, v in ours.items())
        assert metadata(shard(number, copy)) == metadata(shard(number, made))
    # what was there was left alone
    assert all((copy / "pairs" / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_training_on_pairs_with_a_hole_is_one_line(copy, command, tiny):
    shard(2, copy).unlink()
    for script in ("train_reflow.py", "distill.py"):
        assert one_line(command(script, "--model", tiny / "flow", "--pairs", copy / "pairs", "--out", copy / "out",
                                "--device", "cpu"), script, shard(2, copy), "is missing")
    assert not (copy / "out").exists()
    for path in (copy / "nothing", copy):
        assert one_line(command("distill.py", "--model", tiny / "flow", "--pairs", path, "--out", copy / "out",
                                "--device", "cpu"), path, "holds no pairs")


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("size", [0, 5, -7])
def test_a_truncated_shard_is_named(copy, again, number, size):
    shard(number, copy).write_bytes(shard(number, copy).read_bytes()[:size])
    with pytest.raises(UserError, match="is no whole shard") as error:
        data = pairs.PairDataset(copy / "pairs")
        data[number * SHARD]
    assert (str(shard(number, copy)) in str(error.value)
            and "delete it and run the same pairs.py line" in str(error.value) and "\n" not in str(error.value))
    if number == 0:
        assert one_line(again(), shard(0, copy), "is no whole shard")


def edit(path, change):
    tensors, info = load_file(path), metadata(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt", "json": info})


def test_shards_of_other_pairs_are_named(copy, command, tiny):
    """One of another run, one under another's number, and one too many."""
    original = shard(2, copy).read_bytes()
    tensors, info = load_file(shard(2, copy)), json.loads(metadata(shard(2, copy)))
    save_file(tensors, shard(2, copy), {"format": "pt", "json": json.dumps(info | {"guidance": 3.0})})
    for change in (lambda: None, lambda: shard(2, copy).write_bytes(shard(3, copy).read_bytes())):
        change()
        assert one_line(command("distill.py", "--model", tiny / "flow", "--pairs", copy / "pairs",
                                "--out", copy / "out", "--device", "cpu"), shard(2, copy), "of other pairs")
    shard(2, copy).write_bytes(original)
    shard(6, copy).write_bytes(original)
    with pytest.raises(UserError, match="of other pairs"):
        pairs.PairDataset(copy / "pairs")


@pytest.mark.parametrize("change", [lambda tensors, info: tensors.pop("latent"),
                                    lambda tensors, info: info.pop("number"),
                                    lambda tensors, info: info.update(shard="8")])
def test_a_file_that_is_no_shard_is_named(copy, change):
    tensors, info = load_file(shard(0, copy)), json.loads(metadata(shard(0, copy)))
    change(tensors, info)
    save_file(tensors, shard(0, copy), {"format": "pt", "json": json.dumps(info)})
    with pytest.raises(UserError, match="is no whole shard"):
        pairs.PairDataset(copy / "pairs")


def test_latents_that_are_no_numbers_are_not_kept(again, copy):
    shutil.rmtree(copy / "pairs")
    status, _, err = again("--guidance", 1e30)             # (beside a progress bar)
    assert status == 2 and "no finite numbers; give --float32 too" in err and "Traceback" not in err
    assert not list((copy / "pairs").glob("shard*"))


def test_parts_that_a_shared_disk_shows_late_are_waited_for(again, copy, monkeypatch):
    expected, waits, exists = shard(0, copy).read_bytes(), [], Path.exists
    shutil.rmtree(copy / "pairs")
    monkeypatch.setattr(shards, "PART", 4)
    monkeypatch.setattr(pairs.time, "sleep", waits.append)
    monkeypatch.setattr(Path, "exists", lambda path: (len(waits) > 2 or "part-00001" not in path.name) and exists(path))
    assert again()[0] == 0 and waits == [2, 2, 2]
    assert shard(0, copy).read_bytes() == expected and not list((copy / "pairs").glob("*part*"))

    shutil.rmtree(copy / "pairs")
    monkeypatch.setattr(Path, "exists", lambda path: "part-00001" not in path.name and exists(path))
    status, _, err = again()
    assert status == 2 and "shard-00000.safetensors lacks parts that other processes made" in err


@pytest.mark.slow
def test_compiled_makes_the_same_pairs(again, copy, made):
    shutil.rmtree(copy / "pairs")
    assert again("--compile")[0] == 0
    ours, plain = (load_file(shard(0, folder))["latent"].float() for folder in (copy, made))
    assert (ours - plain).abs().max() <= 2e-3 * plain.abs().max()            # two steps of float16


def test_a_folder_is_its_name_however_it_is_written(again, copy, tiny):
    assert again("--model", f"{tiny / 'teacher'}/")[0] == 0


def test_training_over_its_own_model_is_refused(copy, command, tiny):
    for script in ("train_reflow.py", "distill.py"):
        for model in (tiny / "flow", f"{tiny / 'flow'}/"):
            assert one_line(command(script, "--model", model, "--pairs", copy / "pairs", "--out", tiny / "flow",
                                    "--device", "cpu"), "--out", "--model itself")
        assert one_line(command(script, "--model", tiny / "flow", "--pairs", copy / "pairs", "--out", "",
                                "--device", "cpu"), "--out", "name is empty")


def test_a_trained_model_is_not_replaced(copy, command, tiny):
    """A shipped one: its training is not there, so none could go on."""
    models = Path(__file__).resolve().parent.parent / "models"
    for script in ("train_reflow.py", "distill.py"):
        assert one_line(command(script, "--model", tiny / "flow", "--pairs", copy / "pairs",
                                "--out", models / "mini-2rf", "--device", "cpu"), "mini-2rf", "trained model")
    assert one_line(command("mini.py", "teacher", "--out", models / "mini-sd"), "mini-sd", "trained model")
    assert one_line(command("judge.py", "train", "--out", models / "mini-judge"), "mini-judge", "trained model")


@pytest.mark.parametrize("field", ["checksum", "index", "seed"])
def test_a_wrong_checksum_is_named(copy, field):
    edit(shard(2, copy), lambda tensors: tensors[field].__setitem__(3, tensors[field][3] + 1))
    data = pairs.PairDataset(copy / "pairs")
    for i in range(NUMBER):
        if i != 2 * SHARD + 3:
            data[i]
    with pytest.raises(UserError, match="pair 19 was made from another noise than numpy") as error:
        data[2 * SHARD + 3]
    assert str(shard(2, copy)) in str(error.value) and "\n" not in str(error.value)


OTHER = [("--steps", 4, "steps"), ("--guidance", 3, "guidance"), ("--seed", 12, "seed"), ("--number", 43, "number"),
         ("--shard", 7, "shard")]


@pytest.mark.parametrize("flag, value, named", OTHER)
@pytest.mark.parametrize("gone", [None, 0])
def test_other_settings_into_the_same_folder_are_refused(copy, again, flag, value, named, gone):
    if gone is not None:
        shard(gone, copy).unlink()
    before = {p.name: p.read_bytes() for p in (copy / "pairs").iterdir()}
    assert one_line(again(flag, value), copy / "pairs", f"made otherwise ({named} differ)")
    assert {p.name: p.read_bytes() for p in (copy / "pairs").iterdir()} == before


def test_other_prompts_and_another_model_are_refused(copy, again, tiny):
    assert one_line(again("--model", tiny / "flow"), "model, weights, sampler differ")
    (copy / "prompts.txt").write_text("\n".join(PROMPTS[::-1]))
    assert one_line(again(), "prompts differ")


def test_how_many_at_a_time_is_no_setting(copy, again, made):
    shard(1, copy).unlink()
    assert again("--batch", 3)[0] == 0
    ours, one = pairs.PairDataset(copy / "pairs"), pairs.PairDataset(made / "pairs")
    assert all((ours[i]["latent"] - one[i]["latent"]).abs().max() <= one[i]["latent"].abs().max() * 2 ** -10
               for i in range(8, 16))


def test_mistakes_in_the_command_line(again, copy, tiny):
    assert one_line(again("--steps", 0), "--steps")
    assert one_line(again("--number", 0), "--number")
    assert one_line(again("--frobnicate"), "--frobnicate")
    assert one_line(again("--prompts", copy / "none.txt"), copy / "none.txt")
    assert one_line(again("--model", copy / "none"), copy / "none", "no such model folder")
    (copy / "file").write_text("")
    for words, named in ((["--out", copy / "file" / "pairs"], f"pairs.py: {copy / 'file'}"),
                         (["--steps", 1000, "--out", copy / "other"], "pairs.py: steps is 1000")):
        # the second shows only when the work begins: below the progress bar
        status, out, err = again(*words)
        assert (status == 2 and any(line.startswith(named) for line in re.split("[\r\n]", err))
                and "Traceback" not in err)


# --- prompts ---

def test_prompts_are_the_lines_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff  first \r\n\n\t\nein grüner Ring 🟢\nlast".encode())
    prompts = cli.Prompts(path)
    assert len(prompts) == 3 and [prompts[i] for i in (2, 0, 1)] == ["last", "first", "ein grüner Ring 🟢"]
    assert (prompts.crc == zlib.crc32("first\nein grüner Ring 🟢\nlast".encode())
            and list(prompts) == cli.read_prompts(path))


def test_json_lines_are_prompts_too(tmp_path):
    path, text = tmp_path / "prompts.jsonl", tmp_path / "prompts.txt"
    lines = [json.dumps("a string"), "", json.dumps({"url": "x", "caption": "with a\nline break"}),
             json.dumps({"TEXT": "ünï", "id": 3}), json.dumps({"prompt": " "})]
    path.write_text("\n".join(lines))
    prompts = cli.Prompts(path)
    assert list(prompts) == ["a string", "with a line break", "ünï"]
    text.write_text("\n".join(prompts))
    assert cli.Prompts(text).crc == prompts.crc            # the same pairs, whichever file they came from


@pytest.mark.parametrize("line", ['{"caption": "cut', '{"url": "x"}', "3", "null", '{"prompt": null}', "[]"])
def test_a_json_line_without_a_prompt_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('"fine"\n' + line + "\n")
    with pytest.raises(UserError, match="p.jsonl, line 2: no JSON string"):
        cli.Prompts(tmp_path / "p.jsonl")


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UserError, match="p.txt, line 2: not UTF-8"):
        cli.Prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        cli.Prompts(tmp_path / "p.txt")


def test_millions_of_prompts_are_not_held(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{i} {'x' * 200}\n" for i in range(20_000)))
    tracemalloc.start()
    prompts = cli.Prompts(path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(prompts) == 20_000 and prompts[19_999].startswith("19999 x")
    assert held < 20_000 * 12 + 50_000                     # 8 bytes a prompt, not 200


# --- parts and shards ---

@pytest.mark.parametrize("number, shard", [(1, 1), (36, 20), (512, 1024), (513, 1024), (5000, 1300),
                                           (1_600_000, 32768)])
def test_the_plan_covers_every_pair_once(number, shard):
    shards = list(pairs.plan(number, shard))
    assert [i for parts in shards for rows in parts for i in rows] == list(range(number))
    assert all(len(rows) <= pairs.PART for parts in shards for rows in parts)
    assert ([sum(map(len, parts)) for parts in shards]
            == [min(shard, number - start) for start in range(0, number, shard)])


def test_a_shard_is_about_a_gigabyte_unless_told(command, tiny, tmp_path, copy, again):
    (tmp_path / "two.txt").write_text("a\nb\n")
    assert command("pairs.py", "--model", tiny / "flow", "--prompts", tmp_path / "two.txt",
                   "--out", tmp_path / "new", "--steps", 1, "--device", "cpu")[0] == 0
    assert pairs.PairDataset(tmp_path / "new").info["shard"] == 2 ** 30 // (2 * 4 * 8 * 8)
    shard(1, copy).unlink()                                # a folder that was begun with another size goes on with it
    words = line(tiny, copy)
    at = words.index("--shard")
    assert (command("pairs.py", *words[:at], *words[at + 2:])[0] == 0
            and len(pairs.PairDataset(copy / "pairs")) == NUMBER)


def test_a_shard_cut_or_deleted_while_it_is_in_use_is_named(copy):
    """A mapped file that is cut would end the process by SIGBUS."""
    data = pairs.PairDataset(copy / "pairs")
    data[0], data[17]
    os.truncate(shard(2, copy), 100)
    with pytest.raises(UserError, match="was changed while it was in use; "
                                        "delete it and run the same pairs.py line again") as error:
        data[17]
    assert str(shard(2, copy)) in str(error.value)
    shard(3, copy).unlink()
    with pytest.raises(UserError, match="is missing; run the same pairs.py line again"):
        data[25]
    data[0]


def test_batches_ahead_are_the_batches(made):
    data, again = pairs.PairDataset(made / "pairs"), pairs.PairDataset(made / "pairs")
    ahead = training.ahead(lambda step: data.batch([step, (7 * step + 3) % NUMBER]))
    for step in (0, 1, 2, 5, 6):                           # also where a step is left out
        noise, latent, prompts = ahead(step)
        wanted = again.batch([step, (7 * step + 3) % NUMBER])
        assert torch.equal(noise, wanted[0]) and torch.equal(latent, wanted[1]) and prompts == wanted[2]


def test_graphs_are_refused_without_a_gpu(again):
    assert one_line(again("--graphs"), "--graphs is for a GPU; leave it out")


def test_pairs_of_a_small_set_are_kept_and_of_a_large_one_are_not(made, monkeypatch):
    data = pairs.PairDataset(made / "pairs")
    one, three = data[1], data[3]
    data.batch([3, 1])
    assert set(data.kept) == {1, 3}
    with monkeypatch.context() as patch:
        patch.setattr(pairs.PairDataset, "__getitem__", lambda *args: pytest.fail("read again"))
        noise, latent, prompts = data.batch([1, 3, 1])
    assert all(torch.equal(x, row["noise"]) and torch.equal(y, row["latent"]) and prompt == row["prompt"]
               for x, y, prompt, row in zip(noise, latent, prompts, (one, three, one)))
    monkeypatch.setattr(shards, "KEPT", len(data) * 8 * one["noise"].numel() - 1)
    data = pairs.PairDataset(made / "pairs")
    data.batch([3, 1])
    assert not data.kept


def test_pairs_of_other_weights_are_refused(made, copy, tiny, command):
    data = pairs.PairDataset(made / "pairs")
    teacher, flow = InstaFlow.load(tiny / "teacher"), InstaFlow.load(tiny / "flow")
    data.check(teacher, tiny / "teacher")
    result = command("train_reflow.py", "--model", tiny / "flow", "--pairs", copy / "pairs", "--out", copy / "out",
                     "--device", "cpu")
    assert (one_line(result, copy / "pairs", "was made by", "as its weights were then", tiny / "flow")
            and not (copy / "out").exists())
    flow.info["pairs"] = data.info                         # a student of these very pairs
    data.check(flow, tiny / "flow")
    with pytest.raises(UserError, match="was made by"):
        # distillation: the 2-rectified flow with the pairs it was trained on, not its own
        data.check(flow, tiny / "flow", seen=False)
    data.info.pop("weights")                               # pairs from before it was written down
    data.check(InstaFlow.load(tiny / "teacher"), tiny / "flow")


# --- verify and preview ---

def test_verify_says_what_is_there(command, made, copy):
    status, out, err = command("pairs.py", "verify", "--pairs", made / "pairs")
    x = torch.cat([load_file(shard(k, made))["latent"] for k in range(6)]).float()
    assert status == 0 and out.startswith(
        f"{made / 'pairs'}: 42 pairs in 6 shards, all as they should be; latents [4, 8, 8], "
        f"mean {x.mean():.3f}, deviation {x.std(correction=0):.3f}; ")
    assert "3 dpm steps, guidance 2.0" in out


SPOILT = [("checksum", lambda t: t["checksum"].__setitem__(3, 5), "was made from another noise"),
          ("latent", lambda t: t["latent"].__setitem__((1, 0, 0, 0), float("nan")),
           "the latent of pair 17 is not finite"),
          ("index", lambda t: t["index"].__setitem__(1, 15), "does not hold the pairs 16 to 23"),
          ("prompt", lambda t: t["prompt"].__setitem__(0, 255), "not UTF-8"),
          ("rows", lambda t: t.update({k: v[:4] for k, v in t.items() if k != "prompt"}),
           "does not hold the pairs 16 to 23")]


@pytest.mark.parametrize("change, said", [row[1:] for row in SPOILT], ids=[row[0] for row in SPOILT])
def test_verify_names_what_is_wrong(command, copy, change, said):
    edit(shard(2, copy), change)
    edit(shard(4, copy), lambda t: t["seed"].__setitem__(0, 99))
    status, out, err = command("pairs.py", "verify", "--pairs", copy / "pairs")
    assert status == 2 and said in out and len(out.strip().splitlines()) == 2 and "shard-00004" in out
    assert f"{copy / 'pairs'}: 2 of 6 shards are wrong; delete them" in err and "Traceback" not in err


def test_verify_names_every_shard_that_was_cut(command, copy):
    for k in (1, 3):
        os.truncate(shard(k, copy), 500)
    status, out, err = command("pairs.py", "verify", "--pairs", copy / "pairs")
    first, second = out.strip().splitlines()
    assert status == 2 and "shard-00001" in first and "shard-00003" in second and out.count("no whole shard") == 2
    assert f"{copy / 'pairs'}: 2 of 6 shards are wrong" in err


def test_verify_names_what_is_missing(command, copy):
    shard(5, copy).unlink()
    assert one_line(command("pairs.py", "verify", "--pairs", copy / "pairs"), shard(5, copy), "is missing")


def test_preview_decodes_pairs_under_their_prompts(command, made, tiny, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(pairs, "grid", lambda rows, labels, columns: shown.append((rows, columns)) or rows[0][0])
    status, out, err = command("pairs.py", "preview", "--pairs", made / "pairs", "--out", tmp_path / "p.png",
                               "--number", 3, "--device", "cpu")
    assert status == 0 and out == f"{tmp_path / 'p.png'}\n" and Image.open(tmp_path / "p.png").size == (16, 16)
    (pictures,), columns = shown[0]
    assert columns == [f"{i}: {PROMPTS[i % 7]}" for i in (0, 20, 41)]
    model, data = InstaFlow.load(tiny / "teacher"), pairs.PairDataset(made / "pairs")
    wanted = ((model.decode(data[20]["latent"][None])[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(np.asarray(pictures[1]).astype(float) - wanted).max() <= 1


def test_mistakes_of_verify_and_preview(command, made, tmp_path):
    assert one_line(command("pairs.py", "verify"), "pairs.py verify", "--pairs")
    assert one_line(command("pairs.py", "verify", "--pairs", tmp_path), tmp_path, "holds no pairs")
    assert one_line(command("pairs.py", "preview", "--pairs", made / "pairs", "--out", "p.jpg"), "--out p.jpg")
    assert one_line(command("pairs.py", "preview", "--pairs", made / "pairs", "--model", tmp_path / "none"),
                    tmp_path / "none")
