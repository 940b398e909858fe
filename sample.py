"""Pictures from prompts.

    python sample.py "a red circle left of a blue square"
    python sample.py "a small yellow star" "a pink heart" --num 4 --seed 7 --out stars.png
    python sample.py --model models/mini-sd --steps 25 --guidance 1.5 "a green ring"
    python sample.py --compare "a red circle left of a blue square" "a small yellow star"
    python sample.py --interpolate 3 8 "a purple diamond above a cyan cross"

At full size, from Stable Diffusion 1.x's weights in any spelling (README.md says where they are):

    python sample.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 "a lighthouse"     # 25 steps, guidance 7.5
    python sample.py --model v1-5-pruned-emaonly.safetensors --prediction epsilon --dtype bfloat16 "a lighthouse"
    python sample.py --model XCLiu/2_rectified_flow_from_sd_1_5 "a lighthouse"      # 25 steps, guidance 1.5
    python sample.py --model XCLiu/instaflow_0_9B_from_sd_1_5 --steps 1 --guidance 1 "a lighthouse"
    python sample.py --model 2rf --lora style.safetensors:0.8 --image photo.jpg --strength 0.6 "a lighthouse"
    python sample.py --random-weights sd15 --steps 1 "noise"        # no download: does it run?

One picture goes to --out. Several go beside it, numbered, and --out itself shows them all, labelled. Prompt, seed,
model and steps are in each PNG's metadata.
"""
import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

import checkpoint
import cli
import fast
import flows
import hub
import lora
from cli import UserError
from images import grid, to_pil
from instaflow import InstaFlow

MODELS = Path(__file__).resolve().parent / "models"
BATCH = 16                                                 # pictures at a time
COMPARISON = ["mini-sd:25", "mini-sd:1", "mini-2rf:25", "mini-2rf:1", "mini-direct:1",
              "mini-instaflow:1", "mini-instaflow:4"]      # MODEL:STEPS, a row each


def slerp(a, b, n):
    """n points from a to b [C, h, w] along the sphere: each is again a draw of N(0, I), as no point of a chord is."""
    dtype, a, b = a.dtype, a.float(), b.float()
    angle = torch.arccos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1)).clamp(min=1e-6)       # 0 where a is b
    w = torch.linspace(0, 1, n, device=a.device).reshape(-1, 1, 1, 1)
    return ((torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)).to(dtype)


class Clock(dict):
    """Seconds by stage, the device's work included."""

    def __call__(self, stage, function, *args):
        started = time.perf_counter()
        result = function(*args)
        if result.is_cuda:
            torch.cuda.synchronize()
        self[stage] = self.get(stage, 0) + time.perf_counter() - started
        return result


def packs(args):
    """Whether weights are packed: on a CPU, but not for the compiler, which takes plain modules."""
    return torch.device(args.device).type == "cpu" and not args.compile


@contextmanager
def at_work(module, args):
    """On a CPU a module's weights are packed as it first works; elsewhere, with --low-memory, it is loaded onto its
    device now. With --low-memory it is freed afterwards."""
    if packs(args):
        fast.pack(module, args.dtype)
    elif args.low_memory:
        fast.place(module, args.device, args.dtype)
    yield
    if args.low_memory:
        fast.leave(module)


