import json
import shutil
from copy import copy as copied

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusion
import flows
import instaflow
import weights
from cli import UserError
from conftest import relative_error
from instaflow import InstaFlow
from test_diffusion import GaussianNoisePredictor, rectified_velocity

pytestmark = pytest.mark.usefixtures("plain_convolutions")
PROMPTS = ["a red circle", "a small yellow star above a large green heart", ""]


@pytest.fixture(scope="module")
def flow(tiny):
    return InstaFlow.load(tiny / "flow")


@pytest.fixture(scope="module")
def teacher(tiny):
    return InstaFlow.load(tiny / "teacher")


def weights_of(model):
    return {f"{part}.{k}": v for part in ("unet", "vae", "text") for k, v in getattr(model, part).state_dict().items()}


def assert_same(a, b):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# --- noise ---

def test_noise_is_named_by_stream_seed_and_index(flow):
    batch = flow.noise(7, 3, 4)
    assert batch.shape == (4, 4, 8, 8) and batch.dtype == torch.float32
    for i in range(4):
        assert np.array_equal(batch[i],
                              np.random.default_rng([0, 7, 3 + i]).standard_normal((4, 8, 8), dtype=np.float32))
    assert np.array_equal(flow.noise(7, 3, 1, stream=1)[0],
                          np.random.default_rng([1, 7, 3]).standard_normal((4, 8, 8), dtype=np.float32))
    assert flow.noise(0, 0, 2, height=12, width=20).shape == (2, 4, 6, 10)


@pytest.mark.parametrize("name, settings", [("flow", {}), ("flow", {"guidance": 1.0, "steps": 1}), ("teacher", {})])
def test_a_picture_is_the_same_alone_and_in_a_batch(request, name, settings):
    model = request.getfixturevalue(name)
    together = model.latents(PROMPTS, seed=5, first=2, **settings)
    for i, prompt in enumerate(PROMPTS):
        alone = model.latents([prompt], seed=5, first=2 + i, **settings)
        assert relative_error(alone[0], together[i]) <= 1e-5
    assert relative_error(together[:1], together[1:2]) > 0.1                 # they are different pictures


def test_a_step_from_noise_is_one_by_one_in_float32_and_a_batch_in_bf16(teacher, monkeypatch):
    """In float32 for the sake of the test above; in bf16 rounding is larger than what a batch changes, and half of
    the time that pairs take would go there."""
    sizes, unet = [], teacher.unet.forward
    monkeypatch.setattr(teacher.unet, "forward", lambda x, *rest: (sizes.append(len(x)), unet(x, *rest))[1])
    solve = lambda: teacher.solve(torch.ones(3, 4, 8, 8), torch.ones(3, 5, 8), torch.ones(1, 5, 8), 2, 2.0, "euler")
    alone = solve()
    assert sizes == [1] * 6 + [6]                          # t = 0, then t = 1/2, each with and without the prompt
    sizes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        together = solve()
    assert sizes == [6, 6] and relative_error(together, alone) <= 0.1


def test_latents_start_from_stream_0_at_first(flow):
    seen = []
    handle = flow.unet.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        flow.latents(["a", "b"], steps=1, guidance=1.0, seed=9, first=4)
    finally:
        handle.remove()
    (x, timestep, context), = seen                                           # guidance 1 costs one call of B
    assert torch.equal(x, torch.stack([flows.noise(0, 9, i, (4, 8, 8)) for i in (4, 5)]))
    assert timestep.tolist() == [1000.0, 1000.0]                             # exactly: t = 0, never rounded
    assert torch.equal(context, flow.text(["a", "b"]))


def test_the_same_prompts_are_read_once_and_again_where_the_tower_has_changed(tiny):
    flow, calls = InstaFlow.load(tiny / "flow"), []
    flow.text.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    first = [flow.latents(["a red circle", "a ring"], steps=1, seed=seed) for seed in (0, 1, 0)]
    assert len(calls) == 1 and torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    other = flow.latents(["a ring", "a red circle"], steps=1, seed=0)
    assert len(calls) == 2 and not torch.equal(other, first[0])
    assert torch.equal(flow.latents(["a red circle", "a ring"], steps=1, seed=0), first[0])
    with torch.no_grad():
        flow.text.tower.positional_embedding.mul_(3)  # as merging a LoRA or a training's step does
    changed = flow.latents(["a red circle", "a ring"], steps=1, seed=0)
    assert len(calls) == 4 and not torch.equal(changed, first[0])
    assert torch.equal(InstaFlow(flow.unet, flow.vae, flow.text, flow.info).latents(
        ["a red circle", "a ring"], steps=1, seed=0), changed)
    flow.to("cpu", torch.bfloat16)
    assert flow.latents(["a red circle", "a ring"], steps=1, seed=0).dtype == torch.bfloat16
    with torch.inference_mode():
        inside = InstaFlow.load(tiny / "flow")
        assert torch.equal(inside.latents(["a red circle", "a ring"], steps=1, seed=0), first[0])


