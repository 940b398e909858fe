"""Reflow, the paper's Algorithm 1: retrain a flow on its teacher's own (noise, image) pairs, which straightens it.

    python train_reflow.py --model sd15 --pairs pairs/sd --out 2rf-64
    python train_reflow.py --model 2rf-64 --pairs pairs/sd --out 2rf --batch 1024 --accumulate 64 --iterations 25000
    torchrun --nproc-per-node 8 train_reflow.py ...         # one node
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_reflow.py ...

The defaults are the paper's. The teacher's U-Net is the initialisation as it is, even if it predicts noise: it is
fine-tuned to predict the velocity. With --exact it goes on predicting noise and is read as a velocity: training
starts at the teacher's flow. Run the same line again and it resumes where it stopped.
"""
import numpy as np
import torch

import cli
import flows
import training
from images import grid
from instaflow import PROMPTS, InstaFlow, to_predict
from shards import PairDataset


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="initialisation: the model that made the pairs")
    parser.add_argument("--pairs", required=True, help="folder written by pairs.py")
    parser.add_argument("--out", type=cli.folder, required=True,
                        help="folder of the new model; checkpoints and log in its training/")
    parser.add_argument("--drop", type=cli.number(0, 1), default=0.1,
                        help="share of prompts made NULL, so that guidance other than 1 stays calibrated")
    parser.add_argument("--density", choices=flows.DENSITIES, default="uniform",
                        help="of t; the paper: uniform; u-shaped: Lee et al. 2024; early: mostly near the noise, "
                             "for --exact, whose late times are learned already")
    parser.add_argument("--huber", action="store_true",
                        help="pseudo-Huber loss (Lee et al. 2024); the paper: the square")
    parser.add_argument("--exact", action="store_true",
                        help="stay a noise predictor, read as the velocity that it equals (Lee et al. 2024): "
                             "the teacher's flow is where training starts")
    training.add_flags(parser)
    args = parser.parse_args()

    cli.another(args.out, args.model)
    world = training.start(args.device, hours=1)
    data, model = PairDataset(args.pairs), InstaFlow.load(args.model, world.device, prediction=args.prediction)
    data.check(model, args.model)
    unet = model.unet.requires_grad_(True)
    ema, optimizer, net = training.prepare(unet, args, world)
    info = {"prediction": to_predict(model, args.exact, args.model), "sampler": "euler", "steps": 25, "guidance": 1.5,
            "pairs": data.info}
    flow = InstaFlow(ema, model.vae, model.text, info, model.base)
    # a backward pass is two forward ones
    folder, work = f"{args.out}/training", 3 * model.operations()["unet"]
    batch = training.ahead(
        lambda step: data.batch(world.share(training.batch_indices(args.seed, step, args.batch, len(data)))))
    recipe = training.recipe(args) | {"pairs_made": data.info}
    for step, log, lr in training.steps(args, world, folder, unet, ema, optimizer, recipe, args.cosine, work):
        rng = training.step_generator(args.seed, step)
        t = world.share(flows.sample_time(args.batch, args.density, rng)).to(world.device)
        dropped = world.share(rng.random(args.batch) < args.drop)
        (x0, x1, prompts), losses = batch(step), []
        for part in training.parts(net, len(x0), args.accumulate):
            with training.autocast(world.device, args.float32):
                with torch.no_grad():
                    context = model.text(np.where(dropped[part], "", prompts[part]).tolist())
                ends = [y[part].to(world.device, non_blocking=True) for y in (x0, x1)]
                loss = flows.flow_loss(
                    lambda x, t: flow.velocity(x, t, context, net), *ends, t[part], "none", args.huber)
            (loss.sum() / len(x0)).backward()
            losses.append(loss.detach())
        log.add(torch.cat(losses), t, gradient=training.optimiser_step(optimizer, unet, lr, args.clip, args.explode))
        if world.rank == 0 and (step + 1) % args.sample_every == 0:
            with training.autocast(world.device, args.float32):
                pictures = [flow.generate(PROMPTS, steps) for steps in (1, 2, 25)]
            training.write_by(grid(pictures, ["1 step", "2 steps", "25 steps"], PROMPTS).save,
                              f"{folder}/samples-{step + 1:06d}.png")
    if world.rank == 0:
        flow.info["made"] = training.made(folder, args.seed)
        flow.save(args.out, dtype=torch.float16)           # as models are released; the checkpoints keep float32
    training.finish()


if __name__ == "__main__":
    cli.run(main)
