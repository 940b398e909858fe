"""FID: the distance against closed forms and scipy's matrix root, the whole against pytorch-fid, the command line."""
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import fid
import training
from cli import UserError
from conftest import one_line, paint
from judge import Judge

ROOT = Path(__file__).resolve().parent.parent


# --- the distance ---


def spd(rng, d):
    x = rng.standard_normal((2 * d, d))
    return x.T @ x / d


def test_statistics_are_numpys():
    # float32 sums would be off here
    features = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32) + 1000
    mu, sigma = fid.statistics(features)
    assert mu.dtype == sigma.dtype == np.float64
    centred = features.astype(np.float64) - features.astype(np.float64).mean(0)
    assert np.abs(sigma - centred.T @ centred / 49).max() < 1e-12
    with pytest.raises(ValueError):
        fid.statistics(features[:1])


def test_equal_covariances_leave_the_means():
    rng = np.random.default_rng(1)
    s, a, b = spd(rng, 16), rng.standard_normal(16), rng.standard_normal(16)
    assert fid.frechet_distance(a, s, b, s) == pytest.approx(((a - b) ** 2).sum(), rel=1e-9)
    assert abs(fid.frechet_distance(a, s, a, s)) < 1e-6 * np.trace(s)


def test_commuting_covariances():
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    p, r = rng.uniform(0, 3, 12), rng.uniform(0, 3, 12)
    zero = np.zeros(12)
    assert fid.frechet_distance(zero, q * p @ q.T, zero, q * r @ q.T) == pytest.approx(
        ((p ** .5 - r ** .5) ** 2).sum(), rel=1e-9)


