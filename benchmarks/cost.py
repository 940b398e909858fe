"""What the whole recipe costs: samples a second, measured on a device, as GPU-days beside the paper's 199 A100-days.

    python benchmarks/cost.py measure --device cuda --batch 16      # full size, random weights:
                                                                      every stage's samples a second
    python benchmarks/cost.py table                                 # the table in the README,
                                                                      from benchmarks/throughput.json

A GPU-day counts as measured only where each stage was, at full size, on that device. All others are estimates, and
say so: the same work at the share of the device's peak that the nearest thing measured reached,
which no other device owes anybody.
"""
import json
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import distill
import flows
import log
import training
from instaflow import CONFIGS, InstaFlow, timestep
from lpips import LPIPS, random_vgg
from text import TextTower
from unet import UNet
from vae import VAE

FILE = Path(__file__).parent / "throughput.json"
# (Stage, what is measured for it, samples, the paper's A100-days.) The paper's table; the number of pairs is about
# 1.6 million twice.
RECIPE = (("pairs, twice", "generation", 3_200_000, 16.0),
          ("reflow, 64 x 70,000", "reflow", 64 * 70_000, 11.2),
          ("reflow, 1024 x 25,000", "reflow", 1024 * 25_000, 64.0),
          ("distillation, L2, 1024 x 21,500", "l2", 1024 * 21_500, 54.4),
          ("distillation, LPIPS, 1024 x 18,000", "lpips", 1024 * 18_000, 53.6))
# of the sampler in generation, each of two U-Net calls: with the prompt and without
STEPS = 25


def work(operations):
    """Floating point operations a sample, by stage, of {"unet": ..., "decoder": ...} forward passes. A backward pass
    is two forward ones; of the two decoders in LPIPS one has a gradient, and to its input alone;
    text and VGG are a hundredth, and left out."""
    unet, decoder = operations["unet"], operations["decoder"]
    return {"generation": 2 * STEPS * unet, "reflow": 3 * unet, "l2": 3 * unet, "lpips": 3 * unet + 3 * decoder}


def days(samples, speed):
    """GPU-days of so many samples at `speed` a second."""
    return samples / speed / 86400


def table(measured, operations):
    """Lines of markdown: the paper's days, and for each device measured or of a known peak its days.

    measured: {device: {"speed": {stage: samples/s}}}, one GPU each, full size. An A100 that was not measured is
    estimated from each device that was, at the same share of its peak; an H100 that was not,
    from the paper's A100, likewise."""
    flop, columns = work(operations), {}
    share = {stage: sum(n * flop[stage] for _, s, n, _ in RECIPE if s == stage)
             / sum(d * 86400 for _, s, _, d in RECIPE if s == stage) / log.peak("A100") for stage in flop}
    for device, row in measured.items():
        columns[f"{device}, measured"] = [days(n, row["speed"][stage]) for _, stage, n, _ in RECIPE]
        if log.peak(device) and "A100" not in device:
            columns[f"A100, estimate from {device}"] = [
                days(n, row["speed"][stage]) * log.peak(device) / log.peak("A100") for _, stage, n, _ in RECIPE]
    if not any("H100" in name for name in measured):
        columns["H100-days, estimate at the paper's share of the peak"] = [
            days(n, share[stage] * log.peak("H100") / flop[stage]) for _, stage, n, _ in RECIPE]
    lines = ["| stage | samples | TFLOP a sample | paper, A100-days | " + " | ".join(columns) + " |",
             "|---|---|---|---|" + "---|" * len(columns)]
    for i, (name, stage, samples, paper) in enumerate(RECIPE):
        lines.append(f"| {name} | {samples / 1e6:.2f} M | {flop[stage] / 1e12:.2f} | {paper:.1f} | "
                     + " | ".join(f"{column[i]:.1f}" for column in columns.values()) + " |")
    lines.append(f"| all | | | {sum(paper for *_, paper in RECIPE):.1f} | "
                 + " | ".join(f"{sum(column):.1f}" for column in columns.values()) + " |")
    return lines + ["", "The paper's share of an A100's 312 TFLOP/s, by its own days: "
                    + ", ".join(f"{stage} {value:.0%}" for stage, value in share.items()) + ".",
                    f"Measured at full size: {', '.join(measured) or 'nothing yet'}."]


