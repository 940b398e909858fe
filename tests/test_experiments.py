"""experiments.py and measure.py: closed forms, what is kept and what is measured again, and every command on models
of random weights."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
import experiments
import flows
import measure
import scenes
import weights
from conftest import one_line
from instaflow import InstaFlow

MODELS = Path(__file__).resolve().parent.parent / "models"


# --- straightness along t ---

def standing_in(velocity, sampler="euler"):
    """What `straightness` needs of a model, with the velocity of one's choice."""
    return SimpleNamespace(schedule=diffusion.Schedule.stable_diffusion(), info={"sampler": sampler, "guidance": 1.0},
                           velocity=velocity, text=lambda words: torch.zeros(len(words), 2, 3),
                           noise=lambda seed, first, n: torch.ones(n, 4, 2, 2))


def test_a_straight_flow_is_at_no_time_away_from_its_line():
    t, curve = measure.straightness(standing_in(lambda x, t, context: torch.full_like(x, 3.0)), ["a"] * 3, steps=20)
    assert curve.shape == (20,) and curve.max() < 1e-9


def test_the_curve_of_a_flow_that_speeds_up():
    """v = 2 t: between t_min and t_max the mean velocity is their sum (Euler's own points end a step's width
    earlier), so the curve is (sum - 2 t)^2, in units of t and not of the stretched time."""
    lo, hi = diffusion.Schedule.stable_diffusion().range()
    model = standing_in(lambda x, t, context: 2 * t.reshape(-1, 1, 1, 1).expand_as(x))
    t, curve = measure.straightness(model, ["a"] * 3, steps=50)
    torch.testing.assert_close(t[[0, -1]], torch.tensor([lo, hi - (hi - lo) / 50]))
    torch.testing.assert_close(curve, (lo + hi - (hi - lo) / 50 - 2 * t) ** 2, rtol=1e-4, atol=1e-6)


def test_batches_weigh_as_many_captions_as_they_hold(monkeypatch):
    monkeypatch.setattr(measure, "BATCH", 2)
    model = standing_in(lambda x, t, context: x * (0.5 + t.reshape(-1, 1, 1, 1)))
    model.noise = lambda seed, first, n: torch.arange(first, first + n).reshape(-1, 1, 1, 1).expand(n, 4, 2, 2).float()
    parts = measure.straightness(model, ["a"] * 3, steps=10)[1]
    monkeypatch.setattr(measure, "BATCH", 3)
    torch.testing.assert_close(parts, measure.straightness(model, ["a"] * 3, steps=10)[1])


def test_a_noise_predictor_followed_by_euler_is_measured_as_the_velocity_it_is(tiny):
    """Where a model starts is told by its sampler, not by what its U-Net predicts: a student that stayed a noise
    predictor jumps from t = 0, and Stable Diffusion never is there."""
    model = InstaFlow.load(tiny / "teacher")
    model.info |= {"sampler": "euler", "guidance": 1.0}
    twin = standing_in(model.velocity)
    twin.text, twin.noise = model.text, model.noise
    captions = ["a red circle", "a blue square"]
    followed = measure.straightness(model, captions, steps=4)[1]
    torch.testing.assert_close(followed, measure.straightness(twin, captions, steps=4)[1])
    model.info["sampler"] = "dpm"
    assert not torch.allclose(followed, measure.straightness(model, captions, steps=4)[1], rtol=1e-3)


def test_the_mean_of_flows_curve_is_its_straightness():
    x0, velocity = torch.randn(5, 3), lambda x, t: x * t[:, None]
    curve = flows.straightness(velocity, x0, 7, curve=True)
    assert curve.shape == (7,) and curve.std() > 0
    torch.testing.assert_close(curve.mean(), flows.straightness(velocity, x0, 7))


# --- the distance to a teacher's ends ---