def test_rank_deficient():
    """Covariances u u^T and w w^T: tr (S1 S2)^1/2 = |u . w|."""
    rng = np.random.default_rng(3)
    u, w, zero = rng.standard_normal(20), rng.standard_normal(20), np.zeros(20)
    exact = u @ u + w @ w - 2 * abs(u @ w)
    assert fid.frechet_distance(zero, np.outer(u, u), zero, np.outer(w, w)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("ranks", [(200, 30), (30, 200), (30, 30), (30, 0), (0, 0)])
def test_commuting_of_any_rank(ranks):
    rng, d = np.random.default_rng(5), 200
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    p, r = (rng.uniform(0.5, 3, d) * (np.arange(d) < rank) for rank in ranks)
    s1, s2 = (q * v @ q.T for v in (p, r))
    found = fid.frechet_distance(np.zeros(d), (s1 + s1.T) / 2, np.ones(d), (s2 + s2.T) / 2)
    assert found == pytest.approx(d + ((p ** .5 - r ** .5) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("n", [2, 60, 900])
def test_identical_sets_are_at_no_distance(n):
    """Fewer and more than their 300 features, most of whose variance lies in a few directions."""
    rng = np.random.default_rng(6)
    features = np.abs(rng.standard_normal((n, 300))) @ np.abs(rng.standard_normal((300, 300)))
    mu, sigma = fid.statistics(features)
    assert abs(fid.frechet_distance(mu, sigma, mu.copy(), sigma.copy())) <= 1e-9 * np.trace(sigma)


def test_other_shapes_and_nan_are_refused():
    s, m = np.eye(3), np.zeros(3)
    for mu, sigma in ((np.zeros(4), np.eye(4)), (np.zeros(4), s), (m, s[:2]), (m + np.nan, s), (m, s + np.inf)):
        with pytest.raises(ValueError):
            fid.frechet_distance(m, s, mu, sigma)


def test_against_scipys_matrix_root():
    rng = np.random.default_rng(4)
    s1, s2, a, b = spd(rng, 64), spd(rng, 64), rng.standard_normal(64), rng.standard_normal(64)
    theirs = ((a - b) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(a, s1, b, s2) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_faster_than_scipys_matrix_root():
    rng, d = np.random.default_rng(7), 2048
    s1 = np.cov(rng.standard_normal((3 * d, d)) * np.linspace(.1, 2, d), rowvar=False)
    s2, zero = np.cov(rng.standard_normal((3 * d, d)), rowvar=False), np.zeros(d)
    started = time.perf_counter()
    ours, between = fid.frechet_distance(zero, s1, zero, s2), time.perf_counter()
    theirs, end = np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real), time.perf_counter()
    assert ours == pytest.approx(theirs, rel=1e-6)
    print(f"ours {between - started:.1f} s, scipy's {end - between:.1f} s")
    assert end - between >= 4 * (between - started)


# --- in a stream ---

def test_streaming_equals_the_batch():
    rng = np.random.default_rng(8)
    features = (1000 + rng.standard_normal((700, 30)) @ rng.standard_normal((30, 30))).astype(np.float32)
    running = fid.Running(30)
    for part in np.split(features, [1, 2, 50, 51, 300, 640]):
        running.add(torch.from_numpy(part))
    (mu, sigma), (whole_mu, whole_sigma) = running.statistics(), fid.statistics(features)
    assert mu.dtype == sigma.dtype == np.float64
    assert (np.abs(mu - whole_mu).max() <= 1e-9 * np.abs(whole_mu).max()
            and np.abs(sigma - whole_sigma).max() <= 1e-9 * np.abs(whole_sigma).max())


def settings(**changed):
    return Namespace(**{"batch": 10, "workers": 2, "size": None, "features": "inception", "pictures": None,
                        "reference": None} | changed)


ALONE = training.World(0, 1, torch.device("cpu"))


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """A stub for the network; without a stream 400 pictures of 12 KiB would be 4.7 MiB, and 360 more than 40 so much
    more."""
    paint(tmp_path / "many", 400, size=(64, 64))
    (tmp_path / "few").mkdir()
    for i in range(40):
        shutil.copy(tmp_path / "many" / f"{i}.png", tmp_path / "few")

    def peak(folder):
        stub = lambda pictures: torch.from_numpy(np.stack([p[::16, ::16].reshape(-1) for p in pictures])).float(), 48
        tracemalloc.start()
        (mu, sigma, n), _ = fid.of_folder(folder, settings(), ALONE, stub)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        wanted = fid.statistics([np.asarray(Image.open(p))[::16, ::16].reshape(-1) for p in folder.iterdir()])
        assert n == len(list(folder.iterdir())) and np.allclose(mu, wanted[0]) and np.allclose(sigma, wanted[1])
        return top
    peak(tmp_path / "few")                                 # what is allocated once
    assert peak(tmp_path / "many") < peak(tmp_path / "few") + 400_000            # the files' names


# --- against pytorch-fid ---

@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return paint(folder / "a", 20, seed=1), paint(folder / "b", 20, seed=2, size=(31, 64), tint=0.5)


@pytest.fixture(scope="module")
def theirs(sets, their_inception):
    """pytorch-fid's (mu, sigma) of both folders."""
    from pytorch_fid.fid_score import compute_statistics_of_path
    return [compute_statistics_of_path(str(folder), their_inception[1], 8, 2048, "cpu", 0) for folder in sets]


def value(result):
    """The FID that a command line printed."""
    status, out, err = result
    assert status == 0 and out.startswith("FID "), err
    return float(out.split()[1].rstrip(":"))


def test_the_files_written_hold_pytorch_fids_numbers(sets, theirs, their_inception, command, tmp_path):
    from pytorch_fid.fid_score import calculate_frechet_distance, compute_statistics_of_path
    ours = []
    for folder, (mu, sigma) in zip(sets, theirs):
        status, out, err = command("fid.py", folder, "--save", tmp_path / f"{folder.name}.npz",
                                   "--inception", their_inception[0], "--device", "cpu", "--batch", 7)
        assert status == 0 and "20 pictures" in out and "fewer than 2,048" in err
        # as pytorch-fid reads a file
        ours.append(compute_statistics_of_path(str(tmp_path / f"{folder.name}.npz"), None, 8, 2048, "cpu"))
        assert (np.abs(ours[-1][0] - mu).max() <= 1e-5 * np.abs(mu).max()
                and np.abs(ours[-1][1] - sigma).max() <= 1e-4 * np.abs(sigma).max())
    # FID on few enough features that 20 pictures give them full rank
    few = [[x for mu, sigma in pair for x in (mu[::256], sigma[::256, ::256])] for pair in (ours, theirs)]
    wanted = calculate_frechet_distance(*few[1])
    assert wanted > 0.01 and fid.frechet_distance(*few[0]) == pytest.approx(wanted, rel=1e-3)
    # and theirs, read by ours, against our folder
    np.savez_compressed(tmp_path / "theirs.npz", mu=theirs[1][0], sigma=theirs[1][1])
    line = ["--inception", their_inception[0], "--device", "cpu"]
    whole = fid.frechet_distance(*theirs[0], *theirs[1])
    assert value(command("fid.py", tmp_path / "a.npz", tmp_path / "theirs.npz", *line)) == pytest.approx(
        whole, rel=1e-3)
    assert value(command("fid.py", sets[1], tmp_path / "theirs.npz", *line)) < 1e-4 * whole


@pytest.mark.slow
def test_fid_of_2500_pictures_is_pytorch_fids(their_inception, command, tmp_path):
    from pytorch_fid.fid_score import calculate_fid_given_paths
    folders = paint(tmp_path / "a", 2500, seed=1), paint(tmp_path / "b", 2500, seed=2, tint=0.3)
    ours = value(command("fid.py", *folders, "--inception", their_inception[0], "--device", "cpu"))
    wanted = calculate_fid_given_paths([str(folder) for folder in folders], 50, "cpu", 2048, 0)
    print(f"ours {ours}, pytorch-fid's {wanted}")
    assert wanted > 0.01 and abs(ours - wanted) <= 1e-3 * min(1, wanted)


@pytest.mark.slow
def test_as_fast_as_pytorch_fid(their_inception, tmp_path):
    """Files to statistics, by turns in one run, medians."""
    from pytorch_fid.fid_score import calculate_activation_statistics
    folder = paint(tmp_path / "a", 24, size=(256, 256))
    args, seconds = settings(batch=8, workers=1, inception=their_inception[0]), ([], [])
    network = fid.features(args, "cpu")
    for _ in range(5):
        started = time.perf_counter()
        fid.of_folder(folder, args, ALONE, network)
        seconds[0].append(time.perf_counter() - started)
        started = time.perf_counter()
        calculate_activation_statistics(sorted(folder.iterdir()), their_inception[1], 8, 2048, "cpu", 0)
        seconds[1].append(time.perf_counter() - started)
    ours, wanted = (24 / np.median(s) for s in seconds)
    print(f"pictures/s: ours {ours:.2f}, pytorch-fid {wanted:.2f}, ratio {ours / wanted:.2f}")
    assert ours >= 0.95 * wanted


def test_pictures_of_different_sizes_are_each_resized_alone(their_inception, tmp_path):
    embed, width = fid.features(settings(inception=their_inception[0]), "cpu")
    pictures = [np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8)
                for i, (h, w) in enumerate([(40, 60), (60, 40)])]
    alone = torch.cat([embed([p]) for p in pictures])
    assert width == 2048 and (embed(pictures) - alone).abs().max() <= 1e-5 * alone.abs().max()


# --- the command line, with the features of a small random judge ---

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a judge, captions, reference pictures of 64 px and their statistics. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(2)
    Judge((4, 4, 8, 12, 12)).save(folder / "judge")
    paint(folder / "real", 11, seed=3, size=(64, 64))
    (folder / "captions.txt").write_text("\n".join(f"picture number {i}" for i in range(12)))
    return folder


@pytest.fixture
def line(world):
    return ["--features", "judge", "--judge", world / "judge", "--device", "cpu", "--batch", 4]


@pytest.fixture
def draw(world, line, tiny, tmp_path, command, plain_convolutions):
    """fid.py with a model, keeping pictures in `drawn`; later flags win."""
    return lambda *words: command("fid.py", "--model", tiny / "flow", "--captions", world / "captions.txt",
                                  "--size", 64, *line, "--float32", "--out", tmp_path / "drawn", world / "real", *words)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_pictures_of_damaged_weights_are_not_measured(draw, tiny, tmp_path, part):
    """Not a number anywhere would be drawn black, and have an FID."""
    from instaflow import InstaFlow
    model = InstaFlow.load(tiny / "flow")
    with torch.no_grad():
        getattr(model, part).get_submodule(
            "conv_in" if part == "unet" else "decoder.conv_in").weight[0, 0, 0, 0] = float("nan")
    model.save(tmp_path / "damaged", self_contained=True)
    status, out, err = draw("--model", tmp_path / "damaged")
    assert status == 2 and "came out as no numbers" in err and "Traceback" not in err and "FID" not in out
    with pytest.raises(UserError, match="other weights"):
        model.generate(["a"])


def test_a_model_its_folder_and_its_file_give_one_figure(draw, world, line, command, tmp_path, tiny):
    from instaflow import InstaFlow
    status, out, err = first = draw("--save", tmp_path / "drawn.npz")
    wanted = value((status, out[out.index("FID"):], err))
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == [f"{i:06d}.png" for i in range(12)] + ["fid.json"]
    images = InstaFlow.load(tiny / "flow").generate([f"picture number {i}" for i in range(4, 8)], first=4)
    for i, image in enumerate(images):
        assert np.array_equal(Image.open(tmp_path / "drawn" / f"{i + 4:06d}.png"), image)
    judge = Judge.load(world / "judge")
    grown = [Image.open(tmp_path / "drawn" / f"{i:06d}.png").resize((64, 64), Image.Resampling.LANCZOS)
             for i in range(12)]
    by_hand = fid.frechet_distance(*(
        x for images in (grown, [Image.open(p) for p in (world / "real").iterdir()])
        for x in fid.statistics(judge.embed(images).numpy())))
    assert wanted == pytest.approx(by_hand, rel=1e-5, abs=1e-4) and wanted > 0.01
    assert value(command("fid.py", tmp_path / "drawn", world / "real", "--size", 64, *line)) == wanted
    assert value(command("fid.py", tmp_path / "drawn.npz", world / "real", *line)) == wanted
    assert "12 pictures of" in first[2] and "11 pictures of" in first[2] and first[2].count("fewer than 2,048") == 2
    again = draw()
    assert again[1] == out[out.index("FID"):]              # to the last digit, from the pictures that are there


def test_a_cut_generation_goes_on(draw, tmp_path):
    whole = draw()
    drawn = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "drawn").glob("*.png")}
    for i in (6, 8, 9, 10, 11):
        (tmp_path / "drawn" / f"{i:06d}.png").unlink()
    (tmp_path / "drawn" / "000006.png.77.tmp").write_bytes(b"what a kill left")
    assert draw()[:2] == whole[:2]
    for path, (data, written) in drawn.items():
        # the whole batch was left alone
        assert path.read_bytes() == data and (path.stem > "000003" or path.stat().st_mtime_ns == written)
    assert not list((tmp_path / "drawn").glob("*.tmp"))


