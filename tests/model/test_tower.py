"""Towers: timm's own numbers, what they start from, what stays frozen, stochastic depth per clip."""

import logging
import types

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath, resample_abs_pos_embed
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastav.core.errors import UserError
from fastav.model.tower import ClipDropPath, TowerConfig

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def build(size=(32, 32), classes=5, modality="video", **config):
    config = {"name": "vit_tiny_patch16_224", "args": TINY} | config
    return TowerConfig(**config).build(modality=modality, input_size=size, num_classes=classes)


def images(rows=2, size=(32, 32)):
    return torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_tiny_patch16_224", (128, 400)), ("vit_tiny_patch16_224", (64, 64)), ("resnet18", (128, 400))],
)
def test_without_fusion_the_logits_are_timms_own(name, size, mode):
    tower = build(size, name=name, args={}).train(mode == "train")
    kwargs = {"img_size": size} if name.startswith("vit") else {}
    theirs = timm.create_model(name, num_classes=5, **kwargs).train(mode == "train")
    theirs.load_state_dict(tower.net.state_dict())
    x = images(2, size)
    assert torch.equal(tower.head(tower.features(x)), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(tower.net.buffers(), theirs.buffers(), strict=True))


def test_a_vit_taken_apart_is_the_same():
    tower = build()
    x = tower.embed(images())
    for block in tower.blocks:
        x = block(x)
    assert torch.equal(tower.pool(x), tower.features(images()))
    assert (tower.num_prefix, tower.num_patches, tower.width, tower.is_vit) == (1, 16, 32, True)
    assert not build(name="resnet18", args={}).is_vit
    with pytest.raises(UserError, match=r'model\.video\.name: "resnet18" is not a plain timm ViT'):
        build(name="resnet18", args={}).require_blocks("early")


def test_normalisation_is_timms():
    assert build().mean == (0.5, 0.5, 0.5)
    assert build(name="resnet18", args={}).mean == (0.485, 0.456, 0.406)


def test_stochastic_depth_is_drawn_per_clip():
    drop = ClipDropPath(0.5, rows_per_clip=4).train()
    out = drop(torch.ones(40, 3, 2)).reshape(10, 4, 3, 2)
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))
    assert sorted(out.unique().tolist()) == [0.0, 2.0]
    assert torch.equal(drop.eval()(torch.ones(3, 2)), torch.ones(3, 2))
    torch.manual_seed(3)
    theirs = DropPath(0.3).train()(torch.ones(50, 2))
    torch.manual_seed(3)
    assert torch.equal(ClipDropPath(0.3).train()(torch.ones(50, 2)), theirs)


def test_frames_of_a_clip_drop_the_same_blocks():
    tower = build(drop_path=0.5).train()
    same = images(1).expand(12, -1, -1, -1)
    torch.manual_seed(0)
    features = tower.features(same, rows_per_clip=3).unflatten(0, (4, 3))
    torch.testing.assert_close(features, features[:, :1].expand_as(features))
    torch.manual_seed(0)
    single = tower.features(same)
    assert single.unique(dim=0).shape[0] > 2
    assert [type(m) for m in tower.modules() if isinstance(m, DropPath)] == []


def test_freezing():
    tower = build(freeze=2).train()
    frozen = {name for name, p in tower.net.named_parameters() if not p.requires_grad}
    assert {n.split(".")[0] for n in frozen} == {"cls_token", "pos_embed", "patch_embed", "blocks"}
    assert {n.split(".")[1] for n in frozen if n.startswith("blocks")} == {"0", "1"}
    assert [block.training for block in tower.blocks] == [False, False, True]
    tower.features(images()).sum().backward()
    assert tower.net.pos_embed.grad is None
    assert tower.blocks[2].attn.qkv.weight.grad is not None
    with pytest.raises(UserError, match=r"model\.video\.freeze = 4: .* has only 3 blocks"):
        build(freeze=4)


def test_linear_probe_keeps_batch_norm_as_it_is():
    tower = build(name="resnet18", args={}, freeze=-1).train()
    assert [n for n, p in tower.net.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    before = {name: value.clone() for name, value in tower.net.named_buffers()}
    tower.head(tower.features(images())).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in tower.net.named_buffers())
    assert not any(m.training for m in tower.modules() if isinstance(m, nn.BatchNorm2d))
    partly = build(name="resnet18", args={}, freeze=2).train()
    assert not partly.net.layer1[1].bn1.training
    assert partly.net.layer2[0].bn1.training


def test_weights_file_is_fitted_to_size_and_classes(tmp_path, caplog):
    source = build((64, 32), classes=7)
    path = tmp_path / "square.safetensors"
    square = build((48, 48), classes=7)
    save_file(square.net.state_dict(), path)
    with caplog.at_level(logging.WARNING):
        tower = build((32, 80), weights=str(path))
    assert not caplog.records
    expected = resample_abs_pos_embed(square.net.pos_embed, [4, 10], [6, 6])
    torch.testing.assert_close(tower.net.pos_embed, expected)
    assert torch.equal(tower.net.patch_embed.proj.weight, square.net.patch_embed.proj.weight)
    assert torch.equal(tower.blocks[1].mlp.fc2.bias, square.blocks[1].mlp.fc2.bias)
    assert tower.head(tower.features(images(1, (32, 80)))).shape == (1, 5)
    # 32 patches in no square: the grid cannot be known, which is told.
    save_file(source.net.state_dict(), path)
    with caplog.at_level(logging.WARNING):
        build((32, 80), weights=str(path))
    assert "different shape: pos_embed" in caplog.text


