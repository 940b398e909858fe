"""What every training loop shares: processes, random draws, EMA, the optimiser's step, checkpoints and the log.

Nothing random is ever saved: whatever step s needs is drawn from (seed, s) for the whole global batch, and each
process takes its slice. So any number of processes trains the same, and a run goes on where it was killed.
"""
import functools
import json
import os
import platform
import re
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import cli


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, computing on `device`."""
    rank: int
    size: int
    device: torch.device

    def share(self, batch):
        """This process's slice of a global batch (anything that can be sliced along its first axis)."""
        if len(batch) % self.size:
            raise cli.UserError(f"--batch {len(batch)} does not divide among {self.size} processes; choose a multiple")
        return batch[self.rank * len(batch) // self.size:(self.rank + 1) * len(batch) // self.size]


def start(device=None):
    """Join the process group under torchrun (NCCL on GPUs, gloo on CPUs), or be the only process -> World."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        return World(0, 1, torch.device(device))
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"        # never RANK: it counts over all nodes
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=1))      # one may have a shard more to make
    return World(dist.get_rank(), dist.get_world_size(), torch.device(device))


def barrier():
    if dist.is_initialized():
        dist.barrier()


def finish():
    if dist.is_initialized():
        dist.destroy_process_group()


def distributed(module, world):
    """The module whose backward pass averages gradients over all processes; itself where there is one process."""
    devices = [world.device] if world.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, devices) if world.size > 1 else module


@contextmanager
def autocast(device, float32=False):
    """bf16 arithmetic over float32 weights; on a CPU only where the processor has bf16 instructions, and with plain attention:
    there, the fused kernel's backward pass alone takes as long as all the rest of a small network."""
    fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    with torch.autocast(device.type, torch.bfloat16, enabled=fast and not float32):
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            yield


def hardware():
    """The device's name, for whoever reads a number measured on it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def made(folder, seed):
    """Where a model comes from, for its JSON: command, seed, hardware, seconds (by the log: over all restarts, less what was done twice), date."""
    lines = filter(None, map(_json, (Path(folder) / "log.jsonl").read_text().splitlines()))
    return {"command": " ".join(["python", *sys.argv]), "processes": int(os.environ.get("WORLD_SIZE", 1)), "seed": seed, "hardware": hardware(),
            "seconds": round(sum(line.get("seconds", 0) for line in lines)), "date": time.strftime("%Y-%m-%d")}


# --- random draws, for the global batch, from (seed, step) ---

def batch_indices(seed, step, batch, size):
    """Which of `size` items the global batch of `step` holds -> int64 [batch]: every epoch is a fresh permutation."""
    positions = np.arange(step * batch, (step + 1) * batch)
    return np.array([_order(seed, p // size, size)[p % size] for p in positions])


@functools.lru_cache(maxsize=2)
def _order(seed, epoch, size):
    return np.random.default_rng([seed, epoch]).permutation(size)


def step_generator(seed, step):
    """numpy's generator of everything else that `step` draws: times, dropped prompts, noise."""
    return np.random.default_rng([seed, step, 1])          # the third number keeps clear of batch_indices' streams


# --- the recipe: what both train_reflow.py and distill.py can be told ---

def add_flags(parser):
    add = parser.add_argument
    add("--iterations", type=cli.positive, default=70_000, help="optimiser steps in all")
    add("--batch", type=cli.positive, default=64, help="pairs a step, over all processes")
    add("--lr", type=cli.number(0), default=1e-6, help="the paper's, for fine-tuning Stable Diffusion; small nets want 1e-4 and more")
    add("--warmup", type=cli.seed, default=1000, help="steps until the learning rate is reached")
    add("--cosine", action="store_true", help="let it fall to zero; the paper keeps it constant")
    add("--weight-decay", type=cli.number(0), default=1e-2, help="AdamW's")
    add("--clip", type=cli.number(0), default=1.0, help="the gradient's largest norm")
    add("--ema", type=cli.number(0, 1), default=0.9999, help="decay of the average of the weights, which is what is saved")
    add("--seed", type=cli.seed, default=0, help="of the data's order, t and dropped prompts")
    add("--log-every", type=cli.positive, default=50)
    add("--save-every", type=cli.positive, default=500, help="steps from checkpoint to checkpoint: what a kill loses at most")
    add("--sample-every", type=cli.positive, default=1000, help="steps from sample grid to sample grid")
    add("--float32", action="store_true", help="no bf16")
    add("--device", type=cli.device, help="default: the GPU where there is one")


def recipe(args):
    """The settings that decide a run's result: a checkpoint made with others is another run's. (`iterations` do where the
    learning rate's schedule ends with them; else a run can be made longer.)"""
    decisive = {"min_snr", "model", "pairs", "loss", "vgg", "linear", "lpips_size", "drop", "density", "scenes", "images", "batch", "lr", "warmup",
                "cosine", "weight_decay", "clip", "ema", "kl", "seed", "float32"} | ({"iterations"} if getattr(args, "cosine", True) else set())
    return {k: v for k, v in vars(args).items() if k in decisive}


# --- the optimiser's step ---

def adamw(model, lr, weight_decay=1e-2):
    """AdamW as the paper trains with."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def learning_rate(step, lr, warmup, iterations, cosine=False):
    """Linear warm-up, then constant (the paper) or a cosine to zero (short runs)."""
    decay = 0.5 * (1 + np.cos(np.pi * min(step / iterations, 1))) if cosine else 1
    return lr * decay * min(1, (step + 1) / max(warmup, 1))


def optimiser_step(optimizer, model, lr, clip=1.0):
    """Clip the gradient's norm, step, forget the gradient -> the norm before clipping (float)."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    if not np.isfinite(norm):
        raise cli.UserError("the gradient is not finite, so no step was taken; lower --lr and run the same line again: it goes on from its last checkpoint")
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def update_ema(ema, model, step, decay=0.9999):
    """ema <- d ema + (1 - d) model, d warming up with the step so that early weights are forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    for e, p in zip(ema.parameters(), model.parameters()):
        e.lerp_(p, 1 - d)


# --- files that survive a kill ---

def write(path, data):
    """Write bytes under a temporary name, sync, rename: the file is whole or absent. Raises OSError naming the file."""
    path, temporary = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_tensors(path, tensors, metadata=None, dtype=None):
    """A safetensors file, written as `write` does. dtype None keeps each tensor's own."""
    packed = {k: v.detach().to("cpu", dtype, memory_format=torch.contiguous_format).contiguous() for k, v in tensors.items()}
    write(path, save(packed, {"format": "pt"} | (metadata or {})))


def save_checkpoint(folder, step, tensors, metadata=None, keep=2):
    """Write `folder`/step-00001234.safetensors (float32 as given, plus JSON metadata) and keep the newest `keep`."""
    write_tensors(Path(folder) / f"step-{step:08d}.safetensors", tensors, {"json": json.dumps(metadata or {})})
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)


