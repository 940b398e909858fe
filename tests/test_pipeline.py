import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import flows
import training
import single_file
from conftest import one_line, without_time
from distill import start_times
from instaflow import InstaFlow, timestep
from lpips import LPIPS, random_vgg
from pairs import PairDataset

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a red circle", "a small yellow star", "ein grüner Ring", "a blue square", "日本の桜"]
TRAINING = ["--batch", "4", "--warmup", "2", "--ema", "0.8", "--log-every", "1", "--device", "cpu"]
STAGES = {                                                 # the README's lines, short
    "pairs": ("pairs.py", ("--model models/teacher --prompts prompts.txt --steps 3 --guidance 2 --number 22 --shard 4 "
                           "--batch 3 --device cpu --out pairs/first").split()),
    "reflow": ("train_reflow.py", ["--model", "models/teacher", "--pairs", "pairs/first", "--out", "models/2rf",
                                   "--iterations", "12", "--lr", "3e-3", "--save-every", "3", "--sample-every", "12",
                                   *TRAINING]),
    "pairs 2": ("pairs.py", ("--model models/2rf --prompts prompts.txt --steps 3 --guidance 6 --number 22 --shard 4 "
                             "--device cpu --out pairs/second").split()),
    "distill": ("distill.py", ["--model", "models/2rf", "--pairs", "pairs/second", "--out", "models/l2",
                               "--iterations", "28", "--lr", "3e-3", "--save-every", "6", "--sample-every", "28",
                               *TRAINING]),
    "lpips": ("distill.py", ["--model", "models/l2", "--pairs", "pairs/second", "--out", "models/instaflow",
                             "--loss", "lpips", "--vgg", "vgg.safetensors", "--lpips-size", "24",
                             "--iterations", "24", "--lr", "1e-3", "--cosine", "--save-every", "10", *TRAINING]),
}
# run by `python script.py ...`; the others by a process that spares seconds of importing
TYPED = ("reflow", "distill")
OUT = {stage: words[words.index("--out") + 1] for stage, (_, words) in STAGES.items()}


def run_stage(folder, stage):
    """One stage, as `python script.py ...` runs it, in a process of its own (target of a Process)."""
    os.chdir(folder)
    script, words = STAGES[stage]
    with open("output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [str(ROOT / script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported everything and run nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["open_clip.transformer", "matplotlib.pyplot", "train_reflow", "distill",
                                        "test_pipeline"])
        yield context


