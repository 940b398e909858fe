"""The log of a training: JSON lines and their plot. Loss, also by t; gradient norm and skipped steps;
speed, memory, time left.

Everything is over all processes, and seconds are wall-clock time: sample grids and checkpoints slow a run, and count.
"""
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import cli
from checkpoint import write, write_by

# Dense bf16 FLOP/s by NVIDIA's data sheets, for names as torch.cuda.get_device_name() gives them; the first that fits.
PEAKS = (("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("A100", 312e12),
         ("L40S", 362e12), ("RTX 4090", 165e12))
# a run is stopped after more than SKIPS skipped steps among the last OF
SKIPS, OF = 20, 100


class Log:
    """JSON lines in `folder`/log.jsonl and their plot, log.png.
    Lines after `step` (of a run that was killed) are dropped.
    total: steps of the run, for the time left; flops: the model's operations per sample,
    for its share of the peak FLOP/s where that is known."""

    def __init__(self, folder, step=0, bins=10, writes=True, total=0, flops=0):
        self.path, self.bins, self.writes = Path(folder) / "log.jsonl", bins, writes
        self.total, self.flops = total, flops
        self.step, self.skips = step, deque(maxlen=OF)
        try:
            lines = self.path.read_text().splitlines()
        except OSError:                                    # none yet; or the first process is just replacing it
            if writes and self.path.exists():
                raise
            lines = []
        self.lines = [line for line in map(_json, lines) if line and line["step"] <= step]
        if writes:
            write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self.clear()

    def clear(self):
        self.sum, self.count = torch.zeros(self.bins + 1), torch.zeros(self.bins + 1)
        self.last, self.skipped, self.started = {}, 0, time.time()

    def add(self, losses, t=None, **values):
        """Losses [B] at times t [B] (for the bins) and any other numbers, of which the last is written. `gradient` is
        `training.optimiser_step`'s: infinite where the step was skipped. Raises UserError where too many were.
        Losses stay on their device: looking at them here would make a GPU wait."""
        losses = losses.detach().float()
        finite = losses.isfinite()
        where = torch.zeros(len(losses), self.bins + 1, device=losses.device)           # [B, bins + 1]: the last is all
        where[:, self.bins] = 1
        if t is not None:
            where[:, :self.bins] = F.one_hot(
                (t.detach().to(losses.device) * self.bins).long().clamp(0, self.bins - 1), self.bins)
        self.sum = self.sum.to(losses.device) + losses.where(finite, torch.zeros_like(losses)) @ where
        self.count = self.count.to(losses.device) + finite.float() @ where
        if "gradient" in values:
            self.skips.append(not math.isfinite(values["gradient"]))
            if self.skips[-1]:
                del values["gradient"]
                self.skipped += 1
                if sum(self.skips) > SKIPS:
                    raise cli.UserError(f"{sum(self.skips)} of the last {len(self.skips)} steps had a gradient "
                                        "that was not finite or larger than --explode, and were skipped; "
                                        "start anew, in another --out, with a lower --lr (and look at the pairs with "
                                        "`pairs.py verify`); the checkpoints here are from before")
        self.last |= values

    def write(self, step, world):
        """Average over all processes since the last line, and write one line."""
        sums = torch.stack([self.sum, self.count]).to(world.device)
        memory = torch.tensor(peak_memory(world.device), device=world.device)
        if world.size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        mean = [None if m != m else m for m in (sums[0] / sums[1]).tolist()]                 # 0/0 is NaN: an empty bin
        seconds = time.time() - self.started
        speed = float(sums[1][-1]) / seconds
        line = {"step": step, "loss": mean[-1], **self.last, "seconds": round(seconds, 2),
                "samples_per_second": round(speed, 2), "memory_gib": round(float(memory), 2)}
        if self.skipped:
            line["skipped"] = self.skipped
        if self.flops and peak(hardware()):
            line["mfu"] = round(speed * self.flops / (world.size * peak(hardware())), 4)
        if self.total and step > self.step:
            line["hours_left"] = round((self.total - step) * seconds / (step - self.step) / 3600, 3)
        if sums[1][:-1].any():
            line["loss_by_t"] = [None if m is None else round(m, 6) for m in mean[:-1]]
        self.clear()
        self.step = step
        if self.writes:
            self.lines.append(line)
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        return line

    def plot(self, title):
        """Loss over steps, and the last loss by t: log.png beside log.jsonl."""
        from matplotlib.figure import Figure               # without pyplot: no window, and nothing to close
        binned = [line for line in self.lines if "loss_by_t" in line]
        blank = lambda values: [np.nan if v is None else v for v in values]
        figure = Figure(figsize=(11 if binned else 6, 4), layout="tight")
        axes = figure.subplots(1, 2 if binned else 1, squeeze=False)
        axes[0, 0].plot([line["step"] for line in self.lines], blank(line["loss"] for line in self.lines))
        axes[0, 0].set(xlabel="iteration", ylabel="loss", yscale="log", title=title)
        if binned:
            centres = (np.arange(self.bins) + 0.5) / self.bins
            axes[0, 1].plot(centres, blank(binned[-1]["loss_by_t"]), "o-")
            axes[0, 1].set(xlabel="t (0 noise, 1 image)", ylabel="loss",
                           title=f"by time, at iteration {binned[-1]['step']}")
        write_by(figure.savefig, self.path.with_suffix(".png"), dpi=90)


def _json(line):
    try:
        return json.loads(line)
    except ValueError:
        return None                                        # the line a kill cut short


def flops(call):
    """Floating point operations of call() (two a multiply-add, as everyone counts), on the meta device:
    nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode   # here: it imports triton
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak(name):
    """A device's dense bf16 FLOP/s by its maker, None where this file does not know it."""
    return next((value for part, value in PEAKS if part in name), None)


def peak_memory(device):
    """GiB: the most that tensors took on a GPU since the last call; on a CPU, the most that the process ever held."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / 2**30
    import resource                                        # not on every system
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def hardware():
    """The device's name, for whoever reads a number measured on it."""
    if torch.cuda.is_initialized():                        # not so when computing on the CPU of a machine with a GPU
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def made(folder, seed):
    """Where a model comes from, for its JSON: command, seed, hardware, seconds (from the log:
    over all restarts, lost work not counted), date."""
    lines = filter(None, map(_json, (Path(folder) / "log.jsonl").read_text().splitlines()))
    return {"command": shlex.join(["python", *sys.argv]), "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "seed": seed, "hardware": hardware(),
            "seconds": round(sum(line.get("seconds", 0) for line in lines)), "date": time.strftime("%Y-%m-%d")}