@pytest.fixture
def models(tiny, tmp_path):
    """`teacher`, and `flow` that says it was trained on two-step pairs of it."""
    shutil.copytree(tiny, tmp_path / "models")
    path = tmp_path / "models" / "flow" / "instaflow.json"
    pairs = {"model": "elsewhere/teacher", "weights": weights.checksum(tiny / "teacher"), "steps": 2, "guidance": 3.0,
             "sampler": "ddim"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pairs": pairs}))
    measure.ends.cache_clear()
    return tmp_path / "models"


def test_a_model_without_pairs_is_its_own_teacher_and_has_no_error(models):
    _, of_itself = measure.content(models, "teacher", InstaFlow.load(models / "teacher"), 4, 3)
    assert (of_itself() == {"teacher": "teacher:4", "error": 0.0, "unrelated": pytest.approx(of_itself()["unrelated"])}
            and of_itself()["unrelated"] > 0.1)
    assert measure.content(models, "teacher", InstaFlow.load(models / "teacher"), 1, 3)[1]()["error"] > 0.01


def test_one_steps_error_is_the_distance_to_the_pairs_end_from_the_same_noise(models):
    teacher, flow = InstaFlow.load(models / "teacher"), InstaFlow.load(models / "flow")
    captions = list(scenes.captions(measure.SEED, 0, 3))
    teacher.info["sampler"] = "ddim"
    theirs, ours = teacher.latents(captions, 2, 3.0, seed=6), flow.latents(captions, 1, seed=6)
    measured = measure.content(models, "flow", flow, 1, 3, seed=6)[1]()
    assert measured["teacher"] == "teacher:2"
    assert measured["error"] == pytest.approx(float((ours - theirs).square().mean()), rel=0.03)       # bf16
    assert measured["unrelated"] == pytest.approx(
        np.mean([float((theirs[i] - theirs[i - 1]).square().mean()) for i in range(3)]), rel=0.03)


def test_a_folder_overwritten_meanwhile_does_not_lend_its_number(models):
    """What is kept under a model's weights is measured with them, also where its folder has others by then."""
    error = measure.content(models, "flow", InstaFlow.load(models / "flow"), 1, 3)[1]()["error"]
    measured = measure.content(models, "flow", InstaFlow.load(models / "flow"), 1, 3)[1]
    shutil.copy(models / "teacher" / "unet" / weights.UNET_FILE, models / "new")
    (models / "new").replace(models / "flow" / "unet" / weights.UNET_FILE)
    measure.ends.cache_clear()
    assert measured()["error"] == pytest.approx(error)
    assert measure.content(models, "flow", InstaFlow.load(models / "flow"), 1, 3)[1]()["error"] != pytest.approx(error)


def test_the_error_is_to_the_ends_that_another_model_drew(models, capsys):
    """A student of pairs that "teacher" began and "flow" finished, as pairs.py --finish has it."""
    student, captions = InstaFlow.load(models / "flow"), list(scenes.captions(measure.SEED, 0, 3))
    student.info["pairs"]["finish"] = {"model": "elsewhere/flow", "weights": weights.checksum(models / "flow"),
                                       "at": 0.4, "guidance": 2.0}
    assert measure.teacher(models, "flow", student) == ("teacher", 2, 3.0, "ddim", ("flow", 0.4, 2.0))
    student.info["pairs"]["steps"] = 5
    begun, context = InstaFlow.load(models / "teacher"), student.text([*captions, ""])
    with torch.no_grad():
        theirs = begun.solve_with(InstaFlow.load(models / "flow"), 0.4, 2.0, begun.noise(6, 0, 3),
                                  context[:3], context[3:], 5, 3.0)
    of, measured = measure.content(models, "flow", student, 1, 3, seed=6)
    assert measured()["error"] == pytest.approx(
        float((student.latents(captions, 1, seed=6) - theirs).square().mean()), rel=0.03)
    student.info["pairs"]["finish"]["weights"] += 1
    other, measured = measure.content(models, "flow", student, 1, 3, seed=6)
    assert measured() == {} and "has not the model" in capsys.readouterr().err and other != of


def test_another_teacher_than_the_pairs_is_none(models, capsys):
    flow = InstaFlow.load(models / "flow")
    before = measure.content(models, "flow", InstaFlow.load(models / "flow"), 1, 2)[0]
    shutil.copy(models / "flow" / "unet" / weights.UNET_FILE, models / "teacher" / "unet")
    after, measured = measure.content(models, "flow", flow, 1, 2)
    assert measured() == {} and "has not the model that made the pairs flow" in capsys.readouterr().err
    assert before != after                                 # or a number kept before would stand


def test_a_flow_goes_on_from_its_teachers_line(models, monkeypatch):
    """From t = 0 it is the flow itself, unguided; from t = 1 its teacher's end; between, Euler's steps from the point
    of the line."""
    monkeypatch.setattr(measure, "BATCH", 2)
    flow, captions = InstaFlow.load(models / "flow"), list(scenes.captions(measure.SEED, 0, 3))
    whose = measure.teacher(models, "flow", flow)
    teacher = InstaFlow.load(models / "teacher")
    teacher.info["sampler"] = whose[3]
    evaluation = SimpleNamespace(captions=captions, seed=6, of="", scores=lambda images: images)
    start = lambda t: measure.Evaluation.continued(evaluation, "", flow, models, whose, t)[1]()
    of = lambda: measure.Evaluation.continued(evaluation, "", flow, models, whose, 0.5)[0]
    x0, x1, context = flow.noise(6, 0, 3), teacher.latents(captions, 2, 3.0, seed=6), flow.text(captions)
    by_hand = flows.interpolate(x0, x1, torch.full((3,), 0.92))
    by_hand = by_hand + 0.04 * flow.velocity(by_hand, torch.full((3,), 0.92), context).detach()
    by_hand = by_hand + 0.04 * flow.velocity(by_hand, torch.full((3,), 0.96), context).detach()
    for t, latents in ((0, flow.latents(captions, guidance=1.0, seed=6)), (1, x1), (0.92, by_hand)):
        # random decoders multiply rounding
        torch.testing.assert_close(start(t), measure.pictures(flow, latents), rtol=0, atol=5e-3)
    before, flow.info["steps"] = of(), 24
    assert of() != before                                  # or a number kept before would stand


# --- what is kept ---

def test_rows_are_measured_once_and_again_when_what_they_are_of_changes(tmp_path):
    path, calls = tmp_path / "kept.json", []

    def row(name, fails=False):
        def measured():
            calls.append(name)
            if fails:
                raise KeyboardInterrupt
            return {"value": len(calls)}
        return measured
    with pytest.raises(KeyboardInterrupt):
        measure.keep(path, {"a": ("1", row("a")), "b": ("1", row("b", fails=True))})
    assert measure.keep(path, {"a": ("1", row("a")), "b": ("1", row("b"))})["a"]["value"] == 1
    assert calls == ["a", "b", "b"]
    rows = measure.keep(path, {"b": ("2", row("b"))})
    assert calls == ["a", "b", "b", "b"] and rows["b"]["value"] == 4
    assert list(json.loads(path.read_text())) == ["a, 1", "b, 1", "b, 2"]  # a small trial loses nothing of a large one


def test_a_key_tells_weights_guidance_and_sampler_apart(tiny):
    model = InstaFlow.load(tiny / "teacher")
    seen = {measure.identity(model), measure.identity(InstaFlow.load(tiny / "flow"))}
    assert measure.identity(InstaFlow.load(tiny / "teacher")) in seen
    for key, value in (("guidance", 7.0), ("sampler", "ddim")):
        model.info[key] = value
        seen.add(measure.identity(model))
    next(iter(model.text.parameters())).flatten()[0] += 1
    assert len(seen | {measure.identity(model)}) == 5


# --- the commands ---

def drawn(path):
    picture = np.asarray(Image.open(path).convert("L"))
    return min(picture.shape) > 200 and picture.std() > 5


def test_straightness_draws_and_keeps_what_it_draws(command, models, tmp_path):
    line = ("experiments.py", "straightness", "--models", models, "--rows", "teacher,flow", "--n", 2,
            "--device", "cpu", "--out", tmp_path / "s.png")
    status, out, err = command(*line)
    assert status == 0 and err.count("measuring") == 2 and drawn(tmp_path / "s.png")
    for row, printed in zip(json.loads((tmp_path / "s.json").read_text()).values(), out.splitlines()):
        assert f"S {np.mean(row['curve']):.4f}" in printed and len(row["t"]) == 100
    assert command(*line)[1:] == (out, "")                 # again: the same, and nothing measured


def test_shared_noise_and_interpolation_draw(command, models, tmp_path):
    status, out, err = command("experiments.py", "shared-noise", "a red circle", "a blue square", "--models", models,
                               "--rows", "teacher:4,flow:1", "--n", 2, "--device", "cpu", "--out", tmp_path / "n.png")
    assert status == 0 and drawn(tmp_path / "n.png")
    assert [row["teacher"] for row in json.loads((tmp_path / "n.json").read_text()).values()] == [
        "teacher:4", "teacher:2"]
    status, *_ = command("experiments.py", "interpolation", "--models", models, "--rows", "teacher:2,flow:1",
                         "--frames", 3, "--device", "cpu", "--out", tmp_path / "new" / "i.png")
    assert status == 0 and drawn(tmp_path / "new" / "i.png")


@pytest.fixture
def small(monkeypatch):
    """Evaluations that read no picture: the miniature's judge sees only 64 px."""
    class Judged:
        of = "judged"

        def __init__(self, args, n, split):
            self.captions, self.images = ["a red circle"] * n, split

        def scores(self, pictures):
            return {"exact": 0.25, "unordered": 0.5,
                    "by_objects": {1: {"exact": 0.75, "related": None}, 2: {"exact": 0.1, "related": 0.4}},
                    "fid": 12.0, "pictures": str(pictures)}

        def row(self, name, model, steps, guidance=None):
            return measure.identity(model) + self.images, lambda: self.scores((name, steps, guidance))

        def continued(self, name, model, folder, whose, t):
            return f"{measure.identity(model)} {whose}", lambda: self.scores((name, whose[:2], t))

        def floor(self, model):
            return self.images, lambda: self.scores("floor")
    monkeypatch.setattr(experiments, "Evaluation", Judged)


def test_the_table_has_a_line_a_row_and_every_column(command, small, models, tmp_path):
    status, out, err = command("experiments.py", "table", "--models", models, "--rows", "teacher:4,teacher:1,flow:1",
                               "--n", 2, "--device", "cpu", "--out", tmp_path / "t.json")
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert status == 0 and len({line.count("|") for line in lines}) == 1 and len(lines) == 7
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    kept = json.loads((tmp_path / "t.json").read_text())
    s = {key.split(",")[0]: row["straightness"] for key, row in kept.items() if "straightness" in row}
    error = next(row["error"] for row in kept.values() if "error" in row)
    assert cells["teacher:1"][:8] == ["0.250", "0.75 / 0.10", "0.500", "0.40", "0.250", "12.00",
                                      f"{s['teacher']:.3f}", ""]
    assert cells["flow:1"][6:8] == [f"{s['flow']:.3f}", f"{error:.3f}"] and cells["real scenes"][6:] == ["", "", ""]
    assert err.count(", S\n") == 2 and err.count(", ms\n") == 3              # S once a model


def test_figures_of_points_measure_each_once_and_draw(command, small, models, tmp_path):
    for words, points in (
            (("where", "--rows", "teacher,flow", "--times", 1, 0.5),
             {("flow from t = 0.5", ("teacher", 2), 0.5), ("flow from t = 1", ("teacher", 2), 1.0)}),
            (("guidance", "--rows", "teacher:4,flow:1", "--values", 1, 2),
             {("teacher:4, guidance 2", 4, 2.0), ("flow:1, guidance 1", 1, 1.0)}),
            (("steps", "--rows", "teacher,flow", "--steps", 1, 4),
             {("teacher:4", 4, None), ("flow:1", 1, None)})):
        line = ("experiments.py", *words, "--models", models, "--n", 2, "--device", "cpu",
                "--out", tmp_path / f"{words[0]}.png")
        status, out, err = command(*line)
        assert status == 0 and drawn(tmp_path / f"{words[0]}.png") and err.count("measuring") == 5
        measured = {row["pictures"] for row in json.loads((tmp_path / f"{words[0]}.json").read_text()).values()}
        assert {"floor", *map(str, points)} <= measured
        assert command(*line)[1:] == (out, "")


def test_where_a_flow_starts_at_its_end_it_draws_nothing(command, small, models, tmp_path, monkeypatch):
    """So what its pairs' ends score is a level of its own, not a point of the flow."""
    import figures
    lines = {}
    monkeypatch.setattr(figures, "curves", lambda given, *rest: lines.update(given))
    line = ("experiments.py", "where", "--models", models, "--rows", "flow", "--n", 2, "--device", "cpu", "--out",
            tmp_path / "w.png")
    assert command(*line, "--times", 1, 0.5, 0)[0] == 0
    assert {name: [x for x, y in zip(*drawn[0])] for name, drawn in lines.items()} == {
        "flow": [0, 0.5], "the ends of flow's pairs, by its teacher": [0, 0.5, 1], experiments.FLOOR: [0, 0.5, 1]}


def test_the_judge_scores_a_shipped_model(command, tmp_path):
    """Through the real evaluation: judge, exact match and FID."""
    status, _, _ = command("experiments.py", "steps", "--models", MODELS, "--judge", MODELS / "mini-judge",
                           "--rows", "mini-instaflow", "--steps", 1, "--n", 8, "--device", "cpu",
                           "--out", tmp_path / "q.png")
    floor, row = json.loads((tmp_path / "q.json").read_text()).values()
    assert (status == 0 and floor["n"] == row["n"] == 8 and floor["exact"] >= 0.75 and row["exact"] <= floor["exact"]
            and row["fid"] > floor["fid"] > 0)


@pytest.mark.parametrize("words, told", [
    (("table", "--rows", "teacher"), ("--rows teacher", "MODEL:STEPS")),
    (("table", "--rows", "teacher:0"), ("--rows teacher:0", "MODEL:STEPS")),
    (("steps", "--rows", "teacher:4"), ("--rows teacher:4", "write MODEL,")),
    (("straightness", "--rows", "nobody"), ("nobody", "no such model")),
    (("guidance", "--rows", "teacher:4", "--judge", "nowhere"), ("nowhere", "judge.py train")),
    (("interpolation", "--rows", "flow:1", "--out", "i.jpg"), ("--out i.jpg", "PNG")),
    (("table", "--n", "1"), ("--n",)),
    (("shared-noise", "--seed", "-1"), ("--seed",)),
    (("where", "--times", "1.5"), ("--times", "from 0 to 1")),
])
def test_mistakes_are_one_line(command, tiny, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    assert one_line(command("experiments.py", words[0], "--models", tiny, *words[1:]), *told)


def test_a_flow_without_its_teacher_has_nowhere_to_start(command, models, tmp_path):
    shutil.copy(models / "flow" / "unet" / weights.UNET_FILE, models / "teacher" / "unet")
    assert one_line(command("experiments.py", "where", "--models", models, "--rows", "flow",
                            "--out", tmp_path / "w.png"), "pairs of elsewhere/teacher", models, "put it there")
