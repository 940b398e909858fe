"""CLIP's text tower and tokenizer (Radford et al. 2021), built by open_clip: prompts -> states [B, 77, C].

What the U-Net attends to are the last hidden states after the final LayerNorm, of all 77 tokens; the padding is
the end-of-text token, and is attended to like any other, as in Stable Diffusion.
"""
import functools
import sys
import unicodedata
from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY = 49408
START, END = 49406, 49407


@dataclass(frozen=True)
class TextConfig:
    """The defaults are CLIP ViT-L/14's. Field names are those of transformers' config.json."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77

    @classmethod
    def from_dict(cls, config):
        """From transformers' config.json as a dict. Raises ValueError where it asks for a network that this is not."""
        config = config.get("text_config") or config
        for key, value in {"vocab_size": VOCABULARY, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}.items():
            if config.get(key, value) != value:
                raise ValueError(f"text config: {key} is {config[key]!r}, but CLIP ViT-L/14's text tower has {value!r}")
        return cls(**{k: v for k, v in config.items() if k in cls.__dataclass_fields__})

    def to_dict(self):
        """The config.json that transformers' CLIPTextModel reads."""
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": VOCABULARY,
                "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "bos_token_id": START, "eos_token_id": END,
                "pad_token_id": 1, "projection_dim": self.hidden_size, **self.__dict__}


class TextTower(nn.Module):
    """forward(prompts list[str], or token ids int64 [B, L]) -> states [B, L, hidden_size], on the tower's device."""

    def __init__(self, config=TextConfig()):
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer          # here: importing open_clip takes seconds
        self.config = config
        self.tower = TextTransformer(
            context_length=config.max_position_embeddings, vocab_size=VOCABULARY, width=config.hidden_size,
            heads=config.num_attention_heads, layers=config.num_hidden_layers,
            mlp_ratio=config.intermediate_size / config.hidden_size, output_dim=None,
            act_layer=QuickGELU, output_tokens=True)
        # Tokens first, prompts second: PyTorch's attention turns prompts-first around to that as a view, and without
        # gradients a product with a view copies the weights once a token. On a CPU four prompts took 17 times as long
        # in bf16, and 1.7 times in float32 (benchmarks/README.md).
        self.tower.transformer.batch_first = False
        for block in self.tower.transformer.resblocks:
            block.attn.batch_first = False

    def forward(self, prompts):
        ids = prompts if torch.is_tensor(prompts) else tokenize(prompts, self.config.max_position_embeddings)
        return self.tower(ids.to(self.tower.positional_embedding.device, non_blocking=True))[1]


@functools.cache
def _bpe():
    """open_clip's byte-pair encoder, told to read text as transformers' CLIPTokenizer does: its own cleaning
    rewrites HTML entities and curly quotes, which Stable Diffusion never did, and it spells the two special
    tokens otherwise."""
    import regex                                           # open_clip needs it too
    from open_clip.tokenizer import SimpleTokenizer
    bpe, special = SimpleTokenizer(), {"<|startoftext|>": START, "<|endoftext|>": END}
    # a letter at a time: no special case for a final sigma
    bpe.clean_fn = lambda text: "".join(c.lower() for c in " ".join(unicodedata.normalize("NFC", text).split()))
    bpe.pat = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    bpe.encoder.update(special)
    bpe.cache = {token: token for token in special}
    return bpe


_warned = set()


def _warn(message):
    """Once a prompt, since a training meets it in every epoch, and of the first 100 in all: some sets have many."""
    if message not in _warned and len(_warned) <= 100:
        _warned.add(message)
        print(message if len(_warned) <= 100 else "warning: more than these 100 prompts are cut", file=sys.stderr)


@functools.lru_cache(maxsize=2**16)
def _ids(prompt, length):
    """A prompt's tokens, as many as fit; the last prompts' are kept."""
    ids = _bpe().encode(prompt)
    if len(ids) > length - 2:
        cut = _bpe().decode(ids[length - 2:]).strip()
        _warn(f"warning: the prompt is {len(ids)} tokens long, and {length - 2} fit; "
              f"cut off: \"{cut if len(cut) <= 400 else cut[:400] + '...'}\"")
    return ids[:length - 2]


def tokenize(prompts, length=77):
    """list[str] -> token ids, int64 [B, length]: START, the text, END up to the length. A prompt that is too long is
    cut, with a warning on stderr that names what was cut, once. A str is a ValueError."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of str")
    rows = [[START, *ids, *[END] * (length - 1 - len(ids))] for ids in (_ids(prompt, length) for prompt in prompts)]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)
