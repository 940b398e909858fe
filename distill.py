"""One-step distillation, the paper's Algorithm 2: make X0 + v(X0, 0 | T) the end of the teacher's whole path.

    python distill.py --model 2rf --pairs pairs/2rf --out instaflow-l2 --batch 1024 --accumulate 64 --iterations 21500
    python distill.py --model instaflow-l2 --pairs pairs/2rf --out instaflow --loss lpips --vgg vgg16.pth \\
        --linear vgg.pth --batch 1024 --accumulate 64 --iterations 18000
    python distill.py --model 2rf --pairs pairs/2rf --out instaflow-1.7b-l2 --stacked --iterations 110000   # two U-Nets
    torchrun --nproc-per-node 8 distill.py ...              # one node
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 distill.py ...

First L2 between latents, then LPIPS between decoded images, as in the paper. With Stable Diffusion itself as --model,
and its pairs, this is the baseline: direct distillation. InstaFlow-1.7B is --stacked: both halves start as the
2-rectified flow; its LPIPS stage takes the stacked L2 student, which stays stacked. --steps 4 (not in the paper)
gives a student that is good in two and four steps too. Run the same line again and it resumes where it stopped.
"""
import torch
import torch.nn.functional as F

import cli
import flows
import training
from cli import UserError
from images import grid
from instaflow import PROMPTS, InstaFlow, to_predict
from lpips import LPIPS
from shards import PairDataset
from unet import StackedUNet


def image_losses(student, target, model, distance, size):
    """D(image, image): latents [B, 4, h, w] decoded, resized to `size` (0: as they are) -> [B]. The target's decoder
    keeps no graph."""
    def image(latents):
        pixels = model.vae.decode(latents / model.scale).float()             # a CPU cannot resize bf16
        return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True) if size else pixels
    with torch.no_grad():
        wanted = image(target)
    return distance(image(student), wanted)


