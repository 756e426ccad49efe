"""The image tower against plain timm, and that masked patches cannot be seen."""

import pytest
import timm
import torch

from simla_ray.config.schema import Vision
from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_vit, save_tensors
from simla_ray.models.fit import resize_positions
from simla_ray.models.vision import MEAN, STD, VisionTower

PX, PATCH = 32, 8  # 4 x 4 patches


def tower(stem="patch", maskable=True, **changes):
    torch.manual_seed(0)
    shape = {"image_px": PX, "patch_px": PATCH, "width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
    config = Vision(timm="vit_tiny_patch16_224", pretrained=False, stem=stem, **{**shape, **changes})
    built = VisionTower(config, maskable=maskable).eval()
    if maskable:
        torch.nn.init.normal_(built.mask_token)
    return built


def pictures(B=3):
    return torch.randint(0, 256, (B, 3, PX, PX), dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_without_a_mask_it_is_timms_forward_features(stem):
    t, image = tower(stem), pictures()
    normal = (image.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = t.vit.forward_features(normal.float())
    got = t(image)
    assert got.shape == (3, 17, 16)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(t(normal.float()), expected)  # float is taken as already normalised


@torch.no_grad()
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_an_empty_mask_is_no_mask(stem):
    t, image = tower(stem), pictures()
    torch.testing.assert_close(t(image, torch.zeros(3, 16, dtype=torch.bool)), t(image))


@torch.no_grad()
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_pixels_of_masked_patches_do_not_leak(stem):
    t, image = tower(stem), pictures(2)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [0, 5, 6, 11]] = True
    mask[1, 15] = True
    before = t(image, mask)
    inside = mask.view(2, 4, 4).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None].expand_as(image)
    changed = torch.where(inside, 255 - image, image)
    assert torch.equal(t(changed, mask), before)
    assert not torch.allclose(t(changed), t(image))
    outside = torch.where(inside, image, 255 - image)
    assert not torch.allclose(t(outside, mask), before)


@torch.no_grad()
def test_the_mask_token_replaces_the_patch_before_positions():
    """x (1 - w) + token w, then class token and positions, patch (r, c) at row-major index."""
    t, image = tower(), pictures(1)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 6] = True  # row 1, column 2
    normal = (image - t.mean) / t.std
    x = t.vit.patch_embed(normal)
    patch = normal[:, :, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH]
    by_hand = (t.vit.patch_embed.proj.weight * patch).sum((1, 2, 3)) + t.vit.patch_embed.proj.bias
    torch.testing.assert_close(x[0, 6], by_hand, atol=1e-4, rtol=1e-4)
    x[0, 6] = t.mask_token[0, 0]
    x = torch.cat([t.vit.cls_token, x], 1) + t.vit.pos_embed
    expected = t.vit.norm(t.vit.blocks(x))
    torch.testing.assert_close(t(image, mask), expected)


def test_the_mask_token_starts_at_zero_and_is_only_there_when_needed():
    built = VisionTower(Vision(timm="vit_tiny_patch16_224", pretrained=False, image_px=32, patch_px=8), maskable=True)
    assert built.mask_token.shape == (1, 1, 192) and (built.mask_token == 0).all()
    assert built.width == 192
    assert tower(maskable=False).mask_token is None


def test_rows_do_not_see_each_other():
    t, image = tower().train(), pictures(3)
    with torch.no_grad():
        torch.testing.assert_close(t(image)[1:2], t(image[1:2]), atol=1e-5, rtol=1e-5)


def test_normalisation_is_not_part_of_the_state():
    assert not {"mean", "std"} & tower().state_dict().keys()


@pytest.mark.parametrize("name", ["resnet18", "no_such_model", "vit_small_patch14_reg4_dinov2"])
def test_other_models_are_refused(name):
    with pytest.raises(UserError, match=r"vision\.timm"):
        VisionTower(Vision(timm=name, pretrained=False, image_px=32, patch_px=8), maskable=False)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="vision"):
        tower(heads=5)


def timm_file(path, grid=4):
    """Weights as timm and DeiT give them away: with a classifier, in a .pth under ``model``."""
    shape = {"img_size": grid * PATCH, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    torch.manual_seed(1)
    state = timm.create_model("vit_tiny_patch16_224", **shape).state_dict()
    if path.suffix == ".safetensors":
        save_tensors(state, path)
    else:
        torch.save({"model": state, "epoch": 3}, path)
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors"])
def test_weights_from_a_file_are_all_there(name, tmp_path):
    state, t = timm_file(tmp_path / name), tower(weights=tmp_path / name)
    assert not torch.equal(t.vit.state_dict()["pos_embed"], state["pos_embed"])  # a model alone reads no file
    load_vit(t, tmp_path / name)
    assert t.vit.state_dict().keys() == state.keys()
    for key, tensor in t.vit.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_positions_of_another_grid_are_resized(tmp_path):
    state, t = timm_file(tmp_path / "vit.pth", grid=7), tower()
    load_vit(t, tmp_path / "vit.pth")
    assert torch.equal(t.vit.state_dict()["pos_embed"], resize_positions(state["pos_embed"], 4))


def test_a_file_that_does_not_fit_is_one_error_that_says_what(tmp_path):
    timm_file(tmp_path / "vit.pth")
    with pytest.raises(
        UserError, match=r"vision\.weights: .*vit\.pth: does not fit this run; missing 12 .*vision\.depth"
    ):
        load_vit(tower(depth=3), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"unknown 12 "):
        load_vit(tower(depth=1), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"of another shape"):
        load_vit(tower(patch_px=4), tmp_path / "vit.pth")
    (tmp_path / "vit.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"vit\.pth: no checkpoint that can be read"):
        load_vit(tower(), tmp_path / "vit.pth")
