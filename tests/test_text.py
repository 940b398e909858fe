import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import text
import weights
from cli import UserError
from conftest import randomise, relative_error

CONFIG = dict(
    vocab_size=49408, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, bos_token_id=49406, eos_token_id=49407,
    pad_token_id=1, projection_dim=32)

# token ids

PROMPTS = [
    "", " ", "\n", "a", "A", "a photo of a cat", "A PHOTO OF A CAT", "  a   photo\tof \n a\r\ncat  ",
    "a red circle left of a blue square", "cat" * 60, "é" * 90, "a" * 500, "hello,world", "hello , world!", "...",
    "?!?!", "a.b.c", "end.", "snake_case and kebab-case", "it's",
    "It's the dog's; they've, we'll, I'd, you're, I'm, can't", "IT'S THE DOG'S", "rock 'n' roll", "'s", "''", "o'clock",
    "it’s the dog’s", "“curly quotes” and ‘single’ ones", "„low“ «angle» ‹single›", "dash – en — em ― bar",
    "ellipsis… here", "tom &amp; jerry", "&lt;b&gt;bold&lt;/b&gt;", "&quot;quoted&quot;", "&amp;amp; twice",
    "&#39;numeric&#39; &eacute;", "a & b", "<b>tags</b>", "café", "cafe\u0301", "naïve façade", "Ångström",
    "A\u030angström", "ÜBER straße", "ﬁne ligature", "①②③ ½ ²", "ｆｕｌｌ ｗｉｄｔｈ",
    "İstanbul", "ĲSSELMEER", "Ελληνικά", "ΟΔΥΣΣΕΥΣ", "Привет, мир", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया",
    "สวัสดี", "日本の桜", "東京タワー", "你好,世界", "한국어", "🎉", "a 🐱 and a 🐶", "👨‍👩‍👧‍👦 family", "👍🏽",
    "🏳️‍🌈 flag", "☕️ coffee ☃", "❤️❤️❤️", "🇫🇷", "x🎨y", "12345", "3.14159", "1,000,000", "10x20", "4k, 8k, 16k",
    "2024-01-01", "50%", "$9.99", "€5", "#1", "f/1.8, 85mm", "1st 2nd 3rd",
    "(masterpiece:1.2), [best quality]", "((detailed))", "{a|b|c}", "<lora:style:0.8>",
    "artist: greg rutkowski, trending on artstation", "a::b ++ -- == != <= >=", "C++ and C#", "user@example.com",
    "https://example.com/a?b=c&d=e", "path/to/file.png", "C:\\temp", "`code`", "~^~",
    "non\u00a0breaking\u00a0space", "thin\u2009space", "zero\u200bwidth", "soft\u00adhyphen", "\ufeffbom",
    "ideographic\u3000space", "line\u2028separator", "tab\tseparated\tvalues", "line one\nline two\n\nline four",
    "trailing newline\n", "\u0301leading accent", "Zalgo t\u0335e\u0336x\u0337t",
    "supercalifragilisticexpialidocious", "pneumonoultramicroscopicsilicovolcanoconiosis", "asdfghjkl qwertyuiop",
    "aAaAaA", "iPhone XS Max", "eBay", " ".join(f"word{i}" for i in range(300)), " ".join(["cat"] * 75),
    " ".join(["cat"] * 76), " ".join(["cat"] * 74), " ".join(["a tiny 🐱,"] * 100),
]


def mixtures(n):
    """Prompts of fragments of the ones above, so that each meets the others' borders."""
    draw = random.Random(0)
    parts = [p for p in PROMPTS if len(p) < 60]
    return [draw.choice(["", " ", ", ", "\n", " &amp; "]).join(draw.choices(parts, k=draw.randint(2, 6)))
            for _ in range(n)]


PROMPTS = PROMPTS + mixtures(2200 - len(PROMPTS))


def test_the_peer_tokenizer_is_clips(tokenizer):
    # OpenAI's own ids of this sentence: the peer above was put together here.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_tokens(tokenizer):
    assert len(PROMPTS) == 2200
    ours = text.tokenize(PROMPTS)
    theirs = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids
    assert ours.dtype == torch.int64 and ours.shape == (2200, 77)
    wrong = [(prompt, a, b) for prompt, a, b in zip(PROMPTS, ours.tolist(), theirs) if a != b]
    assert not wrong, f"{len(wrong)} prompts differ, the first {wrong[0]}"


@pytest.mark.parametrize("prompt", ["a cat <|endoftext|> a dog", "<|startoftext|>a cat",
                                    "<end_of_text> a <start_of_text>"])
def test_only_clips_own_markers_are_markers(tokenizer, prompt):
    # open_clip spells them otherwise, and so reads the last of these as two markers.
    expected = tokenizer([prompt], padding="max_length", max_length=77, truncation=True).input_ids
    assert text.tokenize([prompt]).tolist() == expected