def checkpoints(folder):
    return sorted(p for p in Path(folder).glob("step-*.safetensors") if re.fullmatch(r"step-\d{8}", p.stem))


def load_checkpoint(folder):
    """The newest checkpoint that reads whole -> (step, tensors, metadata), (0, None, {}) where there is none.
    A damaged one is passed over with a warning."""
    for path in reversed(checkpoints(folder)):
        try:
            with safe_open(path, "pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}
                return int(path.stem[5:]), tensors, json.loads((file.metadata() or {}).get("json", "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            print(f"warning: {path} is damaged ({error}); going back to the one before", file=sys.stderr)
    return 0, None, {}


def pack(model, ema, optimizer):
    """Weights, EMA and AdamW's moments as one flat dict of tensors, for `save_checkpoint`."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"ema.{k}": v for k, v in ema.state_dict().items()}
    names = [k for k, _ in model.named_parameters()]
    moments = optimizer.state_dict()["state"]              # by a parameter's number: one that never had a gradient has none
    return tensors | {f"optimizer.{names[i]}.{k}": v for i, state in moments.items() for k, v in state.items()}


def unpack(tensors, model, ema, optimizer):
    """The inverse of `pack`; strict: a key too many or too few is an error."""
    part = lambda prefix: {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
    moments, state = part("optimizer."), {}
    for i, (name, p) in enumerate(model.named_parameters()):
        state[i] = {k: moments.pop(f"{name}.{k}") for k in ("step", "exp_avg", "exp_avg_sq")}
        for k in ("exp_avg", "exp_avg_sq"):                # in the weights' own memory order: fused AdamW looks at no strides
            state[i][k] = torch.empty_like(p, requires_grad=False).copy_(state[i][k])
    unknown = [*moments, *(k for k in tensors if k.partition(".")[0] not in ("model", "ema", "optimizer"))]
    if unknown:
        raise KeyError(f"unknown tensor {unknown[0]} in a checkpoint ({len(unknown)} in all)")
    model.load_state_dict(part("model."))
    ema.load_state_dict(part("ema."))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def resume(folder, model, ema, optimizer, recipe):
    """Go on from the newest checkpoint in `folder` -> the step to do next (0 where there is none).
    `recipe` (a JSON-like dict) must be what the checkpoint was made with. Raises UserError."""
    step, tensors, metadata = load_checkpoint(folder)
    if tensors is None:
        return 0
    changed = [k for k in recipe if metadata.get("recipe", {}).get(k) != recipe[k]]
    if changed:
        raise cli.UserError(f"{folder} holds a run with other settings ({', '.join(changed)}); give the same ones, or another --out, or delete that folder")
    try:
        unpack(tensors, model, ema, optimizer)
    except (KeyError, RuntimeError) as error:
        raise cli.UserError(f"{folder} holds checkpoints of another network ({str(error).splitlines()[0]}); give another --out, or delete that folder") from None
    return step


def steps(settings, world, folder, model, ema, optimizer, recipe, cosine=False):
    """Yield (step, log, learning rate) for every step that is still to do, going on from the newest checkpoint in `folder`.
    When the loop's body has ended: EMA, and now and then a line of the log and a checkpoint.
    settings: .iterations, .lr, .warmup, .ema, .log_every, .save_every. Raises UserError where `folder` holds another run."""
    first = resume(folder, model, ema, optimizer, recipe)
    if first > settings.iterations:
        raise cli.UserError(f"{folder} holds a run of {first} iterations already, and {settings.iterations} are asked for; ask for more, or give another --out")
    log, name = Log(folder, first, writes=world.rank == 0), "/".join(Path(folder).parts[-3:]).replace("/training", "")
    for leftover in Path(folder).glob("*.tmp") if world.rank == 0 else ():
        leftover.unlink()                                  # what a killed process was writing: gigabytes, at full size
    bar = tqdm(range(first, settings.iterations), initial=first, total=settings.iterations, desc=name,
               disable=world.rank > 0, mininterval=1, dynamic_ncols=True)
    for step in bar:
        yield step, log, learning_rate(step, settings.lr, settings.warmup, settings.iterations, cosine)
        update_ema(ema, model, step, settings.ema)
        last = step + 1 == settings.iterations
        if last or (step + 1) % settings.log_every == 0:
            bar.set_postfix(loss=f"{log.write(step + 1, world)['loss']:.4f}", refresh=False)
        if (last or (step + 1) % settings.save_every == 0) and world.rank == 0:
            save_checkpoint(folder, step + 1, pack(model, ema, optimizer), {"recipe": recipe})
            log.plot(name)


# --- the log ---

class Log:
    """JSON lines in `folder`/log.jsonl and their plot, log.png. Lines from `step` on (of a run that was killed) go."""

    def __init__(self, folder, step=0, bins=10, writes=True):
        self.path, self.bins, self.writes = Path(folder) / "log.jsonl", bins, writes
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = [line for line in map(_json, lines) if line and line["step"] <= step]
        if writes:
            write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self.clear()

    def clear(self):
        self.sum, self.count, self.last, self.started = torch.zeros(self.bins + 1), torch.zeros(self.bins + 1), {}, time.time()

    def add(self, losses, t=None, **values):
        """Losses [B] at times t [B] (for the bins) and any other numbers, of which the last is written."""
        losses, t = losses.detach().float().cpu(), None if t is None else t.detach().float().cpu()
        which = torch.zeros(0, dtype=torch.long) if t is None else (t * self.bins).long().clamp(0, self.bins - 1)
        self.sum[self.bins] += losses.sum()
        self.count[self.bins] += len(losses)
        if t is not None:
            self.sum.index_add_(0, which, losses)
            self.count.index_add_(0, which, torch.ones_like(losses))
        self.last |= values

    def write(self, step, world):
        """Average over all processes since the last line, and write one line."""
        sums = torch.stack([self.sum, self.count]).to(world.device)
        if world.size > 1:
            dist.all_reduce(sums)
        mean = (sums[0] / sums[1]).tolist()                # 0/0 is NaN: an empty bin
        seconds = time.time() - self.started
        line = {"step": step, "loss": mean[-1], **self.last, "seconds": round(seconds, 2), "samples_per_second": round(float(sums[1][-1]) / seconds, 1)}
        if sums[1][:-1].any():
            line["loss_by_t"] = [None if m != m else round(m, 6) for m in mean[:-1]]
        self.clear()
        if self.writes:
            self.lines.append(line)
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        return line

    def plot(self, title):
        """Loss over steps, and the last loss by t: log.png beside log.jsonl."""
        from matplotlib.figure import Figure               # without pyplot: no window, and nothing to close
        binned = [line for line in self.lines if "loss_by_t" in line]
        figure = Figure(figsize=(11 if binned else 6, 4), layout="tight")
        axes = figure.subplots(1, 2 if binned else 1, squeeze=False)
        axes[0, 0].plot([line["step"] for line in self.lines], [line["loss"] for line in self.lines])
        axes[0, 0].set(xlabel="iteration", ylabel="loss", yscale="log", title=title)
        if binned:
            centres = (np.arange(self.bins) + 0.5) / self.bins
            axes[0, 1].plot(centres, [np.nan if v is None else v for v in binned[-1]["loss_by_t"]], "o-")
            axes[0, 1].set(xlabel="t (0 noise, 1 image)", ylabel="loss", title=f"by time, at iteration {binned[-1]['step']}")
        figure.savefig(self.path.with_suffix(".png"), dpi=90)


def _json(line):
    try:
        return json.loads(line)
    except ValueError:
        return None                                        # the line a kill cut short