def test_timestep_of_every_euler_step(flow):
    seen = []
    handle = flow.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1].unique().tolist()))
    try:
        flow.latents(["a"], steps=4)
    finally:
        handle.remove()
    assert seen == [[1000.0], [750.0], [500.0], [250.0]]


# --- the ODE ---

@torch.no_grad()
@pytest.mark.parametrize("alpha", [1.0, 1.5, 0.0, -2.0])
def test_guidance_is_taken_on_velocity(flow, alpha):
    """Equation 8, at one Euler step: Z1 = X0 + alpha v(X0, 0 | T) + (1 - alpha) v(X0, 0 | NULL)."""
    x0, text, null = flow.noise(1, 0, 2), flow.text(PROMPTS[:2]), flow.text([""])
    v = flow.unet(x0, torch.full((2,), 1000.0), text)
    without = flow.unet(x0, torch.full((2,), 1000.0), null.expand(2, -1, -1))
    assert relative_error(v, without) > 1e-3                                 # the prompt matters, so a swap would show
    assert relative_error(flow.latents(PROMPTS[:2], steps=1, guidance=alpha, seed=1),
                          x0 + alpha * v + (1 - alpha) * without) <= 1e-5


@torch.no_grad()
def test_the_negative_prompt_stands_for_null(flow):
    x0, text, null = flow.noise(1, 0, 1), flow.text(["a"]), flow.text(["ugly"])
    v, without = flow.unet(x0, 1000.0, text), flow.unet(x0, 1000.0, null)
    assert relative_error(flow.latents(["a"], steps=1, guidance=3.0, seed=1, negative="ugly"),
                          x0 + 3 * v - 2 * without) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_a_noise_predictor_is_guided_on_noise(teacher, sampler):
    """The solvers of diffusion.py (held against diffusers' own in test_diffusion.py), on a guided U-Net written out."""
    text, null = teacher.text(PROMPTS), teacher.text([""])

    def eps(x, timestep):
        return 3.0 * teacher.unet(x, timestep, text) - 2.0 * teacher.unet(x, timestep, null.expand_as(text))
    x0 = teacher.noise(4, 0, 3)
    wanted = {"dpm": diffusion.dpm_solver, "ddim": diffusion.ddim}[sampler](
        eps, x0, 5, diffusion.Schedule.stable_diffusion())
    got = teacher.solve(x0, text, null, 5, 3.0, sampler)
    assert relative_error(got, wanted) <= 1e-4
    if sampler == "dpm":  # what instaflow.json of a noise predictor says
        # (its prompts are read in one batch)
        assert relative_error(teacher.latents(PROMPTS, steps=5, guidance=3.0, seed=4), got) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 37, 500, 999])
def test_velocity_of_a_noise_predictor_at_a_whole_index(teacher, index):
    """There t = a / (a + b), x = (a + b) z, and v = (x - b eps) / a - eps, by hand."""
    bar = np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)[index]
    a, b = float(np.sqrt(bar)), float(np.sqrt(1 - bar))
    z, text = teacher.noise(2, 0, 2), teacher.text(PROMPTS[:2])
    x = (a + b) * z
    eps = teacher.unet(x, float(index), text)
    assert relative_error(teacher.velocity(z, torch.full((2,), a / (a + b), dtype=torch.float64), text).float(),
                          (x - b * eps) / a - eps) <= 1e-4


