"""How fast this is beside diffusers: the same files, the same inputs, one after the other in turns, in one run.

    python benchmarks/speed.py                                      # full size, bf16, one picture in one step
    python benchmarks/speed.py --device cuda --dtypes float32,bfloat16,float16 --batches 1,4,16 --compile
    python benchmarks/speed.py --device cuda --profile              # what the GPU does all the time, kernel by kernel
    python benchmarks/speed.py --config mini --rounds 1 --out /tmp  # to see whether it runs

Weights are random, written once in float16 to --folder, and loaded by both from there. The peer runs as it comes,
channels-last, and with --compile compiled and channels-last; ours is compared with whichever is fastest. Both go
through the same Euler loop, without their pipelines. Numbers are medians; on a CPU that others use too, the seconds
the processor worked for us say more than the clock. Every row is written as soon as it is measured, beside what an
earlier run on the same machine has measured: the long line may be divided among several.
"""
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
import cli
import fast
import flows
import log
import text
import weights
from cli import UserError
from images import to_pil
from instaflow import CONFIGS, InstaFlow

PROMPT, STEPS, GUIDANCE = "a red circle left of a blue square", 25, 5.0
STAGES = ["process", "load", "text", "U-Net", "decoder", "picture", "guided"]
NAMES = ["process start to PNG", *STAGES[1:]]            # of rows
PATIENCE = 60                                            # seconds of a row, after which three turns are enough
KEYS = ("s", "cpu_s", "peak_gib", "gpu_gib")             # of processes all four
# A process that runs a script with its arguments and then says the most memory it ever held, in bytes: resident,
# and on a GPU.
CHILD = r"""
import re, runpy, sys
sys.argv = sys.argv[1:]
if sys.argv[0].endswith("sample.py"):                    # as requirements.txt installs it:
    sys.modules["transformers"] = None                   # open_clip imports transformers only where it is
runpy.run_path(sys.argv[0], run_name="__main__")
import torch
resident = 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
print("PEAK", resident, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""


def write_model(folder, config):
    """Random weights of a size in CONFIGS in float16, and CLIP's vocabulary as transformers wants it,
    unless they are there."""
    if not (folder / "instaflow.json").exists():
        bpe = text._bpe()
        # open_clip's names for the last two
        ids = {token: i for token, i in bpe.encoder.items() if token not in ("<start_of_text>", "<end_of_text>")}
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(ids))
        (folder / "tokenizer" / "merges.txt").write_text(
            "\n".join(["#version: 0.2", *map(" ".join, bpe.bpe_ranks)]) + "\n")
        InstaFlow.random(config).save(folder, self_contained=True, dtype=torch.float16)


def ours(folder, device, dtype, compile=False):
    """-> text(prompts), unet(x, timestep, context), decode(scaled latents) of our modules,
    packed as sample.py has them."""
    model = InstaFlow.load(folder, device, dtype)
    for module in (model.text.tower, model.unet, model.vae.decoder):
        fast.compiled(module, device) if compile else fast.pack(module)
    def read(prompts):
        text._ids.cache_clear()                            # the peer keeps no prompt's tokens either
        return model.text(prompts)
    return SimpleNamespace(text=read, unet=model.unet, decode=model.decode, last=torch.channels_last)


def theirs(folder, device, dtype, layout=torch.contiguous_format, compile=False):
    """The same of diffusers' and transformers' modules."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
    tower = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).to(device)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device).to(memory_format=layout)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(device).to(memory_format=layout)
    if compile:
        for module in (tower, unet, vae.decoder):
            fast.compiled(module, device)
    return SimpleNamespace(
        text=lambda prompts: tower(tokens(prompts, padding="max_length", truncation=True, return_tensors="pt")
                                   .input_ids.to(device))[0],
        unet=lambda x, t, context: unet(x, t, context).sample, last=layout,
        decode=lambda z: (vae.decode((z / vae.config.scaling_factor).contiguous(memory_format=layout))
                          .sample.float().clamp(-1, 1)))


@torch.no_grad()
def picture(side, prompts, x0, steps, guidance):
    """Prompts and noise to PIL images, by Euler's steps."""
    states = side.text(prompts + [""] * (guidance != 1)).clone()
    v = flows.guided(lambda x, t, c: side.unet(x, 1000 * (1 - t), c), states[:len(prompts)], states[-1:], guidance)
    return to_pil(side.decode(flows.euler(v, x0.contiguous(memory_format=side.last), steps)))


