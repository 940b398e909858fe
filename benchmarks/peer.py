"""One picture in one step by diffusers, as lean as it goes: what speed.py compares sample.py's process with.

    python benchmarks/peer.py FOLDER cpu bfloat16 channels_last out.png "a red circle"
"""
import sys

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

folder, device, dtype, layout, out, prompt = sys.argv[1:]
dtype, layout = getattr(torch, dtype), getattr(torch, layout)
tokens = CLIPTokenizer.from_pretrained(folder + "/tokenizer", model_max_length=77)
text = CLIPTextModel.from_pretrained(folder + "/text_encoder", dtype=dtype).to(device)
unet = UNet2DConditionModel.from_pretrained(folder + "/unet", torch_dtype=dtype).to(device).to(memory_format=layout)
vae = AutoencoderKL.from_pretrained(folder + "/vae", torch_dtype=dtype).to(device).to(memory_format=layout)
with torch.no_grad():
    context = text(tokens(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device))[0]
    x = torch.randn(1, 4, unet.config.sample_size, unet.config.sample_size).to(device, dtype).contiguous(memory_format=layout)
    image = vae.decode((x + unet(x, 1000, context).sample) / vae.config.scaling_factor).sample
    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).cpu().numpy()
Image.fromarray(pixels).save(out)