class Gaussian:
    """Data N(0.7, 0.5^2), whose flow is known exactly: as a noise predictor and as a velocity, with the call of a
    U-Net."""
    mu, s = 0.7, 0.5

    def noise(self, schedule):
        predictor = GaussianNoisePredictor(schedule, self.mu, self.s)
        return lambda x, index, context: predictor(x, index)

    def velocity(self, x, timestep, context):
        return rectified_velocity(x, 1 - torch.as_tensor(timestep) / 1000, self.mu, self.s).to(x.dtype)

    def end(self, z, t):
        """Of the path through z at time t: as far from the data's mean, in deviations, as z is from the mean of that
        time."""
        return self.mu + self.s * (z - t * self.mu) / (t ** 2 * self.s ** 2 + (1 - t) ** 2) ** 0.5


def exact(model, unet, **info):
    other = copied(model)
    other.unet, other.info = unet, model.info | info
    return other


@torch.no_grad()
@pytest.mark.parametrize("name, sampler", [("teacher", "dpm"), ("teacher", "ddim"),
                                           ("flow", "euler"), ("flow", "heun")])
@pytest.mark.parametrize("t", [0.1, 0.3, 0.8])
def test_a_path_goes_on_from_within(request, name, sampler, t):
    data, model = Gaussian(), request.getfixturevalue(name)
    z, text = model.noise(3, 0, 2), model.text(["a", ""])
    path = exact(model, data.noise(model.schedule) if name == "teacher" else data.velocity, sampler=sampler)
    for steps, most in ((20, 0.1), (400, 0.01)):           # both get nearer
        assert relative_error(path.finish(z, t, text[:1].expand(2, -1, -1), text[1:], steps, 1.0),
                              data.end(z, t)) < most
    start = flows.interpolate(z, z.flip(0), torch.full((2,), t))
    wanted = path.finish(start, t, text[:1].expand(2, -1, -1), text[1:], max(1, round((1 - t) * 10)), 2.0)
    assert torch.equal(path.solve_from(t, z, z.flip(0), text[:1].expand(2, -1, -1), text[1:], 10, 2.0), wanted)


@torch.no_grad()
def test_a_path_begun_by_the_flow_is_finished_by_its_teacher(flow, teacher):
    """Two Euler steps of the flow, by hand, and the end that the teacher's exact path has from there."""
    data, text = Gaussian(), flow.text(PROMPTS[:2] + [""])
    x0, begun = flow.noise(0, 0, 2), flow.noise(0, 0, 2)
    for t in (0.0, 0.1):
        v = lambda context: flow.velocity(begun, torch.full((2,), t), context)
        begun = begun + 0.1 * (3.0 * v(text[:2]) - 2.0 * v(text[2:].expand(2, -1, -1)))
    got = flow.solve_with(exact(teacher, data.noise(teacher.schedule)), 0.2, 1.5, x0, text[:2], text[2:], 402, 3.0)
    assert relative_error(got, data.end(begun, 0.2)) < 0.01


@pytest.mark.parametrize("name, sampler", [("flow", "euler"), ("flow", "heun"),
                                           ("teacher", "dpm"), ("teacher", "ddim"), ("teacher", "euler")])
def test_steps_that_cannot_be_are_a_value_error(request, name, sampler):
    model = request.getfixturevalue(name)
    for steps in (0, -1) if sampler in ("euler", "heun") else (0, -1, 1000):
        with pytest.raises(ValueError, match=f"steps is {steps}"):
            model.solve(model.noise(0, 0, 1), model.text(["a"]), model.text([""]), steps, sampler=sampler)


def test_more_steps_than_the_schedule_has_is_one_line(teacher):
    with pytest.raises(UserError, match="steps is 1000; sampler dpm takes at most 999"):
        teacher.latents(["a"], steps=1000)


def test_a_noise_sampler_needs_a_noise_predictor(flow):
    with pytest.raises(UserError, match="sampler dpm needs a noise predictor"):
        flow.solve(flow.noise(0, 0, 1), flow.text(["a"]), flow.text([""]), 1, sampler="dpm")
    with pytest.raises(UserError, match="sampler dpm needs a noise predictor"):
        exact(flow, flow.unet, sampler="dpm").finish(flow.noise(0, 0, 1), 0.5, flow.text(["a"]), flow.text([""]), 1)


def test_none_means_what_the_folder_says(flow):
    assert (flow.info["steps"], flow.info["guidance"]) == (3, 1.5)
    assert torch.equal(flow.latents(["a"]), flow.latents(["a"], steps=3, guidance=1.5))
    assert not torch.equal(flow.latents(["a"]), flow.latents(["a"], steps=2, guidance=1.5))
    assert not torch.equal(flow.latents(["a"]), flow.latents(["a"], steps=3, guidance=1.0))