@torch.no_grad()
def pictures(model, prompts, args, steps=None, x0=None, clock=None):
    """Yield a PIL image a prompt. Text comes first, each different prompt once; then U-Net and decoder, --batch
    pictures at a time, with --low-memory the U-Net for all, then the decoder.
    x0: the noise [B, 4, h, w], None for that of --seed."""
    clock = Clock() if clock is None else clock            # an empty one is False
    guidance = model.info["guidance"] if args.guidance is None else args.guidance
    x0 = noise(model, args.seed, len(prompts), args) if x0 is None else x0
    x0, vae = x0.to(args.device, args.dtype), model.vae
    fits = 64 * 64 // x0[0, 0].numel() if x0.device.type == "cpu" else BATCH                 # into a CPU's caches
    n = args.batch or max(1, fits)
    tile = tile_side(args.tile, vae.config.factor)
    encoder = torch.nn.ModuleList((vae.encoder, vae.quant_conv))
    decoder = torch.nn.ModuleList((vae.post_quant_conv, vae.decoder))
    if args.image:
        with at_work(encoder, args):
            start = clock("encoder", model.encode, read_image(args.image, x0, vae.config.factor))
    known = list(dict.fromkeys(prompts if guidance == 1 else [*prompts, args.negative]))
    with at_work(model.text, args):                        # (.clone(): a graph's output is overwritten by its next run)
        states = torch.cat([clock("text", model.text, known[i:i + n]).clone() for i in range(0, len(known), n)])
    row = {prompt: i for i, prompt in enumerate(known)}
    context, null = states[[row[prompt] for prompt in prompts]], states[row.get(args.negative, 0), None]
    left = len(prompts)
    if args.compile and left > n:                          # fill the last one up: a new size is compiled anew
        x0, context = (torch.cat([y, y[-1:].expand(-left % n, *y.shape[1:])]) for y in (x0, context))

    def solved():
        with at_work(model.unet, args):
            for i in range(0, len(x0), n):
                part = slice(i, i + n)
                settings = context[part], null, steps, guidance
                if args.image:
                    yield clock("U-Net", model.solve_from, 1 - args.strength, x0[part], start.expand_as(x0[part]),
                                *settings)
                else:
                    yield clock("U-Net", model.solve, x0[part], *settings)
    latents = list(solved()) if args.low_memory else solved()
    with at_work(decoder, args):
        for batch in latents:
            images = clock("decoder", model.decode, batch, tile)[:left]
            left -= len(images)
            yield from to_pil(images)


def noise(model, seed, n, args):
    """That of the first n pictures of a seed, float32 [n, 4, h, w]."""
    shape = model.latent_shape(args.height, args.width)
    return torch.stack([flows.noise(0, seed, i, shape) for i in range(n)])


