"""(noise, prompt, latent) triplets: a model's own pairs X0, X1 = ODE[v](X0 | T), to train reflow and distillation on.

    python pairs.py --model models/mini-sd --prompts captions.txt --steps 25 --guidance 1.5 --out pairs/sd
    torchrun --nproc-per-node 8 pairs.py --model ... (the same): any number of processes may begin, and any number go on
    python pairs.py verify  --pairs pairs/sd                        # every shard and every noise, read again
    python pairs.py preview --pairs pairs/sd --out preview.png      # some of them decoded, with their prompts

Pair i holds prompt i of the file and noise(1, seed, i). What is written are shards.py's files: a kill loses minutes.
"""
import errno
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cli
import fast
import flows
import hub
import training
import weights
from cli import UserError
from images import grid, to_pil
from instaflow import InstaFlow
from shards import PART, SHARD, STREAM, PairDataset, checksum, merge, open_shard, part_path, plan, shard_path


def generate(model, solve, prompts, indices, args, made):
    """The pairs `indices` (a range), by `solve` (model.solve, or solve_with) -> one shard's tensors.
    made: is told of every batch's size."""
    shape, latents, sums = model.latent_shape(), [], []
    for start in range(0, len(indices), args.batch):
        batch = indices[start:start + args.batch]
        noise = torch.stack([flows.noise(STREAM, args.seed, i, shape) for i in batch])
        sums += [checksum(x) for x in noise]
        with torch.no_grad(), training.autocast(model.device, args.float32):
            text = model.text([prompts[i % len(prompts)] for i in batch] + [""])
            x1 = solve(noise.to(model.device), text[:-1], text[-1:], args.steps, args.guidance)
        latents.append(x1.half().cpu())
        if not latents[-1].isfinite().all():
            raise UserError(f"of the pairs {batch.start} to {batch.stop - 1} some latents are no finite numbers; give "
                            "--float32 too, which goes on in the same folder, or, in another, guidances nearer to 1 "
                            f"than {args.guidance:g}, or other weights: these may be damaged")
        made(len(batch))
    words = [prompts[i % len(prompts)].encode() for i in indices]
    return {"latent": torch.cat(latents), "seed": torch.full((len(indices),), args.seed),
            "index": torch.tensor(list(indices)), "checksum": torch.tensor(sums),
            "prompt": torch.frombuffer(bytearray(b"".join(words)), dtype=torch.uint8),
            "prompt_end": torch.tensor(np.cumsum([len(w) for w in words]))}