# --- pictures ---

@torch.no_grad()
@torch.no_grad()
def test_a_vae_that_overflows_float16_goes_on_in_float32(tiny, capsys):
    """Pictures are those of float32, not black; the note comes once."""
    model, latents = InstaFlow.load(tiny / "flow", dtype=torch.float16), torch.randn(1, 4, 8, 8)
    model.vae.decoder.conv_in.weight *= 1000
    model.vae.decoder.conv_in.bias += 60000
    whole = InstaFlow.load(tiny / "flow")
    whole.vae.load_state_dict({k: v.float() for k, v in model.vae.state_dict().items()})
    latents = 100 * latents
    assert not model.vae.decode(latents.half() / model.scale).isfinite().all()
    for _ in range(2):
        image = model.decode(latents.half())
        assert torch.allclose(image, whole.decode(latents.half().float()), atol=1e-2) and image.abs().max() > 0.01
    assert capsys.readouterr().err == "note: this VAE does not fit into float16; it goes on in float32\n"


def test_pictures_are_the_decoded_latents(flow):
    latents = flow.latents(PROMPTS, seed=3)
    images = flow.generate(PROMPTS, seed=3)
    wanted = flow.vae.decode(latents / 0.18215).clamp(-1, 1)
    assert wanted.std() > 0.02
    for image, pixels in zip(images, wanted, strict=True):
        assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (16, 16)
        got = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        assert (got - pixels).abs().max() <= 0.5001 / 127.5


def test_height_and_width(flow):
    assert flow.generate(["a"], steps=1, height=12, width=22)[0].size == (22, 12)
    for size in ({"height": 13}, {"width": 1}, {"height": 0}):
        with pytest.raises(UserError, match=f"{list(size)[0]} is {list(size.values())[0]}; it must be a multiple of 2"):
            flow.latents(["a"], **size)


def test_a_student_warns_of_steps_that_it_was_not_trained_for(flow, capsys):
    student = InstaFlow(flow.unet, flow.vae, flow.text,
                        {"prediction": "velocity", "steps": 1, "guidance": 1.0, "trained_steps": [1]})
    student.latents(["a"])
    student.latents(["a"], steps=1)
    flow.latents(["a"], steps=9)                                             # not distilled
    assert capsys.readouterr().err == ""
    student.latents(["a"], steps=4)
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and "distilled for 1 step;" in err and "with 4" in err and err.count("\n") == 1
    InstaFlow(flow.unet, flow.vae, flow.text, {"prediction": "velocity", "trained_steps": [1, 2, 4]}).check_steps(3)
    assert "distilled for 1, 2, 4 steps;" in capsys.readouterr().err


# --- on disk ---

def test_save_and_load_are_exact(flow, tmp_path):
    flow.save(tmp_path / "a" / "b", self_contained=True)
    again = InstaFlow.load(tmp_path / "a" / "b")
    assert_same(flow, again)
    assert again.info == {k: v for k, v in flow.info.items() if not k.startswith("base")}
    assert torch.equal(flow.latents(PROMPTS, seed=2), again.latents(PROMPTS, seed=2))
    assert not any(p.requires_grad for m in (again.unet, again.vae, again.text) for p in m.parameters())
    assert not any(m.training for part in (again.unet, again.vae, again.text) for m in part.modules())


def test_a_base_that_was_trained_again_is_told(tiny, tmp_path, capsys):
    """What a student was trained with is no longer there: its pictures would be wrong, without a word."""
    for name in ("teacher", "flow"):
        shutil.copytree(tiny / name, tmp_path / name)
    InstaFlow.load(tmp_path / "flow")
    assert capsys.readouterr().err == ""
    teacher = InstaFlow.load(tmp_path / "teacher")
    next(teacher.text.parameters()).flatten()[0] += 1
    teacher.save(tmp_path / "teacher")
    InstaFlow.load(tmp_path / "flow")
    err = capsys.readouterr().err
    assert (err.startswith(f"warning: {tmp_path / 'flow'} was trained with another VAE or text tower")
            and err.count("\n") == 1)