@pytest.fixture(scope="module")
def pipeline(processes, tiny, tmp_path_factory):
    """A folder in which every stage's command line has run, undisturbed. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(tiny / "teacher", folder / "models" / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    torch.manual_seed(3)
    save_file(random_vgg((4, 4, 8, 8, 8)), folder / "vgg.safetensors")
    for stage, (script, words) in STAGES.items():
        if stage in TYPED:
            done = subprocess.run([sys.executable, ROOT / script, *words], cwd=folder,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            status, output = done.returncode, done.stdout + done.stderr
        else:
            process = processes.Process(target=run_stage, args=(folder, stage))
            process.start()
            process.join()
            status, output = process.exitcode, (folder / "output.txt").read_text()
        assert status == 0 and "warning" not in output, f"{stage}: {output}"
    return folder


@pytest.fixture(scope="module")
def models(pipeline):
    return {path.name: InstaFlow.load(path) for path in (pipeline / "models").iterdir()}


def read_log(folder, stage):
    return [json.loads(line) for line in (folder / OUT[stage] / "training" / "log.jsonl").read_text().splitlines()]


def everything(data, model):
    """All pairs as one batch -> (noise, latent, text states)."""
    x0, x1, prompts = data.batch(range(len(data)))
    with torch.no_grad():
        return x0, x1, model.text(prompts)


# --- what comes out ---

def test_reflow_brings_the_velocity_nearer_to_its_pairs(pipeline, models):
    x0, x1, text = everything(PairDataset(pipeline / "pairs" / "first"), models["teacher"])
    losses = []
    for name in ("teacher", "2rf"):
        # equation 2 at fixed times; the teacher's U-Net as it is, as the initialisation takes it
        with torch.no_grad():
            v = [models[name].unet((1 - t) * x0 + t * x1, 1000 * (1 - t), text) for t in (0.0, 0.3, 0.6, 0.9)]
        losses.append(torch.stack([(x1 - x0 - u).square().mean() for u in v]).mean().item())
    assert losses[1] < 0.97 * losses[0]
    line = read_log(pipeline, "reflow")[0]                 # step 1 of the log, by hand: nothing has been learnt yet
    rows, rng = training.batch_indices(0, 0, 4, 22), training.step_generator(0, 0)
    t, dropped = flows.sample_time(4, "uniform", rng), rng.random(4) < 0.1
    null = models["teacher"].text([""])
    with torch.no_grad():
        text = torch.where(torch.from_numpy(dropped)[:, None, None], null, text[rows])
        loss = flows.flow_loss(lambda x, t: models["teacher"].unet(x, timestep(t), text), x0[rows], x1[rows], t).item()
    # bf16, where the processor has it
    assert line["step"] == 1 and line["loss"] == pytest.approx(loss, rel=0.03)


def test_distillation_brings_one_step_nearer_to_the_paths_end(pipeline, models):
    x0, x1, text = everything(PairDataset(pipeline / "pairs" / "second"), models["2rf"])
    with torch.no_grad():
        losses = [(x0 + models[name].unet(x0, 1000.0, text) - x1).square().mean().item() for name in ("2rf", "l2")]
    assert losses[1] < 0.9 * losses[0]
    logged = [line["loss"] for line in read_log(pipeline, "distill")]
    assert np.mean(logged[-8:]) < 0.9 * np.mean(logged[:4])


def test_distillation_with_lpips_brings_pictures_nearer(pipeline, models):
    x0, x1, text = everything(PairDataset(pipeline / "pairs" / "second"), models["2rf"])
    distance, losses = LPIPS(pipeline / "vgg.safetensors"), []
    resize = lambda images: torch.nn.functional.interpolate(images, (24, 24), mode="bilinear", antialias=True)
    with torch.no_grad():
        wanted = resize(models["2rf"].vae.decode(x1 / 0.18215))
        for name in ("l2", "instaflow"):
            losses.append(distance(resize(
                models[name].vae.decode((x0 + models[name].unet(x0, 1000.0, text)) / 0.18215)), wanted).mean().item())
    assert losses[1] < 0.95 * losses[0]


def test_l2_beside_lpips(pipeline, command, monkeypatch, tmp_path):
    """The loss is LPIPS + 2 L2, each of which a run of its own has shown: all start at the same student and pairs, in
    float32."""
    shutil.copytree(pipeline, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    words = [*STAGES["lpips"][1], "--iterations", "1", "--float32"]
    losses = []
    at = words.index("--loss")                             # --loss lpips --vgg FILE --lpips-size 24
    alone = [*words[:at], *words[at + 6:], "--loss", "l2"]
    for line in ([*words, "--l2", "2"], words, alone):
        assert command("distill.py", *line, "--out", f"models/{len(losses)}")[0] == 0
        losses.append(json.loads(Path(f"models/{len(losses)}/training/log.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1] + 2 * losses[2], rel=1e-5) and losses[2] > 0.1 * losses[1]
    assert one_line(command("distill.py", *words, "--l2", "1", "--out", "models/1"), "other settings (l2)")


def test_distillation_by_the_square_and_by_pseudo_huber(pipeline, command, monkeypatch, tmp_path):
    """The first losses, in closed form from the errors of one step."""
    shutil.copytree(pipeline, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    x0, x1, text = everything(PairDataset("pairs/second"), model := InstaFlow.load("models/2rf"))
    rows = training.batch_indices(0, 0, 4, 22)
    with torch.no_grad():
        error = (x0[rows] + model.unet(x0[rows], 1000.0, text[rows]) - x1[rows]).flatten(1).double().numpy()
    squares, c = (error ** 2).sum(1), 0.00054 * error.shape[1]
    wanted = {"l2": squares.mean() / error.shape[1], "huber": (np.sqrt(squares + c ** 2) - c).mean() / error.shape[1]}
    for loss, value in wanted.items():
        assert command("distill.py", *STAGES["distill"][1], "--iterations", "1", "--float32", "--loss", loss,
                       "--out", f"models/{loss}-1")[0] == 0
        assert (json.loads(Path(f"models/{loss}-1/training/log.jsonl").read_text())["loss"]
                == pytest.approx(value, rel=1e-4))
    assert wanted["huber"] < 0.9 * wanted["l2"]            # so that one is not the other


def test_a_training_that_diverges_is_not_saved(pipeline, command, monkeypatch, tmp_path):
    """Neither its weights, nor a checkpoint while its steps are skipped in place of those before."""
    shutil.copytree(pipeline, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    words = ["--model", "models/teacher", "--pairs", "pairs/first", "--iterations", "6",
             "--save-every", "2", "--sample-every", "99", *TRAINING]
    status, _, err = command("train_reflow.py", *words, "--out", "models/lost", "--lr", "1e30")
    assert (status == 2 and "the training diverged: at iteration" in err and "lower --lr" in err
            and not list(Path("models/lost").rglob("*.safetensors")))
    step = training.optimiser_step
    monkeypatch.setattr(training, "optimiser_step",
                        lambda *of: step(*of) if optimised.append(1) or len(optimised) < 3 else float("inf"))
    optimised = []
    assert command("train_reflow.py", *words, "--out", "models/skipping", "--lr", "1e-4")[0] == 0
    assert (sorted(path.name for path in Path("models/skipping/training").glob("*.safetensors"))
            == ["step-00000002.safetensors", "step-00000006.safetensors"])


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_a_teacher_that_does_not_say_what_it_predicts(tiny, command, tmp_path, name):
    """As Stable Diffusion's single file: every stage that takes it can be told."""
    InstaFlow.load(tiny / "teacher").save(tmp_path / name, self_contained=True)
    if name == "folder":
        (tmp_path / name / "instaflow.json").unlink()
    else:
        # the sizes alone: without them it would be read as Stable Diffusion 1.x's
        told = {key: value for key, value in single_file.facts(tmp_path / name).items() if key != "info"}
        save_file(load_file(tmp_path / name), tmp_path / name, {"format": "pt", "instaflow": json.dumps(told)})
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    model, pairs = ["--model", tmp_path / name], ["--pairs", tmp_path / "pairs"]
    short = ["--iterations", "1", "--batch", "2", "--device", "cpu"]
    lines = {"pairs.py": [*model, "--prompts", tmp_path / "prompts.txt", "--steps", "2", "--guidance", "2",
                          "--out", tmp_path / "pairs", "--device", "cpu"],
             "train_reflow.py": [*model, *pairs, "--out", tmp_path / "2rf", *short],
             "distill.py": [*model, *pairs, "--out", tmp_path / "student", *short]}
    for script, words in lines.items():
        assert one_line(command(script, *words), name, "give --prediction")
        assert command(script, *words, "--prediction", "epsilon")[0] == 0
    for made in ("2rf", "student"):
        assert InstaFlow.load(tmp_path / made).info["prediction"] == "velocity"
    assert command("pairs.py", "preview", *pairs, "--prediction", "epsilon", "--out", tmp_path / "preview.png")[0] == 0