def speed_of(step, samples, device, least=3, seconds=20):
    """Samples a second of step(), after two calls to warm up -> (samples/s, peak GiB)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        step()
    wait()
    log.peak_memory(device)
    begun, count = time.time(), 0
    while count < least or time.time() - begun < seconds:
        step()
        wait()
        count += 1
    return count * samples / (time.time() - begun), log.peak_memory(device)


def ceiling(device, side):
    """FLOP/s of a bf16 matrix product: what the device does at best, as against its maker's sheet."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side ** 3 * speed_of(lambda: a @ b, 1, device, 10, 2)[0]


def measure(args):
    device = torch.device(args.device)
    model = InstaFlow.random(args.config).to(device)
    x0, x1 = (torch.randn(args.batch, *model.latent_shape(), device=device) for _ in range(2))
    t, prompts = torch.rand(args.batch, device=device), ["a red circle left of a blue square"] * args.batch
    speed, memory = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        save_file(random_vgg(), f"{folder}/vgg.safetensors")
        distance = LPIPS(f"{folder}/vgg.safetensors").to(device)

    def generate():
        with torch.no_grad(), training.autocast(device):
            text = model.text(prompts + [""])
            model.solve(x0, text[:-1], text[-1:], STEPS, 1.5)
    speed["generation"], memory["generation"] = speed_of(generate, args.batch, device, 1, args.seconds)
    unet = model.unet.requires_grad_(True)
    ema, optimizer, net = training.prepare(
        unet, Namespace(lr=1e-6, weight_decay=1e-2, checkpoint=args.checkpoint, compile=args.compile, graphs=False),
        training.World(0, 1, device))
    training.checkpoint_gradients(model.vae, device)

    def train(stage):
        with training.autocast(device):
            with torch.no_grad():
                context = model.text(prompts)
            if stage == "reflow":
                loss = flows.flow_loss(lambda x, t: net(x, timestep(t), context), x0, x1, t)
            else:
                student = x0 + net(x0, timestep(torch.zeros_like(t)), context)
                loss = (distill.image_losses(student, x1, model, distance, args.lpips_size).mean() if stage == "lpips"
                        else (student - x1).square().mean())
        loss.backward()
        training.optimiser_step(optimizer, unet, 1e-6)
        training.update_ema(ema, unet, 0)
    for stage in ("reflow", "l2", "lpips"):
        speed[stage], memory[stage] = speed_of(lambda: train(stage), args.batch, device, 3, args.seconds)
    best, flop = ceiling(device, 8192 if device.type == "cuda" else 512), work(model.operations())
    row = {"config": args.config, "batch": args.batch, "checkpoint": args.checkpoint, "compile": args.compile,
           "speed": {k: round(v, 3) for k, v in speed.items()},
           "memory_gib": {k: round(v, 2) for k, v in memory.items()}, "ceiling_tflops": round(best / 1e12, 2),
           "share_of_ceiling": {k: round(v * flop[k] / best, 4) for k, v in speed.items()},
           "date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv])}
    print(json.dumps(row, indent=1))
    if args.config == "sd15":                              # a smaller network tells nothing of the recipe's cost
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        training.write(FILE, (json.dumps(kept | {log.hardware(): row}, indent=1) + "\n").encode())


def main():
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    commands.add_parser("table", doc=table.__doc__)
    command = commands.add_parser(
        "measure", doc=f"Samples a second of every stage, one process; full size is kept in {FILE.name}.")
    command.add_argument("--config", choices=CONFIGS, default="sd15")
    command.add_argument("--device", type=cli.device, default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--batch", type=cli.positive, default=16)
    command.add_argument("--seconds", type=cli.number(0), default=20, help="for each stage, at least")
    command.add_argument("--lpips-size", type=cli.seed, default=224)
    command.add_argument("--checkpoint", action="store_true", help="as in training")
    command.add_argument("--compile", action="store_true", help="as in training")
    args = parser.parse_args()
    if args.command == "measure":
        return measure(args)
    unet, vae, text = CONFIGS["sd15"]
    with torch.device("meta"):                             # nothing is computed
        model = InstaFlow(UNet(unet), VAE(vae), TextTower(text), {"prediction": "velocity"})
    print("\n".join(table(json.loads(FILE.read_text()) if FILE.exists() else {}, model.operations())))


if __name__ == "__main__":
    cli.run(main)
