"""CLIP's text tower and tokenizer (Radford et al. 2021): prompts -> states [B, 77, C].

What the U-Net attends to are the last hidden states after the final LayerNorm, of all 77 tokens; the padding is
the end-of-text token, and is attended to like any other, as in Stable Diffusion. Attribute names are open_clip's, and so is
the vocabulary's file; the package itself is not imported, which would take as long as making a picture.
"""
import functools
import gzip
import importlib.util
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
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
        made = cls(**{k: v for k, v in config.items() if k in cls.__dataclass_fields__})
        if made.num_attention_heads < 1 or made.hidden_size % made.num_attention_heads:
            raise ValueError(f"text config: num_attention_heads is {made.num_attention_heads}, which does not divide hidden_size, {made.hidden_size}")
        return made

    def to_dict(self):
        """The config.json that transformers' CLIPTextModel reads."""
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": VOCABULARY, "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5, "bos_token_id": START, "eos_token_id": END, "pad_token_id": 1, "projection_dim": self.hidden_size, **self.__dict__}


class Attention(nn.Module):
    """Multi-head attention of every token to itself and those before it; query, key and value weights are one matrix."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * width, width)), nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # [B, heads, L, C/heads]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))                   # [B, L, C]


class Block(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))          # OpenAI's "quick" GELU


class Transformer(nn.Module):
    """forward(token ids int64 [B, L]) -> states [B, L, hidden_size]. Initialised as CLIP was."""

    def __init__(self, config):
        super().__init__()
        width, layers = config.hidden_size, config.num_hidden_layers
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(VOCABULARY, width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(config.max_position_embeddings, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(width, config.num_attention_heads, config.intermediate_size) for _ in range(layers))})
        self.ln_final = nn.LayerNorm(width)
        if self.positional_embedding.is_meta:              # to be filled from a file: here, drawing nothing would import the whole compiler
            return
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer["resblocks"]:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * width) ** -0.5)
            for out in (block.attn.out_proj, block.mlp["c_proj"]):
                nn.init.normal_(out.weight, std=(2 * width * layers) ** -0.5)

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_final(x)


class TextTower(nn.Module):
    """forward(prompts list[str], or token ids int64 [B, L]) -> states [B, L, hidden_size], on the tower's device."""

    def __init__(self, config=TextConfig()):
        super().__init__()
        self.config = config
        self.tower = Transformer(config)

    def forward(self, prompts):
        ids = prompts if torch.is_tensor(prompts) else tokenize(prompts, self.config.max_position_embeddings)
        return self.tower(ids.to(self.tower.positional_embedding.device))


# --- byte-pair encoding, as transformers' CLIPTokenizer does it ---

@functools.cache
def _vocabulary():
    """-> (id of each token, rank of each pair that is merged, the letter that stands for each byte)."""
    file = Path(importlib.util.find_spec("open_clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = [tuple(line.split()) for line in gzip.decompress(file.read_bytes()).decode().split("\n")[1:VOCABULARY - 512 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]        # other bytes borrow letters from 256 on
    letters = dict(zip(printable + [b for b in range(256) if b not in printable], [chr(b) for b in printable] + [chr(256 + i) for i in range(68)]))
    tokens = [*letters.values(), *(c + "</w>" for c in letters.values()), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, {pair: i for i, pair in enumerate(merges)}, letters


@functools.lru_cache(maxsize=10_000)
def _encode_word(word):
    """Token ids of one word: of all neighbours that may be merged the ones learned first are, until none may be."""
    ids, ranks, letters = _vocabulary()
    if word in ("<|startoftext|>", "<|endoftext|>"):
        return [ids[word]]
    parts = [letters[b] for b in word.encode()]
    parts[-1] += "</w>"
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            both = tuple(parts[i:i + 2]) == best
            merged.append("".join(best) if both else parts[i])
            i += 1 + both
        parts = merged
    return [ids[part] for part in parts]


def encode(text):
    """Token ids of a text, without START, END or an end: list[int]."""
    import regex                                           # knows what a letter is in any script, as re does not
    text = "".join(c.lower() for c in " ".join(unicodedata.normalize("NFC", text).split()))          # a letter at a time: a final sigma stays one
    words = regex.findall(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", text)
    return [i for word in words for i in _encode_word(word)]


def decode(tokens):
    """The text of token ids; what was cut within a letter is shown as such."""
    ids, _, letters = _vocabulary()
    names, byte = list(ids), {letter: b for b, letter in letters.items()}
    return bytes(byte[c] for i in tokens for c in names[i]).decode(errors="replace").replace("</w>", " ").strip()


@functools.lru_cache(maxsize=1000)
def _warn(message):
    """Once a prompt: a training meets it in every epoch."""
    print(message, file=sys.stderr)


def tokenize(prompts, length=77):
    """Token ids, int64 [B, length]: START, the text, END up to the length. A prompt that is too long is cut, with a
    warning on stderr that names what was cut."""
    rows = []
    for prompt in prompts:
        ids = encode(prompt)
        if len(ids) > length - 2:
            _warn(f"warning: the prompt is {len(ids)} tokens long, and {length - 2} fit; cut off: \"{decode(ids[length - 2:])}\"")
        ids = [START] + ids[:length - 2]
        rows.append(ids + [END] * (length - len(ids)))
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)
