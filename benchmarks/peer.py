"""One picture in one step by diffusers, without its pipeline: what speed.py compares sample.py's process with.

    python benchmarks/peer.py FOLDER cpu bfloat16 channels_last out.png "a red circle"
        # three networks in memory, as in its pipeline
    python benchmarks/peer.py FOLDER cpu bfloat16 channels_last out.png "a red circle" lean
        # one after the other
"""
import sys

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

folder, device, dtype, layout, out, prompt, *lean = sys.argv[1:]
dtype, layout = getattr(torch, dtype), getattr(torch, layout)
torch.set_grad_enabled(False)

load = {"text_encoder": lambda path: CLIPTextModel.from_pretrained(path, dtype=dtype).to(device),
        "unet": lambda path: (UNet2DConditionModel.from_pretrained(path, torch_dtype=dtype)
                              .to(device).to(memory_format=layout)),
        "vae": lambda path: AutoencoderKL.from_pretrained(path, torch_dtype=dtype).to(device).to(memory_format=layout)}
held = {} if lean else {name: load[name](f"{folder}/{name}") for name in load}


def network(name):
    return held.get(name) or load[name](f"{folder}/{name}")


tokens = CLIPTokenizer.from_pretrained(folder + "/tokenizer", model_max_length=77)
ids = tokens(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
context = network("text_encoder")(ids)[0]
unet = network("unet")
side = unet.config.sample_size
x = torch.randn(1, 4, side, side).to(device, dtype).contiguous(memory_format=layout)
x = x + unet(x, 1000, context).sample
del unet
vae = network("vae")
image = vae.decode(x / vae.config.scaling_factor).sample
pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).cpu().numpy()
Image.fromarray(pixels).save(out)
