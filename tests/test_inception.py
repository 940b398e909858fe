"""Inception-v3 against pytorch-fid's on the same random weights."""
import numpy as np
import pytest
import torch

from cli import UserError
from conftest import relative_error
from inception import Inception, resize


@pytest.fixture(scope="module")
def ours(their_inception):
    return Inception(their_inception[0])


def smooth(*size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(torch.rand(2, 3, 5, 4, generator=g), size, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("size", [(299, 299), (64, 64), (512, 512), (37, 411)])
def test_features_are_pytorch_fids(ours, their_inception, size):
    images = smooth(*size)
    theirs = their_inception[1](images)[0][:, :, 0, 0]
    assert (theirs[0] - theirs[1]).abs().max() > 0.05 * theirs.abs().max()       # the weights tell pictures apart
    found = ours(images)
    assert found.shape == (2, 2048) and found.dtype == torch.float32 and not found.requires_grad
    assert relative_error(found, theirs) <= 1e-4


def test_memory_order_and_299_px_change_nothing(ours):
    images = smooth(120, 90)
    assert relative_error(ours(images.contiguous(memory_format=torch.channels_last)), ours(images)) < 1e-5
    assert torch.equal(resize(resize(images)), resize(images))
    before = images.clone()
    ours(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.rand(3, 64, 64),
                                    torch.rand(1, 1, 64, 64)])
def test_other_kinds_of_images_are_refused(ours, images):
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\] in \[0, 1\]"):
        ours(images)


def change(name, value):
    def edit(tensors):
        tensors.pop(name, None)
        return tensors | ({} if value is None else {name: value})
    return edit


@pytest.mark.parametrize("edit, named", [
    (change("Mixed_7c.branch_pool.bn.running_var", None), "Mixed_7c.branch_pool.bn.running_var is missing"),
    # the kernel turned
    (change("Mixed_6b.branch7x7_2.conv.weight", torch.zeros(128, 128, 7, 1)), "Mixed_6b.branch7x7_2.conv.weight"),
    (change("AuxLogits.fc.bias", torch.zeros(5)), "unknown tensor AuxLogits.fc.bias"),
    # torchvision's own weights
    (change("fc.weight", torch.zeros(1000, 2048)), "1000 classes"),
])
def test_weights_of_another_network_are_named(their_inception, tmp_path, edit, named):
    torch.save(edit(torch.load(their_inception[0], weights_only=True)), tmp_path / "other.pth")
    with pytest.raises(UserError) as error:
        Inception(tmp_path / "other.pth")
    assert (named in str(error.value) and str(tmp_path / "other.pth") in str(error.value)
            and "fetch https://" in str(error.value))


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_broken_files_are_named_and_no_code_runs(tmp_path, capsys):
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "cut.pth").write_bytes(np.random.default_rng(0).bytes(500))
    for name in ("evil.pth", "cut.pth", "none.pth"):
        with pytest.raises(UserError, match=name):
            Inception(tmp_path / name)
    assert capsys.readouterr().out == ""
