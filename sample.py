"""Pictures from prompts.

    python sample.py "a red circle left of a blue square"
    python sample.py "a small yellow star" "a pink heart" --num 4 --seed 7 --out stars.png
    python sample.py --model models/mini-sd --steps 25 --guidance 2 "a green ring"
    python sample.py --compare "a red circle left of a blue square" "a small yellow star"
    python sample.py --interpolate 3 8 "a purple diamond above a cyan cross"

One picture goes to --out. Several go beside it, numbered, and --out itself shows them all, labelled. Prompt, seed, model
and steps are in each PNG's metadata.
"""
import sys
import time
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo

import cli
import flows
from cli import UserError
from instaflow import InstaFlow, grid, to_pil

HERE = Path(__file__).resolve().parent / "models"
COMPARISON = ["mini-sd:25", "mini-sd:1", "mini-2rf:25", "mini-2rf:1", "mini-direct:1", "mini-instaflow:1"]    # MODEL:STEPS, a row each


def slerp(a, b, n):
    """n points from a to b [C, h, w] along the sphere: each is again a draw of N(0, I), as a point of the chord is not."""
    dtype, a, b = a.dtype, a.float(), b.float()
    angle = torch.arccos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1)).clamp(min=1e-6)       # 0 where a is b
    w = torch.linspace(0, 1, n, device=a.device).reshape(-1, 1, 1, 1)
    return ((torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)).to(dtype)


class Clock(dict):
    """Seconds by stage, the device's work included."""

    def __call__(self, stage, function, *args):
        started = time.perf_counter()
        result = function(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self[stage] = self.get(stage, 0) + time.perf_counter() - started
        return result


@torch.no_grad()
def pictures(model, prompts, noise, args, steps=None, clock=None):
    """One picture a prompt, from noise [B, 4, h, w], `args.batch` at a time -> list of PIL images."""
    clock, out = Clock() if clock is None else clock, []                     # an empty one is False
    for i in range(0, len(prompts), args.batch):
        text = clock("text", model.text, [*prompts[i:i + args.batch], args.negative])
        latents = clock("U-Net", model.solve, noise[i:i + args.batch], text[:-1], text[-1:], steps, args.guidance)
        out += to_pil(clock("decoder", model.decode, latents))
    return out


def load(path, args, steps):
    model = InstaFlow.load(path, args.device, args.dtype, args.prediction)
    model.check_steps(steps)
    return model


def write_png(image, path, **facts):
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value).encode("utf-8", "replace").decode())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=info)
    print(path)


def precision(name, device):
    """The dtype, and bf16 or float32 in float16's place on a CPU, where float16 convolutions are some 40 times slower."""
    if name == "float16" and torch.device(device).type == "cpu":
        name = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
        print(f"note: float16 is very slow on a CPU; using {name}", file=sys.stderr)
    return getattr(torch, name)


def arguments():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="what to draw; several make several pictures")
    add("--prompts", metavar="FILE", help="prompts from a text file, one a line")
    add("--num", type=cli.positive, default=1, help="pictures a prompt, each from its own noise")
    add("--seed", type=cli.seed, default=0, help="of the noise")
    add("--steps", type=cli.positive, help="of the sampler (default: the model's own)")
    add("--guidance", type=cli.number(), help="strength of the prompt (default: the model's own; 1 is none)")
    add("--negative", default="", help="the prompt that guidance leads away from")
    add("--model", default=str(HERE / "mini-instaflow"), help="a model folder")
    add("--prediction", choices=("velocity", "epsilon"), help="of a folder that does not say it itself")
    add("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--height", type=cli.positive, help="in pixels (default: what the model was trained on)")
    add("--width", type=cli.positive, help="in pixels")
    add("--batch", type=cli.positive, default=16, help="pictures at a time")
    add("--out", type=Path, default=Path("out.png"))
    add("--interpolate", type=cli.seed, nargs=2, metavar="SEED", help="a strip of --frames pictures between two seeds' noises")
    add("--frames", type=cli.positive, default=8)
    add("--compare", nargs="?", const=",".join(COMPARISON), metavar="MODEL:STEPS,...", help="one row a model and number of steps, from the same noise (default: the shipped ones)")
    args = parser.parse_intermixed_args()
    if args.compare and ":" not in args.compare:           # `--compare "a prompt" ...`
        args.prompt, args.compare = [args.compare, *args.prompt], ",".join(COMPARISON)
    args.prompt += cli.read_prompts(args.prompts) if args.prompts else []
    if not [p for p in args.prompt if p.strip()]:
        parser.error('no prompt; say what to draw, as in: sample.py "a red circle left of a blue square"')
    if args.compare and args.interpolate:
        parser.error("--compare and --interpolate are two different pictures; ask for one of them")
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out {args.out}: pictures are written as PNG; name a .png file")
    args.dtype = precision(args.dtype, args.device)
    return args


def compare(args):
    rows, labels, prompts = [], [], [p for p in args.prompt for _ in range(args.num)]
    for item in args.compare.split(","):
        path, _, steps = item.rpartition(":")
        if not path or not steps.isdigit() or int(steps) < 1:
            raise UserError(f"--compare {item}: write MODEL:STEPS, as in models/mini-sd:25")
        model = load(path if Path(path).exists() else HERE / path, args, int(steps))
        noise = model.noise(args.seed, 0, len(prompts), args.height, args.width)
        rows.append(pictures(model, prompts, noise, args, int(steps)))
        labels.append(f"{Path(path).name}\n{steps} step{'s' * (int(steps) > 1)}")
    write_png(grid(rows, labels, prompts), args.out, prompt=prompts, seed=args.seed, compare=args.compare)


def interpolate(args):
    model = load(args.model, args, args.steps)
    ends = [model.noise(seed, 0, 1, args.height, args.width)[0] for seed in args.interpolate]
    noise = slerp(*ends, args.frames)
    rows = [pictures(model, [prompt] * args.frames, noise, args, args.steps) for prompt in args.prompt]
    write_png(grid(rows, args.prompt, side=128), args.out, prompt=args.prompt, interpolate=args.interpolate, model=args.model, steps=args.steps or model.info["steps"])


def main():
    args = arguments()
    if args.compare:
        return compare(args)
    if args.interpolate:
        return interpolate(args)
    model, clock, prompts = load(args.model, args, args.steps), Clock(), [p for p in args.prompt for _ in range(args.num)]
    steps, guidance = args.steps or model.info["steps"], model.info["guidance"] if args.guidance is None else args.guidance
    images = pictures(model, prompts, model.noise(args.seed, 0, len(prompts), args.height, args.width), args, steps, clock)
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        path = args.out if len(images) == 1 else args.out.with_stem(f"{args.out.stem}-{i:03d}")
        write_png(image, path, prompt=prompt, negative=args.negative, seed=args.seed, index=i, model=args.model, steps=steps, guidance=guidance)
    if len(images) > 1:
        rows = [images[i:i + args.num] for i in range(0, len(images), args.num)] if args.num > 1 else [images]
        labelled = grid(rows, args.prompt) if args.num > 1 else grid(rows, None, prompts)
        write_png(labelled, args.out, prompt=args.prompt, seed=args.seed, model=args.model, steps=steps, guidance=guidance)
    print(f"{len(images)} picture{'s' * (len(images) > 1)}, {steps} step{'s' * (steps > 1)}: " + ", ".join(f"{k} {1000 * v:.0f} ms" for k, v in clock.items()))


if __name__ == "__main__":
    cli.run(main)