def clocked(call, device):
    """-> (seconds by the clock, seconds the processors worked for this process), the GPU's work included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turns(measures, rounds, bar):
    """{name: function -> numbers, the first the seconds by the clock} -> {name: medians by KEYS,
    and all of the first}."""
    seen, begun = {name: [] for name in measures}, time.perf_counter()
    for turn in range(rounds):
        for name, measure in measures.items():
            seen[name].append(measure())
        bar.update()
        if turn >= 2 and time.perf_counter() - begun > PATIENCE:
            bar.update(rounds - turn - 1)
            break
    return {name: dict(zip(KEYS, map(statistics.median, zip(*runs)))) | {"all_s": [round(run[0], 4) for run in runs]}
            for name, runs in seen.items()}


def ceiling(device, dtype):
    """FLOP/s of the best of ten square matrix products: what this device does at most.
    -> (by the clock, by processor seconds)"""
    side = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seen = [clocked(lambda: a @ b, device) for _ in range(11)][1:]
    return tuple(2 * side ** 3 / min(column) for column in zip(*seen))


@torch.no_grad()
def stages(sides, args, dtype, flop, bar):
    """Yield rows of text, U-Net, decoder and whole pictures, for each batch. First all is run until nothing is left
    to be compiled or recorded; then all is timed."""
    config, device, tasks = CONFIGS[args.config][0], args.device, []
    for batch in args.batches:
        prompts = [f"{PROMPT} {i}" for i in range(batch)]
        x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size).to(device, dtype)
        t = torch.full((batch,), 900.0, device=device)
        context = torch.randn(batch, 77, config.cross_attention_dim).to(device, dtype)
        whole = flop["text"] + flop["U-Net"] + flop["decoder"]
        calls = {"text": (1, flop["text"], lambda side, p=prompts: side.text(p)),
                 "U-Net": (1, flop["U-Net"],
                           lambda side, x=x, t=t, c=context: side.unet(x.contiguous(memory_format=side.last), t, c)),
                 "decoder": (1, flop["decoder"], lambda side, x=x: side.decode(x)),
                 "picture": (1, whole, lambda side, p=prompts, x=x: picture(side, p, x, 1, 1)),
                 "guided": (STEPS, whole + (2 * STEPS - 1) * flop["U-Net"],
                            lambda side, p=prompts, x=x: picture(side, p, x, STEPS, GUIDANCE))}
        tasks += [(stage, batch, *calls[stage]) for stage in args.stages if stage in calls]
    differences = []
    for stage, *_, task in tasks:
        # graphs are recorded in the second call, and write over their outputs in the next
        for _ in range(3 if args.compile else 1):
            out = {name: y.clone() if torch.is_tensor(y := task(side)) else y for name, side in sides.items()}
        pil = isinstance(out["ours"], list)
        differences.append({} if pil else {"largest_difference": max(
            float((out[name] - out["diffusers"]).abs().max() / out["diffusers"].abs().max())
            for name in out if name.startswith("ours"))})
    best = ceiling(device, dtype)
    for (stage, batch, steps, work, task), difference in zip(tasks, differences):
        times = in_turns({name: (lambda side=side: clocked(lambda: task(side), device))
                          for name, side in sides.items()}, args.rounds, bar)
        yield {"stage": stage, "dtype": str(dtype)[6:], "batch": batch, "steps": steps, "tflop": work * batch / 1e12,
               "floor_s": work * batch / best[0], "floor_cpu_s": work * batch / best[1], "times": times} | difference


def processes(folder, args, dtype, bar):
    """A row of process start to PNG: seconds by the clock and of the processors, and the most memory,
    of ours and theirs in turns."""
    name = str(dtype)[6:]
    with tempfile.TemporaryDirectory() as place:
        sample = [ROOT / "sample.py", "--model", folder, "--device", args.device, "--dtype", name, "--steps", 1,
                  "--guidance", 1, "--out", f"{place}/ours.png", PROMPT]
        # (on a CPU sample.py does so by itself)
        lines = {"ours": sample} | ({"ours, --low-memory": [*sample, "--low-memory"]} if args.device != "cpu" else {})
        for kind, layout in (("diffusers", "contiguous_format"), ("diffusers, channels-last", "channels_last")):
            lines[kind] = [ROOT / "benchmarks" / "peer.py", folder, args.device, name, layout, f"{place}/peer.png",
                           PROMPT]
        lines["diffusers, lean"] = [*lines[kind], "lean"]

        def once(line):
            before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run([sys.executable, "-c", CHILD, *map(str, line)], capture_output=True, text=True)
            wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode:
                raise UserError(f"{line[0]} ended with status {done.returncode}: "
                                f"{done.stderr.strip().splitlines()[-1]}")
            peak = [int(n) / 2**30 for n in re.search(r"PEAK (\d+) (\d+)", done.stdout).groups()]
            return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, *peak
        return {"stage": "process start to PNG", "dtype": name, "batch": 1, "steps": 1, "times": in_turns(
            {kind: (lambda line=line: once(line)) for kind, line in lines.items()}, args.half, bar)}


def measured(folder, makers, args, bar):
    """Yield every row that the flags ask for."""
    unet, vae, tower = CONFIGS[args.config]
    flop = InstaFlow.load(folder).operations()
    flop = {"U-Net": flop["unet"], "decoder": flop["decoder"],
            "text": log.flops(lambda: text.TextTower(tower)(torch.zeros(1, 77, dtype=torch.long)))}
    for dtype in (getattr(torch, name) for name in args.dtypes):
        if "process" in args.stages:
            yield processes(folder, args, dtype, bar)      # before this process holds much itself
        loads = {name: (lambda make=make: clocked(lambda: make(folder, args.device, dtype), args.device))
                 for name, make in (("ours", ours), ("diffusers", theirs))}
        for load in loads.values() if "load" in args.stages else ():
            load()                                         # imports are no loading
        if "load" in args.stages:
            yield {"stage": "load", "dtype": str(dtype)[6:], "batch": 1, "steps": 1,
                   "times": in_turns(loads, args.rounds, bar)}
        torch.compiler.reset()
        if set(args.stages) - {"process", "load"}:
            yield from stages({name: make(folder, args.device, dtype) for name, make in makers.items()},
                              args, dtype, flop, bar)


@torch.no_grad()
def profiled(folder, makers, args):
    """What computes longest in one picture, of every side and dtype: PyTorch's own profile."""
    from torch.profiler import ProfilerActivity, profile
    gpu = torch.device(args.device).type == "cuda"
    for dtype in (getattr(torch, name) for name in args.dtypes):
        config = CONFIGS[args.config][0]
        x = torch.randn(1, config.in_channels, config.sample_size, config.sample_size).to(args.device, dtype)
        for name, make in makers.items():
            side = make(folder, args.device, dtype)
            for _ in range(3):
                picture(side, [PROMPT], x, 1, 1)
            with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as seen:
                picture(side, [PROMPT], x, 1, 1)
            print(f"\n{name}, {str(dtype)[6:]}:\n" + seen.key_averages().table(
                sort_by=f"self_{'cuda' if gpu else 'cpu'}_time_total", row_limit=15, max_name_column_width=70))