def test_empty_prompt_and_no_prompt():
    assert text.tokenize([""]).tolist() == [[49406] + [49407] * 76]
    assert text.tokenize([]).shape == (0, 77)


def test_tokens_repeat_whatever_came_before():
    alone = text.tokenize(["a cat"])
    text.tokenize(PROMPTS)
    assert torch.equal(text.tokenize(["dog", "a cat"])[1:], alone)


def test_one_prompt_is_no_list_of_letters():
    with pytest.raises(ValueError, match="list of str"):
        text.tokenize("a cat")


def test_truncation_warns_and_names_what_was_cut(capsys):
    prompts = [" ".join(["cat"] * 75), " ".join(["cat"] * 73 + ["red", "circle", "purple", "hexagon"])]
    text.tokenize(prompts[:1])
    assert capsys.readouterr() == ("", ""), "75 words fit"
    ids = text.tokenize(prompts)
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1
    assert "purple hexagon" in err and "circle" not in err
    assert ids[1, -1] == 49407 and ids[1, -2] != 49407


def test_of_many_prompts_that_are_cut_the_first_hundred_are_named(capsys, monkeypatch):
    monkeypatch.setattr(text, "_warned", set())
    for _ in range(2):                                     # two epochs
        text.tokenize(["cat " * 80 + str(i) for i in range(150)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 101 and lines[-1] == "warning: more than these 100 prompts are cut"


# the tower

@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(1)
    model = randomise(CLIPTextModel(CLIPTextConfig(**CONFIG)))
    with torch.no_grad():  # drawn so small that attention is flat: make it attend
        for name, p in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                p.mul_(4)
    return model


@pytest.fixture(scope="module", params=["as written", "text_model. and position_ids"])
def folder(request, theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_encoder")
    theirs.save_pretrained(folder)
    if request.param != "as written":
        path = folder / "model.safetensors"
        tensors = {"text_model." + k.removeprefix("text_model."): v for k, v in load_file(path).items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(tensors, path, {"format": "pt"})
    return folder


def test_states(folder, theirs):
    ours = weights.load_text(folder)
    prompts = PROMPTS[:220:20]
    ids = text.tokenize(prompts)
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state
        for batch in (prompts, ids):
            got = ours(batch)
            assert got.shape == (len(prompts), 77, 32)
            assert relative_error(got, expected) <= 2e-5


def test_several_prompts_are_no_batched_products():
    """PyTorch makes such of a product with a view, where there are no gradients: a copy of the weights a token."""
    config = text.TextConfig(**{key: CONFIG[key] for key in text.TextConfig().__dict__})
    tower = text.TextTower(config).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        tower(["a red circle", "a blue square", "a star"])
    counted = counter.get_flop_counts()["Global"]
    assert torch.ops.aten.addmm in counted and torch.ops.aten.bmm not in counted


def test_a_later_token_never_changes_an_earlier_state(folder):
    ours = weights.load_text(folder)
    ids = text.tokenize(["a red cat", "a red dog"])
    with torch.no_grad():
        cat, dog = ours(ids)
    torch.testing.assert_close(cat[:3], dog[:3])
    assert not torch.allclose(cat[3], dog[3])


def test_gradients(folder, theirs):
    ours = weights.load_text(folder)
    ids, projection = text.tokenize(PROMPTS[5:9]), torch.randn(4, 77, 32)
    ours.zero_grad(), theirs.zero_grad()
    (ours(ids) * projection).sum().backward()
    (theirs(ids).last_hidden_state * projection).sum().backward()
    expected = weights.text_from_transformers({n: p.grad for n, p in theirs.named_parameters()})
    got = {n: p.grad for n, p in ours.named_parameters()}
    assert got.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    assert max((got[n] - expected[n]).abs().max() for n in got) <= 2e-4 * largest


def test_transformers_reads_what_we_write(folder, theirs, tmp_path):
    weights.save_module(weights.load_text(folder), tmp_path, weights.TEXT_FILE)
    again = CLIPTextModel.from_pretrained(tmp_path).eval()
    ids = text.tokenize(PROMPTS[5:9])
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, theirs(ids).last_hidden_state)


@pytest.mark.parametrize("change", ["lacking", "unknown"])
def test_a_key_left_over_is_named(theirs, tmp_path, change):
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(k for k in tensors if k.endswith("layers.1.self_attn.k_proj.weight"))
    value = tensors.pop(key)
    if change == "unknown":
        tensors |= {key: value, "visual.proj": value.clone()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model.safetensors.*(visual.proj|resblocks.1|layers.1)"):
        weights.load_text(tmp_path)


@pytest.mark.parametrize("other", [dict(hidden_act="gelu"), dict(vocab_size=1000)], ids=lambda d: next(iter(d)))
def test_another_tower_is_refused(other):
    with pytest.raises(ValueError):
        text.TextConfig.from_dict(CONFIG | other)
