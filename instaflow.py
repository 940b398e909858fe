"""InstaFlow, the model that you use: text -> noise -> velocity -> image.

    model = InstaFlow.load("models/mini-instaflow")
    model.generate(["a red circle left of a blue square"])[0].save("out.png")

A model on disk is a folder in the diffusers layout plus instaflow.json, which says what the U-Net predicts
(velocity | epsilon), how to sample it, and where the frozen VAE and text tower lie (`base`) if not inside.
"""
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch

import checkpoint
import diffusion
import fast
import flows
import hub
import log
import single_file
import weights
from cli import UserError
from images import to_pil
from text import TextConfig, TextTower
from unet import StackedUNet, UNet, UNetConfig
from vae import VAE, VAEConfig

CONFIGS = {                                                # U-Net, VAE, text tower
    "sd15": (UNetConfig(), VAEConfig(), TextConfig()),
    "stacked": (UNetConfig(stacked=True), VAEConfig(), TextConfig()),
    "mini": (UNetConfig(block_out_channels=(48, 96, 128), layers_per_block=1, attention_head_dim=4,
                        cross_attention_dim=64, norm_num_groups=8, sample_size=16,
                        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")),
             VAEConfig(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=4, sample_size=64),
             TextConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)),
}
# of every training's sample grids
PROMPTS = ["a red circle left of a blue square", "a small yellow star", "a large green heart above a small purple ring",
           "a pink cross on a dark striped background", "a cyan diamond below an orange triangle",
           "a blue ring left of a red star and a green square above the red star"]
SAMPLERS = {"euler": flows.euler, "heun": flows.heun, "ddim": diffusion.ddim, "dpm": diffusion.dpm_solver}
# Euler steps of the flow before its teacher takes over (solve_with)
FLOW_STEPS = 2
DEFAULTS = {
    "velocity": {"sampler": "euler", "steps": 25, "guidance": 1.5, "trained_steps": []},  # the paper's 2-rectified flow
    "epsilon": {"sampler": "dpm", "steps": 25, "guidance": 7.5, "trained_steps": []},     # Stable Diffusion
}


def timestep(t):
    """The U-Net's time for flow time t: 1000 (1 - t), never rounded. (t = 0, noise, is 1000.0.)"""
    return 1000 * (1 - t)


