import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from cli import UserError
from conftest import relative_error

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("our_lpips", ROOT / "lpips.py")          # the peer has the same name
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)

WIDTHS = (4, 6, 8, 8, 10)                                  # a narrow trunk's, a block each


def import_peer():
    """The lpips package, whose name our module has too: imported where ours cannot be seen, and forgotten again."""
    path, hidden = sys.path[:], {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == "lpips"}
    sys.path[:] = [p for p in path if Path(p).resolve() != ROOT]
    try:
        peer = importlib.import_module("lpips")
        assert Path(peer.__file__).parent.name == "lpips"
        return peer
    finally:
        sys.path[:] = path
        for name in [k for k in sys.modules if k.split(".")[0] == "lpips"]:
            del sys.modules[name]
        sys.modules.update(hidden)


def trunk(widths, seed=0):
    """Random weights under VGG16's keys, wide enough spread that all depths count."""
    torch.manual_seed(seed)
    tensors, channels = {}, 3
    for block, width in zip(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), widths):
        for i in block:
            tensors[f"features.{i}.weight"] = torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            tensors[f"features.{i}.bias"] = 0.1 * torch.randn(width)
            channels = width
    return tensors


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """torchvision's VGG16 with random weights, but for its three linear layers -> (features, the file of their
    weights)."""
    torch.manual_seed(0)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}
               | {"classifier.6.bias": torch.zeros(1000)}, path)
    return features, path


@pytest.fixture(scope="module")
def peer(vgg):
    """(the package's LPIPS with these weights, the file of layer weights that ships in the package)."""
    package, whole = import_peer(), torchvision.models.vgg16
    # spares it 120 million numbers it drops
    torchvision.models.vgg16 = lambda pretrained: types.SimpleNamespace(features=vgg[0])
    try:
        net = package.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    finally:
        torchvision.models.vgg16 = whole
    path = Path(package.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    layers = torch.load(path, map_location="cpu", weights_only=True)
    net.load_state_dict(layers, strict=False)
    assert all(torch.equal(net.lins[k].model[1].weight, layers[f"lin{k}.model.1.weight"]) for k in range(5))
    return net, path


def test_the_peer_reads_the_same_trunk(vgg, peer):
    """Else the comparisons below would compare something else."""
    theirs = {k.split(".", 1)[1]: v for k, v in peer[0].net.state_dict().items()}
    assert theirs.keys() == {k.removeprefix("features.") for k in trunk([1] * 5)}
    assert all(torch.equal(v, vgg[0].state_dict()[k]) for k, v in theirs.items())


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (33, 50), (16, 16)], ids=str)
def test_distance_is_the_packages(vgg, peer, size):
    a, b = torch.rand(2, 2, 3, *size) * 2 - 1
    b[1] = (a[1] + 0.02 * b[1]).clamp(-1, 1)               # one pair far, one near
    wanted = peer[0](a, b).flatten()
    assert wanted[1] < wanted[0] / 3
    distance = ours.LPIPS(vgg[1], peer[1])
    got = distance(a, b)
    assert got.shape == (2,)
    # each by its own size: the far pair must not hide the near one
    for i in range(2):
        assert relative_error(got[i], wanted[i]) <= 1e-5
    assert torch.equal(distance(b, a), got)


def test_gradient_is_the_packages(vgg, peer):
    a, b = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    gradients = []
    for distance in (ours.LPIPS(vgg[1], peer[1]), peer[0]):
        x = a.clone().requires_grad_()
        distance(x, b).sum().backward()
        gradients.append(x.grad)
    assert relative_error(*gradients) <= 1e-4


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow") / "judge.safetensors"
    save_file(trunk(WIDTHS) | {"head.weight": torch.zeros(3)}, path)
    return path


@torch.no_grad()
def test_without_layer_weights_all_channels_count_alike(narrow):
    """By hand, straight from section 3's equation 1 with w = 1/C, on a trunk run layer by layer."""
    tensors, distance = trunk(WIDTHS), ours.LPIPS(narrow)
    a, b = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([-.030, -.088, -.188]), torch.tensor([.458, .448, .450])
    wanted = torch.zeros(3, dtype=torch.float64)
    x, y = (((z.permute(0, 2, 3, 1) - shift) / scale).permute(0, 3, 1, 2).double() for z in (a, b))
    for i in range(31):
        if f"features.{i}.weight" in tensors:
            weight, bias = (tensors[f"features.{i}.{k}"].double() for k in ("weight", "bias"))
            x, y = (torch.conv2d(z, weight, bias, padding=1).clamp(min=0) for z in (x, y))
        elif i in (4, 9, 16, 23):
            x, y = (torch.max_pool2d(z, 2, 2) for z in (x, y))
        if i in (3, 8, 15, 22, 29):                        # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            x1, y1 = (z / z.norm(dim=1, keepdim=True).clamp(min=1e-12) for z in (x, y))
            wanted += (x1 - y1).square().mean((1, 2, 3))
    assert wanted.min() > 1e-3
    assert relative_error(distance(a, b).double(), wanted) <= 1e-5


def test_a_narrow_trunk_keeps_its_widths_and_is_frozen(narrow):
    distance = ours.LPIPS(narrow)
    assert [distance.features[str(i)].out_channels for i in (2, 7, 14, 21, 28)] == list(WIDTHS)
    assert not any(p.requires_grad for p in distance.parameters())
    assert distance(*torch.rand(2, 5, 3, 16, 16)).shape == (5,)