@pytest.mark.parametrize("key, value", [("prediction", []), ("sampler", ["euler"]), ("sampler", {}),
                                        ("guidance", float("nan")), ("guidance", float("inf"))])
def test_fields_of_other_kinds_are_refused(flow, key, value):
    with pytest.raises(UserError, match=key):
        InstaFlow(flow.unet, flow.vae, flow.text, {**flow.info, key: value})


def test_info_survives(flow, tmp_path):
    info = {"prediction": "velocity", "sampler": "heun", "steps": 2, "guidance": 1.25, "trained_steps": [1, 2],
            "made": {"command": "python ü", "seed": 2 ** 40}}
    InstaFlow(flow.unet, flow.vae, flow.text, info).save(tmp_path)
    assert json.loads((tmp_path / "instaflow.json").read_text()) == info
    assert InstaFlow.load(tmp_path).info == info


def test_half_precision_on_disk(flow, tmp_path):
    flow.save(tmp_path, self_contained=True, dtype=torch.float16)
    assert {v.dtype for v in load_file(tmp_path / "unet" / weights.UNET_FILE).values()} == {torch.float16}
    again = weights_of(InstaFlow.load(tmp_path))
    assert all(v.dtype == torch.float32 and torch.equal(v, weights_of(flow)[k].half().float())
               for k, v in again.items())
    assert next(InstaFlow.load(tmp_path, dtype=torch.bfloat16).vae.parameters()).dtype == torch.bfloat16


def test_base_is_a_relative_path(tiny, flow, tmp_path):
    shutil.copytree(tiny, tmp_path / "models")
    assert json.loads((tmp_path / "models" / "flow" / "instaflow.json").read_text())["base"] == "../teacher"
    assert not (tmp_path / "models" / "flow" / "vae").exists()
    student = InstaFlow.load(tmp_path / "models" / "flow")
    student.save(tmp_path / "models" / "deep" / "student")  # the base of a base is the one that holds the weights
    assert (json.loads((tmp_path / "models" / "deep" / "student" / "instaflow.json").read_text())["base"]
            == "../../teacher")
    (tmp_path / "models").rename(tmp_path / "moved")
    assert_same(InstaFlow.load(tmp_path / "moved" / "deep" / "student"), flow)
    shutil.rmtree(tmp_path / "moved" / "teacher")
    with pytest.raises(UserError, match="lie in .*teacher, which is no folder") as error:
        InstaFlow.load(tmp_path / "moved" / "flow")
    assert "\n" not in str(error.value) and "flow/instaflow.json" in str(error.value)


