"""Kind `mbt` against outputs of the authors' code, and its start from an image ViT."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from timm.layers import GELUTanh
from torch import nn

from fastav.core.errors import UserError
from fastav.model.av_model import AVModel
from fastav.model.fusion import FusionInputs
from fastav.model.fusion.mbt import MBT, MBTFusion
from fastav.model.fusion.mbt_init import copy_image_vit
from fastav.model.scenic_checkpoint import mbt_state
from fastav.model.tower import ClipDropPath, TowerConfig
from fastav.recipe.parse import load_recipe
from tests import ROOT, SHARED

CASES = (
    "gap_bottleneck", "token_bottleneck", "token_bottleneck_rgbfirst", "token_bottleneck_tsample",
    "gap_bottleneck_early", "token_late", "token_crossattn_sepweights", "gap_vanilla_shared",
    "token_bottleneck_shared", "token_bottleneck_rep", "gap_bottleneck_testoff", "token_bottleneck_n1",
    "rgb_only_token", "spec_only_gap", "module_defaults",
)  # fmt: skip
MODALITY = {"spectrogram": "audio", "rgb": "video"}


@pytest.fixture(scope="module")
def parity():
    folder = Path(os.environ.get("FASTAV_PARITY", SHARED / "parity"))
    if not folder.is_dir():
        pytest.skip("no reference outputs here (set FASTAV_PARITY)")
    return np.load(folder / "mbt_small.npz"), json.loads((folder / "mbt_small.json").read_text())


def tree_of(arrays, place):
    return {name.removeprefix(f"{place}/"): arrays[name] for name in arrays.files if name.startswith(f"{place}/")}


def config_of(told):
    """The recipe's settings of one of the authors' configurations."""
    fuses, shares = told.get("use_bottleneck", False), told.get("share_encoder", False)
    order = told.get("modality_fusion", ["spectrogram"])
    sampled = told["temporal_encoding_config"]["method"] == "temporal_sampling"
    return MBT(
        start=told.get("fusion_layer", 0),
        mixing="bottleneck" if fuses else "joint" if shares else "cross",
        tokens=told.get("n_bottlenecks", 4),
        head=told.get("classifier", "gap"),
        shared=shares,
        tubelet=1 if sampled else told["patches"]["size"][2],
        sampled=told["temporal_encoding_config"]["n_sampled_frames"] if sampled else 0,
        patch=told["patches"]["size"][0],
        hidden=told.get("representation_size") or 0,
        order="video_audio" if order[0] == "rgb" else "audio_video",
        evaluate_fused=told.get("test_with_bottlenecks", True),
    )


class Whole(nn.Module):
    """Towers and fusion under the names of a saved model."""

    def __init__(self, config, told, frames_size, mel_size, used):
        super().__init__()
        args = {
            "patch_size": told["patches"]["size"][0], "embed_dim": told["hidden_size"], "depth": told["num_layers"],
            "num_heads": told["num_heads"], "mlp_ratio": told["mlp_dim"] / told["hidden_size"],
            "act_layer": "gelu_tanh", "class_token": False, "global_pool": "avg",
        }  # fmt: skip
        sizes = {"video": frames_size[1:], "audio": (mel_size[1], mel_size[0])}
        self.towers = {
            name: TowerConfig(name="vit_tiny_patch16_224", args=args).build(
                modality=name, input_size=sizes[name], num_classes=0
            )
            for name in used
        }
        self.fusion = MBTFusion(config, told["hidden_size"], told["num_classes"], frames_size, mel_size, used)
        self.fusion.take_blocks(self.towers)
        for name, tower in self.towers.items():
            self.add_module(name, tower)

    def forward(self, rgb, spectrogram):
        streams = FusionInputs(
            rgb.permute(0, 1, 4, 2, 3) if "video" in self.towers else None,
            spectrogram.permute(0, 3, 2, 1).unsqueeze(1) if "audio" in self.towers else None,
        )
        return self.fusion(self.towers.get("video"), self.towers.get("audio"), streams)


def whole(parity, case, dtype=torch.float64):
    arrays, told = parity
    told = told["cases"][case]["config"]
    used = tuple(MODALITY[name] for name in told.get("modality_fusion", ["spectrogram"]))
    rgb, spectrogram = arrays["inputs/rgb"], arrays["inputs/spectrogram"]
    model = Whole(config_of(told), told, rgb.shape[1:4], spectrogram.shape[1:3], used).to(dtype).eval()
    state = mbt_state(tree_of(arrays, f"{case}/params"))
    missing, unknown = model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, strict=False)
    assert not unknown
    assert not [name for name in missing if "blocks" in name or "fusion" in name]
    inputs = [torch.from_numpy(value).to(dtype) for value in (rgb, spectrogram)]
    return model, inputs, used


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_authors_code(parity, case):
    arrays, _ = parity
    model, inputs, used = whole(parity, case)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), torch.from_numpy(arrays[f"{case}/logits_f64"]), rtol=0, atol=1e-10)
        model.train()
        logits = model(*inputs)
    by_name = f"{case}/train_logits_f64"
    if case == "module_defaults":
        pass  # drops out in training, by draws of its own
    elif by_name in arrays.files:
        torch.testing.assert_close(logits, torch.from_numpy(arrays[by_name]), rtol=0, atol=1e-10)
    else:
        names = {"audio": "spectrogram", "video": "rgb"}
        expected = [torch.from_numpy(arrays[f"{by_name}/{names[name]}"]) for name in used]
        logits = logits if logits.ndim == 3 else logits.unsqueeze(1)
        torch.testing.assert_close(logits, torch.stack(expected, 1), rtol=0, atol=1e-10)
    model, inputs, _ = whole(parity, case, torch.float32)
    with torch.no_grad():
        single = model(*inputs)
    torch.testing.assert_close(single, torch.from_numpy(arrays[f"{case}/logits_f32"]).float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", ["gap_bottleneck", "token_bottleneck"])
def test_gradients_are_those_of_the_authors_code(parity, case):
    arrays, _ = parity
    model, inputs, _ = whole(parity, case)
    inputs = [value.requires_grad_() for value in inputs]
    model.train()
    logits = model(*inputs)
    targets = torch.from_numpy(arrays["labels"])
    each = [logits] if logits.ndim == 2 else logits.unbind(1)
    loss = torch.stack([-(targets * one.log_softmax(1)).sum(1).mean() for one in each]).mean()
    assert abs(loss.item() - float(arrays[f"{case}/loss_f64"])) < 1e-10
    loss.backward()
    expected = mbt_state(tree_of(arrays, f"{case}/grads"))
    found = dict(model.named_parameters())
    assert {name for name, value in found.items() if value.grad is not None} == set(expected)
    for name, gradient in expected.items():
        # The reference was rounded to float32.
        torch.testing.assert_close(found[name].grad, gradient.double(), rtol=2e-7, atol=1e-9)
    for name, value in zip(("rgb", "spectrogram"), inputs, strict=True):
        expected_grad = torch.from_numpy(arrays[f"{case}/input_grads/{name}"]).double()
        torch.testing.assert_close(value.grad, expected_grad, rtol=2e-7, atol=1e-9)


def vit_state(tree):
    """An image ViT of the same code, under timm's names."""
    made = mbt_state({name: value for name, value in tree.items() if name.startswith("Transformer/encoderblock")})
    state = {name.removeprefix("video.net."): value for name, value in made.items()}
    state["patch_embed.proj.weight"] = torch.from_numpy(tree["embedding/kernel"].transpose(3, 2, 0, 1).copy())
    state["patch_embed.proj.bias"] = torch.from_numpy(tree["embedding/bias"])
    state["pos_embed"] = torch.from_numpy(tree["Transformer/posembed_input/pos_embedding"])
    state["norm.weight"] = torch.from_numpy(tree["Transformer/encoder_norm/scale"])
    state["norm.bias"] = torch.from_numpy(tree["Transformer/encoder_norm/bias"])
    if "cls" in tree:
        state["cls_token"] = torch.from_numpy(tree["cls"])
    return state


