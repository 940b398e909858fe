"""Several processes (gloo, on the CPU): the same training as one, killed or not."""
import functools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import pairs
import shards
import training
from conftest import without_time
from instaflow import InstaFlow

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [f"prompt {i}" for i in range(7)]
MAKE = ("--model models/teacher --prompts prompts.txt --steps 2 --guidance 2 --number 36 --shard 20 --batch 3 "
        "--device cpu --float32 --out pairs").split()
REFLOW = ("--model models/teacher --pairs pairs --batch 8 --lr 1e-3 --warmup 0 --iterations 20 --ema 0.9 "
          "--log-every 1 --save-every 5 --float32 --device cpu").split()


def same_data(patch):
    """Every rank is made to see what the first one sees."""
    patch.setattr(training.World, "share", lambda self, batch: batch[:len(batch) // self.size])


def smaller_parts(patch):
    patch.setattr(shards, "PART", 4)


def dump_gradients(patch):
    """Write what the first step's gradients are, before they are clipped."""
    step = training.optimiser_step

    def dumping(optimizer, model, *more):
        if not Path("gradients").exists() and os.environ.get("RANK", "0") == "0":
            torch.save({k: p.grad.clone() for k, p in model.named_parameters()}, "gradients")
        return step(optimizer, model, *more)
    patch.setattr(training, "optimiser_step", dumping)


def stuck_after(count, patch):
    """A process that makes `count` parts and then waits to be killed."""
    generate, made = pairs.generate, []

    def stuck(*words):
        if len(made) == count:
            time.sleep(3600)
        made.append(0)
        return generate(*words)
    patch.setattr(pairs, "generate", stuck)


def waits_for_a_signal(patch):
    """At the tenth step, until `signalled` tells that the signal has been sent: it comes neither too early nor too
    late."""
    update, seen = training.update_ema, []

    def waiting(*words):
        seen.append(0)
        while len(seen) == 10 and not Path("signalled").exists():
            time.sleep(0.01)
        update(*words)
    patch.setattr(training, "update_ema", waiting)


def one_bad_gradient(patch):
    """In one process, and in one step, the gradient is not finite."""
    parts, seen = training.parts, []

    def spoiled(net, size, count):
        yield from parts(net, size, count)
        seen.append(0)
        if len(seen) == 7 and os.environ.get("RANK", "0") == "0":
            net.module.conv_in.weight.grad.fill_(float("nan"))
    patch.setattr(training, "parts", spoiled)


def bad_gradients(patch):
    """From the fourth step on, no gradient is finite."""
    parts, seen = training.parts, []

    def spoiled(net, size, count):
        yield from parts(net, size, count)
        seen.append(0)
        if len(seen) > 3:
            next(net.parameters()).grad.fill_(float("inf"))
    patch.setattr(training, "parts", spoiled)


def _run(folder, script, words, environment, changes):
    """One process, as torchrun starts it (target of a Process)."""
    os.environ.update(environment)
    os.chdir(folder)
    with open(f"output-{environment.get('RANK', 0)}.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False                  # a kernel for each new shape takes longer than these nets
    sys.argv = [str(ROOT / script), *map(str, words)]
    with pytest.MonkeyPatch.context() as patch:
        for change in changes:
            change(patch)
        runpy.run_path(sys.argv[0], run_name="__main__") if script != "pairs.py" else pairs_main()


def pairs_main():
    import cli
    cli.run(pairs.main)                                    # the module that was changed, not a fresh one


@pytest.fixture(scope="module")
def launch():
    """launch(folder, script, words, processes=1, *changes) -> the processes, started, with torchrun's environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["open_clip.transformer", "matplotlib.figure", "train_reflow", "distill",
                                        "test_distributed"])

        def launch(folder, script, words, processes=1, *changes):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            started = []
            for rank in range(processes):
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
                started.append(context.Process(target=_run, args=(folder, script, words, environment, changes)))
                started[-1].start()
            return started
        yield launch


def wait(processes, folder, status=0):
    for process in processes:
        process.join()
    output = "\n".join(path.read_text() for path in sorted(Path(folder).glob("output-*.txt")))
    assert [p.exitcode for p in processes] == [status] * len(processes), output
    return output


@pytest.fixture(scope="module")
def world(launch, tiny, tmp_path_factory):
    """A folder with a model and its pairs, made by one process. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny / "teacher", folder / "models" / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    wait(launch(folder, "pairs.py", MAKE, 1, smaller_parts), folder)
    return folder


@pytest.fixture(scope="module")
def trained(world, launch, tmp_path_factory):
    """trained(processes, words, *changes) -> (first step's gradients, weights moved by, log, folder) of a reflow,
    each run once."""
    kept = {}

    def run(processes, words=(), *changes):
        key = (processes, tuple(words), *changes)
        if key not in kept:
            folder = tmp_path_factory.mktemp("run")
            for name in ("models", "pairs"):
                os.symlink(world / name, folder / name)
            wait(launch(folder, "train_reflow.py", [*REFLOW, "--out", "out", *words], processes,
                        dump_gradients, *changes), folder)
            start = InstaFlow.load(world / "models" / "teacher").unet.state_dict()
            last = load_file(folder / "out" / "training" / "step-00000020.safetensors")
            moved = torch.cat([(last[f"model.{k}"] - v).flatten().double() for k, v in start.items()])
            lines = [json.loads(line) for line in (folder / "out" / "training" / "log.jsonl").read_text().splitlines()]
            kept[key] = torch.load(folder / "gradients"), moved, lines, folder
        return kept[key]
    return run


def differences(ours, theirs):
    """(Largest difference of the first step's gradients over the largest gradient, difference of the ways the weights
    went over the way)."""
    largest = max(g.abs().max() for g in theirs[0].values())
    return ((max((ours[0][k] - g).abs().max() for k, g in theirs[0].items()) / largest).item(),
            ((ours[1] - theirs[1]).norm() / theirs[1].norm()).item())


# --- any number of processes, and of parts ---

@pytest.mark.parametrize("processes, words", [(2, ()), (4, ()), (1, ("--accumulate", "4")),
                                              (2, ("--accumulate", "2", "--checkpoint"))], ids=str)
def test_the_same_global_batch_trains_the_same(trained, processes, words):
    gradient, way = differences(trained(processes, words), trained(1))
    assert gradient <= 1e-5
    assert way <= 1e-3
    for a, b in zip(trained(processes, words)[2], trained(1)[2]):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_ranks_that_see_the_same_data_are_found_out(trained):
    gradient, way = differences(trained(2, (), same_data), trained(1))
    assert gradient > 1e-2 and way > 1e-1                  # what the test above would not let pass


def test_gradients_are_sent_with_the_last_part_only():
    sent = []

    class Net(torch.nn.Linear):
        def no_sync(self):
            sent.append("held")
            return torch.no_grad()                         # any context: that it is entered and left shows
    net = Net(1, 1)
    for part in training.parts(net, 12, 3):
        sent.append((part.start, part.stop, torch.is_grad_enabled()))
    assert sent == ["held", (0, 4, False), "held", (4, 8, False), (8, 12, True)]
    with pytest.raises(training.cli.UserError, match="--accumulate 5 does not divide the 12 pairs"):
        next(training.parts(net, 12, 5))


# --- SIGTERM and SIGKILL ---

def steps_done(folder):
    log = folder / "out" / "training" / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def assert_same_end(folder, undisturbed):
    for path in (Path("training") / "step-00000020.safetensors", Path("unet") / "diffusion_pytorch_model.safetensors"):
        ours, theirs = load_file(folder / "out" / path), load_file(undisturbed / "out" / path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items()), path


@pytest.mark.parametrize("processes, victim", [(1, 0), (2, 1), (4, 2)])
def test_sigterm_writes_a_checkpoint_and_the_same_line_goes_on_bitwise(trained, launch, tmp_path, processes, victim):
    for name in ("models", "pairs"):
        os.symlink(trained(processes)[3] / name, tmp_path / name)
    words = [*REFLOW, "--out", "out"]
    running = launch(tmp_path, "train_reflow.py", words, processes, waits_for_a_signal)
    while steps_done(tmp_path) < 7:
        time.sleep(0.01)
    os.kill(running[victim].pid, signal.SIGTERM)
    (tmp_path / "signalled").touch()
    output = wait(running, tmp_path, 143)
    step = steps_done(tmp_path)
    assert 7 <= step <= 11
    assert (output.count("SIGTERM at iteration") == 1
            and f"SIGTERM at iteration {step}: a checkpoint is written" in output and "Traceback" not in output)
    assert training.load_checkpoint(tmp_path / "out" / "training")[0] == step
    wait(launch(tmp_path, "train_reflow.py", words, processes), tmp_path)
    assert_same_end(tmp_path, trained(processes)[3])
    lines = [json.loads(line) for line in (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()]
    assert without_time(lines) == without_time(trained(processes)[2])


def test_a_killed_process_ends_the_others_with_a_line_and_the_same_line_goes_on_bitwise(trained, launch, tmp_path):
    for name in ("models", "pairs"):
        os.symlink(trained(2)[3] / name, tmp_path / name)
    words = [*REFLOW, "--out", "out"]
    running = launch(tmp_path, "train_reflow.py", words, 2, waits_for_a_signal)
    while steps_done(tmp_path) < 8:
        time.sleep(0.01)
    running[1].kill()
    (tmp_path / "signalled").touch()
    for process in running:
        process.join()
    output = (tmp_path / "output-0.txt").read_text()
    assert running[0].exitcode == 2, output
    assert ("train_reflow.py: another process of this run has ended; its own message says why" in output
            and "Traceback" not in output)
    wait(launch(tmp_path, "train_reflow.py", words, 2), tmp_path)
    assert_same_end(tmp_path, trained(2)[3])


@pytest.mark.parametrize("before, after", [(2, 1), (1, 4)])
def test_a_run_goes_on_with_another_number_of_processes(trained, launch, tmp_path, before, after):
    """The same loss curve, so no pair comes twice and none is left out."""
    for name in ("models", "pairs"):
        os.symlink(trained(1)[3] / name, tmp_path / name)
    for processes, iterations in ((before, 10), (after, 20)):
        wait(launch(tmp_path, "train_reflow.py", [*REFLOW, "--out", "out", "--iterations", iterations], processes),
             tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in trained(1)[2]], rel=1e-3)


# --- pairs ---

def test_parts_become_the_shards_that_one_piece_makes(world, launch, tmp_path):
    """PART is no setting: it shows in nothing but what a kill loses."""
    for name in ("models", "prompts.txt"):
        os.symlink(world / name, tmp_path / name)
    wait(launch(tmp_path, "pairs.py", MAKE), tmp_path)
    whole, parts = (pairs.PairDataset(folder / "pairs") for folder in (tmp_path, world))
    assert [p.name for p in sorted((world / "pairs").iterdir())] == [
        "shard-00000.safetensors", "shard-00001.safetensors"]
    assert len(whole) == len(parts) == 36 and whole.info == parts.info
    for i in range(36):
        assert (whole[i]["prompt"] == parts[i]["prompt"] == PROMPTS[i % 7]
                and torch.equal(whole[i]["noise"], parts[i]["noise"]))
        assert (whole[i]["latent"] - parts[i]["latent"]).abs().max() <= whole[i]["latent"].abs().max() * 2 ** -10


@pytest.mark.parametrize("before, after, each, left", [
    (2, 3, 1, ["0-part-00000", "0-part-00001"]), (1, 2, 6, ["0", "1-part-00000"]),
    (3, 1, 1, ["0-part-00000", "0-part-00001", "0-part-00002"])])
def test_pairs_go_on_with_another_number_of_processes(world, launch, tmp_path, before, after, each, left):
    for name in ("models", "prompts.txt"):
        os.symlink(world / name, tmp_path / name)
    left = {f"shard-0000{name}.safetensors" for name in left}

    def made():
        times = {}
        for path in (tmp_path / "pairs").glob("*.safetensors"):
            with suppress(FileNotFoundError):              # a part that became a shard just now
                times[path.name] = path.stat().st_mtime_ns
        return times
    running = launch(tmp_path, "pairs.py", MAKE, before, smaller_parts, functools.partial(stuck_after, each))
    while set(made()) != left and any(p.is_alive() for p in running):
        time.sleep(0.01)
    for process in running:
        process.kill()
        process.join()
    times = made()
    assert set(times) == left
    (tmp_path / "pairs" / "shard-00000-part-00004.safetensors.99.tmp").write_bytes(b"what a kill left")
    again = launch(tmp_path, "pairs.py", MAKE, after, smaller_parts)
    while any(p.is_alive() for p in again):
        assert all(times[name] == time for name, time in made().items() if name in times)    # nothing is made twice
        time.sleep(0.01)
    wait(again, tmp_path)
    assert sorted(made()) == sorted(p.name for p in (tmp_path / "pairs").iterdir()) == [
        "shard-00000.safetensors", "shard-00001.safetensors"]
    for path in (tmp_path / "pairs").iterdir():
        assert path.read_bytes() == (world / "pairs" / path.name).read_bytes()


def test_a_kill_between_a_shard_and_its_parts_end(world, launch, tmp_path):
    """The shard is there, and so are its parts: they go, and nothing is made."""
    for name in ("models", "prompts.txt"):
        os.symlink(world / name, tmp_path / name)
    shutil.copytree(world / "pairs", tmp_path / "pairs")
    for j in range(2):
        shutil.copy(tmp_path / "pairs" / "shard-00000.safetensors",
                    tmp_path / "pairs" / f"shard-00000-part-{j:05d}.safetensors")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pairs").glob("shard-0000?.safetensors")}
    wait(launch(tmp_path, "pairs.py", MAKE, 2, smaller_parts), tmp_path)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pairs").iterdir()} == times


# --- torchrun itself ---

def torchrun(folder, words, processes, restarts):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            "--max-restarts", str(restarts), *map(str, words)]
    return subprocess.Popen(line, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=open(folder / "torchrun.txt", "w"))


def workers(process, script):
    """The processes that torchrun has started: its children that run `script`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue                                       # it has just ended
        if parent == process.pid and script.encode() in command:
            found.append(int(path.parent.name))
    return sorted(found)


def disturb(folder, words, script, kills, sent, draw):
    """torchrun, whose processes get `sent` signals at random moments, until it ends by itself -> how many came."""
    process, came = torchrun(folder, words, 2, 2 * kills), 0
    while process.poll() is None:
        begun = steps_done(folder)  # a life is long enough for some steps, or nothing would ever be done
        while process.poll() is None and steps_done(folder) <= begun:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.5))
        running = workers(process, script)
        if came < kills and len(running) == 2:
            os.kill(draw.choice(running), sent)
            came += 1
            while process.poll() is None and set(workers(process, script)) & set(running):
                time.sleep(0.05)
    assert process.returncode == 0, (folder / "torchrun.txt").read_text()[-3000:]
    return came


def torchrun_disturbed(world, folder, kills, sent, *words):
    """A reflow under torchrun, undisturbed and disturbed -> how many signals came, and what torchrun and its
    processes said."""
    seed = random.SystemRandom().randrange(10 ** 6)
    print("moments are drawn from seed", seed)
    for name in ("undisturbed", "disturbed"):
        (folder / name).mkdir()
        for link in ("models", "pairs"):
            os.symlink(world / link, folder / name / link)
    words = [ROOT / "train_reflow.py", *REFLOW, "--out", "out", *words]
    disturb(folder / "undisturbed", words, "train_reflow.py", 0, sent, random.Random(seed))
    came = disturb(folder / "disturbed", words, "train_reflow.py", kills, sent, random.Random(seed))
    ours, theirs = (load_file(checkpoint.checkpoints(folder / name / "out" / "training")[-1])
                    for name in ("disturbed", "undisturbed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert not list((folder / "disturbed" / "out").rglob("*.tmp"))
    return came, (folder / "disturbed" / "torchrun.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sent, kills", [(signal.SIGKILL, 20), (signal.SIGTERM, 5)], ids=["SIGKILL", "SIGTERM"])
def test_torchrun_killed_at_random_moments_ends_as_if_it_had_not_been(world, tmp_path, sent, kills):
    came, said = torchrun_disturbed(world, tmp_path, kills, sent,
                                    "--iterations", "500", "--save-every", "10", "--log-every", "5")
    assert came == kills


def killed_while_it_writes(patch):
    """SIGKILL in the middle of the second checkpoint's write, once."""
    fsync, seen = checkpoint.os.fsync, []

    def killing(number):
        if "step-" in os.readlink(f"/proc/self/fd/{number}"):
            seen.append(number)
        if len(seen) == 2 and not Path("killed").exists():
            Path("killed").touch()
            os.ftruncate(number, os.fstat(number).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(number)
    patch.setattr(checkpoint.os, "fsync", killing)


def test_a_kill_in_the_middle_of_a_checkpoints_write(trained, launch, tmp_path):
    for name in ("models", "pairs"):
        os.symlink(trained(1)[3] / name, tmp_path / name)
    words = [*REFLOW, "--out", "out"]
    wait(launch(tmp_path, "train_reflow.py", words, 1, killed_while_it_writes), tmp_path, -signal.SIGKILL)
    names = sorted(p.name for p in (tmp_path / "out" / "training").glob("step-*"))
    assert (names[0] == "step-00000005.safetensors" and names[1].startswith("step-00000010.safetensors.")
            and names[1].endswith(".tmp"))
    wait(launch(tmp_path, "train_reflow.py", words, 1, killed_while_it_writes), tmp_path)
    assert_same_end(tmp_path, trained(1)[3])
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_which_one_process_was_killed(world, tmp_path):
    came, said = torchrun_disturbed(world, tmp_path, 1, signal.SIGKILL, "--iterations", "150")
    assert came == 1 and "Traceback" not in said.split("ChildFailedError")[0]


# --- a gradient that is none ---

def test_a_bad_gradient_in_one_process_skips_the_step_in_all(world, launch, trained, tmp_path):
    _, _, lines, folder = trained(2, (), one_bad_gradient)
    undisturbed = trained(2)[2]
    assert ([line["step"] for line in lines if "skipped" in line] == [7]
            and lines[6]["skipped"] == 1 and "gradient" not in lines[6])
    # the loss itself was sound
    assert [line["loss"] for line in lines[:7]] == [line["loss"] for line in undisturbed[:7]]
    assert lines[7]["loss"] != undisturbed[7]["loss"] and all(np.isfinite(line["loss"]) for line in lines)
    last = load_file(folder / "out" / "training" / "step-00000020.safetensors")
    assert all(v.isfinite().all() for v in last.values())
    assert last["optimizer.conv_in.weight.step"] == 19


def test_too_many_bad_gradients_stop_the_run_with_a_line(world, launch, tmp_path):
    for name in ("models", "pairs"):
        os.symlink(world / name, tmp_path / name)
    output = wait(launch(tmp_path, "train_reflow.py",
                         [*REFLOW, "--iterations", "60", "--save-every", "3", "--out", "out"], 1, bad_gradients),
                  tmp_path, 2)
    assert (output.count("train_reflow.py: 21 of the last 24 steps had a gradient that was not finite "
                         "or larger than --explode") == 1 and "Traceback" not in output)
    start = InstaFlow.load(world / "models" / "teacher").unet.state_dict()
    step, tensors, _ = training.load_checkpoint(tmp_path / "out" / "training")
    assert (step == 3 and all(v.isfinite().all() for v in tensors.values())
            and tensors["optimizer.conv_in.weight.step"] == 3)
    assert any(not torch.equal(tensors[f"model.{k}"], v) for k, v in start.items())