def test_saved_over_itself_a_model_keeps_its_parts(tiny, flow, tmp_path, monkeypatch):
    shutil.copytree(tiny / "teacher", tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    model = InstaFlow.load("m")
    model.save("./m")
    assert "base" not in json.loads((tmp_path / "m" / "instaflow.json").read_text())
    assert_same(InstaFlow.load("m"), model)


@pytest.mark.parametrize("part", ["vae", "text"])
def test_a_changed_vae_or_text_tower_is_saved_too(tiny, tmp_path, part):
    shutil.copytree(tiny, tmp_path / "models")
    model = InstaFlow.load(tmp_path / "models" / "flow")
    with torch.no_grad():
        next(getattr(model, part).parameters()).add_(1)
    model.save(tmp_path / "models" / "changed")
    assert_same(InstaFlow.load(tmp_path / "models" / "changed"), model)


def test_to_a_device_keeps_the_dtype(tiny):
    model = InstaFlow.load(tiny / "flow", dtype=torch.bfloat16).to("cpu")
    assert {p.dtype for module in (model.unet, model.vae, model.text) for p in module.parameters()} == {torch.bfloat16}
    assert next(model.to("cpu", torch.float32).unet.parameters()).dtype == torch.float32


def test_self_contained_needs_no_base(tiny, flow, tmp_path):
    shutil.copytree(tiny, tmp_path / "models")
    InstaFlow.load(tmp_path / "models" / "flow").save(tmp_path / "alone", self_contained=True)
    shutil.rmtree(tmp_path / "models")
    assert "base" not in json.loads((tmp_path / "alone" / "instaflow.json").read_text())
    assert_same(InstaFlow.load(tmp_path / "alone"), flow)


@torch.no_grad()
def test_diffusers_and_transformers_open_our_folder(tiny, teacher):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    from text import tokenize
    folder, text = tiny / "teacher", teacher.text(PROMPTS)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([999.0, 500.25, 0.0])
    unet, loading = UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert relative_error(teacher.unet(x, t, text), unet(x, t, text).sample) <= 2e-5
    vae, loading = AutoencoderKL.from_pretrained(folder / "vae", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert vae.config.scaling_factor == 0.18215
    assert relative_error(teacher.vae.decode(x), vae.decode(x).sample) <= 2e-5
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert relative_error(teacher.vae.encode(images)[0], vae.encode(images).latent_dist.mean) <= 2e-5
    tower = CLIPTextModel.from_pretrained(folder / "text_encoder")
    assert relative_error(text, tower(tokenize(PROMPTS)).last_hidden_state) <= 2e-5


def test_a_folder_that_diffusers_wrote(teacher, tiny, tmp_path):
    """As Stable Diffusion's: no instaflow.json, all parts inside, other keys in its config.json."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    UNet2DConditionModel.from_pretrained(tiny / "teacher" / "unet").save_pretrained(tmp_path / "unet")
    AutoencoderKL.from_pretrained(tiny / "teacher" / "vae").save_pretrained(tmp_path / "vae")
    CLIPTextModel.from_pretrained(tiny / "teacher" / "text_encoder").save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    model = InstaFlow.load(tmp_path)
    assert_same(model, teacher)
    assert model.info == {"prediction": "epsilon", "sampler": "dpm", "steps": 25, "guidance": 7.5, "trained_steps": []}


@pytest.fixture
def copy(tiny, tmp_path):
    """A folder of one's own with the teacher in it."""
    return shutil.copytree(tiny / "teacher", tmp_path / "model")


@pytest.mark.parametrize("name, prediction", [("RectifiedFlowPipeline", "velocity"),
                                              ("StableDiffusionPipeline", "epsilon")])
def test_model_index_decides_the_prediction(copy, name, prediction):
    (copy / "instaflow.json").unlink()
    (copy / "model_index.json").write_text(
        json.dumps({"_class_name": name, "scheduler": ["diffusers", "PNDMScheduler"]}))
    model = InstaFlow.load(copy)
    assert model.info == {"prediction": prediction, **instaflow.DEFAULTS[prediction]}


@pytest.mark.parametrize("index", [None, '{"_class_name": "StableDiffusionXLPipeline"}', "{}"])
def test_a_prediction_is_never_guessed(copy, index):
    (copy / "instaflow.json").unlink()
    if index:
        (copy / "model_index.json").write_text(index)
    with pytest.raises(UserError, match="does not say what its U-Net predicts") as error:
        InstaFlow.load(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)
    assert InstaFlow.load(copy, prediction="velocity").info["sampler"] == "euler"
    assert InstaFlow.load(copy, prediction="epsilon").info["sampler"] == "dpm"


UNET, VAE, TEXT = f"unet/{weights.UNET_FILE}", f"vae/{weights.VAE_FILE}", f"text_encoder/{weights.TEXT_FILE}"
POINTER = (b"version https://git-lfs.github.com/spec/v1\n"
           b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n")
DAMAGE = {
    "is missing": lambda p: p.unlink(),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-10]),
    "cut early": lambda p: p.write_bytes(p.read_bytes()[:20]),
    "empty": lambda p: p.write_bytes(b""),
    "zeros": lambda p: p.write_bytes(bytes(5000)),
    "git lfs pull": lambda p: p.write_bytes(POINTER),
    "folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_damaged_file_is_one_line_that_names_it(copy, file, damage):
    DAMAGE[damage](copy / file)
    with pytest.raises(UserError) as error:
        InstaFlow.load(copy)
    line = str(error.value)
    assert str(copy / file) in line and "\n" not in line
    assert {"is missing": "is missing", "git lfs pull": "git lfs pull"}.get(damage, "fetch it again") in line


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


WRONG = {
    "shape": (UNET, lambda t: t.update({"conv_in.weight": torch.zeros(8, 5, 3, 3)}),
              r"conv_in\.weight is \[8, 5, 3, 3\], but config\.json asks for \[8, 4, 3, 3\]"),
    "too few": (UNET, lambda t: t.pop("conv_out.bias"), r"lacks tensor conv_out\.bias \(1 in all\)"),
    "too many": (VAE, lambda t: t.update({"encoder.more": torch.zeros(1)}), r"has an unknown tensor encoder\.more"),
    "whole numbers": (VAE, lambda t: t.update({"decoder.conv_out.bias": torch.zeros(3, dtype=torch.int64)}),
                      r"decoder\.conv_out\.bias is torch\.int64"),
    "no key": (TEXT, lambda t: t.pop("text_model.encoder.layers.0.self_attn.k_proj.weight"), "lacks tensor"),
    "other text": (TEXT, lambda t: t.update({"text_model.final_layer_norm.bias": torch.zeros(7)}),
                   r"is \[7\], but config\.json asks for \[8\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_that_do_not_fit_are_one_line(copy, wrong):
    file, edit, words = WRONG[wrong]
    change(copy / file, edit)
    with pytest.raises(UserError, match=words) as error:
        InstaFlow.load(copy)
    assert str(copy / file) in str(error.value) and "\n" not in str(error.value)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_JSON = {
    "cut": lambda p: p.write_text(p.read_text()[:-9]),
    "list": lambda p: p.write_text("[1]"),
    "binary": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "gone": lambda p: p.unlink(),
}


@pytest.mark.parametrize("damage", BAD_JSON)
@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "text_encoder/config.json", "instaflow.json"])
def test_a_damaged_json_is_one_line_that_names_it(copy, file, damage):
    BAD_JSON[damage](copy / file)
    with pytest.raises(UserError) as error:
        InstaFlow.load(copy)
    assert "\n" not in str(error.value)
    if (file, damage) != ("instaflow.json", "gone"):  # then the folder as a whole does not say what it is
        assert str(copy / file) in str(error.value)


@pytest.mark.parametrize("file, values, words", [
    ("unet/config.json", {"attention_head_dim": [5, 10]}, "must be one number"),
    ("unet/config.json", {"use_linear_projection": True}, "Stable Diffusion 2"),
    ("unet/config.json", {"block_out_channels": [8, 16, 16]}, "differ in length"),
    ("unet/config.json", {"norm_num_groups": 3}, "unet/config.json"),
    ("unet/config.json", {"block_out_channels": "wide"}, "unet/config.json"),
    ("unet/config.json", {"cross_attention_dim": 16}, "attn2"),
    ("vae/config.json", {"norm_num_groups": 3}, "vae/config.json"),
    ("vae/config.json", {"layers_per_block": None}, "vae/config.json"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act"),
    ("text_encoder/config.json", {"num_attention_heads": 3}, "text_encoder/config.json"),
    ("text_encoder/config.json", {"hidden_size": 16}, "but config.json asks for"),
    ("instaflow.json", {"prediction": "noise"}, "it must be \"velocity\" or \"epsilon\""),
    ("instaflow.json", {"sampler": "magic"}, "it must be one of euler"),
    ("instaflow.json", {"trained_steps": 1}, "it must be a list of whole numbers"),
    ("instaflow.json", {"base": "../elsewhere"}, "which is no folder"),
])
def test_a_json_that_asks_for_something_else_is_one_line(copy, file, values, words):
    edit_json(copy / file, **values)
    with pytest.raises(UserError) as error:
        InstaFlow.load(copy)
    assert words in str(error.value) and str(copy) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["nothing", "file"])
def test_no_folder_is_one_line(tmp_path, what):
    if what == "file":
        (tmp_path / what).write_text("")
    with pytest.raises(UserError, match={"nothing": "no such model folder",
                                         "file": "no whole safetensors file"}[what]) as error:
        InstaFlow.load(tmp_path / what)
    assert str(tmp_path / what) in str(error.value) and "\n" not in str(error.value)


# --- random weights ---

def test_random_weights_are_the_seeds_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = InstaFlow.random("mini", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert_same(a, InstaFlow.random("mini", seed=3))
    b = weights_of(InstaFlow.random("mini", seed=4))
    assert not torch.equal(weights_of(a)["unet.conv_in.weight"], b["unet.conv_in.weight"])
    assert a.latent_shape() == (4, 16, 16)
    assert a.generate(["a"], steps=1, guidance=1.0)[0].size == (64, 64)
    with pytest.raises(UserError, match="no configuration 'huge'; there are sd15, stacked, mini"):
        InstaFlow.random("huge")
