"""What every training loop shares: precision, random draws, EMA, the optimiser's step, and the loop's frame.

Nothing random is ever saved: whatever step s needs is drawn from (seed, s) for the whole global batch, and each
process takes its slice. So any number of processes trains the same, and a killed run resumes where it stopped.
"""
import copy
import functools
import math
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cli
# also for who imports `training`
from checkpoint import (clean, load_checkpoint, pack, resume, save_checkpoint, unpack, warn_of_little_room, write,
                        write_by, write_tensors)
from log import Log, flops, hardware, made
from processes import World, barrier, finish, from_first, largest, start


@contextmanager
def autocast(device, float32=False):
    """bf16 arithmetic over float32 weights; on a CPU only where the processor has bf16 instructions."""
    with (torch.autocast(device.type, torch.bfloat16,
                         enabled=(device.type == "cuda" or _cpu_has_bf16(device)) and not float32),
          plain_attention(device) if torch.is_grad_enabled() else nullcontext()):
        yield


def _cpu_has_bf16(device):
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def plain_attention(device):
    """On a CPU with bf16 the fused kernel's backward pass alone takes as long as all the rest of a small network; on
    one without, and where there is no backward pass, the fused kernel is the faster one."""
    return sdpa_kernel(SDPBackend.MATH) if _cpu_has_bf16(device) else nullcontext()


# --- the network that a loop calls ---

def prepare(unet, args, world):
    """A U-Net to be trained -> (its average over the steps, AdamW, the network that the loop calls)."""
    if args.graphs and (world.size > 1 or world.device.type != "cuda" or args.accumulate > 1
                        or args.checkpoint or args.compile):
        raise cli.UserError("--graphs is for one process with a GPU, "
                            "and goes with none of --accumulate, --checkpoint and --compile; leave it out")
    ema, optimizer = copy.deepcopy(unet).eval(), adamw(unet, args.lr, args.weight_decay)
    if args.checkpoint:
        checkpoint_gradients(unet, world.device)
    like = functools.partial(torch.zeros, device=world.device)
    net = distributed(unet.train(), world, like(1, unet.config.in_channels, 8, 8), like(1),
                      like(1, 1, unet.config.cross_attention_dim))
    if args.compile:
        compile_blocks(unet)
    if args.graphs:
        size, batch = unet.config.sample_size, args.batch
        inputs = (like(batch, unet.config.in_channels, size, size).to(memory_format=torch.channels_last), like(batch),
                  like(batch, 77, unet.config.cross_attention_dim))
        with torch.autocast("cuda", torch.bfloat16, enabled=not args.float32, cache_enabled=False):
            net = torch.cuda.make_graphed_callables(unet, inputs)
    return ema, optimizer, net


def distributed(module, world, *example):
    """The module whose backward pass averages gradients over all processes; itself where there is one process.

    example: any inputs it takes. DDP settles the order in which it adds gradients in its first backward pass, so one
    pass is spent on them: a run that was restarted then adds in the same order in its first step too, and ends
    bitwise as if it had not been."""
    if world.size == 1:
        return module
    net = torch.nn.parallel.DistributedDataParallel(
        module, [world.device] if world.device.type == "cuda" else None, gradient_as_bucket_view=True)
    if example:
        net(*example).sum().backward()
        module.zero_grad(set_to_none=True)
    return net


def compile_blocks(net):
    """torch.compile a U-Net's or decoder's blocks, each by itself: that is fast, and DDP sends one's gradients while
    the next computes."""
    torch._dynamo.config.recompile_limit = 64              # blocks of one class share it
    for name, module in net.named_modules():
        if re.fullmatch(r"((first|second)\.)?(down_blocks\.\d+|mid_block|up_blocks\.\d+)", name):
            module.compile(dynamic=False)                  # they differ in size, which is no sign of dynamic shapes


def checkpoint_gradients(net, device):
    """Keep only the input of each residual block and transformer for the backward pass, which computes the rest again
    (Chen et al. 2016): a third more work, and a fraction of the memory. `net` is changed; copy it before."""
    # the backward pass is outside `autocast`, and must choose the same kernels
    def forward_as_before(forward, *inputs):
        with plain_attention(device):
            return forward(*inputs)
    for module in net.modules():
        if type(module).__name__ in ("ResnetBlock", "Transformer"):
            again = functools.partial(forward_as_before, module.forward)
            # nothing here is random
            module.forward = functools.partial(checkpoint, again, use_reentrant=False, preserve_rng_state=False)


