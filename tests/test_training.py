import builtins
import errno
import json
import os
import re
import subprocess
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import checkpoint
import log as log_module
import training
from cli import UserError
from conftest import one_line, relative_error, without_time
from instaflow import CONFIGS, InstaFlow
from text import TextTower
from unet import UNet
from vae import VAE

ONE = training.World(0, 1, torch.device("cpu"))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))


# --- EMA, learning rate, draws ---

@pytest.mark.parametrize("first, decay", [(0, 0.9999), (0, 0.15), (100_000, 0.9999)])
def test_ema_is_its_formula(first, decay):
    ema, model = net(1), net(2)
    wanted = [p.detach().double().clone() for p in ema.parameters()]
    for step in range(first, first + 6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        before = [p.detach().clone() for p in model.parameters()]
        training.update_ema(ema, model, step, decay)
        d = min(decay, (1 + step) / (10 + step))
        wanted = [d * w + (1 - d) * p.double() for w, p in zip(wanted, before)]
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    for e, w in zip(ema.parameters(), wanted):
        assert (e - w).abs().max() < 1e-6
        assert not e.grad_fn


def test_learning_rate_by_hand():
    rate = lambda step, **kw: training.learning_rate(step, 0.5, 4, 10, **kw)
    assert [rate(s) for s in (0, 1, 2, 3, 4, 9)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert rate(0, cosine=True) == pytest.approx(0.125)
    assert rate(5, cosine=True) == pytest.approx(0.25)                       # half way down
    assert rate(8, cosine=True) == pytest.approx(0.5 * 0.5 * (1 + np.cos(0.8 * np.pi)))
    assert 0 < rate(9, cosine=True) < 0.5 * 0.03
    assert rate(10, cosine=True) == pytest.approx(0)
    assert training.learning_rate(0, 0.5, 0, 10) == 0.5                      # no warm-up


def test_optimiser_step_clips_and_takes_the_rate_it_is_given():
    weight = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(weight.parameters(), lr=123.0)
    for gradient, moved in ((30.0, 0.25 * 2), (-1.0, -0.25 * 1)):            # clipped to 2, and left alone
        before, weight.weight.grad = weight.weight.item(), torch.tensor([[gradient]])
        assert training.optimiser_step(optimizer, weight, 0.25, clip=2.0) == pytest.approx(abs(gradient))
        assert before - weight.weight.item() == pytest.approx(moved, abs=1e-5)
        assert weight.weight.grad is None


@pytest.mark.parametrize("batch, size", [(1, 5), (4, 10), (10, 10), (7, 3), (64, 10), (5, 1)])
def test_every_item_comes_once_an_epoch(batch, size):
    epochs = 6
    count = -(-epochs * size // batch)
    order = np.concatenate([training.batch_indices(3, step, batch, size)
                            for step in range(count)])[:epochs * size].reshape(epochs, size)
    assert np.array_equal(np.sort(order, 1), np.tile(np.arange(size), (epochs, 1)))
    if size > 4:
        assert len({tuple(epoch) for epoch in order}) == epochs              # each its own permutation


def test_batches_have_no_state():
    forth = [training.batch_indices(0, step, 4, 10) for step in range(8)]
    np.random.seed(9)
    torch.manual_seed(9)
    back = [training.batch_indices(0, step, 4, 10) for step in reversed(range(8))][::-1]
    assert np.array_equal(forth, back)
    assert not np.array_equal(forth[0], training.batch_indices(1, 0, 4, 10))
    a, b = (training.step_generator(0, 5).random(4) for _ in range(2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, training.step_generator(0, 6).random(4))
    assert not np.array_equal(a, training.step_generator(1, 5).random(4))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_shares_tile_the_batch(size):
    worlds = [training.World(rank, size, torch.device("cpu")) for rank in range(size)]
    for batch in (np.arange(12), torch.arange(12), list(range(12))):
        shares = [w.share(batch) for w in worlds]
        assert {len(s) for s in shares} == {12 // size}
        assert np.array_equal(np.concatenate([np.asarray(s) for s in shares]), np.arange(12))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="--batch 10 does not divide among 4 processes"):
        training.World(0, 4, torch.device("cpu")).share(np.arange(10))


@pytest.mark.parametrize("device", ["nonsense", "", "meta", "cuda:99"])
@pytest.mark.parametrize("script", ["pairs.py", "train_reflow.py", "distill.py"])
def test_a_device_that_is_none_is_refused(command, script, device):
    assert one_line(command(script, "--device", device), "argument --device: ", "cannot be used")


@pytest.mark.parametrize("flag, value", [
    ("--seed", "-1"), ("--seed", "1.5"), ("--seed", str(2 ** 63)), ("--seed", "\u00b2"), ("--batch", "0"),
    ("--batch", "+-1"), ("--iterations", "ten"), ("--lr", "fast"), ("--iters", "3")])
def test_a_flag_that_cannot_be_is_refused(command, flag, value):
    words = ("--model", "m", "--pairs", "p", "--out", "o", flag, value)
    assert one_line(command("train_reflow.py", *words), flag, value, "--help")


# --- files ---

def fail_rename(monkeypatch):
    def replace(source, target):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(checkpoint.os, "replace", replace)


def fail_full_disk(monkeypatch):
    class Full:
        """A file of which half can be written."""
        def __init__(self, *args):
            self.file = builtins.open(*args)

        def write(self, data):
            self.file.write(data[:len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()
    monkeypatch.setattr(checkpoint, "open", Full, raising=False)


def fail_sync(monkeypatch):
    def fsync(number):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint.os, "fsync", fsync)


@pytest.mark.parametrize("fail", [fail_rename, fail_full_disk, fail_sync])
@pytest.mark.parametrize("old", [b"the old one, whole", None])
def test_a_write_that_fails_leaves_the_old_file(monkeypatch, tmp_path, fail, old):
    path = tmp_path / "sub" / "file.bin"
    if old:
        training.write(path, old)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(OSError, match="file.bin") as caught:
            training.write(path, b"new" * 1000)
    assert caught.value.filename == str(path)
    assert [p.name for p in path.parent.iterdir()] == (["file.bin"] if old else [])          # no temporary file left
    assert not old or path.read_bytes() == old
    training.write(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("save", [Image.new("RGB", (9, 5)).save, Figure(figsize=(1, 1)).savefig])
@pytest.mark.parametrize("name, head", [("a.png", b"\x89PNG"), ("a.JPG", b"\xff\xd8\xff")])
def test_a_picture_is_of_its_endings_format_whole_or_not_there(monkeypatch, tmp_path, save, name, head):
    with monkeypatch.context() as patch:
        fail_full_disk(patch)
        with pytest.raises(OSError, match=name):
            checkpoint.write_by(save, tmp_path / name)
    assert not list(tmp_path.iterdir())
    checkpoint.write_by(save, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(head)


@pytest.mark.parametrize("line", [("scenes.py", "--grid", "grid.png"),
                                  ("scenes.py", "--pictures", 2, "--out", "scenes")])
def test_a_full_disk_leaves_no_half_picture(monkeypatch, tmp_path, command, line):
    monkeypatch.chdir(tmp_path)
    fail_full_disk(monkeypatch)
    one_line(command(*line), ".png: No space left on device", "free some space")
    assert not list(tmp_path.rglob("*.*"))


def test_a_full_disk_is_one_line(monkeypatch, tmp_path, command, tiny):
    (tmp_path / "prompts.txt").write_text("a\n")
    fail_full_disk(monkeypatch)
    result = command("pairs.py", "--model", tiny / "flow", "--prompts", tmp_path / "prompts.txt",
                     "--out", tmp_path / "pairs", "--steps", 1, "--device", "cpu")
    status, out, err = result
    assert status == 2 and not out
    # but for the progress bar
    lines = [line for line in re.split("[\r\n]", err) if line.strip() and not line.startswith("pairs: ")]
    assert (len(lines) == 1 and lines[0].startswith("pairs.py: ")
            and "shard-00000.safetensors: No space left on device; free some space" in lines[0])
    assert list((tmp_path / "pairs").iterdir()) == []


def test_what_is_renamed_was_written_and_synced_before(monkeypatch, tmp_path):
    """The order is what makes a file whole after a power cut."""
    done, (fsync, replace) = [], (checkpoint.os.fsync, checkpoint.os.replace)
    monkeypatch.setattr(checkpoint.os, "fsync",
                        lambda number: (done.append(("sync", checkpoint.os.fstat(number).st_size)), fsync(number)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (done.append(("rename", a.read_bytes())), replace(a, b)))
    training.write(tmp_path / "file", b"12345")
    assert done == [("sync", 5), ("rename", b"12345")]


TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3).T / 7,    # not contiguous
           "b.c": torch.tensor(3), "h": torch.tensor([0.1, 70000.0, -0.0], dtype=torch.bfloat16),
           "e": torch.zeros(0, 4)}


def test_checkpoint_round_trip(tmp_path):
    metadata = {"recipe": {"lr": 1e-6, "name": "ü", "none": None, "yes": True, "n": 3}}
    training.save_checkpoint(tmp_path, 1234, TENSORS, metadata)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00001234.safetensors"]
    step, tensors, read = training.load_checkpoint(tmp_path)
    assert (step, read) == (1234, metadata)
    assert tensors.keys() == TENSORS.keys()
    for k, v in TENSORS.items():
        assert tensors[k].dtype == v.dtype and torch.equal(tensors[k], v)


def test_no_checkpoint_is_step_0(tmp_path):
    for name in ("step-00000007.safetensors.123.tmp", "step-12.safetensors", "step-00000001.png", "log.jsonl"):
        (tmp_path / name).write_bytes(b"something else")
    for folder in (tmp_path, tmp_path / "none"):
        assert training.load_checkpoint(folder) == (0, None, {})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    for step in (5, 10, 15, 1000):
        training.save_checkpoint(tmp_path, step, {"step": torch.tensor(step)}, keep=keep)
    assert (sorted(p.name for p in tmp_path.iterdir())
            == [f"step-{s:08d}.safetensors" for s in (5, 10, 15, 1000)[-keep:]])


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [cut, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"\0" * 4096),
                                    lambda p: (p.unlink(), p.mkdir())], ids=["cut", "empty", "zeros", "folder"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, damage):
    for step in (3, 6):
        training.save_checkpoint(tmp_path, step, {"step": torch.tensor(step)})
    damage(tmp_path / "step-00000006.safetensors")
    step, tensors, _ = training.load_checkpoint(tmp_path)
    assert step == 3 and tensors["step"] == 3
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and "step-00000006.safetensors is damaged" in err and err.count("\n") == 1
    cut(tmp_path / "step-00000003.safetensors")
    assert training.load_checkpoint(tmp_path) == (0, None, {})


def test_a_safetensors_file_as_the_library_reads_it(tmp_path):
    """The header is written here; the library's reader, which checks every offset, has to agree."""
    tensors = TENSORS | {"long name with \" and ü": torch.tensor([True, False, True]),
                         "i": torch.arange(3, dtype=torch.uint8),
                         "l": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    training.write_tensors(tmp_path / "file", tensors, {"note": "ü"})
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(read[k].dtype == v.dtype and read[k].shape == v.shape and torch.equal(read[k], v)
               for k, v in tensors.items())
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}
    training.write_tensors(tmp_path / "half", {"a": TENSORS["a"]}, dtype=torch.float16)
    assert torch.equal(load_file(tmp_path / "half")["a"], TENSORS["a"].half())


def test_a_checkpoint_is_written_one_tensor_at_a_time(monkeypatch, tmp_path):
    """What is 14 GB at full size must not be in memory twice, let alone thrice."""
    # 8 MiB each
    tensors = {str(i): torch.randn(2, 2 ** 16, 4, 4).to(memory_format=torch.channels_last) for i in range(24)}
    resident, seen = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2 ** 20, []

    class Watching:
        def __init__(self, *args):
            self.file = builtins.open(os.devnull, "wb")

        def write(self, data):
            seen.append(resident())

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()
    before = resident()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "open", Watching, raising=False)
        patch.setattr(checkpoint.os, "fsync", lambda number: None)
        patch.setattr(checkpoint.os, "replace", lambda a, b: None)
        training.write_tensors(tmp_path / "file", tensors)
    assert len(seen) == 25 and max(seen) - before < 96       # of 192; malloc keeps a few of what was freed


def test_a_later_checkpoint_that_was_passed_over_keeps_its_place_to_itself(tmp_path):
    for step in (3, 6, 9):
        training.save_checkpoint(tmp_path, step, {"step": torch.tensor(step)})
    cut(tmp_path / "step-00000009.safetensors")
    training.save_checkpoint(tmp_path, 8, {"step": torch.tensor(8)})         # gone on from 6, other --save-every
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}.safetensors" for s in (6, 8, 9)]
    assert training.load_checkpoint(tmp_path)[0] == 8


def test_little_room_is_said_beforehand(monkeypatch, tmp_path, capsys):
    tensors = {"a": torch.zeros(2 ** 18)}                                     # 1 MiB
    for free, said in ((3 * 2 ** 20, False), (3 * 2 ** 20 - 1, True)):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: Namespace(free=free))
        checkpoint.warn_of_little_room(tmp_path, 2 ** 20)
        err = capsys.readouterr().err
        assert err.startswith("warning: ") == said and err.count("\n") == said
    training.save_checkpoint(tmp_path, 1, tensors)
    checkpoint.warn_of_little_room(tmp_path, 2 ** 20)                         # two more, now
    assert not capsys.readouterr().err


def test_room_is_asked_for_moments_that_are_not_there_yet(monkeypatch, tmp_path):
    asked, model, ema = [], nn.Linear(256, 256), nn.Linear(256, 256)
    monkeypatch.setattr(training, "warn_of_little_room", lambda folder, size: asked.append(size))
    settings, optimizer = Namespace(iterations=1, lr=1e-3, warmup=1, ema=0.9, log_every=1,
                                    save_every=1), training.adamw(model, 1e-3)
    for _, log, _ in training.steps(settings, ONE, tmp_path, model, ema, optimizer, {}):
        model(torch.ones(1, 256)).sum().backward()
        log.add(torch.ones(1), gradient=training.optimiser_step(optimizer, model, 1e-3))
    assert asked == [pytest.approx((tmp_path / "step-00000001.safetensors").stat().st_size, rel=0.01)]


def test_a_full_disk_for_real(tmp_path, tiny):
    """A tmpfs of two megabytes: the run stops with one line, and what it had written stays as it was."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    try:
        training.save_checkpoint(disk, 1, {"a": torch.zeros(2 ** 18)})       # 1 MiB
        whole = (disk / "step-00000001.safetensors").read_bytes()
        with pytest.raises(OSError, match="No space left") as caught:
            training.save_checkpoint(disk, 2, {"a": torch.zeros(2 ** 19)})
        assert caught.value.filename == str(disk / "step-00000002.safetensors")
        assert ([p.name for p in disk.iterdir()] == ["step-00000001.safetensors"]
                and (disk / "step-00000001.safetensors").read_bytes() == whole)
        assert training.load_checkpoint(disk)[0] == 1
    finally:
        subprocess.run(["umount", disk], check=True)


# --- going on where a run was killed ---

SETTINGS = Namespace(iterations=11, lr=0.05, warmup=3, ema=0.9, log_every=2, save_every=3)
RECIPE = {"lr": 0.05, "seed": 0, "cosine": True}


class Killed(Exception):
    pass


def train(folder, kill=None, recipe=RECIPE):
    """A loop as train_reflow.py's, on points of R^3 -> (model, EMA, log lines). kill: the step at which it dies."""
    model, ema = net(5), net(5).requires_grad_(False)
    optimizer = training.adamw(model, SETTINGS.lr)
    for step, log, lr in training.steps(SETTINGS, ONE, folder, model, ema, optimizer, recipe, cosine=True):
        if step == kill:
            raise Killed
        rows = training.batch_indices(0, step, 4, 10)
        x = (torch.from_numpy(training.step_generator(0, step).standard_normal((4, 3)).astype(np.float32))
             + torch.from_numpy(rows)[:, None] / 10)
        losses = (model(x)[:, 0] - x.sum(1)).square()
        losses.mean().backward()
        log.add(losses, torch.from_numpy(rows) / 10, gradient=training.optimiser_step(optimizer, model, lr))
    return model, ema, training.Log(folder, SETTINGS.iterations, writes=False).lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def test_training_by_hand(whole, tmp_path):
    """steps() is what it says: learning rate, EMA, log and checkpoints of a loop written out."""
    model, ema = net(5), net(5)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=1e-2), []
    for step in range(SETTINGS.iterations):
        rows = training.batch_indices(0, step, 4, 10)
        x = (torch.from_numpy(training.step_generator(0, step).standard_normal((4, 3)).astype(np.float32))
             + torch.from_numpy(rows)[:, None] / 10)
        loss = (model(x)[:, 0] - x.sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 0.05 * min(1, (step + 1) / 3) * 0.5 * (1 + np.cos(np.pi * step / 11))
        optimizer.step()
        d = min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for e, p in zip(ema.parameters(), model.parameters()):
                e.copy_(d * e + (1 - d) * p)
        losses.append(loss.item())
    for ours, hand in zip((*whole[0].parameters(), *whole[1].parameters()), (*model.parameters(), *ema.parameters())):
        assert (ours - hand).abs().max() < 1e-5
    assert [line["step"] for line in whole[2]] == [2, 4, 6, 8, 10, 11]
    wanted = [np.mean(losses[i:i + 2]) for i in range(0, 11, 2)]
    assert np.abs(np.array([line["loss"] for line in whole[2]]) - wanted).max() < 1e-5


@pytest.mark.parametrize("kills", [(8,), (3,), (2,), (4, 4, 7, 10), (0, None)], ids=str)
def test_a_killed_run_ends_as_an_undisturbed_one_bitwise(whole, tmp_path, kills):
    for kill in kills:
        (tmp_path / "step-00000003.safetensors.99.tmp").write_bytes(b"what a kill left")
        with pytest.raises(Killed) if kill is not None else nullcontext():   # None: it ends, and nothing is done again
            train(tmp_path, kill)
    model, ema, lines = train(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    for (k, ours), undisturbed in zip([*model.state_dict().items(), *ema.state_dict().items()],
                                      [*whole[0].state_dict().values(), *whole[1].state_dict().values()]):
        assert torch.equal(ours, undisturbed), k
    assert [line["step"] for line in lines] == [line["step"] for line in whole[2]]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == lines
    # went on from 6, where a line of the log had ended
    if kills == (8,):
        assert without_time(lines) == without_time(whole[2])
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000009.safetensors", "step-00000011.safetensors"]


def test_an_ended_run_can_be_made_longer(tmp_path, monkeypatch):
    """But for a cosine, whose learning rates say where it ends."""
    monkeypatch.setattr(training, "learning_rate", lambda step, lr, warmup, iterations, cosine: lr)
    wanted = train(tmp_path / "long")[0].state_dict()
    monkeypatch.setattr(SETTINGS, "iterations", 5)
    train(tmp_path / "longer")
    monkeypatch.setattr(SETTINGS, "iterations", 11)
    assert all(torch.equal(v, wanted[k]) for k, v in train(tmp_path / "longer")[0].state_dict().items())


def test_other_settings_are_refused_and_named(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, 4)
    with pytest.raises(UserError, match=r"holds a run with other settings \(seed, cosine\); "
                                        "give the same ones, or another --out") as caught:
        train(tmp_path, recipe={"lr": 0.05, "seed": 1, "cosine": False})
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    # a setting that the checkpoint does not know
    with pytest.raises(UserError, match=r"\(batch\)"):
        train(tmp_path, recipe=RECIPE | {"batch": 4})
    assert training.load_checkpoint(tmp_path)[0] == 3
    train(tmp_path)


def trained(steps, start=None):
    """Adam's steps on net(5), optionally gone on from packed tensors -> packed tensors."""
    model, ema = net(5), net(5)
    optimizer, done = training.adamw(model, 0.05), 0
    if start:
        done, tensors = start
        with torch.no_grad():
            for p in (*model.parameters(), *ema.parameters()):
                p.fill_(9.0)
        training.unpack(tensors, model, ema, optimizer)
    for step in range(done, steps):
        x = torch.from_numpy(training.step_generator(1, step).standard_normal((4, 3)).astype(np.float32))
        model(x).square().mean().backward()
        training.optimiser_step(optimizer, model, 0.05)
        training.update_ema(ema, model, step)
    return training.pack(model, ema, optimizer)


def test_unpacked_adamw_goes_on_bitwise(tmp_path):
    training.save_checkpoint(tmp_path, 4, trained(4))
    step, tensors, _ = training.load_checkpoint(tmp_path)
    ours, undisturbed = trained(9, (step, tensors)), trained(9)
    assert ours.keys() == undisturbed.keys() and sum(k.startswith("optimizer.") for k in ours) == 3 * 4
    for k in ours:
        assert torch.equal(ours[k], undisturbed[k]), k
    forgotten = trained(9, (step, tensors | {k: torch.zeros_like(v) for k, v in tensors.items()
                                             if k.endswith("exp_avg")}))
    assert not torch.equal(forgotten["model.0.weight"], undisturbed["model.0.weight"])     # the moments matter here


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_unpacked_moments_go_on_bitwise_in_either_memory_order(tmp_path, memory_format):
    """A checkpoint is contiguous; fused AdamW walks weights and moments side by side, whatever their strides."""
    def train(steps, start=None):
        torch.manual_seed(0)
        model, ema = (nn.Conv2d(4, 6, 3).to(memory_format=memory_format) for _ in range(2))
        optimizer, done = training.adamw(model, 0.05), 0
        if start:
            done, tensors, _ = start
            training.unpack(tensors, model, ema, optimizer)
        for step in range(done, steps):
            x = torch.from_numpy(training.step_generator(1, step).standard_normal((2, 4, 5, 5)).astype(np.float32))
            model(x).square().mean().backward()
            training.optimiser_step(optimizer, model, 0.05)
        training.save_checkpoint(tmp_path, steps, training.pack(model, ema, optimizer))
        return model.weight.detach()
    undisturbed = train(6)
    for path in tmp_path.iterdir():
        path.unlink()
    train(3)
    assert torch.equal(train(6, training.load_checkpoint(tmp_path)), undisturbed)


PACKED = ["model.0.weight", "ema.2.bias", "optimizer.0.weight.exp_avg", "optimizer.2.bias.step"]


@pytest.mark.parametrize("key", PACKED)
def test_a_key_too_few_is_an_error(key):
    tensors = trained(1)
    del tensors[key]
    with pytest.raises((RuntimeError, KeyError), match=key.split(".", 1)[1].replace(".", r"\.")):
        trained(1, (1, tensors))


@pytest.mark.parametrize("key", ["model.4.weight", "ema.0.other", "optimizer.4.weight.exp_avg",
                                 "optimizer.0.weight.other", "else"])
def test_a_key_too_many_is_an_error(key):
    with pytest.raises((RuntimeError, KeyError), match=key.split(".", 1)[-1].replace(".", r"\.")):
        trained(1, (1, trained(1) | {key: torch.zeros(1)}))


def test_a_shape_that_differs_is_an_error():
    with pytest.raises(RuntimeError, match="0.weight"):
        trained(1, (1, trained(1) | {"model.0.weight": torch.zeros(8, 4)}))


def test_recipe_is_what_decides_the_result(tmp_path):
    args = Namespace(out="x", device="cpu", log_every=1, save_every=2, sample_every=3, lr=1e-3, seed=0, batch=4,
                     model="m", pairs="p")
    assert training.recipe(args) == {"lr": 1e-3, "seed": 0, "batch": 4, "model": "m", "pairs": "p"}


def test_a_checkpoint_from_before_the_pseudo_huber_flag_goes_on():
    args = Namespace(lr=1.0, huber=False)
    assert training.recipe(args) == {"lr": 1.0}
    assert training.recipe(Namespace(lr=1.0, huber=True)) == {"lr": 1.0, "huber": True}


@pytest.mark.parametrize("old, new", [({"lr": 1}, {"lr": 1, "huber": True}), ({"lr": 1, "huber": True}, {"lr": 1})])
def test_a_setting_that_only_one_side_has_is_a_difference(tmp_path, old, new):
    training.save_checkpoint(tmp_path, 1, {"a": torch.zeros(1)}, {"recipe": old})
    with pytest.raises(UserError, match=r"other settings \(huber\)"):
        checkpoint.resume(tmp_path, None, None, None, new)


# --- skipped steps, memory, processes ---

@pytest.mark.parametrize("gradient, taken", [(999.0, True), (1001.0, False), (float("nan"), False),
                                             (float("inf"), False), (-float("inf"), False)])
def test_a_step_is_skipped_where_the_gradient_is_none(gradient, taken):
    weight = nn.Linear(1, 1, bias=False)
    optimizer, before = training.adamw(weight, 0.1), weight.weight.item()
    weight.weight.grad = torch.tensor([[gradient]])
    norm = training.optimiser_step(optimizer, weight, 0.1, explode=1000.0)
    assert norm == (pytest.approx(999) if taken else float("inf"))
    assert ((weight.weight.item() != before) == taken and weight.weight.grad is None
            and np.isfinite(weight.weight.item()))
    assert bool(optimizer.state) == taken                                    # AdamW's own count of steps as well


def test_skipped_steps_are_counted_and_too_many_are_an_end(tmp_path):
    log = training.Log(tmp_path)
    for step in range(20):
        log.add(torch.tensor([1.0, float("nan")]), gradient=float("inf"))
    log.add(torch.tensor([3.0]), gradient=5.0)
    line = log.write(21, ONE)
    # NaN losses are left out
    assert line["skipped"] == 20 and line["gradient"] == 5.0 and line["loss"] == pytest.approx(23 / 21)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == line
    with pytest.raises(UserError, match="21 of the last 22 steps") as caught:
        log.add(torch.tensor([1.0]), gradient=float("inf"))
    assert "\n" not in str(caught.value)
    log = training.Log(tmp_path)
    for step in range(500):                                                  # one in ten, for ever, is no end
        log.add(torch.tensor([1.0]), gradient=float("inf") if step % 10 == 0 else 1.0)


def test_recomputed_activations_give_the_same_gradients():
    unet = {}
    for again in (False, True):
        model = InstaFlow.random("mini").unet.requires_grad_(True)
        if again:
            training.checkpoint_gradients(model, torch.device("cpu"))
        kept = []
        with (torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
              training.autocast(torch.device("cpu"), True)):
            out = model(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500.0]),
                        torch.ones(1, 3, 64))
        out.square().sum().backward()
        unet[again] = {k: p.grad for k, p in model.named_parameters()}, sum(kept)
    assert all(torch.equal(v, unet[True][0][k]) for k, v in unet[False][0].items())
    assert unet[True][1] < 0.3 * unet[False][1]


def test_attention_is_written_out_for_a_backward_pass_alone(monkeypatch):
    """On a CPU with bf16 the fused kernel's backward pass is slow, its forward pass is not."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    with training.autocast(torch.device("cpu"), True):
        assert not torch.backends.cuda.flash_sdp_enabled()
    with torch.no_grad(), training.autocast(torch.device("cpu"), True):
        assert torch.backends.cuda.flash_sdp_enabled()


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "10"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="LOCAL_RANK is 2, but this machine has 2 GPUs; "
                                        "give torchrun --nproc-per-node 2"):
        training.start("cuda")


@pytest.mark.parametrize("world, given", [
    (ONE, {}), (training.World(0, 2, torch.device("cuda")), {}),
    (training.World(0, 1, torch.device("cuda")), {"accumulate": 2}),
    (training.World(0, 1, torch.device("cuda")), {"checkpoint": True}),
    (training.World(0, 1, torch.device("cuda")), {"compile": True})], ids=str)
def test_graphs_are_refused_where_they_cannot_be(world, given):
    args = Namespace(**dict(lr=1e-3, weight_decay=1e-2, batch=2, accumulate=1, checkpoint=False, compile=False,
                            graphs=True) | given)
    with pytest.raises(UserError, match="--graphs is for one process with a GPU"):
        training.prepare(net(), args, world)


@pytest.mark.slow
def test_compiled_blocks_train_the_same(tiny):
    losses = {}
    for compiled in (False, True):
        unet = InstaFlow.load(tiny / "teacher").unet.requires_grad_(True)
        args = Namespace(lr=1e-3, weight_decay=1e-2, checkpoint=compiled, compile=compiled, graphs=False)
        ema, optimizer, run = training.prepare(unet, args, ONE)
        losses[compiled] = []
        for step in range(3):
            with training.autocast(ONE.device, True):
                loss = run(torch.full((2, 4, 8, 8), 0.5), torch.tensor([500.0, 3.0]),
                           torch.ones(2, 3, 8)).square().mean()
            loss.backward()
            training.optimiser_step(optimizer, unet, 1e-2)
            losses[compiled].append(loss.item())
        assert unet.state_dict().keys() == ema.state_dict().keys()           # checkpoints are those of a run without
    assert losses[True] == pytest.approx(losses[False], rel=1e-3) and losses[True][2] < 0.9 * losses[True][0]


@pytest.mark.slow
def test_a_compiled_decoder_has_the_same_gradients(tiny):
    gradients = []
    for compiled in (False, True):
        vae, z = InstaFlow.load(tiny / "teacher").vae, torch.full((2, 4, 8, 8), 0.5, requires_grad=True)
        if compiled:
            training.checkpoint_gradients(vae, ONE.device)
            training.compile_blocks(vae.decoder)
        with training.autocast(ONE.device, True):
            vae.decode(z).square().mean().backward()
        gradients.append(z.grad)
    assert relative_error(*gradients) <= 1e-4


# --- the log ---

def test_operations_of_stable_diffusion_are_the_known_ones():
    """0.803 TFLOP for the U-Net and 2.515 for the decoder, a picture of 512 pixels, counted by others."""
    unet, vae, text = CONFIGS["sd15"]
    with torch.device("meta"):
        model = InstaFlow(UNet(unet), VAE(vae), TextTower(text), {"prediction": "velocity"})
    operations = model.operations()
    assert (operations["unet"] / 1e12 == pytest.approx(0.803, abs=0.001)
            and operations["decoder"] / 1e12 == pytest.approx(2.515, abs=0.01))


def test_share_of_the_peak_and_time_left_by_hand(monkeypatch, tmp_path):
    monkeypatch.setattr(log_module, "hardware", lambda: "NVIDIA A100-SXM4-80GB")
    log = training.Log(tmp_path, 40, total=100, flops=3e12)
    log.started -= 100
    log.add(torch.ones(500))
    # 500 samples of 3 TFLOP in 100 s, of 312 TFLOP/s; 10 steps in 100 s, 50 to go
    line = log.write(50, ONE)
    assert (line["mfu"] == pytest.approx(5 * 3 / 312, rel=0.01)
            and line["hours_left"] == pytest.approx(500 / 3600, rel=0.01))
    assert line["samples_per_second"] == pytest.approx(5, rel=0.01) and 0.01 < line["memory_gib"] < 100
    assert ([log_module.peak(name) for name in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "Tesla T4")]
            == [756e12, 989e12, 989e12, None])
    monkeypatch.setattr(log_module, "hardware", lambda: "2 cores of something")
    log.add(torch.ones(5))
    assert "mfu" not in log.write(60, ONE)


def write_log(folder, text):
    (folder / "log.jsonl").write_text(text)


@pytest.mark.parametrize("last", ['{"step": 40, "lo', '{"step"', "", "\0\0\0"], ids=repr)
def test_the_log_drops_what_is_done_again_and_a_cut_line(tmp_path, last):
    write_log(tmp_path, "".join(json.dumps({"step": s, "loss": s / 7}) + "\n" for s in (10, 20, 30)) + last)
    log = training.Log(tmp_path, 20)
    assert log.lines == [{"step": 10, "loss": 10 / 7}, {"step": 20, "loss": 20 / 7}]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == log.lines
    log.add(torch.tensor([2.0]))
    log.write(30, ONE)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [10, 20, 30]


def test_only_the_writer_writes(tmp_path):
    log = training.Log(tmp_path / "log", writes=False)
    log.add(torch.tensor([1.0, 3.0]))
    assert log.write(1, ONE)["loss"] == 2
    assert not (tmp_path / "log").exists()


def test_loss_by_time_by_hand(tmp_path):
    log = training.Log(tmp_path, bins=4)
    log.add(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.24, 0.25]), gradient=7.0)
    # t = 1 is of the last bin
    log.add(torch.tensor([5.0, 8.0, 12.0]), torch.tensor([0.9, 1.0, 0.2499]), gradient=9.0)
    line = log.write(3, ONE)
    assert line["step"] == 3 and line["gradient"] == 9.0
    assert line["loss"] == pytest.approx(31 / 6)
    assert line["loss_by_t"] == [5.0, 3.0, None, 6.5]
    log.add(torch.tensor([4.0]), torch.tensor([0.5]))                        # counted anew
    assert log.write(4, ONE)["loss_by_t"] == [None, None, 4.0, None]
    log.add(torch.tensor([4.0, 8.0]))
    line = log.write(5, ONE)
    assert line["loss"] == 6.0 and "loss_by_t" not in line and "gradient" not in line
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_the_log_is_plotted(tmp_path):
    for t in (None, torch.tensor([0.3])):
        log = training.Log(tmp_path / str(t))
        log.add(torch.tensor([1.0]), t)
        log.write(1, ONE)
        log.plot("title")
        assert (tmp_path / str(t) / "log.png").read_bytes().startswith(b"\x89PNG")
