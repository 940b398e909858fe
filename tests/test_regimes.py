"""Reflow against direct distillation: that what is called equal is equal, counted from the command lines themselves."""
import importlib.util
import shlex
from pathlib import Path

import pytest

import mini

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


def after_reflow(lines, pairs, student):
    """Passes of reflow, the 2-rectified flow's pairs and distillation on those. (What is behind the flow is behind its pairs too, and counted once.)"""
    words = next(words for words in map(shlex.split, lines) if flag(words, "--out") == student)
    return passes(lines, pairs) + 3 * int(flag(words, "--iterations")) * int(flag(words, "--batch"))


@pytest.mark.parametrize("regime", regimes.REGIMES)
@pytest.mark.parametrize("seed", (0, 1))
def test_equal_is_equal(regime, seed):
    lines, folder = regimes.pipeline("runs/regimes", regime, seed), f"runs/regimes/{regime}-{seed}"
    parsed = {flag(words, "--out"): words for words in map(shlex.split, lines)}
    reflowed, direct, total = (parsed[f"{folder}/{route}"] for route in regimes.ROUTES)
    assert flag(reflowed, "--iterations") == flag(direct, "--iterations") and flag(reflowed, "--batch") == flag(direct, "--batch")
    assert 0 <= after_reflow(lines, f"{folder}/pairs", f"{folder}/reflowed") - passes(lines, f"{folder}/direct-total") < 20      # less than a pair
    for words in (reflowed, direct, total):
        assert words.count("--exact") == (regime == "exact") and flag(words, "--seed") == str(seed)


def test_the_shipped_direct_student_cost_what_the_reflowed_one_did():
    lines = mini.pipeline("root")
    more = after_reflow(lines, "root/pairs/2rf", "root/models/mini-instaflow-l2") - passes(lines, "root/models/mini-direct-l2")
    assert 0 <= more < 20                                  # less than one pair of the teacher's
    lpips = [line.split(" --loss ")[1] for line in lines if " --loss " in line]
    assert len(lpips) == 2 and lpips[0] == lpips[1]