@pytest.mark.parametrize("case", ["init_token", "init_gap"])
def test_the_start_from_an_image_vit_is_that_of_the_authors_code(parity, case):
    arrays, everything = parity
    told = everything[case]
    size, frames = told["image"], told["num_frames"]
    config = config_of(told["config"])
    model = Whole(config, told["config"], (frames, size, size), tuple(told["spec_shape"]), ("audio", "video"))
    before = mbt_state(tree_of(arrays, f"{case}/before"))
    model.load_state_dict(before, strict=False)
    copy_image_vit(model.fusion, model.towers, vit_state(tree_of(arrays, f"{case}/vit")))
    after = mbt_state(tree_of(arrays, f"{case}/after"))
    found = model.state_dict()
    for name, value in after.items():
        torch.testing.assert_close(
            found[name], value.float(), rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def tiny(**changes):
    """Settings, towers and streams of a model of kind `mbt`, and the model."""
    torch.manual_seed(3)
    args = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    tower = TowerConfig(name="vit_tiny_patch16_224", args=args)
    video = tower.build(modality="video", input_size=(16, 16), num_classes=0)
    audio = tower.build(modality="audio", input_size=(16, 24), num_classes=0)
    fusion = MBT(**{"start": 1, "patch": 8} | changes).build(video, audio, 4, 2)
    for parameter in fusion.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    modules = nn.ModuleDict({"video": video, "audio": audio, "fusion": fusion}).double().eval()
    streams = FusionInputs(torch.randn(3, 2, 3, 16, 16).double(), torch.randn(3, 1, 3, 16, 24).double())

    def forward(streams):
        return fusion(video, audio, streams)

    return modules, forward, streams


KINDS = [
    {"mixing": mixing, "head": head, "shared": mixing == "joint"}
    for mixing in ("bottleneck", "cross", "joint")
    for head in ("token", "gap", "gmp")
]


@pytest.mark.parametrize("changes", KINDS, ids=lambda c: f"{c['mixing']}-{c['head']}")
@pytest.mark.parametrize("training", [False, True])
def test_what_a_clip_lacks_does_not_matter(changes, training):
    modules, forward, streams = tiny(**changes)
    modules.train(training)
    lacking = streams._replace(
        has_video_B=torch.tensor([True, False, True]), has_audio_B=torch.tensor([False, True, True])
    )
    frames, mel = streams.frames_BTCHW.clone(), streams.mel_BWCML.clone()
    frames[1] = 9.0
    mel[0] = -9.0
    one, other = forward(lacking), forward(lacking._replace(frames_BTCHW=frames, mel_BWCML=mel))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    whole = forward(streams)
    torch.testing.assert_close(one[2], whole[2], rtol=0, atol=1e-12)
    assert (one[:2] - whole[:2]).abs().max() > 1e-3
    if training and changes["head"] == "token":
        assert one.shape == (3, 2, 4)
        assert torch.equal(one[:2, 0], one[:2, 1])
        assert not torch.equal(one[2, 0], one[2, 1])


def test_the_bottleneck_of_a_clip_with_one_modality_is_that_ones_alone():
    """By hand: the layers of [x || z] for the frames alone, as timm's blocks have them."""
    modules, forward, streams = tiny(head="gap", tubelet=2)
    fusion, blocks = modules["fusion"], modules["video"].blocks
    tokens = fusion.embed["video"](streams.frames_BTCHW.transpose(1, 2)).flatten(2).transpose(1, 2)
    tokens = blocks[0](tokens + fusion.position["video"])
    z = fusion.bottleneck.expand(3, -1, -1)
    args = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    plain = TowerConfig(name="vit_tiny_patch16_224", args=args).build(
        modality="video", input_size=(16, 16), num_classes=0
    )
    plain.double().eval()
    for number in (1, 2):
        plain.blocks[number].load_state_dict(blocks[number].state_dict())
        out = plain.blocks[number](torch.cat([tokens, z], 1))
        tokens, z = out[:, : tokens.shape[1]], out[:, tokens.shape[1] :]
    expected = fusion.head(fusion.norm(tokens).mean(1))
    found = forward(streams._replace(has_video_B=torch.tensor([True] * 3), has_audio_B=torch.tensor([False] * 3)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 4}, "model.fusion.start = 4: the towers have only 3 layers"),
        ({"patch": 7}, "sampling.image_size = 16: expected a multiple of model.fusion.patch ."),
        ({"tubelet": 3}, "sampling.frames = 2: expected a multiple of model.fusion.tubelet ."),
        ({"attention": "spda"}, 'model.fusion.attention: "spda" is unknown; did you mean "sdpa"'),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_the_recipe_is_the_authors_model():
    recipe = load_recipe(ROOT / "launch" / "recipes" / "mbt_b.toml")
    config = msgspec.structs.replace(recipe.model, fusion=msgspec.structs.replace(recipe.model.fusion, image_vit=""))
    frontend = msgspec.structs.replace(recipe.frontend, mean=0.0, std=1.0)
    with torch.device("meta"):
        model = AVModel.build(config, ["a"] * 527, recipe.sampling, frontend)
    lengths = {name: tuple(value.shape) for name, value in model.fusion.position.items()}
    assert lengths == {"audio": (1, 401, 768), "video": (1, 3137, 768)}
    assert model.fusion.bottleneck.shape == (1, 5, 768)
    assert model.fusion.embed["video"].weight.shape == (768, 3, 2, 16, 16)
    assert (len(model.video.blocks), len(model.audio.blocks)) == (12, 12)
    assert isinstance(model.video.blocks[0].mlp.act, GELUTanh)
    assert model.video.blocks[11].drop_path1.rate == pytest.approx(0.3)
    assert not model.video.blocks[11].drop_path1.rescale


def test_stochastic_depth_without_rescaling_keeps_branches_as_they_are():
    drop = ClipDropPath(0.5, rescale=False).train()
    torch.manual_seed(0)
    assert set(drop(torch.ones(64, 1)).unique().tolist()) == {0.0, 1.0}
    assert set(ClipDropPath(0.5).train()(torch.ones(64, 1)).unique().tolist()) == {0.0, 2.0}
