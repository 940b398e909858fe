"""LoRA merged by us equals diffusers with peft, on each spelling."""
import json

import pytest
import torch
from safetensors.torch import save_file

import lora
import names
from cli import UserError
from conftest import relative_error
from instaflow import InstaFlow
from unet import StackedUNet

pytestmark = pytest.mark.usefixtures("plain_convolutions")
UNET = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out", "down_blocks.0.resnets.0.conv1",
        "up_blocks.1.resnets.1.conv_shortcut", "down_blocks.1.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv", "down_blocks.2.resnets.0.time_emb_proj"]
TEXT = [f"encoder.layers.{i}.{name}"
        for i, name in ((0, "self_attn.q_proj"), (0, "self_attn.k_proj"), (0, "self_attn.v_proj"),
                        (1, "self_attn.out_proj"), (1, "mlp.fc1"), (0, "mlp.fc2"))]
ALPHAS = (1.0, 2.0, 3.5, 8.0)


@pytest.fixture
def model(peers):
    return InstaFlow.load(peers.path)


@pytest.fixture
def pipe(peers, tokenizer):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel
    return StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(peers.path / "vae"), CLIPTextModel.from_pretrained(peers.path / "text_encoder"),
        tokenizer, UNet2DConditionModel.from_pretrained(peers.path / "unet"),
        DDIMScheduler(clip_sample=False, steps_offset=1), None, None, requires_safety_checker=False)


def draw(peers, rank=4, seed=0, text=True):
    """path -> (down, up, alpha) of random LoRAs, paths with unet. or text_encoder."""
    torch.manual_seed(seed)
    out = {}
    for part, module, paths in (("unet", peers.unet, UNET), ("text_encoder", peers.text, TEXT if text else [])):
        for i, path in enumerate(paths):
            weight = next(v for k, v in module.state_dict().items()
                          if k.removeprefix("text_model.") == path + ".weight")
            tail = (1, 1) if weight.dim() == 4 else ()
            out[f"{part}.{path}"] = (0.3 * torch.randn(rank, *weight.shape[1:]),
                                     0.3 * torch.randn(len(weight), rank, *tail), ALPHAS[i % 4])
    return out


def kohya(pairs, sgm=None, te="lora_te_", alpha=True):
    tensors = {}
    for path, (down, up, a) in pairs.items():
        part, _, rest = path.partition(".")
        if part == "unet" and sgm:
            rest = names.ldm_unet(rest + ".weight", sgm).removesuffix(".weight")
        name = (("lora_unet_" + rest) if part == "unet" else te + "text_model." + rest).replace(".", "_")
        tensors |= ({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                    | ({f"{name}.alpha": torch.tensor(a)} if alpha else {}))
    return tensors


def diffusers_style(pairs, text="text_encoder.text_model."):
    tensors = {}
    for path, (down, up, _) in pairs.items():
        path = path.replace("text_encoder.", text)
        tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    return tensors


def by_hand(model, pairs, scale, alpha):
    """W + scale * alpha / rank * up @ down, in float64, of every layer; a copy of the model's tensors with that."""
    out = {"unet." + k: v.clone() for k, v in model.unet.state_dict().items()}
    out |= {"text_encoder." + k.removeprefix("text_model."): v.clone()
            for k, v in names.text_to_transformers(model.text.state_dict()).items()}
    for path, (down, up, a) in pairs.items():
        weight = out[path + ".weight"]
        delta = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double()).reshape(weight.shape)
        out[path + ".weight"] = (weight.double() + scale * (a if alpha else len(down)) / len(down) * delta).float()
    return out


def tensors_of(model):
    out = {"unet." + k: v for k, v in model.unet.state_dict().items()}
    return out | {"text_encoder." + k.removeprefix("text_model."): v
                  for k, v in names.text_to_transformers(model.text.state_dict()).items()}


def assert_near(got, expected):
    assert got.keys() == expected.keys()
    worst = max((got[k] - v).abs().max() / v.abs().max() for k, v in expected.items())
    assert worst <= 1e-6, f"{worst}"


def old(key):
    layer = "lora" if key.startswith("unet.") else "lora_linear_layer"
    return key.replace("lora_A", f"{layer}.down").replace("lora_B", f"{layer}.up")


