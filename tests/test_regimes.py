"""Reflow against direct distillation: that what is called equal is equal, counted from the command lines themselves."""
import importlib.util
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("regimes", ROOT / "benchmarks" / "regimes.py")
regimes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(regimes)


def flag(words, name):
    return words[words.index(name) + 1]


def passes(lines, out):
    """U-Net passes behind the model or pairs `out`: a guided step is two, a training picture three (a backward pass is two forward ones)."""
    for line in lines:
        words = shlex.split(line)
        if flag(words, "--out") != out:
            continue
        if words[0] == "pairs.py":
            own = int(flag(words, "--number")) * int(flag(words, "--steps")) * 2
        elif words[0] in ("train_reflow.py", "distill.py"):
            own = int(flag(words, "--iterations")) * int(flag(words, "--batch")) * 3
        else:
            return 0
        needs = [flag(words, name) for name in ("--model", "--pairs") if name in words]
        return own + sum(passes(lines, path) for path in set(needs))
    return 0                                               # what nobody here makes: the teacher


@pytest.mark.parametrize("regime", regimes.REGIMES)
@pytest.mark.parametrize("seed", (0, 1))
def test_equal_is_equal(regime, seed):
    lines = regimes.pipeline("models", "runs/regimes", regime, seed)
    folder = f"runs/regimes/{regime}-{seed}"
    parsed = {flag(words, "--out"): words for words in map(shlex.split, lines)}
    reflowed, direct, total = (parsed[f"{folder}/{route}"] for route in regimes.ROUTES)
    assert flag(reflowed, "--iterations") == flag(direct, "--iterations") and flag(reflowed, "--batch") == flag(direct, "--batch")
    # The teacher's pairs are behind the reflow, and are counted once: behind its model, and not behind its pairs again.
    teacher_pairs = passes(lines, flag(parsed[f"{folder}/2rf"], "--pairs"))
    reflow = passes(lines, f"{folder}/2rf")
    pairs = passes(lines, f"{folder}/pairs") - reflow
    last = int(flag(reflowed, "--iterations")) * 3 * int(flag(reflowed, "--batch"))
    assert teacher_pairs > 0 and reflow > teacher_pairs
    assert passes(lines, f"{folder}/direct-total") == pytest.approx(reflow + pairs + last, rel=1e-3)
    for words in (reflowed, direct, total):
        assert words.count("--exact") == (regime == "exact") and flag(words, "--seed") == str(seed)
