"""k-means codes by hand and DALL-E's encoder from a file that nothing of is run."""

import os
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from simla_ray.config.schema import Vision
from simla_ray.errors import UserError
from simla_ray.models.dvae import CODES, DalleEncoder
from simla_ray.models.vision import VisionTower
from simla_ray.models.visual_codes import PatchCodes


def test_pixel_codes_are_the_nearest_centroids():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 3, 8, 12), dtype=np.uint8)
    centroids = rng.random((5, 3 * 16)).astype(np.float32)
    got = PatchCodes(torch.from_numpy(centroids), 4)(torch.from_numpy(image))
    assert got.shape == (2, 6) and got.dtype == torch.int64
    for c in range(2):
        for p in range(6):
            r, k = divmod(p, 3)
            patch = image[c, :, 4 * r : 4 * r + 4, 4 * k : 4 * k + 4].reshape(-1) / 255  # channel, row, column
            distance = ((patch - centroids) ** 2).sum(1)
            assert got[c, p] == distance.argmin()


def test_a_towers_patch_features_are_frozen():
    config = Vision(
        timm="vit_tiny_patch16_224", pretrained=False, image_px=16, patch_px=8, width=16, depth=1, heads=2, mlp_ratio=2
    )
    codes = PatchCodes(torch.randn(4, 16), 8, VisionTower(config, maskable=False))
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = codes.features(image)
    assert features.shape == (2, 4, 16) and not features.requires_grad
    distance = torch.cdist(features, codes.centroids)
    assert torch.equal(codes(image), distance.argmin(-1))
    assert not any(p.requires_grad for p in codes.parameters())


