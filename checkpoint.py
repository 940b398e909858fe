"""Files that survive a kill, and checkpoints made of them: all that a training run needs to resume.

A file is written under a temporary name, synced and renamed: it is whole or absent.
Tensors are written one by one and read back memory-mapped, since a checkpoint of the full-size model is 14 GB
and every process on a machine reads it.
"""
import io
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import cli

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
          torch.uint8: "U8", torch.bool: "BOOL"}


def write(path, data):
    """Write bytes, or pieces of bytes one after another, under a temporary name, sync, rename: the file is whole or
    absent. Raises OSError naming the file."""
    path, temporary = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_by(save, path, **how):
    """What a library writes itself (`save`: image.save, figure.savefig), as `write` does,
    in the format of the path's ending."""
    buffer = io.BytesIO()
    save(buffer, format=Path(path).suffix[1:].lower().replace("jpg", "jpeg"), **how)
    write(path, buffer.getvalue())


def clean(folder):
    """Remove the temporary files of killed processes: gigabytes, at full size.
    To be called by one process, before any of them writes."""
    for leftover in Path(folder).glob("*.tmp"):
        leftover.unlink(missing_ok=True)


def write_tensors(path, tensors, metadata=None, dtype=None):
    """A safetensors file, written as `write` does. dtype None keeps each tensor's own. The format is simple (the
    header's length in 8 bytes, a JSON header, the tensors' bytes), so it is written here: the library's own function
    wants all in memory twice."""
    kinds = {k: dtype or v.dtype for k, v in tensors.items()}
    names = sorted(tensors, key=lambda k: (-kinds[k].itemsize, k))           # widest first, so that each is aligned
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for k in names:
        start, end = end, end + tensors[k].numel() * kinds[k].itemsize
        header[k] = {"dtype": DTYPES[kinds[k]], "shape": list(tensors[k].shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def pieces():
        yield len(head).to_bytes(8, "little") + head
        for k in names:
            value = tensors[k].detach().to("cpu", dtype, memory_format=torch.contiguous_format).contiguous()
            yield value.reshape(-1).view(torch.uint8).numpy()
    write(path, pieces())


def crc(*modules):
    """CRC-32 of modules' weights, in hexadecimal: saved results record with it which weights they belong to."""
    value = 0
    for tensor in (tensor for module in modules for tensor in module.state_dict().values()):
        value = zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def save_checkpoint(folder, step, tensors, metadata=None, keep=2):
    """Write `folder`/step-00001234.safetensors (float32 as given, plus JSON metadata) and keep the newest `keep` up
    to that step. (A checkpoint of a later step is damaged: it was skipped when the run was resumed.)"""
    path = Path(folder) / f"step-{step:08d}.safetensors"
    write_tensors(path, tensors, {"json": json.dumps(metadata or {})})
    for old in [p for p in checkpoints(folder) if p <= path][:-keep]:
        old.unlink(missing_ok=True)


def warn_of_little_room(folder, size, keep=2):
    """One line on stderr where the disk cannot hold the checkpoints to come, of `size` bytes each: `keep`, and the one
    being written."""
    wanted, free = size * (keep + 1 - len(checkpoints(folder))), shutil.disk_usage(folder).free
    if free < wanted:
        print(f"warning: {folder}: {free / 2**30:.1f} GiB are free, "
              f"and the checkpoints of this run will take another {wanted / 2**30:.1f} GiB", file=sys.stderr)


def checkpoints(folder):
    """Their paths, oldest first."""
    return sorted(p for p in Path(folder).glob("step-*.safetensors") if re.fullmatch(r"step-\d{8}", p.stem))


def load_checkpoint(folder):
    """The newest checkpoint that reads whole -> (step, tensors, metadata), (0, None, {}) where there is none.
    The tensors are memory-mapped. A damaged one is passed over with a warning."""
    for path in reversed(checkpoints(folder)):
        try:
            with safe_open(path, "pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}
                return int(path.stem[5:]), tensors, json.loads((file.metadata() or {}).get("json", "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: {path} is damaged ({error}); going back to the one before", file=sys.stderr)
    return 0, None, {}


def pack(model, ema, optimizer):
    """Weights, EMA and AdamW's moments as one flat dict of tensors, for `save_checkpoint`."""
    tensors = ({f"model.{k}": v for k, v in model.state_dict().items()}
               | {f"ema.{k}": v for k, v in ema.state_dict().items()})
    names = [k for k, _ in model.named_parameters()]
    # keyed by parameter number; a parameter that never had a gradient has no entry
    moments = optimizer.state_dict()["state"]
    return tensors | {f"optimizer.{names[i]}.{k}": v for i, state in moments.items() for k, v in state.items()}


def unpack(tensors, model, ema, optimizer):
    """The inverse of `pack`; strict: a key too many or too few is an error."""
    part = lambda prefix: {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
    moments, state = part("optimizer."), {}
    for i, (name, p) in enumerate(model.named_parameters()):
        state[i] = {k: moments.pop(f"{name}.{k}") for k in ("step", "exp_avg", "exp_avg_sq")}
        # in the weights' own memory order: fused AdamW looks at no strides
        for k in ("exp_avg", "exp_avg_sq"):
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
    old = metadata.get("recipe", {})
    changed = [k for k in recipe | old if recipe.get(k) != old.get(k)]
    if changed:
        raise cli.UserError(f"{folder} holds a run with other settings ({', '.join(changed)}); "
                            "give the same ones, or another --out, or delete that folder")
    try:
        unpack(tensors, model, ema, optimizer)
    except (KeyError, RuntimeError) as error:
        raise cli.UserError(f"{folder} holds checkpoints of another network ({str(error).splitlines()[0]}); "
                            "give another --out, or delete that folder") from None
    return step