def ratio(times, key, compiled=True):
    """Our best over the peer's best; without compiled, of those that are not compiled."""
    mine, other = (min(t[key] for name, t in times.items()
                       if name.startswith(who) and (compiled or "compiled" not in name))
                   for who in ("ours", "diffusers"))
    return mine / other if other else float("nan")


def table(rows, key):
    """Lines of markdown. key: "s", or "cpu_s", by which the share of the ceiling is."""
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    lines = ["| stage | dtype | batch | steps | " + " | ".join(f"{n}, ms (cpu s)" for n in names)
             + " | ours / peer's best, clock | cpu s | neither compiled, clock | share of the ceiling |",
             "|" + "---|" * (len(names) + 8)]
    for row in rows:
        cells = [f"{1000 * row['times'][n]['s']:.0f} ({row['times'][n]['cpu_s']:.2f})" if n in row["times"] else ""
                 for n in names]
        quick = min(t[key] for n, t in row["times"].items() if n.startswith("ours"))
        lines.append(f"| {row['stage']} | {row['dtype']} | {row['batch']} | {row['steps']} | " + " | ".join(cells)
                     + f" | {ratio(row['times'], 's'):.2f} | {ratio(row['times'], 'cpu_s'):.2f} | "
                       f"{ratio(row['times'], 's', compiled=False):.2f} | "
                     + (f"{row[f'floor_{key}'] / quick:.0%} |" if "tflop" in row else "|"))
    for row in rows:
        for where in [k for k in KEYS[2:] if row["times"]["ours"].get(k)]:
            lines += ["", f"Peak memory of a process, {row['dtype']}, "
                          f"{'on the GPU' if where == 'gpu_gib' else 'resident'}, GiB: "
                      + ", ".join(f"{name} {t[where]:.2f}" for name, t in row["times"].items())
                      + f"; ours / peer's best {ratio(row['times'], where):.2f}."]
    return lines