class InstaFlow:
    """`unet`, `vae`, `text`: the modules. `info`: instaflow.json's fields
    (prediction, sampler, steps, guidance, ...)."""

    def __init__(self, unet, vae, text, info, base=None):
        prediction = info.get("prediction")
        if not isinstance(prediction, str) or prediction not in DEFAULTS:
            raise UserError(f'prediction is {prediction!r}; it must be "velocity" or "epsilon"')
        self.unet, self.vae, self.text, self.base = unet, vae, text, base
        self.info = {**DEFAULTS[prediction], **info}
        if unet.config.cross_attention_dim != text.config.hidden_size:
            raise UserError(f"the U-Net attends to states {unet.config.cross_attention_dim} wide, "
                            f"and the text tower's are {text.config.hidden_size}: they are of two models")
        if {unet.config.in_channels, unet.config.out_channels} != {vae.config.latent_channels}:
            raise UserError(f"the U-Net takes {unet.config.in_channels} channels and the VAE's latents have "
                            f"{vae.config.latent_channels}: they are of two models, or it is an inpainting model")
        trained = self.info["trained_steps"]               # by distillation; [] where any number will do
        if type(trained) is not list or any(type(n) is not int or n < 1 for n in trained):
            raise UserError(f"trained_steps is {trained!r}; it must be a list of whole numbers of at least 1")
        if not isinstance(self.info["sampler"], str) or self.info["sampler"] not in SAMPLERS:
            raise UserError(f"sampler is {self.info['sampler']!r}; it must be one of {', '.join(SAMPLERS)}")
        steps, guidance = self.info["steps"], self.info["guidance"]
        if type(steps) is not int or steps < 1 or type(guidance) not in (int, float) or not math.isfinite(guidance):
            raise UserError(f"steps is {steps!r} and guidance {guidance!r}; "
                            "they must be a whole number of at least 1 and a finite number")
        self.schedule, self._read = diffusion.Schedule.stable_diffusion(), (None, None)

    # --- on disk ---

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, prediction=None):
        """A model folder, a single .safetensors or .ckpt file, or a hub name (owner/name).
        prediction ("velocity" | "epsilon") is needed only where neither instaflow.json nor model_index.json tells it:
        it is never guessed. dtype None keeps each tensor's own. Raises UserError (a ValueError) in one line that
        names the file and the mend."""
        local = hub.locate(path, dtype)
        info, where = hub.told(local)
        if prediction and info.setdefault("prediction", prediction) != prediction:
            raise UserError(f"{where} says that the U-Net predicts {info['prediction']}, not {prediction}; "
                            "leave out --prediction, or name another model")
        if "prediction" not in info:
            raise UserError(f"{path} does not say what its U-Net predicts "
                            "(no instaflow.json, and no model_index.json of a class known here); "
                            "give --prediction velocity or epsilon (noise; Stable Diffusion's)")
        base, on_disk = local / info["base"] if isinstance(info.get("base"), str) else local, dtype
        if torch.device(device).type == "cuda":
            on_disk = None                                 # as the file has it: the GPU converts
        if local.is_file():
            modules, base = single_file.load_single_file(local, on_disk), None
        elif base.is_dir():
            modules = (weights.load_unet(local / "unet", on_disk), weights.load_vae(base / "vae", on_disk),
                       weights.load_text(base / "text_encoder", on_disk))
        else:
            raise UserError(f"{where} says that VAE and text tower lie in {base}, which is no folder; "
                            "put that model there")
        if info.get("base") and info.get("base_weights") not in (None, weights.checksum(base, "vae", "text_encoder")):
            print(f"warning: {path} was trained with another VAE or text tower than {base} has now, "
                  "so its pictures are wrong; train it again, or put those weights back", file=sys.stderr)
        try:
            # no saved model should depend on the hub's cache
            return cls(*modules, info, base if local == Path(path) else None).to(device, dtype)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def random(cls, config, seed=0):
        """Seeded random weights of a size in CONFIGS ("sd15", "stacked", "mini"): it runs,
        and its pictures are noise."""
        if config not in CONFIGS:
            raise UserError(f"no configuration {config!r}; there are {', '.join(CONFIGS)}")
        unet, vae, text = CONFIGS[config]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = [(StackedUNet if unet.stacked else UNet)(unet), VAE(vae), TextTower(text)]
        return cls(*(m.eval() for m in modules), {"prediction": "velocity"}).to("cpu")

    def save(self, path, self_contained=False, dtype=None):
        """Write the folder. VAE and text tower are written too where they came from no folder, or are no longer as it
        has them, or self_contained is set; else instaflow.json points at theirs. A path that ends in .safetensors
        becomes one file in the ldm layout, which the usual programs read.
        dtype: of the weights on disk, None their own."""
        self.check_weights("save it")
        path, info = Path(path), {k: v for k, v in self.info.items() if not k.startswith("base")}
        if path.suffix == ".safetensors":
            return single_file.save_single_file(path, self.unet, self.vae, self.text, info, dtype)
        weights.save_module(self.unet, path / "unet", weights.UNET_FILE, dtype)
        if (self.base is None or self_contained or self.base.resolve() == path.resolve()
                or not weights.holds(self.base, self.vae, self.text)):
            weights.save_module(self.vae, path / "vae", weights.VAE_FILE, dtype)
            weights.save_module(self.text, path / "text_encoder", weights.TEXT_FILE, dtype)
        else:
            info |= {"base": os.path.relpath(self.base, path),
                     "base_weights": weights.checksum(self.base, "vae", "text_encoder")}
        checkpoint.write(path / "instaflow.json", (json.dumps(info, indent=2) + "\n").encode())

    def check_weights(self, purpose):
        """Raises UserError where they are packed."""
        if not all(p.numel() for module in (self.unet, self.vae, self.text) for p in module.parameters()):
            raise UserError("this model's weights are packed for sampling (fast.pack), "
                            f"and no longer as a file has them; load it again to {purpose}")

    def to(self, device, dtype=None):
        """Every module to a device, and to a dtype (None: each its own) -> self. Without gradients from then on."""
        for module in (self.unet, self.vae, self.text):
            fast.place(module, device, dtype)
        return self

    # --- what it computes ---

    @property
    def device(self):
        return next(self.unet.parameters()).device

    @property
    def scale(self):
        """Latents are multiplied by this (0.18215 at full size), so that their variance is about 1."""
        return self.vae.config.scaling_factor

    def velocity(self, x, t, context, net=None):
        """v(x, t | T): x [B, 4, h, w], t [B] in [0, 1], context [B, L, C] -> [B, 4, h, w], by one call of the U-Net.
        A noise predictor is converted exactly (diffusion.velocity_from_eps), on a CPU at t = 0 by B calls, unless
        under autocast. net: what computes the U-Net's output in training (DDP around it)."""
        net = net or self.unet
        if self.info["prediction"] == "velocity":
            return net(x, timestep(t), context)
        eps = lambda z, index: net(z, index, context)
        if x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or t.any()):
            # One by one: at t = 0 rounding errors are multiplied by 1 / a = 15, and on a CPU they differ
            # between a batch and a single picture.
            eps = lambda z, index: torch.cat(
                [net(*one) for one in zip(z.split(1), index.expand(len(z)).split(1), context.split(1), strict=True)])
        return diffusion.velocity_from_eps(eps, self.schedule)(x, t)

    def latent_shape(self, height=None, width=None):
        """Of one picture of height x width pixels (None: what the model was trained on). Raises UserError."""
        factor, native = self.vae.config.factor, self.unet.config.sample_size * self.vae.config.factor
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise UserError(f"{name} is {pixels}; it must be a multiple of {factor}")
        return self.unet.config.in_channels, (height or native) // factor, (width or native) // factor

    def operations(self):
        """Floating point operations of one forward pass for one picture of the trained size
        -> {"unet": int, "decoder": int}."""
        latent, unet, vae = (1, *self.latent_shape()), self.unet.config, self.vae.config
        length = self.text.config.max_position_embeddings
        return {"unet": log.flops(lambda: type(self.unet)(unet)(torch.empty(latent), torch.empty(1),
                                                                torch.empty(1, length, unet.cross_attention_dim))),
                "decoder": log.flops(lambda: VAE(vae).decode(torch.empty(latent)))}

    def noise(self, seed, first, n, height=None, width=None, stream=0):
        """The noise of pictures first, first + 1, ... -> [n, 4, h, w]."""
        shape = self.latent_shape(height, width)
        x0 = [flows.noise(stream, seed, first + i, shape) for i in range(n)]
        return torch.stack(x0).to(self.device, next(self.unet.parameters()).dtype)

    @torch.no_grad()
    def solve(self, x0, context, null, steps=None, guidance=None, sampler=None):
        """From noise x0 [B, 4, h, w] along the model's ODE -> latents [B, 4, h, w]. context [B, L, C], null [1, L, C].
        Guidance is taken on what the U-Net predicts: on noise as Stable Diffusion does, on velocity as the paper does;
        it is the same formula. Raises ValueError for steps < 1, UserError for a sampler of the other kind."""
        steps = self.info["steps"] if steps is None else steps
        x0 = x0.contiguous(memory_format=torch.channels_last)                # then all computed from x0 is so too
        alpha = self.info["guidance"] if guidance is None else guidance
        sampler = sampler or self.info["sampler"]
        if sampler in ("euler", "heun"):
            return SAMPLERS[sampler](flows.guided(self.velocity, context, null, alpha), x0, steps)
        self.check_sampler(sampler)
        if steps > 999:
            raise UserError(f"steps is {steps}; sampler {sampler} takes at most 999")
        return SAMPLERS[sampler](flows.guided(self.unet, context, null, alpha), x0, steps, self.schedule)

    def check_sampler(self, sampler):
        """Raises UserError for a sampler of the other kind."""
        if sampler not in ("euler", "heun") and self.info["prediction"] != "epsilon":
            raise UserError(f"sampler {sampler} needs a noise predictor, and this model predicts velocity; "
                            "use euler or heun")

    @torch.no_grad()
    def solve_from(self, start, x0, latents, context, null, steps=None, guidance=None):
        """Image to image: from a point within the flow, (1 - start) noise + start latents, on to its end
        -> latents [B, 4, h, w]. start in [0, 1] is the flow time: 0 forgets the picture, 1 keeps it.
        As many of `steps` as fall between start and 1."""
        if not 0 <= start <= 1:
            raise ValueError(f"start is {start}; it must be a flow time, from 0 to 1")
        x = flows.interpolate(x0, latents, torch.full((len(x0),), start, device=x0.device))
        return self.finish(x, start, context, null,
                           max(1, round((1 - start) * (self.info["steps"] if steps is None else steps))), guidance)

    @torch.no_grad()
    def finish(self, x, t, context, null, steps, guidance=None):
        """From a point x [B, 4, h, w] of the flow at time t in [0, 1] along the model's ODE to its end, in `steps`
        steps from there -> latents [B, 4, h, w]; fewer where fewer timesteps are left. By the model's own sampler;
        DDIM, whose grid starts at noise, gives way to DPM-Solver++."""
        alpha = self.info["guidance"] if guidance is None else guidance
        x, sampler = x.contiguous(memory_format=torch.channels_last), self.info["sampler"]
        self.check_sampler(sampler)
        if t == 1:
            return x                                       # a noise predictor would still look for noise
        if sampler in ("euler", "heun"):
            v = flows.guided(self.velocity, context, null, alpha)
            # s in [0, 1] runs over the times left
            return SAMPLERS[sampler](lambda z, s: (1 - t) * v(z, t + (1 - t) * s), x, steps)
        a, b = self.schedule.scales()
        index = int(np.abs(np.divide(a, np.add(a, b)) - t).argmin())        # the nearest timestep
        # from the line's scale to the diffusion's, as in velocity_from_eps
        x = x / (t ** 2 + (1 - t) ** 2) ** 0.5
        return diffusion.dpm_solver(flows.guided(self.unet, context, null, alpha), x, min(steps, max(index, 1)),
                                    self.schedule, index)

    @torch.no_grad()
    def solve_with(self, teacher, t, teacher_guidance, x0, context, null, steps, guidance):
        """The model's path to time t, in FLOW_STEPS Euler steps; from there its teacher's (`finish`), in all other
        steps, at guidance `teacher_guidance` -> latents [B, 4, h, w]. Not in the paper. Which picture a noise becomes
        is decided early, and that part of the path is what reflow has made easy to learn; what follows, a reflowed
        model draws worse than its teacher (benchmarks/miniature.md). Raises UserError where no step is left to it."""
        if steps <= FLOW_STEPS:
            raise UserError(f"steps is {steps}; of a path that a teacher finishes the first {FLOW_STEPS} "
                            f"are the flow's own, so give at least {FLOW_STEPS + 1}")
        v = flows.guided(self.velocity, context, null, guidance)
        x = flows.euler(lambda z, s: t * v(z, t * s), x0.contiguous(memory_format=torch.channels_last), FLOW_STEPS)
        return teacher.finish(x, t, context, null, steps - FLOW_STEPS, teacher_guidance)

    def latents(self, prompts, steps=None, guidance=None, seed=0, first=0, negative="", height=None, width=None):
        """-> scaled latents [B, 4, h, w] of list[str]; picture i starts from noise(0, seed, first + i).
        A str is a ValueError."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError("prompts must be a list of at least one str")
        self.check_steps(steps)
        x0 = self.noise(seed, first, len(prompts), height, width)
        unguided = (self.info["guidance"] if guidance is None else guidance) == 1
        known = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts if unguided else [*prompts, negative]))}
        states = self.read(list(known))                    # each different prompt once
        return self.solve(x0, states[[known[prompt] for prompt in prompts]], states[[known.get(negative, 0)]],
                          steps, guidance)

    @torch.no_grad()
    def read(self, prompts):
        """Text states of list[str] -> [n, 77, C]. Those of the last list are cached while the tower's weights are
        unchanged: the same prompts with other noise need no text encoding."""
        weights = [(p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in self.text.parameters()]
        key = prompts, weights, torch.is_autocast_enabled(self.device.type)
        if key != self._read[0]:
            self._read = key, self.text(prompts).clone()   # a CUDA graph's output is overwritten by its next run
        return self._read[1]

    def check_steps(self, steps):
        """Warn on stderr where a student is asked for other numbers of steps than it was trained for:
        its pictures may break."""
        trained = self.info["trained_steps"]
        if steps and trained and steps not in trained:
            print(f"warning: this model was distilled for {', '.join(map(str, trained))} step{'s' * (trained != [1])}; "
                  f"with {steps} its pictures may get worse, not better", file=sys.stderr)

    @torch.no_grad()
    def encode(self, images):
        """Images [B, 3, H, W] in [-1, 1] -> scaled latents [B, 4, h, w], the means of the encoder's distributions."""
        p = next(self.vae.parameters())
        return self.vae.encode(images.to(p.device, p.dtype, memory_format=torch.channels_last))[0] * self.scale

    @torch.no_grad()
    def decode(self, latents, tile=None):
        """Scaled latents [B, 4, h, w] -> images [B, 3, H, W], float32 in [-1, 1]. tile: latents a side that are
        decoded at a time (`VAE.decode_tiled`: less memory, and not quite the same picture); None decodes whole."""
        z = ((latents / self.scale).to(self.vae.post_quant_conv.weight.dtype)
             .contiguous(memory_format=torch.channels_last))
        images = (self.vae.decode_tiled(z, tile) if tile else self.vae.decode(z)).float()
        # activations past 65,504, which some fine-tunes have: pictures would be black
        if z.dtype == torch.float16 and not images.isfinite().all():
            print("note: this VAE does not fit into float16; it goes on in float32", file=sys.stderr)
            self.vae.float()
            return self.decode(latents, tile)
        return images.clamp(-1, 1)

    def generate(self, prompts, steps=None, guidance=None, seed=0, first=0, negative="", height=None, width=None):
        """list[str] -> list of PIL images; None means instaflow.json's.
        Picture i starts from noise(0, seed, first + i)."""
        return to_pil(self.decode(self.latents(prompts, steps, guidance, seed, first, negative, height, width)))


def to_predict(model, exact, path):
    """What a U-Net trained from `model` is to predict: the velocity, as in the paper, or, with exact, still
    the noise. Raises UserError where training so far was for the other: the U-Net's output would be misread,
    and it would have to learn everything anew."""
    if exact and model.info["prediction"] == "velocity":
        raise UserError(f"--exact is for noise predictors, and {path} predicts the velocity; leave it out")
    if not exact and model.info["prediction"] == "epsilon" and model.info.get("pairs"):
        raise UserError(f"{path} was trained with --exact and still predicts noise; give --exact here too")
    return "epsilon" if exact else "velocity"