def test_what_a_weights_file_lacks_is_named(tmp_path, caplog):
    state = build().net.state_dict()
    state["blocks.1.norm1.weight"] = torch.zeros(3)
    state["extra"] = torch.zeros(3)
    del state["norm.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with caplog.at_level(logging.WARNING):
        build(weights=str(tmp_path / "part.safetensors"))
    (record,) = caplog.records
    assert record.getMessage() == (
        "model.video.weights: some parameters were not loaded: missing: norm.bias; "
        "different shape: blocks.1.norm1.weight; not in this tower: extra"
    )
    save_file({"other": torch.zeros(3)}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="none of its 1 tensors fits"):
        build(weights=str(tmp_path / "none.safetensors"))


def test_class_token_of_the_weights_may_be_dropped_and_patches_resampled(tmp_path):
    given = build()
    save_file(given.net.state_dict(), tmp_path / "cls.safetensors")
    args = TINY | {"class_token": False, "global_pool": "avg", "fc_norm": False}
    tower = build(args=args, weights=str(tmp_path / "cls.safetensors"))
    assert torch.equal(tower.net.pos_embed, given.net.pos_embed[:, 1:])
    coarse = build((64, 64), args=TINY | {"patch_size": 16}, weights=str(tmp_path / "cls.safetensors"))
    assert coarse.net.patch_embed.proj.weight.shape[-1] == 16
    assert torch.equal(coarse.net.pos_embed, given.net.pos_embed)


def test_what_cannot_be_started_from(tmp_path):
    with pytest.raises(UserError, match=r'model\.video\.weights: ".*none\.safetensors": no such file'):
        build(weights=str(tmp_path / "none.safetensors"))
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is not a \.safetensors file"):
        build(weights=str(tmp_path / "x.pth"))
    (tmp_path / "x.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="cannot be read"):
        build(weights=str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="weights and init_from are both set"):
        build(weights="timm", init_from="run")
    with pytest.raises(UserError, match=r"has no model\.json"):
        build(init_from=str(tmp_path))


def test_timm_weights_that_cannot_be_fetched(monkeypatch):
    def offline(name, *, pretrained=False, **kwargs):
        assert pretrained
        raise OSError("no\nnetwork")

    monkeypatch.setattr("fastav.model.tower.timm.create_model", offline)
    with pytest.raises(UserError, match=r'weights of "resnet18" could not be loaded \(no network\)'):
        build(name="resnet18", args={}, weights="timm")


def test_misspelt_names_and_arguments():
    with pytest.raises(UserError, match=r'"vit_bsae_patch16_224" is not a model of timm .*mean "vit_base_patch16_224"'):
        build(name="vit_bsae_patch16_224")
    with pytest.raises(UserError, match=r"model\.audio\.args: .*'dephth'; did you mean \"depth\""):
        build(args={"dephth": 3}, modality="audio")
    with pytest.raises(UserError, match=r"model\.video\.args\.img_size: cannot be given here; the size follows from"):
        build(args={"img_size": 64})
    for changes in ({"name": "deit_tiny_distilled_patch16_224"}, {"args": TINY | {"global_pool": ""}}):
        with pytest.raises(UserError, match="has several heads or no pooling"):
            build(**changes)
    with pytest.raises(UserError, match="Token pooling needs the class token"):
        build(args=TINY | {"class_token": False})


class Brightness(nn.Module):
    """The least that a network of one's own needs."""

    num_features = 3

    def __init__(self, input_size, num_classes, scale):
        super().__init__()
        self.size, self.scale = input_size, scale
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(3, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x):
        return x * self.scale

    def forward_head(self, x, pre_logits=False):
        x = self.mean(x).flatten(1)
        return x if pre_logits else self.fc(x)

    def get_classifier(self):
        return self.fc


def test_a_network_of_ones_own(monkeypatch):
    module = types.ModuleType("brightness_towers")
    module.make, module.bad = Brightness, lambda input_size, num_classes: nn.Linear(1, 1)
    monkeypatch.setitem(__import__("sys").modules, "brightness_towers", module)
    tower = build(name="brightness_towers:make", args={"scale": 2.0}, freeze=-1)
    x = images()
    assert torch.equal(tower.head(tower.features(x)), tower.net.fc((2 * x).mean((2, 3), keepdim=True).flatten(1)))
    assert tower.net.size == (32, 32)
    assert tower.feature_flops() == 0
    for config, message in [
        ({"name": "brightness_towers:made"}, r'has no "made"; did you mean "make"'),
        ({"name": "no_such_module:make"}, r"cannot import .*: No module named 'no_such_module'"),
        ({"name": "brightness_towers:make", "args": {}}, "missing 1 required positional argument: 'scale'"),
        ({"name": "brightness_towers:make", "weights": "timm"}, "is not a timm model"),
        ({"name": "brightness_towers:bad", "args": {}}, "has no forward_features, which a tower needs"),
        ({"name": "brightness_towers:make", "args": {"scale": 1.0}, "freeze": 1}, r"no group_matcher\(\)"),
    ]:
        with pytest.raises(UserError, match=message):
            build(**config)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", TINY),
        ("vit_tiny_patch16_224", TINY | {"global_pool": "map"}),
        ("vit_tiny_patch16_224", TINY | {"global_pool": "avg", "class_token": False, "reg_tokens": 2}),
        ("resnet18", {}),
    ],
)
def test_flops_are_pytorchs_count(name, args):
    tower = build((32, 80), name=name, args=args).eval().requires_grad_(False)  # the counter wants none
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        tower.head(tower.features(images(3, (32, 80))))
    assert 3 * (tower.feature_flops() + tower.head_flops()) == pytest.approx(counter.get_total_flops(), rel=0.01)