def chart(rows, path, title):
    """Bars of the first dtype, by the clock, a panel a stage and batch, beside the floor:
    the stage's operations at the ceiling."""
    from matplotlib.figure import Figure
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    unit, times = ("ms", 1000) if max(t["s"] for row in rows for t in row["times"].values()) < 1 else ("s", 1)
    lines = -(-len(rows) // 2)
    figure = Figure(figsize=(13, 1.5 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes in panels[len(rows):]:
        axes.remove()
    for axes, row in zip(panels, rows):
        names = list(row["times"])[::-1]
        head = f"{row['stage']}, {row['dtype']}, batch {row['batch']}" + f", {row['steps']} steps" * (row["steps"] > 1)
        bars = axes.barh(names, [times * row["times"][n]["s"] for n in names],
                         color=["tab:blue" if n.startswith("ours") else "tab:orange" for n in names])
        axes.bar_label(bars, [f"{times * row['times'][n]['s']:.3g} {unit}" for n in names], fontsize=8, padding=3,
                       bbox=dict(color="white", pad=0.5), zorder=3)
        if "tflop" in row:
            axes.axvline(times * row["floor_s"], color="black", linestyle="--")
            head += f"; dashed: {row['tflop']:.3g} TFLOP at the ceiling, {times * row['floor_s']:.2g} {unit}"
        axes.set_title(head, fontsize=9, loc="left")
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    checkpoint.write_by(figure.savefig, path, dpi=90)


def main():
    parser = cli.Parser(__doc__)
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--config", choices=("sd15", "mini"), default="sd15")
    add("--device", type=cli.device, default="cuda" if gpu else "cpu")
    add("--dtypes", default="bfloat16",
        help="of float32,bfloat16,float16 (on a CPU float16 convolutions are some 40 times slower)")
    add("--batches", type=lambda words: [cli.positive(w) for w in words.split(",")], default=[1], help="as in 1,4,16")
    add("--stages", type=lambda words: words.split(","), default=STAGES[:-1],
        help=f"some of {','.join(STAGES)} "
             f"(default: all but the last, which is {STEPS} steps with guidance {GUIDANCE:g})")
    add("--compile", action="store_true", help="also both compiled: on a CPU, many minutes")
    add("--profile", action="store_true", help="measure nothing: print what computes longest")
    add("--rounds", type=cli.positive, default=20 if gpu else 5, help="turns; half as many of whole processes")
    add("--folder", type=Path,
        help="where the weights are or are to be written: 2.1 GB at full size (default: a temporary one)")
    add("--out", type=Path, default=Path(__file__).parent, help="the folder of speed-<device>.json and .png")
    args = parser.parse_args()
    args.half = max(args.rounds // 2, 1)                   # turns of what takes long
    try:
        import diffusers
    except ImportError:
        raise UserError("diffusers, which this compares with, is not installed; "
                        "pip install -r requirements-dev.txt") from None
    args.dtypes = args.dtypes.split(",")
    if set(args.dtypes) - {"float32", "bfloat16", "float16"}:
        parser.error(f"--dtypes {','.join(args.dtypes)}: name some of float32,bfloat16,float16")
    if set(args.stages) - set(STAGES):
        parser.error(f"--stages {','.join(args.stages)}: name some of {','.join(STAGES)}")
    makers = {"ours": ours, **({"ours, compiled": lambda *a: ours(*a, compile=True)} if args.compile else {}),
              "diffusers": theirs, "diffusers, channels-last": lambda *a: theirs(*a, torch.channels_last),
              **({"diffusers, compiled": lambda *a: theirs(*a, torch.channels_last, True)} if args.compile else {})}
    # on both sides and at the ceiling, as convolutions have it anyway
    torch.backends.cuda.matmul.allow_tf32 = True
    kind = torch.device(args.device).type
    path, name = args.out / f"speed-{kind}.json", lambda row: [row[key] for key in ("stage", "dtype", "batch", "steps")]
    facts = {"hardware": torch.cuda.get_device_name() if kind == "cuda" else log.hardware(),
             "threads": torch.get_num_threads(), "config": args.config, "torch": torch.__version__,
             "diffusers": diffusers.__version__}
    old = weights.read_json(path) if path.exists() else {}
    rows = old["rows"] if facts.items() <= old.items() else []
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        write_model(folder, args.config)
        if args.profile:
            return profiled(folder, makers, args)
        turns = (args.half * args.stages.count("process")
                 + args.rounds * (args.stages.count("load")
                                  + len(args.batches) * len(set(args.stages) - {"process", "load"})))
        with tqdm(total=len(args.dtypes) * turns, desc="speed", mininterval=1) as bar:
            for row in measured(folder, makers, args, bar):
                rows = [other for other in rows if name(other) != name(row)] + [
                    row | {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv])}]
                checkpoint.write(path, (json.dumps(facts | {"rows": rows}, indent=1) + "\n").encode())
    rows.sort(key=lambda row: (row["dtype"], row["batch"], row["steps"], NAMES.index(row["stage"])))
    chart(rows, path.with_suffix(".png"),
          f"{args.config}: {facts['hardware']}, {facts['threads']} threads, {max(row['date'] for row in rows)}")
    print("\n".join(table(rows, "cpu_s" if kind == "cpu" else "s")))


if __name__ == "__main__":
    cli.run(main)