SPELLINGS = {
    "kohya": lambda p, m: kohya(p),
    "kohya, te1": lambda p, m: kohya(p, te="lora_te1_"),
    "kohya, ldm's names": lambda p, m: kohya(p, m.unet.config),
    "kohya, no alpha": lambda p, m: kohya(p, alpha=False),
    "diffusers": lambda p, m: diffusers_style(p),
    "diffusers, transformers 5": lambda p, m: diffusers_style(p, "text_encoder."),
    "peft": lambda p, m: {"base_model.model." + k: v for k, v in diffusers_style(p).items()},
    "diffusers, .lora.": lambda p, m: {old(k): v for k, v in diffusers_style(p).items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_formula(peers, model, tmp_path, spelling):
    pairs = draw(peers)
    tensors = SPELLINGS[spelling](pairs, model)
    save_file(tensors, tmp_path / "x.safetensors")
    expected = by_hand(model, pairs, 0.7, alpha="kohya" in spelling and "no alpha" not in spelling)
    changed = sum(not torch.equal(v, expected[k]) for k, v in tensors_of(model).items())
    assert changed == len(pairs)
    assert lora.load_lora(model, tmp_path / "x.safetensors", 0.7) is model
    assert_near(tensors_of(model), expected)


def test_the_oldest_diffusers_spelling(peers, model, tmp_path):
    """unet.load_attn_procs': no prefix, and attention's processors."""
    pairs = {k: v for k, v in draw(peers).items() if ".attn" in k}
    tensors = {}
    for path, (down, up, _) in pairs.items():
        head, _, name = path.removeprefix("unet.").replace("to_out.0", "to_out").rpartition(".")
        tensors |= {f"{head}.processor.{name}_lora.down.weight": down, f"{head}.processor.{name}_lora.up.weight": up}
    assert (len(tensors) == 4
            and "down_blocks.1.attentions.1.transformer_blocks.0.attn2.processor.to_out_lora.up.weight" in tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    expected = by_hand(model, pairs, 1.0, False)
    lora.load_lora(model, tmp_path / "x.safetensors")
    assert_near(tensors_of(model), expected)


def run_both(model, pipe):
    from text import tokenize
    torch.manual_seed(5)
    x, ids = torch.randn(2, 4, 8, 8), tokenize(["a red circle", "a small yellow star"])
    with torch.no_grad():
        ours, theirs = model.text(ids), pipe.text_encoder(ids).last_hidden_state
        return (ours, theirs), (model.unet(x, 300.0, ours), pipe.unet(x, 300.0, theirs).sample)


def as_the_peer_can(pairs):
    """diffusers loses to_out's alpha and, with transformers 5, the text tower's (it warns): here the one is left out,
    and the other the rank."""
    return {k: (down, up, float(len(down)) if k.startswith("text") else a)
            for k, (down, up, a) in pairs.items() if "to_out" not in k}


def assert_peers_agree(model, pipe):
    for ours, theirs in run_both(model, pipe):
        assert relative_error(ours, theirs) <= 5e-5


def test_kohyas_file_in_diffusers_with_peft(peers, model, pipe, tmp_path):
    plain = run_both(model, pipe)
    save_file(kohya(as_the_peer_can(draw(peers))), tmp_path / "x.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    lora.load_lora(model, tmp_path / "x.safetensors")
    assert_peers_agree(model, pipe)
    for (before, _), (after, _) in zip(plain, run_both(model, pipe)):
        assert relative_error(after, before) > 0.01        # it does something


SETTINGS = [dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=6, use_rslora=True),
            dict(r=2, lora_alpha=3, alpha_pattern={"attn1.to_q": 7, "conv1": 5})]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_diffusers_own_file(peers, model, pipe, tmp_path, settings):
    """Made by peft, written by diffusers with its header, read by both."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_out.0", "conv1", "proj_in", "ff.net.2"],
                                     init_lora_weights="gaussian", **settings))
    # (transformers' own add_adapter wants a peft that may not be out yet)
    others = {k: v for k, v in settings.items() if k != "alpha_pattern"}
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], **others), pipe.text_encoder)
    torch.manual_seed(2)
    with torch.no_grad():
        for module in (pipe.unet, pipe.text_encoder):
            for name, p in module.named_parameters():
                if "lora_" in name:
                    p.copy_(0.2 * torch.randn_like(p))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(pipe.unet),
        convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder)),
        **_collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder}))
    file, = tmp_path.glob("*.safetensors")
    lora.load_lora(model, file)
    assert_peers_agree(model, pipe)


@pytest.mark.parametrize("by", ["diffusers", "peft"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_file_of_the_u_net_alone(peers, model, pipe, tmp_path, settings, by):
    """Its alpha stands in the header without "unet.", or in the adapter_config.json beside it; against the live
    model, since diffusers itself forgets it."""
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(target_modules=["to_q", "to_out.0", "conv1", "proj_in", "ff.net.2"],
                        init_lora_weights="gaussian", **settings)
    saved = pipe.unet.add_adapter(config) or pipe.unet if by == "diffusers" else get_peft_model(pipe.unet, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in saved.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn_like(p))
    saved.save_lora_adapter(tmp_path) if by == "diffusers" else saved.save_pretrained(tmp_path)
    file, = tmp_path.glob("*.safetensors")
    lora.load_lora(model, file)
    assert_peers_agree(model, pipe)


def test_several_with_scales(peers, model, pipe, tmp_path):
    first, second = draw(peers, seed=1), draw(peers, rank=2, seed=2)
    save_file(kohya(as_the_peer_can(first)), tmp_path / "a.safetensors")
    save_file(diffusers_style(second), tmp_path / "b.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="a")
    pipe.load_lora_weights(str(tmp_path), weight_name="b.safetensors", adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, -0.25])
    lora.load_lora(model, tmp_path / "a.safetensors", 0.5)
    lora.load_lora(model, tmp_path / "b.safetensors", scale=-0.25)
    assert_peers_agree(model, pipe)
    assert model.info["lora"] == [{"file": "a.safetensors", "scale": 0.5}, {"file": "b.safetensors", "scale": -0.25}]


def test_a_merged_model_saves_whole(peers, model, tmp_path):
    """Its text tower is no longer its base's."""
    save_file(kohya(draw(peers)), tmp_path / "x.safetensors")
    lora.load_lora(model, tmp_path / "x.safetensors")
    model.save(tmp_path / "merged")
    again = InstaFlow.load(tmp_path / "merged")
    assert all(torch.equal(v, tensors_of(again)[k]) for k, v in tensors_of(model).items())
    untouched = InstaFlow.load(peers.path)                 # merging changes memory, never the file
    assert not torch.equal(untouched.unet.down_blocks[0].resnets[0].conv1.weight,
                           again.unet.down_blocks[0].resnets[0].conv1.weight)


def test_half_precision_models(peers, tmp_path):
    save_file(kohya(draw(peers)), tmp_path / "x.safetensors")
    model, half = InstaFlow.load(peers.path), InstaFlow.load(peers.path, dtype=torch.bfloat16)
    for m in (model, half):
        lora.load_lora(m, tmp_path / "x.safetensors")
    for k, v in tensors_of(half).items():
        assert (v.dtype == torch.bfloat16
                and (v.float() - tensors_of(model)[k]).abs().max() <= 0.01 * tensors_of(model)[k].abs().max())


NAME = "lora_unet_mid_block_attentions_0_proj_in"
WRONG = {
    "unknown layer": (lambda t: t.update({"lora_unet_nowhere.lora_up.weight": torch.zeros(4, 4)}),
                      "lora_unet_nowhere.lora_up.weight is of no layer"),
    "unknown kind": (lambda t: t.update({f"{NAME}.bias": torch.zeros(4)}), f"{NAME}.bias is of no layer"),
    "no partner": (lambda t: t.pop(f"{NAME}.lora_up.weight"), f"{NAME} has no up matrix"),
    "ranks differ": (lambda t: t.update({f"{NAME}.lora_up.weight": torch.zeros(32, 3, 1, 1)}),
                     r"is \[32, 3, 1, 1\] times \[4, 32, 1, 1\], but the model's layer is \[32, 32, 1, 1\]"),
    "too wide": (lambda t: t.update({f"{NAME}.lora_down.weight": torch.zeros(4, 64, 1, 1)}), "Stable Diffusion 1.x"),
    "no rank": (lambda t: t.update({f"{NAME}.lora_down.weight": torch.zeros(0, 32, 1, 1),
                                    f"{NAME}.lora_up.weight": torch.zeros(32, 0, 1, 1)}), "times"),
    "numbers": (lambda t: t.update({f"{NAME}.lora_down.weight": torch.zeros(4)}), "times"),
    "alpha": (lambda t: t.update({f"{NAME}.alpha": torch.zeros(2)}), "alpha is .2., not one number"),
    "twice": (lambda t: t.update({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(4, 32)}),
              "twice, in two spellings"),
    "dora": (lambda t: t.update({f"{NAME}.dora_scale": torch.zeros(32, 1)}), "a DoRA"),
    "loha": (lambda t: t.update({f"{NAME}.hada_w1_a": torch.zeros(32, 4)}), "a LoHa"),
    "xl": (lambda t: t.update({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.zeros(())}),
           "Stable Diffusion XL"),
    "bytes": (lambda t: t.update({f"{NAME}.lora_down.weight": torch.zeros(4, 32, 1, 1, dtype=torch.int8)}),
              "torch.int8"),
    "empty": (lambda t: t.clear(), "holds no tensors"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_does_not_fit_is_one_line_and_changes_nothing(peers, model, tmp_path, wrong):
    edit, words = WRONG[wrong]
    tensors, before = kohya(draw(peers)), {k: v.clone() for k, v in tensors_of(model).items()}
    edit(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words) as error:
        lora.load_lora(model, tmp_path / "x.safetensors")
    assert str(tmp_path / "x.safetensors") in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in tensors_of(model).items()) and "lora" not in model.info


def test_no_file_a_folder_a_cut_file_a_damaged_header_and_a_stacked_model(peers, model, tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="is missing"):
        lora.load_lora(model, file)
    with pytest.raises(UserError, match="is a folder"):
        lora.load_lora(model, tmp_path)
    for header in ("{", "[1]", json.dumps({"unet.lora_alpha": "much"}), json.dumps({"unet.alpha_pattern": {"(": 3}})):
        save_file(diffusers_style(draw(peers)), file, {"lora_adapter_metadata": header})
        with pytest.raises(UserError, match="lora_adapter_metadata is damaged") as error:
            lora.load_lora(model, file)
        assert str(file) in str(error.value)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="cut download"):
        lora.load_lora(model, file)
    stacked = InstaFlow(StackedUNet.from_unet(model.unet), model.vae, model.text, {"prediction": "velocity"})
    with pytest.raises(UserError, match="two stacked"):
        lora.load_lora(stacked, file)


# --- W(custom) - W(base) ---

@pytest.fixture
def custom(peers, tmp_path):
    """A fine-tune: every tensor of the peers' folder moved a little."""
    model = InstaFlow.load(peers.path)
    torch.manual_seed(9)
    with torch.no_grad():
        for module in (model.unet, model.vae, model.text):
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))
    model.save(tmp_path / "custom", self_contained=True)
    model.save(tmp_path / "custom.safetensors")
    return model


@pytest.mark.parametrize("form", ["objects", "folders", "files"])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_difference_of_a_fine_tune(peers, custom, tmp_path, form, scale):
    base = InstaFlow.load(peers.path)
    base.save(tmp_path / "base.safetensors")
    flow = InstaFlow.load(peers.path, prediction="epsilon")
    flow.info["prediction"] = "velocity"
    torch.manual_seed(4)
    with torch.no_grad():
        for p in flow.unet.parameters():
            p.add_(0.1 * torch.randn_like(p))
    expected = {k: (v.double() + scale * (custom.unet.state_dict()[k].double()
                                          - base.unet.state_dict()[k].double())).float()
                for k, v in flow.unet.state_dict().items()}
    given = {"objects": (custom, base), "folders": (tmp_path / "custom", peers.path),
             "files": (tmp_path / "custom.safetensors", str(tmp_path / "base.safetensors"))}[form]
    assert lora.add_difference(flow, *given, scale=scale) is flow
    for k, v in flow.unet.state_dict().items():
        assert (v - expected[k]).abs().max() <= 1e-6 * expected[k].abs().max()
    for part in ("vae", "text"):                           # the custom ones, put in
        got, wanted = getattr(flow, part).state_dict(), getattr(custom, part).state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in got.items())
    assert flow.vae is not custom.vae and flow.base is None


def test_a_difference_of_other_networks_is_one_line(peers, model, tiny):
    for custom, base, word in ((tiny / "teacher", peers.path, "custom"), (peers.path, tiny / "teacher", "base")):
        before = {k: v.clone() for k, v in tensors_of(model).items()}
        with pytest.raises(UserError, match=f"the {word} model's U-Net is another network") as error:
            lora.add_difference(model, custom, base)
        assert "\n" not in str(error.value) and all(torch.equal(v, before[k]) for k, v in tensors_of(model).items())
