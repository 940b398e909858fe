"""The processes of a run: one, or torchrun's, each with its device."""
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

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


def start(device=None, hours=24):
    """Join the process group under torchrun (NCCL on GPUs, gloo on CPUs), or be the only process -> World.
    hours: how long one process may keep the others waiting before they give the run up for dead.
    Raises UserError where there is no GPU for each."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        # graphs and the name are the current device's
        if torch.device(device).type == "cuda" and torch.device(device).index is not None:
            torch.cuda.set_device(device)
        return World(0, 1, torch.device(device))
    if torch.device(device).type == "cuda":
        # never RANK: it counts over all nodes
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise cli.UserError(f"LOCAL_RANK is {local}, but this machine has {gpus} GPU{'s' * (gpus != 1)}; "
                                f"give torchrun --nproc-per-node {gpus}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://"))
        # torchrun keeps its store across a restart, with the addresses of dead processes in it;
        # on several nodes this count may differ: README
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank,
                                world_size=size, timeout=timedelta(hours=hours))
    return World(dist.get_rank(), dist.get_world_size(), torch.device(device))


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def finish():
    """Leave the process group, where there is one, once all have come so far: where the first still writes and the
    others are gone, torchrun may take it for dead."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def from_first(world, flags):
    """Flags as the first process has them -> list[bool], the same in all."""
    flags = torch.tensor(flags, dtype=torch.uint8, device=world.device)
    if world.size > 1:
        dist.broadcast(flags, 0)
    return flags.bool().tolist()


def largest(values):
    """The largest of each number over all processes, the same in all -> list."""
    if not dist.is_initialized():
        return list(values)
    values = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()