def test_pictures_made_otherwise_are_refused(draw, tmp_path, world):
    assert draw()[0] == 0
    for flag, new, named in (("--steps", 2, "steps"), ("--guidance", 2, "guidance"), ("--seed", 1, "seed"),
                             ("--number", 10, "captions, number")):
        status, out, err = draw(flag, new)
        assert status == 2 and f"holds pictures made otherwise ({named} differ)" in err and "Traceback" not in err
    paint(tmp_path / "others", 2)
    status, out, err = draw("--out", tmp_path / "others")
    assert status == 2 and "not of such a run" in err


def test_three_processes_print_what_one_prints(world, line, tiny, tmp_path):
    words = ["--model", tiny / "flow", "--captions", world / "captions.txt", "--size", 64, *line, "--float32",
             world / "real"]
    printed = []
    for name, start in (("one", []),
                        ("three", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"])):
        done = subprocess.run([str(word) for word in (sys.executable, *start, ROOT / "fid.py", *words,
                                                      "--save", tmp_path / f"{name}.npz", "--out", tmp_path / name)],
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("fewer than 2,048") == 2
        printed.append(done.stdout[done.stdout.index("FID"):])
    assert printed[0] == printed[1] and value((0, printed[0], "")) > 0.01
    for i in range(12):
        assert (tmp_path / "one" / f"{i:06d}.png").read_bytes() == (tmp_path / "three" / f"{i:06d}.png").read_bytes()
    one, three = (np.load(tmp_path / f"{name}.npz") for name in ("one", "three"))
    assert one["n"] == three["n"] == 12
    assert all(np.abs(three[key] - one[key]).max() <= 1e-9 * np.abs(one[key]).max() for key in ("mu", "sigma"))


def merge_in_a_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
    for rows in (200, 60):
        running = fid.Running(30)
        for part in torch.from_numpy(np.load(f"{folder}/features.npy")[:rows]).split(37)[rank::3]:
            running.add(part)
        running.merge()
        np.savez(f"{folder}/{rows}-{rank}.npz", n=running.n, **dict(zip(("mu", "sigma"), running.statistics())))
    torch.distributed.destroy_process_group()


def test_the_merge_is_exact(tmp_path):
    """Three processes; of the smaller set's two batches one of them gets none."""
    rng = np.random.default_rng(9)
    features = (100 + rng.standard_normal((200, 30)) @ rng.standard_normal((30, 30))).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    torch.multiprocessing.spawn(merge_in_a_process, (str(tmp_path),), nprocs=3)
    for rows in (200, 60):
        for rank in range(3):
            merged = np.load(tmp_path / f"{rows}-{rank}.npz")
            assert merged["n"] == rows
            for key, whole in zip(("mu", "sigma"), fid.statistics(features[:rows])):
                assert np.abs(merged[key] - whole).max() <= 1e-9 * np.abs(whole).max()


# --- COCO ---

@pytest.fixture
def coco(tmp_path):
    """A val folder of 14 JPEGs of several shapes, and captions of 12 of them."""
    for i in range(14):
        paint(tmp_path / "painted", 1, seed=50 + i, size=(96, 70 + 5 * i))
        (tmp_path / "val").mkdir(exist_ok=True)
        Image.open(tmp_path / "painted" / "0.png").save(tmp_path / "val" / f"{i:012d}.jpg")
    notes = {"images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(12)],
             "annotations": [{"image_id": i, "caption": f"caption {i}"} for i in range(12)]}
    (tmp_path / "captions_val.json").write_text(json.dumps(notes))
    return tmp_path


@pytest.mark.parametrize("protocol, number, side", [("coco2017-5k", "5,000", 512), ("coco2014-30k", "30,000", 256)])
def test_protocols(coco, protocol, number, side, line, command):
    """Both sets come to the protocol's size; the judge, who reads 64 px, refuses it unless --size says otherwise."""
    status, out, err = command("fid.py", coco / "val", coco / "val", "--protocol", protocol, *line)
    assert status == 2 and f"one is {side} x {side}; give --size 64" in err
    line = ["--model", "M", "--captions", coco / "captions_val.json", "--protocol", protocol, coco / "val"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fid.py", *map(str, line)])
        args = fid.arguments()
    assert (args.number, args.size) == (int(number.replace(",", "")), side)


def test_a_protocol_with_too_few_pictures_warns(coco, world, line, tiny, command, plain_convolutions):
    words = ["--model", tiny / "flow", "--captions", coco / "captions_val.json", "--protocol", "coco2017-5k",
             *line, "--size", 64, coco / "val"]
    status, out, err = command("fid.py", *words)
    assert (status == 0 and "--protocol coco2017-5k is of 5,000 pictures, and these are 12" in err
            and "draws 16 px, and its pictures are enlarged to 64" in err)
    assert "12 of" in out and "against 14 of" in out and "at 64 px, coco2017-5k)" in out and "is a JPEG" not in err
    status, out, err = command("fid.py", *words, "--matched")
    assert "against 12 of" in out and "matched" in out
    assert "does not name its pictures" in command(
        "fid.py", *words, "--matched", "--captions", world / "captions.txt")[2]
    (coco / "val" / f"{3:012d}.jpg").unlink()
    assert "lacks the picture 000000000003 (1 in all)" in command("fid.py", *words, "--matched")[2]


# --- mistakes ---

def test_mistakes_in_the_command_line(world, line, command, tmp_path, tiny):
    real = world / "real"
    paint(tmp_path / "wide", 2)
    paint(tmp_path / "one", 1, size=(64, 64))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(24), sigma=np.eye(7))
    np.savez(tmp_path / "keys.npz", mean=np.zeros(24))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "wide.npz").read_bytes()[:300])
    for words, named in [
            ((), "nothing to compare"), ((real,), "nothing to compare"),
            ((real, real, real), "two sets are compared"), ((real, tmp_path / "none"), "none: no such folder"),
            ((real, tmp_path / "none.npz"), "none.npz: no such statistics file"),
            ((real, tmp_path / "wide.npz"), "statistics of 7 features, and the other set has 24"),
            ((tmp_path / "wide.npz", real), "wide.npz holds statistics of 7"),
            ((real, tmp_path / "odd.npz"), "odd.npz holds mu [24] and sigma [7, 7]"),
            ((real, tmp_path / "keys.npz"), "keys.npz is no whole statistics file"),
            ((real, tmp_path / "pickle.npz"), "pickle.npz is no whole"),
            ((real, tmp_path / "cut.npz"), "cut.npz is no whole"),
            ((real, tmp_path / "wide"), "one is 48 x 40; give --size 64"),
            ((real, tmp_path / "one"), "1 picture has no covariance"), ((real, real, "--frobnicate"), "--frobnicate"),
            (("--model", tiny / "flow", real), "need --captions"),
            ((real, real, "--out", tmp_path / "x"), "give --model"),
            ((real, "--save", tmp_path / "x.txt"), "name a .npz file"),
            (("--model", tiny / "flow", "--captions", world / "captions.txt", "--number", 13, real),
             "holds 12 captions, and --number asks for 13"),
            (("--model", tmp_path / "none", "--captions", world / "captions.txt", real), "no such model folder"),
            ((real, real, "--judge", tmp_path), "holds no judge")]:
        status, out, err = command("fid.py", *line, *words)
        last = err[err.rindex("fid.py: "):] if "fid.py: " in err else err
        assert one_line((status, out, last), named) and out == "" and "Traceback" not in err
    assert one_line(command("fid.py", real, real, "--device", "cpu"),
                    "--inception pt_inception-2015-12-05-6726825d.pth: no such file", "https://")


def test_odd_files_in_a_folder_are_named(world, line, command, tmp_path):
    shutil.copytree(world / "real", tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("")
    Image.open(world / "real" / "0.png").save(tmp_path / "mine" / "11.jpg")
    Image.open(world / "real" / "1.png").convert("LA").save(tmp_path / "mine" / "12.png")
    Image.new("L", Image.open(world / "real" / "0.png").size).save(tmp_path / "mine" / "14.png")
    status, out, err = command("fid.py", tmp_path / "mine", world / "real", *line)
    assert status == 0 and "14 of" in out
    for word in ("no pictures: notes.txt\n", "11.jpg is a JPEG", "12.png (and maybe more) has an alpha channel",
                 "14.png (and maybe more) is all black"):
        assert word in err
    (tmp_path / "mine" / "13.png").write_bytes((world / "real" / "0.png").read_bytes()[:200])
    status, out, err = command("fid.py", tmp_path / "mine", world / "real", *line)
    assert (status == 2 and f"fid.py: {tmp_path / 'mine' / '13.png'} is no whole picture" in err
            and "Traceback" not in err)