def read_image(path, noise, factor):
    """The picture at `path`, cropped to the size that noise [B, 4, h, w] makes -> [1, 3, H, W] in [-1, 1]."""
    try:
        with Image.open(path) as image:
            deep, image = image.mode[0] in "IF", ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"--image {path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {path} is no picture that Pillow reads ({error})") from None
    if deep:
        raise UserError(f"--image {path} has more than 8 bits a pixel; convert it to 8 bits")
    image = ImageOps.fit(image, (noise.shape[3] * factor, noise.shape[2] * factor), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def tile_side(pixels, factor):
    """--tile in latents. Raises UserError."""
    if pixels and (pixels % factor or pixels < 8 * factor):
        raise UserError(f"--tile is {pixels}; it must be a multiple of {factor}, and at least {8 * factor}")
    return pixels and pixels // factor


def load(path, args, steps):
    """The model that the flags ask for, with its LoRAs."""
    if args.random_weights:
        print(f"WARNING: RANDOM WEIGHTS OF THE SIZE {args.random_weights}: EVERY PICTURE IS NOISE. "
              "This only shows that it runs.", file=sys.stderr)
        model = InstaFlow.random(args.random_weights)
    else:                                                  # with --low-memory the weights stay in their file for now
        model = InstaFlow.load(hub.locate(path, args.dtype), "cpu", None if args.low_memory else args.dtype,
                               args.prediction)
    if not args.low_memory:
        model.to(args.device, args.dtype)
    for file, scale in args.lora:
        lora.load_lora(model, file, scale)
    model.check_steps(steps)
    if args.negative and (model.info["guidance"] if args.guidance is None else args.guidance) == 1:
        print(f"warning: --negative does nothing at guidance 1, which is {Path(path).name}'s here; give --guidance",
              file=sys.stderr)
    if args.compile:
        for module in (model.text.tower, model.unet, model.vae.decoder):
            # Heun holds two outputs at a time
            fast.compiled(module, args.device, graphs=model.info["sampler"] != "heun")
    if args.image and model.info["trained_steps"]:
        print("warning: this model was distilled to go from noise to picture at once; "
              "from a picture (--image) it blurs: use the model it was distilled from", file=sys.stderr)
    return model


def write_png(image, path, args, **facts):
    """With what it was made from in its metadata."""
    info = PngInfo()
    asked = ({key: getattr(args, key) for key in ("guidance", "negative", "lora", "image") if getattr(args, key)}
             | ({"strength": args.strength} if args.image else {}))
    facts = asked | facts
    for key, value in facts.items():
        info.add_itxt(key, str(value).encode("utf-8", "replace").decode())
    checkpoint.write_by(image.save, path, pnginfo=info, compress_level=1)       # a third of the time, 15 % more bytes
    return path


def precision(name, device):
    """The dtype; on a CPU, where float16 convolutions are some 40 times slower, bf16 or float32 in its place."""
    if name == "float16" and torch.device(device).type == "cpu":
        name = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
        print(f"note: float16 is very slow on a CPU; using {name}", file=sys.stderr)
    return getattr(torch, name)


def lora_and_scale(text):
    """An argparse type: FILE or FILE:SCALE."""
    file, _, scale = text.rpartition(":")
    try:
        return (file, cli.number()(scale)) if file and not Path(text).exists() else (text, 1.0)
    except argparse.ArgumentTypeError:
        return text, 1.0                                   # a colon of the path's own


def arguments():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="what to draw; several make several pictures")
    add("--prompts", metavar="FILE", help="prompts from a text file, one a line, or a .jsonl file")
    add("--num", type=cli.positive, default=1, help="pictures a prompt, each from its own noise")
    add("--seed", type=cli.seed, default=0, help="of the noise")
    add("--steps", type=cli.positive, help="of the sampler (default: the model's own)")
    add("--guidance", type=cli.number(), help="strength of the prompt (default: the model's own; 1 is none)")
    add("--negative", default="", help="the prompt that guidance leads away from")
    add("--model",
        help="a model folder, a single .safetensors or .ckpt file of Stable Diffusion 1.x's, "
             "or a hub name (default: the shipped miniature)")
    add("--prediction", choices=cli.PREDICTIONS, help=cli.PREDICTION)
    add("--random-weights", choices=("sd15", "stacked"),
        help="no model at all: random weights of that size, to see whether it runs. Pictures are noise")
    add("--lora", type=lora_and_scale, action="append", default=[], metavar="FILE[:SCALE]",
        help="a LoRA to merge in; may be given several times")
    add("--image", type=Path, metavar="FILE", help="start from this picture, partway along the flow, not from noise")
    add("--strength", type=cli.number(0, 1),
        help="with --image: share of the path that is drawn anew; 1 forgets the picture (default: 0.6)")
    add("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--height", type=cli.positive, help="in pixels (default: what the model was trained on)")
    add("--width", type=cli.positive, help="in pixels")
    add("--batch", type=cli.positive,
        help=f"pictures at a time (default: {BATCH}; on a CPU as many as have 64 x 64 latents in all: 1 at 512 px)")
    add("--tile", type=cli.positive, nargs="?", const=512, metavar="PIXELS",
        help="decode in tiles of so many pixels a side (alone: 512), blended: "
             "less memory, but not quite the same picture, since norms and attention see one tile")
    add("--compile", action="store_true",
        help="torch.compile, on a GPU with CUDA graphs: minutes at the first run of a size, kept on disk for the next. "
             "For GPUs: on a CPU it is slower than the default")
    add("--low-memory", action="store_true",
        help="text tower, U-Net and decoder are loaded one after the other, and freed; the picture is the same "
             f"(on a CPU up to {BATCH} pictures are drawn so anyway, without --lora and --compile)")
    add("--out", type=Path, default=Path("out.png"))
    add("--interpolate", type=cli.seed, nargs=2, metavar="SEED",
        help="a strip of --frames pictures between two seeds' noises")
    add("--frames", type=cli.positive, help="with --interpolate (default: 8)")
    add("--compare", nargs="?", const=",".join(COMPARISON), metavar="MODEL:STEPS,...",
        help="one row a model and number of steps, from the same noise (default: the shipped ones)")
    args = parser.parse_intermixed_args()
    if args.compare and (MODELS / args.compare).is_dir():
        parser.error(f"--compare {args.compare}: write MODEL:STEPS, as in {args.compare}:25")
    if args.compare and ":" not in args.compare:           # `--compare "a prompt" ...`
        args.prompt, args.compare = [args.compare, *args.prompt], ",".join(COMPARISON)
    args.prompt += cli.Prompts(args.prompts) if args.prompts else []
    if not [p for p in args.prompt if p.strip()]:
        parser.error('no prompt; say what to draw, as in: sample.py "a red circle left of a blue square"')
    for flag, usual, of in (("strength", 0.6, "image"), ("frames", 8, "interpolate")):
        if getattr(args, flag) is None:
            setattr(args, flag, usual)
        elif not getattr(args, of):
            parser.error(f"--{flag} is of --{of}; give that too, or leave it out")
    if args.compare and args.interpolate:
        parser.error("--compare and --interpolate are two different pictures; ask for one of them")
    if args.compare and (args.model is not None or args.steps):
        print("warning: --model and --steps do nothing here: --compare MODEL:STEPS,... names both", file=sys.stderr)
    if args.random_weights and (args.model is not None or args.compare):
        parser.error("--random-weights stands in place of a model; leave out --model and --compare")
    if args.image and args.interpolate:
        parser.error("--image starts from a picture and --interpolate from noise; ask for one of them")
    if args.num > 1 and (args.compare or args.interpolate):
        parser.error("--num is of single pictures; leave it out with --compare and --interpolate")
    if args.model is None:
        args.model = args.random_weights or str(MODELS / "mini-instaflow")
    for prompt in [*args.prompt, args.negative]:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            parser.error(f"the prompt {prompt!a} is not UTF-8 text")
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out {args.out}: pictures are written as PNG; name a .png file")
    cli.writable(args.out)
    args.dtype = precision(args.dtype, args.device)
    if packs(args) and not args.lora and len(args.prompt) * (args.frames if args.interpolate else args.num) <= BATCH:
        # of few pictures, on a CPU, it costs no time; with LoRAs it merges them in the file's dtype
        args.low_memory = True
    return args