def parts(net, size, count):
    """The slices of a process's `size` samples in `count` parts, to be gone through one after another, gradients
    adding up. DDP sends gradients with the last part only. Raises UserError where they do not divide."""
    if size % count:
        raise cli.UserError(f"--accumulate {count} does not divide the {size} pairs that each process has of --batch; "
                            "choose a divisor")
    for k in range(count):
        with net.no_sync() if k < count - 1 and hasattr(net, "no_sync") else nullcontext():
            yield slice(k * size // count, (k + 1) * size // count)


# --- random draws, for the global batch, from (seed, step) ---

def batch_indices(seed, step, batch, size):
    """Which of `size` items the global batch of `step` holds -> int64 [batch]: every epoch is a fresh permutation."""
    positions = np.arange(step * batch, (step + 1) * batch)
    return np.array([_order(seed, p // size, size)[p % size] for p in positions])


@functools.lru_cache(maxsize=2)
def _order(seed, epoch, size):
    return np.random.default_rng([seed, epoch]).permutation(size)


def ahead(draw):
    """-> a function step -> draw(step), which has the next step's drawn in a thread meanwhile."""
    pool, coming = ThreadPoolExecutor(1), {}

    def drawn(step):
        ready = coming.pop(step, None) or pool.submit(draw, step)
        coming[step + 1] = pool.submit(draw, step + 1)
        return ready.result()
    return drawn


def step_generator(seed, step):
    """numpy's generator of everything else that `step` draws: times, dropped prompts, and,
    for the miniature's teacher and VAE, noise."""
    # with a third number, or it would be the order of epoch `step`
    return np.random.default_rng([seed, step, 1])


# --- the recipe: what both train_reflow.py and distill.py can be told ---

def add_flags(parser):
    add = parser.add_argument
    add("--iterations", type=cli.positive, default=70_000, help="optimiser steps in all")
    add("--batch", type=cli.positive, default=64, help="pairs a step, over all processes")
    add("--accumulate", type=cli.positive, default=1,
        help="parts in which each process goes through its share of a batch: less memory, the same result")
    add("--lr", type=cli.number(0), default=1e-6,
        help="the paper's, for fine-tuning Stable Diffusion; small nets want 1e-4 and more")
    add("--warmup", type=cli.seed, default=1000, help="steps until the learning rate is reached")
    add("--cosine", action="store_true", help="let the learning rate fall to zero; the paper keeps it constant")
    add("--weight-decay", type=cli.number(0), default=1e-2, help="AdamW's")
    add("--clip", type=cli.number(1e-9), default=1.0,
        help="norm that a larger gradient is scaled down to (1e9: none is)")
    add("--explode", type=cli.number(1e-9), default=1000.0,
        help="norm above which a gradient is not used: the step is skipped")
    add("--ema", type=cli.number(0, 1), default=0.9999,
        help="decay of the average of the weights, which is what is saved")
    add("--seed", type=cli.seed, default=0, help="of the data's order, t and dropped prompts")
    add("--log-every", type=cli.positive, default=50)
    add("--save-every", type=cli.positive, default=500,
        help="steps from checkpoint to checkpoint: what a kill loses at most")
    add("--sample-every", type=cli.positive, default=1000, help="steps from sample grid to sample grid")
    add("--float32", action="store_true", help="no bf16")
    add("--checkpoint", action="store_true",
        help="compute activations again in the backward pass: a fraction of the memory, a third more work")
    add("--compile", action="store_true",
        help="torch.compile, block by block (under LPIPS the decoder too): minutes at the start, faster steps on a GPU")
    add("--graphs", action="store_true",
        help="replay CUDA graphs: for networks so small that launching kernels takes longer than running them")
    add("--device", type=cli.device, help="default: the GPU where there is one")
    add("--prediction", choices=cli.PREDICTIONS, help=cli.PREDICTION)


def recipe(args):
    """The settings that decide a run's result: a checkpoint made with others is another run's. (`iterations` is one
    where the learning rate's schedule depends on it; else a run can be made longer.)"""
    decisive = {"batch", "clip", "cosine", "drop", "ema", "float32", "lr", "seed", "warmup", "weight_decay",  # all,
                "density", "linear", "loss", "lpips_size", "model", "pairs", "vgg",  # students,
                "images", "kl", "min_snr", "related", "scenes", "skew", "velocity", "where"}  # mini.py
    decisive |= {"iterations"} if getattr(args, "cosine", True) else set()
    newer = dict(huber=False, exact=False, l2=0, steps=1)  # checkpoints older than these flags can still be resumed
    decisive |= {flag for flag, default in newer.items() if getattr(args, flag, default) != default}
    return {k: os.path.normpath(v) if k in ("model", "pairs") else v for k, v in vars(args).items() if k in decisive}


# --- the optimiser's step ---

def adamw(model, lr, weight_decay=1e-2):
    """AdamW as the paper trains with."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def learning_rate(step, lr, warmup, iterations, cosine=False):
    """Linear warm-up, then constant (the paper) or a cosine to zero (short runs)."""
    decay = 0.5 * (1 + np.cos(np.pi * min(step / iterations, 1))) if cosine else 1
    return lr * decay * min(1, (step + 1) / max(warmup, 1))


def optimiser_step(optimizer, model, lr, clip=1.0, explode=math.inf):
    """Clip the gradient's norm, step, forget the gradient -> the norm before clipping (float). Where it is not
    finite, or larger than `explode`, in any process, all skip the step -> inf; the log counts those."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    skip, = largest([not (math.isfinite(norm) and norm <= explode)])
    if not skip:
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return math.inf if skip else norm


@torch.no_grad()
def update_ema(ema, model, step, decay=0.9999):
    """ema <- d ema + (1 - d) model, d warming up with the step so that early weights are forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    # as torch.optim.swa_utils has it: on a GPU few kernels, not one a parameter
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


# --- the frame of a loop ---

@contextmanager
def terminations():
    """A list that SIGTERM fills: a scheduler's warning before it takes the machine away."""
    received = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, old)


def steps(settings, world, folder, model, ema, optimizer, recipe, cosine=False, work=0):
    """Yield (step, log, learning rate) for every step that is still to do, going on from the newest checkpoint in
    `folder`. After the loop's body: EMA, and at intervals a line of the log and a checkpoint. After a SIGTERM to any
    process all end with status 143, as the shell has it, once a checkpoint is written.
    settings: .iterations, .lr, .warmup, .ema, .log_every, .save_every. work: floating point operations a sample, for
    the log. Raises UserError where `folder` holds another run."""
    first = resume(folder, model, ema, optimizer, recipe)
    if largest([first, -first]) != [first, -first]:
        raise cli.UserError(f"{folder}: the processes found different checkpoints there; "
                            "--out must lie on a disk that all nodes share")
    if first > settings.iterations:
        raise cli.UserError(f"{folder} holds a run of {first} iterations already, "
                            f"and {settings.iterations} are asked for; ask for more, or give another --out")
    log = Log(folder, first, writes=world.rank == 0, total=settings.iterations, flops=work)
    name = "/".join(Path(folder).parts[-3:]).replace("/training", "")
    if world.rank == 0:
        clean(folder)
        # weights, average, two moments: the optimizer has none before its first step
        warn_of_little_room(folder, 4 * sum(v.numel() * v.element_size() for v in model.state_dict().values()))
    bar = tqdm(range(first, settings.iterations), initial=first, total=settings.iterations, desc=name,
               disable=world.rank > 0, mininterval=1, dynamic_ncols=True)
    with terminations() as received:
        for step in bar:
            yield step, log, learning_rate(step, settings.lr, settings.warmup, settings.iterations, cosine)
            update_ema(ema, model, step, settings.ema)
            last, (stop,) = step + 1 == settings.iterations, largest([bool(received)])
            if last or stop or (step + 1) % settings.log_every == 0:
                bar.set_postfix({k: v for k, v in log.write(step + 1, world).items()
                                 if k in ("loss", "samples_per_second")}, refresh=False)
            # while steps are skipped the checkpoints before are the better ones
            due = last or stop or (step + 1) % settings.save_every == 0 and not (log.skips and log.skips[-1])
            if due and not torch.stack(torch._foreach_norm(list(ema.parameters()))).isfinite().all():
                raise cli.UserError(f"the training diverged: at iteration {step + 1} the weights are no finite "
                                    "numbers, and are not saved; start anew, in another --out, with a lower --lr")
            if due and world.rank == 0:
                save_checkpoint(folder, step + 1, pack(model, ema, optimizer), {"recipe": recipe})
                log.plot(name)
            if stop and not last:
                # no process exits, and gets the others killed, before the checkpoint is whole
                barrier()
                bar.close()
                if world.rank == 0:
                    print(f"{Path(sys.argv[0]).name}: SIGTERM at iteration {step + 1}: a checkpoint is written, "
                          "and the same line goes on from there", file=sys.stderr)
                finish()
                sys.exit(128 + signal.SIGTERM)
