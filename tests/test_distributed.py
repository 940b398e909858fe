"""Several processes (gloo, on the CPU): the same training as one, killed or not."""
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
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pairs
import training
from conftest import without_time
from instaflow import InstaFlow

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [f"prompt {i}" for i in range(7)]
MAKE = "--model models/teacher --prompts prompts.txt --steps 2 --guidance 2 --number 36 --shard 20 --batch 3 --device cpu --float32 --out pairs".split()
REFLOW = "--model models/teacher --pairs pairs --batch 8 --lr 1e-3 --warmup 0 --iterations 20 --ema 0.9 --log-every 1 --save-every 5 --float32 --device cpu".split()


def same_data(patch):
    """Every rank is made to see what the first one sees."""
    patch.setattr(training.World, "share", lambda self, batch: batch[:len(batch) // self.size])


def smaller_parts(patch):
    patch.setattr(pairs, "PART", 4)


def dump_gradients(patch):
    """Write what the first step's gradients are, before they are clipped."""
    step = training.optimiser_step

    def dumping(optimizer, model, *more):
        if not Path("gradients").exists() and os.environ.get("RANK", "0") == "0":
            torch.save({k: p.grad.clone() for k, p in model.named_parameters()}, "gradients")
        return step(optimizer, model, *more)
    patch.setattr(training, "optimiser_step", dumping)


def slow_second(patch):
    """The second of two processes is slow to begin: what the first does alone shows."""
    if os.environ.get("RANK") == "1":
        time.sleep(1)


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
    sys.argv = [str(ROOT / script), *words]
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
        context.set_forkserver_preload(["open_clip.transformer", "matplotlib.figure", "train_reflow", "distill", "test_distributed"])

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
    """trained(processes, words, *changes) -> (first step's gradients, weights moved by, log, folder) of a reflow, each run once."""
    kept = {}

    def run(processes, words=(), *changes):
        key = (processes, tuple(words), *changes)
        if key not in kept:
            folder = tmp_path_factory.mktemp("run")
            for name in ("models", "pairs"):
                os.symlink(world / name, folder / name)
            wait(launch(folder, "train_reflow.py", [*REFLOW, "--out", "out", *words], processes, dump_gradients, *changes), folder)
            start = InstaFlow.load(world / "models" / "teacher").unet.state_dict()
            last = load_file(folder / "out" / "training" / "step-00000020.safetensors")
            moved = torch.cat([(last[f"model.{k}"] - v).flatten().double() for k, v in start.items()])
            lines = [json.loads(line) for line in (folder / "out" / "training" / "log.jsonl").read_text().splitlines()]
            kept[key] = torch.load(folder / "gradients"), moved, lines, folder
        return kept[key]
    return run


def differences(ours, theirs):
    """(Largest difference of the first step's gradients over the largest gradient, difference of the ways the weights went over the way)."""
    largest = max(g.abs().max() for g in theirs[0].values())
    return (max((ours[0][k] - g).abs().max() for k, g in theirs[0].items()) / largest).item(), ((ours[1] - theirs[1]).norm() / theirs[1].norm()).item()


# --- any number of processes, and of parts ---

@pytest.mark.parametrize("processes, words", [(2, ()), (4, ()), (1, ("--accumulate", "4")), (2, ("--accumulate", "2", "--checkpoint"))], ids=str)
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
    running = launch(tmp_path, "train_reflow.py", words, processes)
    while steps_done(tmp_path) < 7:
        time.sleep(0.01)
    os.kill(running[victim].pid, signal.SIGTERM)
    output = wait(running, tmp_path, 143)
    step = steps_done(tmp_path)
    assert 7 <= step < 20, "SIGTERM came too late for this test"
    assert output.count("SIGTERM at iteration") == 1 and f"SIGTERM at iteration {step}: a checkpoint is written" in output and "Traceback" not in output
    assert training.load_checkpoint(tmp_path / "out" / "training")[0] == step
    wait(launch(tmp_path, "train_reflow.py", words, processes), tmp_path)
    assert_same_end(tmp_path, trained(processes)[3])
    lines = [json.loads(line) for line in (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()]
    assert without_time(lines) == without_time(trained(processes)[2])


# --- a gradient that is none ---

def test_a_bad_gradient_in_one_process_skips_the_step_in_all(world, launch, trained, tmp_path):
    _, _, lines, folder = trained(2, (), one_bad_gradient)
    undisturbed = trained(2)[2]
    assert [line["step"] for line in lines if "skipped" in line] == [7] and lines[6]["skipped"] == 1 and "gradient" not in lines[6]
    assert [line["loss"] for line in lines[:7]] == [line["loss"] for line in undisturbed[:7]]       # the loss itself was sound
    assert lines[7]["loss"] != undisturbed[7]["loss"] and all(np.isfinite(line["loss"]) for line in lines)
    last = load_file(folder / "out" / "training" / "step-00000020.safetensors")
    assert all(v.isfinite().all() for v in last.values())
    assert last["optimizer.conv_in.weight.step"] == 19


def test_too_many_bad_gradients_stop_the_run_with_a_line(world, launch, tmp_path):
    for name in ("models", "pairs"):
        os.symlink(world / name, tmp_path / name)
    output = wait(launch(tmp_path, "train_reflow.py", [*REFLOW, "--iterations", "60", "--save-every", "3", "--out", "out"], 1, bad_gradients), tmp_path, 2)
    assert output.count("train_reflow.py: 21 of the last 24 steps had a gradient that was not finite or larger than --explode") == 1 and "Traceback" not in output
    start, (step, tensors, _) = InstaFlow.load(world / "models" / "teacher").unet.state_dict(), training.load_checkpoint(tmp_path / "out" / "training")
    assert step == 21 and all(v.isfinite().all() for v in tensors.values()) and tensors["optimizer.conv_in.weight.step"] == 3
    assert any(not torch.equal(tensors[f"model.{k}"], v) for k, v in start.items())
