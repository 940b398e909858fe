"""Where a model lies, a name on the Hugging Face hub included, and what it says of itself."""
import re
from pathlib import Path

from cli import UserError
from single_file import facts
from weights import PARTS, PICKLES, read_json, weight_file


def needed(listed, dtype=None):
    """Which of a hub repository's files a model needs: configs, and one variant of each part's weights."""
    files = [name for name in ("model_index.json", "instaflow.json", "scheduler/scheduler_config.json")
             if name in listed]
    for part in PARTS:
        inside = {name.removeprefix(part + "/") for name in listed if name.startswith(part + "/")}
        chosen = weight_file(inside, part, dtype)
        if chosen is None or "config.json" not in inside:
            raise UserError(f"no {part}/ with config.json and weights in it; "
                            "name a repository in the diffusers layout, or download its single file and name that")
        shards = []
        # which shards they are stands in the index: their names tell too
        if chosen.endswith(".json"):
            stem, suffix, half = chosen.split(".")[0], ".bin" if ".bin" in chosen else ".safetensors", ".fp16" in chosen
            shards = [name for name in inside
                      if re.fullmatch(re.escape(stem) + r"(\.fp16)?-\d+-of-\d+(\.fp16)?" + re.escape(suffix), name)
                      and (".fp16" in name) == half]
        files += [f"{part}/{name}" for name in ("config.json", chosen, *sorted(shards))]
    return files


def locate(path, dtype=None):
    """A local path as it is; a hub name (owner/name) as its folder in huggingface_hub's cache, fetched where need be.
    Off-line the cache serves. Raises UserError."""
    name = str(path)
    if (Path(path).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
            or Path(path).suffix in (*PICKLES, ".safetensors")):
        return Path(path)
    from huggingface_hub import HfApi, snapshot_download   # here: it takes a second
    try:
        # (list_repo_files waits half a minute for a lost connection)
        listed = [file.rfilename for file in HfApi().model_info(name).siblings]
        return Path(snapshot_download(name, allow_patterns=needed(listed, dtype)))
    except Exception as error:                             # its own errors, httpx's or requests', OSError ...
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
    try:
        return Path(snapshot_download(name, allow_patterns=["unet/config.json"], local_files_only=True))
    except Exception:
        raise UserError(f"{name}: no such folder or file here, and as a hub name it cannot be fetched ({reason}); "
                        "check name and connection; a gated model wants `hf auth login`") from None


def told(path):
    """instaflow.json's fields, as far as a folder or single file tells them, and the path that does. Without an
    instaflow.json, model_index.json's class name says what the U-Net predicts. Raises UserError."""
    if path.is_file():
        return facts(path).get("info", {}), path
    if not (path / "unet").is_dir():
        raise UserError(f"{path}: no such model folder; a model is a folder with unet/, vae/, text_encoder/ "
                        "and instaflow.json, a .safetensors or .ckpt file, or a hub name")
    if (path / "instaflow.json").exists():
        return read_json(path / "instaflow.json"), path / "instaflow.json"
    index = path / "model_index.json"
    name = read_json(index).get("_class_name") if index.exists() else None
    known = {"RectifiedFlowPipeline": "velocity", "StableDiffusionPipeline": "epsilon"}
    scheduler = path / "scheduler" / "scheduler_config.json"
    kind = (read_json(scheduler).get("prediction_type", "epsilon")
            if name == "StableDiffusionPipeline" and scheduler.exists() else "epsilon")
    # (a scheduler left over in a RectifiedFlowPipeline's folder means nothing)
    if kind != "epsilon":
        raise UserError(f"{scheduler} says that the U-Net predicts {kind}, "
                        "which is neither noise nor the flow's velocity; this is another kind of model")
    return ({"prediction": known[name]}, index) if name in known else ({}, path)