def make(words):
    """`python pairs.py`, by the words of its command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="the model whose ODE is solved")
    parser.add_argument("--prompts", required=True, help="a text file, one prompt a line, or a .jsonl file")
    parser.add_argument("--out", type=cli.folder, required=True,
                        help="folder of shards; what is there is not made again")
    parser.add_argument("--number", type=cli.positive,
                        help="pairs in all (default: one a prompt; beyond that the prompts repeat)")
    parser.add_argument("--steps", type=cli.positive, help="of the sampler (the paper: 25; default: the model's own)")
    parser.add_argument("--guidance", type=cli.number(),
                        help="the paper: 5.0 on Stable Diffusion's noise, 1.5 on the 2-rectified flow's velocity")
    parser.add_argument("--prediction", choices=cli.PREDICTIONS, help=cli.PREDICTION)
    parser.add_argument("--finish", type=cli.folder,
                        help="a noise predictor, the teacher of --model: it draws the paths' ends, "
                             "all but the first two steps (not the paper's)")
    parser.add_argument("--finish-at", type=cli.number(), help="the flow time, between 0 and 1, from which it does")
    parser.add_argument("--finish-guidance", type=cli.number(), help="its guidance (default: its own)")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the noise, in stream 1")
    parser.add_argument("--batch", type=cli.positive, default=64, help="pictures at a time")
    parser.add_argument("--shard", type=cli.positive,
                        help="pairs a file (default: the folder's, or what makes about 1 GB)")
    parser.add_argument("--float32", action="store_true", help="no bf16")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile, block by block: minutes at the start, faster on a GPU")
    parser.add_argument("--graphs", action="store_true",
                        help="on a GPU, replay CUDA graphs: for networks so small that launching kernels "
                             "takes longer than running them")
    parser.add_argument("--device", type=cli.device, help="default: the GPU where there is one")
    args = parser.parse_args(words)

    if not 0 < (args.finish_at or 0) < 1 if args.finish else (args.finish_at, args.finish_guidance) != (None, None):
        raise UserError("--finish MODEL and --finish-at T, with T between 0 and 1 (in miniature: 0.3), go together, "
                        "and --finish-guidance with both")
    world = training.start(args.device)
    if args.graphs and (world.device.type != "cuda" or args.compile):
        raise UserError(f"--graphs is for a GPU{', without --compile' * args.compile}; leave it out")
    prompts = cli.Prompts(args.prompts)
    model = InstaFlow.load(args.model, world.device, prediction=args.prediction)
    teacher = InstaFlow.load(args.finish, world.device, prediction="epsilon") if args.finish else None
    alike = teacher and [weights.same(getattr(teacher, part), getattr(model, part)) for part in ("unet", "vae", "text")]
    if teacher and (teacher.info["trained_steps"] or alike != [False, True, True]):
        raise UserError(f"--finish {args.finish} is no teacher of --model {args.model}: "
                        "that has the same VAE and text tower, another U-Net, and is no one-step student")
    for each in filter(None, (model, teacher)):
        if args.graphs:
            fast.graphed(each.unet)
        elif args.compile:
            training.compile_blocks(each.unet)
    # a part tells as much as a shard
    first = next(iter(sorted(Path(args.out).glob("shard-*.safetensors"))), None)
    old = json.loads(open_shard(first).metadata()["json"]) if first else {}
    number, args.steps = args.number or len(prompts), args.steps or model.info["steps"]
    args.guidance = model.info["guidance"] if args.guidance is None else args.guidance
    args.shard = (args.shard or old.get("shard")
                  or max(SHARD // (2 * int(np.prod(model.latent_shape()))) // PART, 1) * PART)
    info = {"model": os.path.normpath(args.model), "weights": weights.checksum(hub.locate(args.model)),
            "sampler": model.info["sampler"], "steps": args.steps, "guidance": args.guidance, "number": number,
            "shard": args.shard, "seed": args.seed, "prompts": prompts.crc}
    if teacher:
        finish_guidance = teacher.info["guidance"] if args.finish_guidance is None else args.finish_guidance
        info["finish"] = {"model": os.path.normpath(args.finish), "weights": weights.checksum(hub.locate(args.finish)),
                          "sampler": teacher.info["sampler"].replace("ddim", "dpm"), "at": args.finish_at,
                          "guidance": finish_guidance}
    solve = ((lambda *path: model.solve_with(teacher, args.finish_at, finish_guidance, *path)) if teacher
             else model.solve)
    if first and old != info:
        changed = [k for k in old | info if old.get(k) != info.get(k)]
        raise UserError(f"{args.out} holds pairs made otherwise ({', '.join(changed)} differ); "
                        "give the same settings, or another --out")

    shards = list(plan(number, args.shard))
    work = [(k, j) for k, parts in enumerate(shards) for j in range(len(parts))]
    there = lambda k, j: shard_path(args.out, k).exists() or part_path(args.out, k, j, len(shards[k])).exists()
    if world.rank == 0:
        # a folder that cannot be written shows now, not after the first part
        os.makedirs(args.out, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), args.out)
        training.clean(args.out)
    # one process looks: all go by the same list
    done = training.from_first(world, [world.rank == 0 and there(k, j) for k, j in work])
    todo = [(k, j) for (k, j), made in zip(work, done) if not made]
    # the shards that this process puts together
    mine = [k for k in range(len(shards)) if len(shards[k]) > 1][world.rank::world.size]

    def put_together():
        for k in list(mine):
            parts = [part_path(args.out, k, j, len(shards[k])) for j in range(len(shards[k]))]
            if shard_path(args.out, k).exists():
                for path in parts:
                    path.unlink(missing_ok=True)
            elif all(path.exists() for path in parts):
                merge(args.out, k, shards[k])
            else:
                continue
            mine.remove(k)

    count, begun = sum(len(shards[k][j]) for k, j in todo), time.time()
    bar = tqdm(total=number, initial=number - count, desc="pairs", unit="pair", disable=world.rank > 0, mininterval=1)
    for k, j in todo[world.rank::world.size]:
        rows = shards[k][j]
        training.write_tensors(
            part_path(args.out, k, j, len(shards[k])),
            generate(model, solve, prompts, rows, args, lambda n: bar.update(min(n * world.size, number - bar.n))),
            {"json": json.dumps(info)})
        put_together()
    training.barrier()                                     # now every part is there, but
    for _ in range(60):                                    # a shared disk may show other nodes' files late
        put_together()
        if not mine:
            break
        time.sleep(2)
    else:
        raise UserError(f"{shard_path(args.out, mine[0])} lacks parts that other processes made; "
                        "see that all nodes share --out, and run the same line again")
    training.barrier()
    bar.close()
    if world.rank == 0 and count:
        seconds = time.time() - begun
        print(f"{count} pairs in {seconds:.0f} s: {count / seconds:.2f} a second, "
              f"by {world.size} x {training.hardware()}", file=sys.stderr)
    training.finish()


def refuse(wrong, folder, of):
    """Print what is wrong, a line a shard, and raise UserError where anything is."""
    for line in wrong:
        tqdm.write(line)
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} of {of} shards are wrong; "
                        "delete them and run the same pairs.py line again")


def verify(words):
    """Read every pair again and make every noise again; exit status 2 and a line for each shard that is not
    as it should be."""
    parser = cli.Parser(verify.__doc__, prog="pairs.py verify")
    parser.add_argument("--pairs", required=True, help="folder written by pairs.py")
    args = parser.parse_args(words)
    wrong, files = [], sorted(Path(args.pairs).glob("shard-?????.safetensors"))
    # those that were cut: a PairDataset would name the first alone
    for path in files:
        try:
            open_shard(path)
        except UserError as error:
            wrong.append(str(error))
    refuse(wrong, args.pairs, len(files))
    data, total, squares, numbers = PairDataset(args.pairs), 0.0, 0.0, 0
    for k, end in enumerate(tqdm(data.ends, desc="shards", unit="shard", mininterval=1)):
        start = data.ends[k - 1] if k else 0
        try:
            tensors = data._open(k)
            if (tensors["index"].tolist() != list(range(start, end))
                    or set(tensors["seed"].tolist()) != {data.info["seed"]}):
                raise UserError(f"{shard_path(args.pairs, k)} does not hold the pairs {start} to {end - 1} "
                                f"of seed {data.info['seed']}")
            latent = tensors["latent"]
            finite = latent.isfinite().flatten(1).all(1)
            if not finite.all():
                raise UserError(f"{shard_path(args.pairs, k)}: the latent of pair "
                                f"{start + int(finite.int().argmin())} is not finite")
            for i in range(start, end):
                data[i]                                    # its noise against its checksum, its prompt as UTF-8
            for x in latent.split(PART):                   # in float64, a part at a time
                total += float(x.double().sum())
                squares += float(x.double().square().sum())
                numbers += x.numel()
        except UserError as error:
            wrong.append(str(error))
    refuse(wrong, args.pairs, len(data.ends))
    mean = total / numbers
    print(f"{args.pairs}: {len(data)} pairs in {len(data.ends)} shards, all as they should be; "
          f"latents {list(latent.shape[1:])}, mean {mean:.3f}, "
          f"deviation {(squares / numbers - mean * mean) ** 0.5:.3f}; by {data.info['model']}, "
          f"{data.info['steps']} {data.info['sampler']} steps, guidance {data.info['guidance']}"
          + ("; from t = {at} on by {model}, {sampler}, guidance {guidance}".format(**data.info["finish"])
             if "finish" in data.info else ""))


def preview(words):
    """Decode a few pairs, evenly spread, with their prompts above."""
    parser = cli.Parser(preview.__doc__, prog="pairs.py preview")
    parser.add_argument("--pairs", required=True, help="folder written by pairs.py")
    parser.add_argument("--out", default="preview.png", help="a .png file")
    parser.add_argument("--number", type=cli.positive, default=8, help="pictures")
    parser.add_argument("--model", help="whose decoder (default: the model that made the pairs)")
    parser.add_argument("--prediction", choices=cli.PREDICTIONS, help=cli.PREDICTION)
    parser.add_argument("--device", type=cli.device, help="default: the GPU where there is one")
    args = parser.parse_args(words)
    if Path(args.out).suffix != ".png":
        raise UserError(f"--out {args.out} is no .png file; give it that ending")
    data = PairDataset(args.pairs)
    model = InstaFlow.load(args.model or data.info["model"], training.start(args.device).device,
                           prediction=args.prediction)
    data.check(model)
    rows = np.linspace(0, len(data) - 1, min(args.number, len(data))).round().astype(int)
    _, latents, prompts = data.batch(rows)
    pictures = [to_pil(model.decode(x[None].to(model.device)))[0] for x in latents]
    training.write_by(grid([pictures], None, [f"{i}: {prompt}" for i, prompt in zip(rows, prompts)]).save, args.out)
    print(args.out)


def main():
    commands, words = {"verify": verify, "preview": preview}, sys.argv[1:]
    if words and words[0] in commands:
        commands[words[0]](words[1:])
    else:
        make(words)


if __name__ == "__main__":
    cli.run(main)