def test_codes_do_not_depend_on_autocast():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)
    codes = PatchCodes(torch.rand(64, 192), 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = codes(image)
    assert torch.equal(low, codes(image))


class Small(DalleEncoder):
    """The same graph at width 8; the real one has 54 M parameters."""

    def __init__(self):
        super().__init__(width=8)


def random_state():
    torch.manual_seed(0)
    shapes = {n: t.shape for n, t in Small().state_dict().items()}
    return {n: torch.randn(s) / s[1:].numel() ** 0.5 if len(s) > 1 else torch.zeros(s) for n, s in shapes.items()}


IMAGE = torch.randint(0, 256, (2, 3, 2, 2), generator=torch.Generator().manual_seed(1)).repeat_interleave(8, 2)
IMAGE = IMAGE.repeat_interleave(8, 3).to(torch.uint8)  # a colour per code


def official(state, image):
    """The published definition with torch functions: 7x7 input, four groups of residual blocks, three poolings."""
    conv = torch.nn.functional.conv2d
    x = image.float() / 255 * (1 - 2 * 0.1) + 0.1
    x = conv(x, state["blocks.input.w"], state["blocks.input.b"], padding=3)
    for g in (1, 2, 3, 4):
        for b in (1, 2):
            at = f"blocks.group_{g}.block_{b}."
            y = x
            for i, pad in ((1, 1), (2, 1), (3, 1), (4, 0)):
                w, bias = state[f"{at}res_path.conv_{i}.w"], state[f"{at}res_path.conv_{i}.b"]
                assert w.shape[-1] == 2 * pad + 1
                y = conv(y.relu(), w, bias, padding=pad)
            if f"{at}id_path.w" in state:
                x = conv(x, state[f"{at}id_path.w"], state[f"{at}id_path.b"])
            x = x + y / 64  # gain 1 / (4 groups x 2 blocks)^2
        if g < 4:
            x = torch.nn.functional.max_pool2d(x, 2)
    logits = conv(x.relu(), state["blocks.output.conv.w"], state["blocks.output.conv.b"])
    return logits.argmax(1).flatten(1)


def test_the_graph_is_the_published_one():
    state = random_state()
    encoder = Small()
    encoder.load_state_dict(state)
    got = encoder(IMAGE)
    assert got.shape == (2, 4) and int(got.max()) < CODES
    assert torch.equal(got, official(state, IMAGE))
    assert len(got.unique()) > 1


@pytest.fixture
def fake_dall_e(monkeypatch):
    """Modules with the released package's names; the classes in them are what the weight file pickles."""
    package = types.ModuleType("dall_e")
    encoder, utils = types.ModuleType("dall_e.encoder"), types.ModuleType("dall_e.utils")

    def cls(module, name):
        made = type(name, (nn.Module,), {"__module__": module.__name__})
        setattr(module, name, made)
        return made

    kinds = cls(encoder, "Encoder"), cls(encoder, "EncoderBlock"), cls(utils, "Conv2d")
    for module in (package, encoder, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return kinds


def pickled_like_the_release(state, kinds):
    """A tree of the released classes with their extra attributes: sizes, flags, a device."""
    Encoder, Block, Conv2d = kinds

    def conv(at):
        made = Conv2d()
        made.w, made.b = nn.Parameter(state[f"{at}.w"]), nn.Parameter(state[f"{at}.b"])
        made.n_in, made.kw, made.use_float16, made.device = 3, 3, True, torch.device("cpu")
        return made

    def block(at):
        made = Block()
        made.n_in, made.post_gain, made.device, made.requires_grad = 8, 1 / 64, torch.device("cpu"), False
        made.id_path = conv(f"{at}.id_path") if f"{at}.id_path.w" in state else nn.Identity()
        layers = OrderedDict()
        for i in (1, 2, 3, 4):
            layers[f"relu_{i}"], layers[f"conv_{i}"] = nn.ReLU(), conv(f"{at}.res_path.conv_{i}")
        made.res_path = nn.Sequential(layers)
        return made

    groups = OrderedDict(input=conv("blocks.input"))
    for g in (1, 2, 3, 4):
        layers = OrderedDict((f"block_{b}", block(f"blocks.group_{g}.block_{b}")) for b in (1, 2))
        if g < 4:
            layers["pool"] = nn.MaxPool2d(kernel_size=2)
        groups[f"group_{g}"] = nn.Sequential(layers)
    groups["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv("blocks.output.conv")))
    encoder = Encoder()
    encoder.n_hid, encoder.vocab_size, encoder.device = 8, CODES, torch.device("cpu")
    encoder.blocks = nn.Sequential(groups)
    return encoder


def test_a_pickled_module_is_read_without_its_classes(tmp_path, fake_dall_e, monkeypatch):
    state, path = random_state(), tmp_path / "encoder.pkl"
    torch.save(pickled_like_the_release(state, fake_dall_e), path)
    for name in ("dall_e", "dall_e.encoder", "dall_e.utils"):
        monkeypatch.delitem(sys.modules, name)
    encoder = Small.load(path)
    assert torch.equal(encoder(IMAGE), official(state, IMAGE))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_safetensors_and_state_dicts_work_too(tmp_path):
    state = random_state()
    save_file(state, tmp_path / "encoder.safetensors")
    torch.save(state, tmp_path / "encoder.pt")
    for name in ("encoder.safetensors", "encoder.pt"):
        assert torch.equal(Small.load(tmp_path / name)(IMAGE), official(state, IMAGE))


def test_half_precision_weights_are_widened(tmp_path):
    save_file({n: t.half() for n, t in random_state().items()}, tmp_path / "encoder.safetensors")
    assert next(Small.load(tmp_path / "encoder.safetensors").parameters()).dtype == torch.float32


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("plain", [True, False])
def test_a_file_that_runs_commands_is_refused_and_not_run(tmp_path, plain):
    marker, path = tmp_path / "was_run", tmp_path / "encoder.pkl"
    if plain:
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save({"w": torch.zeros(1), "x": Evil(marker)}, path)
    with pytest.raises(UserError, match=r"codes\.source"):
        Small.load(path)
    assert not marker.exists()


def test_other_wrong_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"codes\.source.*not a file"):
        Small.load(tmp_path / "missing.pkl")
    (tmp_path / "noise.pkl").write_bytes(b"\x00\x01 not a pickle")
    torch.save({"blocks.input.w": torch.zeros(2)}, tmp_path / "short.pt")
    for name in ("noise.pkl", "short.pt"):
        with pytest.raises(UserError):
            Small.load(tmp_path / name)


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    (tmp_path / "noise.safetensors").write_bytes(b"\x00\x01 nor this")
    with pytest.raises(UserError):
        Small.load(tmp_path / "noise.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(2),
        {"a": "text"},
        {"state": {"b": torch.zeros(1)}},
    ],
)
def test_harmless_pickles_of_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError):
        Small.load(tmp_path / "other.pt")
