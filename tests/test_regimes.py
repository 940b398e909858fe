"""Reflow against direct distillation: that what is called equal is equal, counted from the command lines themselves."""
import shlex
import sys
from pathlib import Path

import pytest

import mini

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import recipes
import regimes


def flag(words, name):
    return words[words.index(name) + 1]


def behind(lines, out):
    """Outs of the lines that the model or pairs `out` needs, its own among them: each once, however many others need
    it."""
    words = next((words for words in map(shlex.split, lines) if flag(words, "--out") == out), [])
    needs = [flag(words, name) for name in ("--model", "--pairs") if name in words]
    return {out}.union(*(behind(lines, path) for path in needs)) if words else set()


def passes(lines, out):
    """U-Net passes behind the model or pairs `out`: a guided step is two, a training picture three (a backward pass
    is two forward ones), and under LPIPS, with decoder and judge, as much time as nine."""
    total, outs = 0, behind(lines, out)
    for words in map(shlex.split, lines):
        if words[0] == "pairs.py" and flag(words, "--out") in outs:
            total += int(flag(words, "--number")) * int(flag(words, "--steps")) * 2
        elif words[0] in ("train_reflow.py", "distill.py") and flag(words, "--out") in outs:
            total += int(flag(words, "--iterations")) * int(flag(words, "--batch")) * (9 if "lpips" in words else 3)
    return total


@pytest.mark.parametrize("regime", regimes.REGIMES)
@pytest.mark.parametrize("seed", (0, 1))
def test_equal_is_equal(regime, seed):
    lines, folder = regimes.pipeline("runs/regimes", regime, seed), f"runs/regimes/{regime}-{seed}"
    parsed = {flag(words, "--out"): words for words in map(shlex.split, lines)}
    made = {route: parsed[f"{folder}/{route}"] for route in regimes.routes(regime)}
    if "direct" in made:
        assert all(flag(made["reflowed"], name) == flag(made["direct"], name) for name in ("--iterations", "--batch"))
        assert (flag(parsed[flag(made["reflowed"], "--pairs")], "--number")
                == flag(parsed[flag(made["direct"], "--pairs")], "--number"))
    if "direct-total" in made:
        # less than a pair
        assert 0 <= passes(lines, f"{folder}/reflowed") - passes(lines, f"{folder}/direct-total") < 20
    for words in made.values():
        assert (words.count("--exact") == (regime in ("exact", "guided"))
                and words.count("--stacked") == (regime == "stacked") and flag(words, "--seed") == str(seed))


def test_the_stacked_student_learns_from_the_single_ones_flow():
    lines, single = (regimes.pipeline("root", regime, 0) for regime in ("stacked", "raw-long"))
    own = {line for line in lines if "/stacked-0/" in line}
    # even its pairs, and the flow, are raw-long's
    assert len(own) == 2 and set(lines) - own < set(single)


@pytest.mark.parametrize("seed", (0, 1))
def test_recipes_at_equal_cost(seed):
    lines, own = recipes.lines("root", seed), f"root/{{}}-{seed}/{{}}".format
    cost = {recipe: passes(lines, own(recipe, "reflowed")) for recipe in ("exact", *recipes.FLAGS, "3rf", "longer")}
    assert ({cost[recipe] for recipe in recipes.FLAGS} == {cost["exact"]}
            and cost["exact"] < cost["3rf"] == cost["longer"])
    hubered = [passes(lines, own(recipe, "hubered")) for recipe in ("early-huber", "direct-huber")]
    assert (passes(lines, own("early-huber", "strong")) == hubered[0] == cost["exact"]
            and 0 <= hubered[0] - hubered[1] < 20)         # less than a pair
    perceived = [passes(lines, own(recipe, "perceived")) for recipe in ("exact", "early-huber", "direct-huber")]
    assert perceived == [cost["exact"], cost["exact"], hubered[1]]
    assert [passes(lines, own(recipe, "perceived-alone")) for recipe in ("exact", "early-huber")] == perceived[:2]
    for n in recipes.SHARES:                               # to an iteration
        assert abs(passes(lines, own("early-huber", f"perceived-{n}")) - cost["exact"]) <= 3 * 32
    finished = [passes(lines, own("early-huber", f"finished-{t}-{guidance}")) - perceived[1]
                for t, _, guidance in recipes.FINISHED]
    assert finished == [2 * recipes.PAIRS] * 2 + [0] * 3   # a step more, of two passes
    assert passes(lines, own("early-huber", "few")) == perceived[1]
    assert (passes(lines, own("3rf-finished", "perceived")) == passes(lines, own("longer-finished", "perceived"))
            == cost["3rf"])
    parsed = {flag(words, "--out"): words for words in map(shlex.split, lines)}
    assert len(parsed) == len(lines)                       # nothing is written twice
    paper = parsed[own("exact", "2rf")]
    for recipe, flags in recipes.FLAGS.items():            # what sets it apart is its flags
        words = parsed[own(recipe, "2rf")]
        assert set(words) - set(paper) == {own(recipe, "2rf"), *flags.split()}
    for words in parsed.values():
        assert (words[0] in ("scenes.py", "pairs.py")
                or flag(words, "--seed") == str(seed) and flag(words, "--batch") == "32" and "--exact" in words)


def test_the_shipped_direct_student_cost_no_less_than_the_reflowed_one():
    lines = mini.pipeline("root")
    more = passes(lines, "root/models/mini-instaflow-l2") - passes(lines, "root/models/mini-direct-l2")
    # the reflowed one cost a little less
    assert -0.1 * passes(lines, "root/models/mini-instaflow-l2") < more < 0
    lpips = {flag(shlex.split(line), "--out"): line.split(" --loss lpips ")[1]
             for line in lines if " --loss lpips " in line}
    assert lpips["root/models/mini-instaflow-lpips"] == lpips["root/models/mini-direct"]