def start_times(n, steps, generator):
    """Where on their lines n pairs start, float32 [n]: 0, 1/N, ..., (N-1)/N for N steps. Half of them 0 (if N > 1),
    where all of the path is left and mistakes are largest: with all alike, every number of steps is a little worse
    (benchmarks/miniature.md)."""
    # of 2 (N - 1) whole numbers N - 1 are negative or 0, the others 1 ... N - 1; for N = 1 there is 0 alone
    k = generator.integers(min(0, 2 - steps), steps, size=n).clip(0)
    return torch.from_numpy(k / steps).float()


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True,
                        help="initialisation: the model that made the pairs, or the L2 student")
    parser.add_argument("--pairs", required=True, help="folder written by pairs.py")
    parser.add_argument("--out", type=cli.folder, required=True,
                        help="folder of the student; checkpoints and log in its training/")
    parser.add_argument("--loss", choices=("l2", "huber", "lpips"), default="l2",
                        help="L2 or pseudo-Huber (Lee et al. 2024; not the paper's) between latents, "
                             "or LPIPS between decoded images")
    parser.add_argument("--vgg", help="for lpips: VGG16's weights (torchvision's file), or the judge's")
    parser.add_argument("--linear",
                        help="for lpips: the lpips package's weights of layers (default: all channels alike)")
    parser.add_argument("--lpips-size", type=cli.seed, default=224,
                        help="pixels a side that LPIPS sees; 0 leaves images as they are")
    parser.add_argument("--l2", type=cli.number(0), default=0.0,
                        help="for lpips: weight of an added L2 between latents, "
                             "since LPIPS alone lets brightness drift; the paper: none")
    parser.add_argument("--steps", type=cli.positive, default=1,
                        help="N: learn to reach the end from every t = 0, 1/N, ... on the pair's line, "
                             "half the time from 0, so that up to N Euler steps help; the paper: 1, from t = 0 alone")
    parser.add_argument("--stacked", action="store_true",
                        help="the student is two U-Nets in series (InstaFlow-1.7B); a stacked --model stays so")
    parser.add_argument("--exact", action="store_true",
                        help="stay a noise predictor, read as the velocity that it equals, as train_reflow.py --exact")
    training.add_flags(parser)
    args = parser.parse_args()
    if args.loss == "lpips" and not args.vgg:
        raise UserError("--loss lpips needs --vgg, the file of VGG16's weights")
    if args.loss != "lpips" and (args.l2 or args.vgg or args.linear or args.lpips_size != 224):
        raise UserError("--vgg, --linear, --lpips-size and --l2 are of --loss lpips; give that, or leave them out: "
                        f"--loss {args.loss} compares latents alone")
    if 0 < args.lpips_size < 16:
        raise UserError(f"--lpips-size {args.lpips_size} is too small for VGG16, which halves a picture four times; "
                        "give at least 16")

    cli.another(args.out, args.model)
    world = training.start(args.device, hours=1)
    data, model = PairDataset(args.pairs), InstaFlow.load(args.model, world.device, prediction=args.prediction)
    data.check(model, args.model, seen=bool(model.info["trained_steps"]))
    distance = LPIPS(args.vgg, args.linear).to(world.device) if args.loss == "lpips" else None
    stack = args.stacked and not model.unet.config.stacked
    if stack and args.exact:
        raise UserError("--exact is to start at the teacher's flow, and two U-Nets in series do not start there; "
                        "leave it out")
    predicts = "velocity" if stack else to_predict(model, args.exact, args.model)
    if stack:
        model.unet = StackedUNet.from_unet(model.unet)
    unet = model.unet.requires_grad_(True)
    ema, optimizer, net = training.prepare(unet, args, world)
    # a decoder's activations at 512 pixels are several GB a picture
    if distance:
        training.checkpoint_gradients(model.vae, world.device)
        if args.compile:
            training.compile_blocks(model.vae.decoder)
    info = {"prediction": predicts, "sampler": "euler", "steps": 1, "guidance": 1.0, "pairs": data.info}
    flow = InstaFlow(ema, model.vae, model.text, info, model.base)
    folder, operations = f"{args.out}/training", model.operations()
    # both decoded, one of them with its gradient
    work = 3 * operations["unet"] + bool(distance) * 3 * operations["decoder"]
    batch = training.ahead(
        lambda step: data.batch(world.share(training.batch_indices(args.seed, step, args.batch, len(data)))))
    recipe = training.recipe(args) | {"pairs_made": data.info}
    for step, log, lr in training.steps(args, world, folder, unet, ema, optimizer, recipe, args.cosine, work):
        (noise, latent, prompts), losses = batch(step), []
        times = world.share(start_times(args.batch, args.steps, training.step_generator(args.seed, step)))
        for part in training.parts(net, len(noise), args.accumulate):
            x0, x1, t = (y[part].to(world.device, non_blocking=True) for y in (noise, latent, times))
            x = flows.interpolate(x0, x1, t)               # x0 where t = 0
            with training.autocast(world.device, args.float32):
                with torch.no_grad():
                    context = model.text(prompts[part])
                # one Euler step to t = 1
                student = x + (1 - t)[:, None, None, None] * flow.velocity(x, t, context, net)
                error = (student - x1).float().flatten(1)
                loss = flows.pseudo_huber(error) if args.loss == "huber" else error.square().mean(1)
                if distance:
                    loss = args.l2 * loss + image_losses(student, x1, model, distance, args.lpips_size)
            (loss.sum() / len(noise)).backward()
            losses.append(loss.detach())
        log.add(torch.cat(losses), times if args.steps > 1 else None,
                gradient=training.optimiser_step(optimizer, unet, lr, args.clip, args.explode))
        if world.rank == 0 and (step + 1) % args.sample_every == 0:
            with training.autocast(world.device, args.float32):
                pictures = [flow.generate(PROMPTS, steps) for steps in (1, 4)]
            training.write_by(grid(pictures, ["1 step", "4 steps"], PROMPTS).save,
                              f"{folder}/samples-{step + 1:06d}.png")
    if world.rank == 0:
        flow.info |= {"trained_steps": [n for n in range(1, args.steps + 1) if args.steps % n == 0],
                      "made": training.made(folder, args.seed)}
        flow.save(args.out, dtype=torch.float16)           # as models are released; the checkpoints keep float32
    training.finish()


if __name__ == "__main__":
    cli.run(main)