def compare(args):
    rows, labels, prompts = [], [], args.prompt
    for item in args.compare.split(","):
        path, _, steps = item.rpartition(":")
        if not path or not steps.isdecimal() or int(steps) < 1:
            raise UserError(f"--compare {item}: write MODEL:STEPS, as in models/mini-sd:25")
        model = load(MODELS / path if (MODELS / path).exists() and not Path(path).exists() else path, args, int(steps))
        rows.append(list(pictures(model, prompts, args, int(steps))))
        labels.append(f"{Path(path).name}\n{steps} step{'s' * (int(steps) > 1)}")
    print(write_png(grid(rows, labels, prompts), args.out, args, prompt=prompts, seed=args.seed, compare=args.compare))


def interpolate(args):
    model, n = load(args.model, args, args.steps), args.frames
    strip = slerp(*(noise(model, seed, 1, args)[0] for seed in args.interpolate), n)
    images = list(pictures(model, [p for p in args.prompt for _ in range(n)], args, args.steps,
                           strip.repeat(len(args.prompt), 1, 1, 1)))
    rows = [images[i:i + n] for i in range(0, len(images), n)]
    facts = dict(prompt=args.prompt, interpolate=args.interpolate, model=args.model,
                 steps=args.steps or model.info["steps"])
    print(write_png(grid(rows, args.prompt, side=128), args.out, args, **facts))


def main():
    args = arguments()
    if args.compare:
        return compare(args)
    if args.interpolate:
        return interpolate(args)
    model, clock = load(args.model, args, args.steps), Clock()
    prompts = [p for p in args.prompt for _ in range(args.num)]
    steps = args.steps or model.info["steps"]
    guidance = model.info["guidance"] if args.guidance is None else args.guidance
    images, written = [], []
    with ThreadPoolExecutor() as pool:                     # a batch is encoded while the next one is computed
        for i, image in enumerate(pictures(model, prompts, args, steps, clock=clock)):
            path = args.out if len(prompts) == 1 else args.out.with_stem(f"{args.out.stem}-{i:03d}")
            facts = dict(prompt=prompts[i], negative=args.negative, seed=args.seed, index=i, model=args.model,
                         steps=steps, guidance=guidance)
            written.append(pool.submit(write_png, image, path, args, **facts))
            images.append(image)
    for path in written:
        print(path.result())
    if len(images) > 1:
        rows = [images[i:i + args.num] for i in range(0, len(images), args.num)] if args.num > 1 else [images]
        labelled = grid(rows, args.prompt) if args.num > 1 else grid(rows, None, prompts)
        print(write_png(labelled, args.out, args, prompt=args.prompt, seed=args.seed, model=args.model,
                        steps=steps, guidance=guidance))
    times = ", ".join(f"{stage} {1000 * seconds:.0f} ms" for stage, seconds in clock.items())
    print(f"{len(images)} picture{'s' * (len(images) > 1)}, {steps} step{'s' * (steps > 1)}: {times}")


if __name__ == "__main__":
    cli.run(main)