@pytest.mark.parametrize("suffix, dtype", [("pth", torch.float32), ("safetensors", torch.float16)])
def test_kinds_of_file(narrow, tmp_path, suffix, dtype):
    tensors = {k: v.to(dtype) for k, v in trunk(WIDTHS).items()}
    path = tmp_path / f"w.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    a, b = torch.rand(2, 1, 3, 16, 16)
    got = ours.LPIPS(path)(a, b)
    assert got.dtype == torch.float32
    assert relative_error(got, ours.LPIPS(narrow)(a, b)) <= (1e-7 if dtype == torch.float32 else 1e-2)


# gradients

def gradient(distance, a, b):
    a = a.clone().requires_grad_()
    value = distance(a, b)
    value.sum().backward()
    return value.detach(), a.grad


def test_equal_images_have_distance_and_gradient_zero(narrow):
    a = torch.rand(2, 3, 32, 32) * 2 - 1
    value, grad = gradient(ours.LPIPS(narrow), a, a)
    assert torch.equal(value, torch.zeros(2)) and torch.equal(grad, torch.zeros_like(a))


@pytest.mark.parametrize("dead", [0, 24, 28], ids="features.{}".format)
def test_gradient_is_finite_where_features_are_zero(tmp_path, dead):
    """The root's slope at zero is infinite: the package's eps, outside the root, leaves NaN here."""
    tensors = trunk(WIDTHS)
    # no unit of this layer ever fires
    tensors[f"features.{dead}.bias"] = torch.full_like(tensors[f"features.{dead}.bias"], -1e4)
    save_file(tensors, tmp_path / "w.safetensors")
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    for other in (a, b):
        value, grad = gradient(ours.LPIPS(tmp_path / "w.safetensors"), a, other)
        assert value.isfinite().all() and grad.isfinite().all()
    assert grad.abs().max() > 0 or dead == 0               # the layers before still say which way


def test_gradient_is_finite_where_some_positions_are_zero(tmp_path):
    tensors = {k: v if k.endswith("weight") else torch.full_like(v, -0.3) for k, v in trunk(WIDTHS).items()}
    save_file(tensors, tmp_path / "w.safetensors")
    distance = ours.LPIPS(tmp_path / "w.safetensors")
    a, b = torch.rand(2, 2, 3, 32, 32) * 0.5
    silent = [(m == 0).all(1).float().mean().item() for m in distance.maps(a)]
    assert any(0 < s < 1 for s in silent), silent          # some positions silent, some not
    value, grad = gradient(distance, a, b)
    assert value.isfinite().all() and grad.isfinite().all() and grad.abs().max() > 0


# files that are something else

def without(key):
    tensors = trunk(WIDTHS)
    del tensors[key]
    return tensors


WRONG = {
    "nothing.pth": None,
    "nothing.safetensors": None,
    "empty.pth": b"",
    "empty.safetensors": b"",
    "text.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "text.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "one layer short.safetensors": without("features.12.weight"),
    "no bias.pth": without("features.0.bias"),
    "wide kernel.safetensors": trunk(WIDTHS) | {"features.0.weight": torch.zeros(4, 3, 5, 5)},
    "channels do not meet.safetensors": trunk(WIDTHS) | {"features.2.weight": torch.zeros(4, 7, 3, 3)},
    "bias too long.safetensors": trunk(WIDTHS) | {"features.2.bias": torch.zeros(9)},
    "a vector.safetensors": trunk(WIDTHS) | {"features.2.weight": torch.zeros(9)},
    "grey.safetensors": trunk(WIDTHS) | {"features.0.weight": torch.zeros(4, 1, 3, 3)},
    "a tensor.pth": torch.zeros(3),
    "a list.pth": [torch.zeros(3)],
    "no tensors.pth": dict.fromkeys(trunk(WIDTHS), "text"),
    "a module.pth": nn.Linear(1, 1),                       # a pickle that could run code
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_trunk_is_one_line(tmp_path, name):
    content, path = WRONG[name], tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path) if name.endswith("safetensors") else torch.save(content, path)
    with pytest.raises(UserError) as error:
        ours.LPIPS(path)
    assert (str(path) in str(error.value) and "\n" not in str(error.value)
            and len(str(error.value)) < len(str(path)) + 250)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_cut_trunk_and_a_folder_are_one_line(narrow, tmp_path, name):
    torch.save(trunk(WIDTHS), tmp_path / "w.pth")
    save_file(trunk(WIDTHS), tmp_path / "w.safetensors")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:len(whole) // 2])
    (tmp_path / "folder.d" / name).mkdir(parents=True)
    for path in (tmp_path / name, tmp_path / "folder.d" / name):
        with pytest.raises(UserError) as error:
            ours.LPIPS(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "a red circle\na blue square\n", "<html>not found</html>"])
def test_a_text_is_no_trunk(tmp_path, text):
    """Whatever torch's reader of pickles makes of it."""
    (tmp_path / "w.pth").write_text(text)
    with pytest.raises(UserError, match="w.pth is no whole file of tensors .*fetch it again") as error:
        ours.LPIPS(tmp_path / "w.pth")
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_layer_weights_of_another_trunk_are_one_line(narrow, peer):
    with pytest.raises(UserError, match=r"vgg\.pth: lin0\.model\.1\.weight is missing or not \[1, 4, 1, 1\]") as error:
        ours.LPIPS(narrow, peer[1])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="lin0"):
        ours.LPIPS(narrow, narrow)                         # a trunk where layer weights belong