@pytest.mark.parametrize("steps", (1, 2, 3, 4, 8))
def test_half_the_starts_are_noise(steps):
    """And the others' are as likely as each other; in one step all are. 24,000 draws: four binomial deviations are at
    most 0.013."""
    times, counted = start_times(24_000, steps, np.random.default_rng(0)).unique(return_counts=True)
    wanted = [1.0] if steps == 1 else [0.5] + (steps - 1) * [0.5 / (steps - 1)]
    assert (times.tolist() == pytest.approx([i / steps for i in range(steps)])
            and (counted / 24_000).tolist() == pytest.approx(wanted, abs=0.013))


def test_a_student_of_several_steps(pipeline, command, monkeypatch, tmp_path):
    """The first loss by hand, from the pair's line; then nearer to the end from each of the times."""
    shutil.copytree(pipeline, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    words = [*STAGES["distill"][1], "--float32", "--model", "models/teacher", "--pairs", "pairs/first",
             "--out", "models/several", "--steps", "4"]
    assert command("distill.py", *words)[0] == 0
    start, student = InstaFlow.load("models/teacher"), InstaFlow.load("models/several")
    data = PairDataset("pairs/first")
    assert student.info["steps"] == 1 and student.info["trained_steps"] == [1, 2, 4]
    x0, x1, text = everything(data, start)

    def error(model, rows, t):
        with torch.no_grad():
            s = t[:, None, None, None]
            x = (1 - s) * x0[rows] + s * x1[rows]
            return (x + (1 - s) * model.unet(x, 1000 * (1 - t), text[rows]) - x1[rows]).square().mean().item()
    rows = training.batch_indices(0, 0, 4, 22)
    line = json.loads(Path("models/several/training/log.jsonl").read_text().splitlines()[0])
    t = torch.tensor(training.step_generator(0, 0).integers(-2, 4, size=4).clip(0) / 4, dtype=torch.float32)
    assert len(set(t.tolist())) > 1 and line["loss"] == pytest.approx(error(start, rows, t), rel=1e-4)
    for k in range(4):
        t = torch.full((22,), k / 4)
        assert error(student, np.arange(22), t) < 0.97 * error(start, np.arange(22), t)
    assert one_line(command("distill.py", *words, "--steps", "2"), "other settings")
    assert one_line(command("distill.py", *words, "--steps", "0"), "--steps")


def test_a_stacked_student(pipeline, command, monkeypatch, tmp_path):
    """Two halves that start as the 2-rectified flow and end apart; L2, then LPIPS; one step brings it nearer to the
    path's end."""
    shutil.copytree(pipeline, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    words = [*STAGES["distill"][1], "--stacked"]
    words[words.index("--out") + 1] = "models/stacked-l2"
    assert command("distill.py", *words)[0] == 0
    student, start = InstaFlow.load("models/stacked-l2"), InstaFlow.load("models/2rf")
    data = PairDataset("pairs/second")
    assert (json.loads(Path("models/stacked-l2/unet/config.json").read_text())["stacked"] is True
            and student.info["trained_steps"] == [1])
    assert ({k.split(".")[0] for k in load_file("models/stacked-l2/unet/diffusion_pytorch_model.safetensors")}
            == {"first", "second"})
    first, second = student.unet.first.state_dict(), student.unet.second.state_dict()
    assert any(not torch.equal(v, second[k]) for k, v in first.items() if k in second)
    from unet import StackedUNet
    x0, x1, context = everything(data, student)
    error = lambda unet: float((x0 + unet(x0, 1000.0, context) - x1).square().mean())
    with torch.no_grad():
        assert error(student.unet) < 0.9 * error(StackedUNet.from_unet(start.unet))
    words = [*STAGES["lpips"][1]]
    words[words.index("--model") + 1], words[words.index("--out") + 1] = "models/stacked-l2", "models/stacked"
    assert command("distill.py", *words)[0] == 0
    final = InstaFlow.load("models/stacked")
    assert final.unet.config.stacked and final.generate(["a red circle"])[0].size == (16, 16)
    lines = [json.loads(line)["loss"] for line in Path("models/stacked/training/log.jsonl").read_text().splitlines()]
    assert np.mean(lines[-6:]) < np.mean(lines[:6])


def test_exact_initialisation(pipeline, command, monkeypatch, tmp_path):
    """With --exact both stages start at the teacher's own flow, by hand here, and stay noise predictors."""
    shutil.copytree(pipeline, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    teacher = InstaFlow.load("models/teacher")
    x0, x1, text = everything(PairDataset("pairs/first"), InstaFlow.load("models/teacher"))
    for stage, script, out in (("reflow", "train_reflow.py", "models/exact-2rf"),
                               ("distill", "distill.py", "models/exact-student")):
        words = [*STAGES[stage][1], "--exact", "--model", "models/teacher", "--pairs", "pairs/first", "--out", out,
                 "--drop", "0", "--lr", "1e-4"]
        if stage == "distill":
            words[words.index("--drop"):words.index("--drop") + 2] = []
        assert command(script, *words)[0] == 0
        model, rows = InstaFlow.load(out), training.batch_indices(0, 0, 4, 22)
        assert (model.info["prediction"], model.info["sampler"]) == ("epsilon", "euler")
        t = flows.sample_time(4, "uniform", training.step_generator(0, 0)) if stage == "reflow" else torch.zeros(4)
        bar = np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)
        a, b = np.sqrt(bar), np.sqrt(1 - bar)
        # where a : b is t : 1 - t, held at the schedule's ends
        index = np.interp(t.numpy(), (a / (a + b))[::-1], np.arange(1000)[::-1])
        a, b = (torch.from_numpy(np.interp(index, np.arange(1000), y)).float().reshape(4, 1, 1, 1) for y in (a, b))
        s = t.reshape(4, 1, 1, 1)
        x = ((1 - s) * x0[rows] + s * x1[rows]) * ((a ** 2 + b ** 2) / (s ** 2 + (1 - s) ** 2)).sqrt()
        with torch.no_grad():
            eps = teacher.unet(x, torch.from_numpy(index), text[rows])
        loss = (x1[rows] - x0[rows] - ((x - b * eps) / a - eps)).square().mean().item()
        lines = [json.loads(line)["loss"] for line in Path(out, "training", "log.jsonl").read_text().splitlines()]
        assert lines[0] == pytest.approx(loss, rel=0.05)   # bf16, where the processor has it
        s = torch.full((22,), 0.1 if stage == "reflow" else 0.0)
        errors = [float(flows.flow_loss(lambda x, t: m.velocity(x, t, text), x0, x1, s)) for m in (teacher, model)]
        assert errors[1] < 0.97 * errors[0]
    exact, wrong = "was trained with --exact", "predicts the velocity"
    for script, model, pairs, flag, words in (("train_reflow.py", "exact-2rf", "first", [], exact),
                                              ("distill.py", "exact-student", "first", [], exact),
                                              ("train_reflow.py", "2rf", "second", ["--exact"], wrong),
                                              ("distill.py", "2rf", "second", ["--exact"], wrong)):
        assert one_line(command(script, "--model", f"models/{model}", "--pairs", f"pairs/{pairs}",
                                "--out", "models/none", *TRAINING, *flag), words)
    # starts at no flow, so there is none to stay at
    stacked = ["--model", "models/exact-student", "--pairs", "pairs/first", *TRAINING, "--iterations", "2", "--stacked"]
    assert one_line(command("distill.py", *stacked, "--exact", "--out", "models/none"),
                    "two U-Nets in series do not start there; leave it out")
    assert not Path("models/none").exists()
    assert command("distill.py", *stacked, "--out", "models/stacked")[0] == 0
    assert InstaFlow.load("models/stacked").info["prediction"] == "velocity"


def test_what_the_folders_say(pipeline, models):
    assert {k: models["2rf"].info[k] for k in ("prediction", "sampler", "steps", "guidance", "base")} == {
        "prediction": "velocity", "sampler": "euler", "steps": 25, "guidance": 1.5, "base": "../teacher"}
    assert models["2rf"].info["trained_steps"] == []
    for name, stage in (("l2", "distill"), ("instaflow", "lpips")):
        info = models[name].info
        assert {k: info[k] for k in ("prediction", "sampler", "steps", "guidance", "trained_steps", "base")} == {
            "prediction": "velocity", "sampler": "euler", "steps": 1, "guidance": 1.0, "trained_steps": [1],
            "base": "../teacher"}
        assert info["pairs"]["model"] == "models/2rf" and info["pairs"]["guidance"] == 6
        assert (info["made"]["command"].startswith("python ")
                and info["made"]["command"].endswith(" ".join(STAGES[stage][1])))
        assert info["made"]["seconds"] >= 0 and info["made"]["seed"] == 0 and info["made"]["processes"] == 1
    for name in ("2rf", "l2", "instaflow"):
        assert {p.name for p in (pipeline / "models" / name).iterdir()} == {"training", "unet", "instaflow.json"}
        weights = load_file(pipeline / "models" / name / "unet" / "diffusion_pytorch_model.safetensors")
        assert {v.dtype for v in weights.values()} == {torch.float16}
        picture, = models[name].generate(["a red circle"])
        assert picture.size == (16, 16)


def test_the_saved_weights_are_the_average(pipeline):
    for stage in ("reflow", "distill", "lpips"):
        last = load_file(sorted((pipeline / OUT[stage] / "training").glob("step-*.safetensors"))[-1])
        saved = load_file(pipeline / OUT[stage] / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(v, last[f"ema.{k}"].half()) for k, v in saved.items())
        assert not torch.equal(last["ema.conv_in.weight"], last["model.conv_in.weight"])


def test_log_plot_and_samples(pipeline):
    for stage, count in (("reflow", 12), ("distill", 28), ("lpips", 24)):
        lines = read_log(pipeline, stage)
        assert [line["step"] for line in lines] == list(range(1, count + 1))
        assert all(np.isfinite(line["loss"]) and line["gradient"] > 0 for line in lines)
        assert ("loss_by_t" in lines[-1]) == (stage == "reflow")             # distillation knows only t = 0
        folder = pipeline / OUT[stage] / "training"
        files = {"log.jsonl", "log.png"} | {
            f"step-{s:08d}.safetensors" for s in {"reflow": (9, 12), "distill": (24, 28), "lpips": (20, 24)}[stage]}
        assert ({p.name for p in folder.iterdir()}
                == files | ({f"samples-{count:06d}.png"} if stage != "lpips" else set()))


def test_a_run_that_has_ended_can_be_run_again(pipeline, tmp_path, command, monkeypatch):
    monkeypatch.chdir(shutil.copytree(pipeline, tmp_path / "p"))
    for stage in ("reflow", "distill"):
        before = {p: load_file(pipeline / p) for p in Path(OUT[stage]).rglob("*.safetensors")}
        # killed after the last checkpoint, before the model was saved
        shutil.rmtree(f"{OUT[stage]}/unet")
        assert command(STAGES[stage][0], *STAGES[stage][1])[0] == 0
        after = {p: load_file(p) for p in Path(OUT[stage]).rglob("*.safetensors")}
        assert after.keys() == before.keys()
        assert all(torch.equal(v, before[p][k]) for p, tensors in after.items() for k, v in tensors.items())
        made = json.loads(Path(OUT[stage], "instaflow.json").read_text())["made"]
        assert made["seconds"] == json.loads((pipeline / OUT[stage] / "instaflow.json").read_text())["made"]["seconds"]


def test_other_settings_are_refused(pipeline, command, monkeypatch):
    monkeypatch.chdir(pipeline)
    assert one_line(command("train_reflow.py", *STAGES["reflow"][1], "--lr", "1e-5", "--density", "u-shaped"),
                    "models/2rf/training holds a run with other settings (density, lr)")
    assert one_line(command("distill.py", *STAGES["distill"][1], "--seed", "1"),
                    "models/l2/training holds a run with other settings (seed)")


def test_mistakes_in_the_command_lines(pipeline, command, monkeypatch, tmp_path):
    monkeypatch.chdir(pipeline)
    new = ["--out", tmp_path / "new"]
    assert one_line(command("distill.py", *STAGES["distill"][1], *new, "--loss", "lpips"), "--vgg")
    assert one_line(command("distill.py", *STAGES["lpips"][1], *new, "--vgg", "none.pth"), "none.pth")
    assert one_line(command("distill.py", *STAGES["lpips"][1], *new, "--linear", "vgg.safetensors"),
                    "vgg.safetensors", "lin0")
    assert one_line(command("distill.py", *STAGES["lpips"][1], *new, "--lpips-size", "8"), "--lpips-size 8")
    assert one_line(command("distill.py", *STAGES["distill"][1], *new, "--l2", "1"), "--l2 are of --loss lpips")
    assert one_line(command("distill.py", *STAGES["lpips"][1], *new, "--lpips-size", "-8"), "--lpips-size")
    assert one_line(command("train_reflow.py", *STAGES["reflow"][1], *new, "--density", "normal"), "--density")
    assert one_line(command("train_reflow.py", *STAGES["reflow"][1], *new, "--model", "models/none"), "models/none")
    assert not (tmp_path / "new").exists()


# --- kills ---

def progress(folder, stage):
    """(How much of a stage is done, of how much): shards, or lines of the log."""
    if stage.startswith("pairs"):
        return len(list((folder / OUT[stage]).glob("*.safetensors"))), 6
    log = folder / OUT[stage] / "training" / "log.jsonl"
    return (log.read_text().count("\n") if log.exists() else 0,
            int(STAGES[stage][1][STAGES[stage][1].index("--iterations") + 1]))


def disturb(processes, folder, stage, kills, draw):
    """Run a stage, killed at `kills` random moments and started again each time, until it ends."""
    done = 0
    while True:
        process = processes.Process(target=run_stage, args=(folder, stage))
        process.start()
        if done < kills:
            moment, delay = draw.randint(0, progress(folder, stage)[1]), draw.uniform(0, 0.1)
            while process.is_alive() and progress(folder, stage)[0] < moment:
                time.sleep(0.001)
            time.sleep(delay)
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            done += 1
        else:
            assert process.exitcode == 0, (folder / "output.txt").read_text()
            if done == kills:
                return
            shutil.rmtree(folder / OUT[stage])             # it ended before the kill came: once more from the beginning
            done = 0


def assert_undisturbed(folder, pipeline, stage):
    """What a stage left in `folder` is what the undisturbed one left, bitwise."""
    ours, theirs = ({p.relative_to(f / OUT[stage]): p for p in (f / OUT[stage]).rglob("*.safetensors")}
                    for f in (folder, pipeline))
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        a, b = load_file(path), load_file(theirs[name])
        assert a.keys() == b.keys()
        for k in a:
            assert torch.equal(a[k], b[k]), f"{name}: {k} differs by {(a[k].float() - b[k].float()).abs().max()}"
    if not stage.startswith("pairs"):
        assert without_time(read_log(folder, stage)) == without_time(read_log(pipeline, stage))
        assert not list((folder / OUT[stage] / "training").glob("*.tmp"))


@pytest.fixture
def draw():
    """Moments nobody chose; printed, so that a failure can be had again."""
    seed = random.SystemRandom().randrange(10 ** 6)
    print("moments are drawn from seed", seed)
    return random.Random(seed)


@pytest.mark.parametrize("stage", ["pairs", "reflow", "distill"])
def test_a_killed_stage_ends_as_an_undisturbed_one_bitwise(processes, pipeline, tmp_path, draw, stage):
    folder = shutil.copytree(pipeline, tmp_path / "p", ignore=shutil.ignore_patterns("training"))
    shutil.rmtree(folder / OUT[stage])
    disturb(processes, folder, stage, 1, draw)
    assert_undisturbed(folder, pipeline, stage)


@pytest.mark.slow
def test_the_whole_pipeline_killed_ten_times(processes, pipeline, tmp_path, draw):
    folder = tmp_path / "p"
    shutil.copytree(pipeline / "models" / "teacher", folder / "models" / "teacher")
    for name in ("prompts.txt", "vgg.safetensors"):
        shutil.copy(pipeline / name, folder)
    for stage in STAGES:
        disturb(processes, folder, stage, 2, draw)
    for stage in STAGES:
        assert_undisturbed(folder, pipeline, stage)


# --- any number of processes ---

@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reflow", "lpips"])
def test_two_processes_train_as_one(pipeline, tmp_path, stage):
    """But for the order in which a gradient's parts are added."""
    folder, (script, words) = shutil.copytree(pipeline, tmp_path / "p"), STAGES[stage]
    for processes, out in ((1, "one"), (2, "two")):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                ROOT / script, *words, "--float32", "--lr", "1e-3", "--out", out]
        done = subprocess.run(line, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (folder / out / "training" / "log.jsonl").read_text().splitlines()]
                for out in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert ("loss_by_t" in a) == ("loss_by_t" in b)
        assert [v and pytest.approx(v, rel=1e-4) for v in a.get("loss_by_t", [])] == b.get("loss_by_t", [])
    one, two = (load_file(sorted((folder / out / "training").glob("step-*"))[-1]) for out in ("one", "two"))
    start = InstaFlow.load(folder / words[1]).unet.state_dict()
    moved = max((one[f"model.{k}"] - v).abs().max().item() for k, v in start.items())
    assert moved > 5e-3
    assert max((one[f"model.{k}"] - two[f"model.{k}"]).abs().max().item() for k in start) < 0.02 * moved
    assert json.loads((folder / "two" / "instaflow.json").read_text())["made"]["processes"] == 2
