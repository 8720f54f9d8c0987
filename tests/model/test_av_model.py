"""The whole model: a batch in, logits out; saving and loading; towers that start from other runs."""

import copy
import json
import logging
import shutil

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastav.core.errors import UserError
from fastav.data.plan import Sampling
from fastav.media.spectrogram import Frontend
from fastav.model.av_model import AVModel, Inputs, Model
from fastav.model.fusion import MBT, Audio, Bottleneck, Early, Late, Score, Video
from fastav.model.tower import ClipDropPath, TowerConfig

B, T, W = 4, 2, 3
ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TINY = TowerConfig(name="vit_tiny_patch16_224", args=ARGS)
SAMPLING = Sampling(frames=T, image_size=16, window=24)
FRONTEND = Frontend(num_mels=16, mean=-40.0, std=20.0)
CLASSES = ("coot", "crow", "gull")
FUSIONS = [
    Video(), Audio(), Late(), Score(), Early(), Bottleneck(start=1, frames="shared"), MBT(start=1, patch=8),
]  # fmt: skip


def make(fusion, classes=CLASSES, sampling=SAMPLING, **towers):
    torch.manual_seed(0)
    config = Model(video=towers.get("video", TINY), audio=towers.get("audio", TINY), fusion=fusion)
    inputs = Inputs(frames=sampling.frames, image_size=sampling.image_size, num_mels=16, window=sampling.window)
    return AVModel(config, classes, inputs, FRONTEND)


def batch(channels=1, windows=W):
    generator = torch.Generator().manual_seed(2)
    frames = torch.randint(0, 256, (B, T, 3, 16, 16), generator=generator, dtype=torch.uint8)
    mel = torch.randn(B, windows, channels, 16, 24, generator=generator) * 20 - 40
    window = torch.ones(B, windows, dtype=torch.bool)
    window[1, 1:] = False
    return frames, mel, window, torch.tensor([True, True, False, True]), torch.tensor([True, False, True, True])


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: type(f).__name__)
def test_logits_of_a_batch(fusion):
    model = make(fusion).eval()
    frames, mel, window, has_video, has_audio = batch()
    logits = model(frames, mel, window, has_video, has_audio)
    assert logits.shape == (B, 3)
    assert logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        low = model(frames, mel, window, has_video, has_audio)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, logits, rtol=0.1, atol=0.05)
    # A clip's logits do not depend on what stands where its windows are not real.
    mel[1, 1:] = 7.0
    torch.testing.assert_close(model(frames, mel, window, has_video, has_audio), logits)
    assert model.modalities == fusion.modalities
    assert "PyTorch" in model.attention("bf16")


def test_single_modality_models_ignore_the_other():
    frames, mel, window, has_video, has_audio = batch()
    video, audio = make(Video()).eval(), make(Audio()).eval()
    assert video.audio is None
    assert audio.video is None
    assert torch.equal(video(frames), video(frames, mel, window, has_video, has_audio))
    assert torch.equal(audio(None, mel, window), audio(frames, mel, window, has_video, has_audio))
    with pytest.raises(ValueError, match="mel_BWCML is required"):
        audio(frames)
    with pytest.raises(ValueError, match="frames_BTCHW is required"):
        video(None, mel)


def test_the_first_operation_normalises():
    frames, mel, *_ = batch()
    video, audio = make(Video()).eval(), make(Audio()).eval()
    images = (frames[:, 0].float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(video(frames[:, :1]), video.video.net(images))
    spectrogram = ((mel[:, 0] + 40) / 20).expand(-1, 3, -1, -1)
    torch.testing.assert_close(audio(None, mel[:, :1]), audio.audio.net(spectrogram))
    torch.testing.assert_close(audio(None, mel.expand(-1, -1, 3, -1, -1)), audio(None, mel))


def test_masked_bands_do_not_matter():
    model = make(Audio()).eval()
    _, mel, window, *_ = batch()
    band = torch.tensor([[2, 5], [0, 0], [0, 16], [10, 3]])
    out = model(None, mel, window, None, None, band)
    other = mel.clone()
    other[0, :, :, 2:7] = 3.0
    other[2] = 3.0
    torch.testing.assert_close(model(None, other, window, None, None, band), out)
    assert not torch.allclose(model(None, mel, window)[0], out[0])


def test_mixup():
    model = make(Bottleneck(start=1, frames="mean")).eval()
    frames, mel, *_ = batch(windows=1)
    everything = torch.ones(B, dtype=torch.bool)
    partner = torch.tensor([1, 0, 3, 2])
    none, whole = torch.ones(B), torch.zeros(B)
    plain = model(frames, mel)
    torch.testing.assert_close(model(frames, mel, None, everything, everything, None, none, partner), plain)
    swapped = model(frames, mel, None, everything, everything, None, whole, partner)
    torch.testing.assert_close(swapped, plain[partner])
    # A clip without sound hears its partner's share.
    quiet = torch.tensor([True, False, True, True])
    mixed = model(frames, mel, None, everything, quiet, None, none * 0.6, partner)
    both = model(frames, mel, None, everything, everything, None, none * 0.6, partner)
    torch.testing.assert_close(mixed, both)
    alone = model(frames, mel, None, everything, quiet, None, none, partner)
    assert not torch.allclose(alone[1], plain[1])


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: type(f).__name__)
def test_saved_models_load_again(fusion, tmp_path):
    model = make(fusion).eval()
    model.save(tmp_path / "run" / "model")
    again = AVModel.from_pretrained(tmp_path / "run")
    assert torch.equal(again(*batch()), model(*batch()))
    assert (again.config, again.classes, again.inputs, again.frontend) == (
        model.config,
        model.classes,
        model.inputs,
        model.frontend,
    )
    assert not again.training
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["model"]
    # Saving again replaces it; other values go by the same names.
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    model.save(tmp_path / "run" / "model", doubled)
    values = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(values[name], value) for name, value in doubled.items())


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    model = make(Video()).eval()
    model.save(tmp_path / "model")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastav.model.av_model.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert AVModel.from_pretrained(tmp_path / "model").classes == CLASSES


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    make(Late()).save(folder)
    whole, values = json.loads((folder / "model.json").read_text()), load_file(folder / "model.safetensors")

    def refused(match, **changes):
        (folder / "model.json").write_text(json.dumps(whole | changes))
        with pytest.raises(UserError, match=match) as info:
            AVModel.from_pretrained(folder)
        assert "\n" not in str(info.value)

    refused("its format is 9, this version reads format 1", format=9)
    refused(r"model\.json: Expected `array`", classes=3)
    refused(r"unknown field `dephth`", model=whole["model"] | {"dephth": 3})
    refused(r"do not match this model: .*fusion\.head\.weight: got \(\d+, \d+\), expected \(1, \d+\)", classes=["a"])
    code = whole["model"]["video"] | {"name": "os:system"}
    refused(r'loading it runs code of "os:system"', model=whole["model"] | {"video": code})
    (folder / "model.json").write_text("{")
    with pytest.raises(UserError, match="is broken"):
        AVModel.from_pretrained(folder)
    (folder / "model.json").write_text(json.dumps(whole))
    save_file({name: v for name, v in values.items() if "norm1" not in name}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"12 missing \(video\.net\.blocks\.0\.norm1\.weight"):
        AVModel.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be read"):
        AVModel.from_pretrained(folder)
    with pytest.raises(UserError, match="no such folder"):
        AVModel.from_pretrained(tmp_path / "nowhere")
    (folder / "model.json").unlink()
    with pytest.raises(UserError, match=r"has no model\.json"):
        AVModel.from_pretrained(folder)

    def offline(*args, **kwargs):
        raise ConnectionError("offline mode\nis enabled")

    monkeypatch.setattr("fastav.model.av_model.snapshot_download", offline)
    with pytest.raises(UserError, match=r'model "someone/birds": .*from the hub .*\(offline mode is enabled\)'):
        AVModel.from_pretrained("someone/birds")


def test_models_of_the_hub(tmp_path, monkeypatch):
    make(Video()).save(tmp_path / "fetched")
    monkeypatch.setattr(
        "fastav.model.av_model.snapshot_download", lambda name, allow_patterns: str(tmp_path / "fetched")
    )
    assert AVModel.from_pretrained("someone/birds").classes == CLASSES


class Probe(nn.Module):
    num_features = 3

    def __init__(self, input_size, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x):
        return x.mean((2, 3))

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.fc(x)

    def get_classifier(self):
        return self.fc


def test_code_of_a_saved_model_has_to_be_allowed(tmp_path):
    name = f"{Probe.__module__}:Probe"
    make(Late(), video=TowerConfig(name=name)).save(tmp_path / "model")
    with pytest.raises(UserError, match="loading it runs code of"):
        AVModel.from_pretrained(tmp_path / "model")
    assert AVModel.from_pretrained(tmp_path / "model", factories=[name])(*batch()).shape == (B, 3)


def build(fusion, video, audio, classes=CLASSES, sampling=SAMPLING):
    return AVModel.build(Model(video=video, audio=audio, fusion=fusion), classes, sampling, FRONTEND)


def start_from(path, tower=TINY):
    return msgspec.structs.replace(tower, init_from=str(path))


def test_towers_start_from_other_runs(tmp_path, caplog):
    video, audio = make(Video()).eval(), make(Audio()).eval()
    video.save(tmp_path / "video" / "model")
    audio.save(tmp_path / "audio" / "model")
    towers = start_from(tmp_path / "video"), start_from(tmp_path / "audio")
    frames, mel, window, *_ = batch()
    with caplog.at_level(logging.WARNING):
        score = build(Score(of="logits"), *towers).eval()
        late = build(Late(), *towers)
    assert not caplog.records
    torch.testing.assert_close(score(frames, mel, window), (video(frames) + audio(None, mel, window)) / 2)
    assert torch.equal(late.video.net.blocks[2].mlp.fc1.weight, video.video.net.blocks[2].mlp.fc1.weight)
    # The fusion outlives the runs it came from.
    shutil.rmtree(tmp_path / "video")
    score.save(tmp_path / "score")
    again = AVModel.from_pretrained(tmp_path / "score")
    assert torch.equal(again(frames, mel), score(frames, mel))
    assert again.config.video.init_from.endswith("video")
    with pytest.raises(UserError, match="has no video tower; it has: audio"):
        build(Late(), start_from(tmp_path / "audio"), TINY)
    with pytest.raises(UserError, match=r'model\.audio\.init_from is not set; fusion "score" trains nothing and needs'):
        build(Score(), start_from(tmp_path / "score"), TINY)
    with pytest.raises(UserError, match="trained on 3 classes that differ from the 2 of this data"):
        build(Score(), start_from(tmp_path / "score"), start_from(tmp_path / "audio"), CLASSES[:2])


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_whole_model_starts_from_another_but_for_its_head(name, tmp_path):
    tower = TowerConfig(name=name)
    sampling = msgspec.structs.replace(SAMPLING, image_size=64)
    saved = make(Video(), classes=("a", "b"), sampling=sampling, video=tower)
    saved.save(tmp_path / "m")
    config = Model(video=tower, fusion=Video(), init_from=str(tmp_path / "m"))
    model = AVModel.build(config, ("x", "y", "z"), sampling, FRONTEND)
    head = {id(p) for p in model.video.net.get_classifier().parameters()}
    before = saved.state_dict()
    for key, value in model.named_parameters():
        assert (id(value) in head) or torch.equal(value, before[key]), key
    same = AVModel.build(config, ("a", "b"), sampling, FRONTEND)
    assert all(torch.equal(value, before[key]) for key, value in same.state_dict().items())


@pytest.mark.parametrize(
    ("fusion", "towers", "message"),
    [
        (
            MBT(image_vit="x.safetensors"),
            {"video": TowerConfig(weights="timm")},
            "image_vit and model.video.weights or .init_from are both set",
        ),
        (MBT(), {"audio": TowerConfig(freeze=2)}, "model.audio.freeze = 2: "),
    ],
)
def test_towers_of_mbt_are_blocks_alone(fusion, towers, message):
    with pytest.raises(UserError, match=message):
        AVModel.build(Model(fusion=fusion, **towers), CLASSES, SAMPLING, FRONTEND)


def test_a_tower_of_other_sizes_and_classes(tmp_path, caplog):
    """The spectrogram's grid (2 x 3 patches) is known from the run; as a square it could not be read."""
    source = make(Bottleneck(start=1))
    source.save(tmp_path / "model")
    wide = msgspec.structs.replace(SAMPLING, window=40, image_size=32)
    with caplog.at_level(logging.WARNING):
        model = build(Bottleneck(start=2), start_from(tmp_path), start_from(tmp_path), CLASSES[::-1], wide)
    assert not caplog.records
    assert model.audio.net.pos_embed.shape == (1, 1 + 2 * 5, 32)
    assert torch.equal(model.audio.net.pos_embed[:, 0], source.audio.net.pos_embed[:, 0])
    assert model.video.net.pos_embed.shape == (1, 1 + 16, 32)
    # The same number of classes, but others: the head starts afresh.
    assert not torch.equal(model.audio.net.head.weight, source.audio.net.head.weight)
    same = build(Bottleneck(start=2), start_from(tmp_path), start_from(tmp_path))
    assert torch.equal(same.audio.net.head.weight, source.audio.net.head.weight)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("windows", [1, 3])
def test_flops_are_pytorchs_count(fusion, windows):
    model = make(fusion).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch(windows=windows)[:2])
    assert B * model.flops(windows) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_a_convolutional_tower():
    model = make(Late(), video=TowerConfig(name="resnet18")).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch(windows=1)[:2])
    assert B * model.flops() == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_the_published_size():
    """ViT-B/16, 8 frames and one window of 128 x 400: 281 GFLOP of video tokens and 36 of audio, about."""
    config, facts = Model(fusion=Bottleneck(frames="shared")), Inputs()
    with torch.device("meta"):
        model = AVModel(config, CLASSES, facts, FRONTEND)
    assert model.flops() == pytest.approx(317e9, rel=0.02)


@pytest.mark.parametrize(
    "fusion", [Bottleneck(start=1, frames="shared"), MBT(start=1, patch=8)], ids=lambda f: type(f).__name__
)
def test_compiles_as_one_graph(fusion):
    tower = msgspec.structs.replace(TINY, drop_path=0.1, args=ARGS | {"depth": 2})
    model = make(fusion, video=tower, audio=tower).train()
    model.fusion.bottleneck.data.normal_()
    if isinstance(fusion, MBT):
        model.fusion.head.weight.data.normal_()
    mixing = torch.tensor([[2, 3]] * B), torch.full((B,), 0.7), torch.tensor([1, 0, 3, 2])
    inputs = (*batch(windows=1), *mixing)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    out = compiled(*inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(out, model(*inputs))
    out.sum().backward()
    assert model.fusion.bottleneck.grad.norm() > 0
    model.eval()
    evaluate = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(evaluate(*batch()), model(*batch()))


def test_copies_stand_on_their_own():
    """Averaged weights are kept in a copy, which must not share the state of stochastic depth."""
    tower = msgspec.structs.replace(TINY, drop_path=0.5)
    model = make(Bottleneck(start=1), video=tower, audio=tower)
    twin = copy.deepcopy(model).train()
    ours, theirs = ({id(m) for m in each.modules()} for each in (model, twin))
    assert not ours & theirs
    twin.video.rows_per_clip(7)
    told, untold = ({m.rows_per_clip for m in each.modules() if isinstance(m, ClipDropPath)} for each in (twin, model))
    assert 7 in told
    assert 7 not in untold
    torch.manual_seed(1)
    out = twin(*batch())
    torch.manual_seed(1)
    assert torch.equal(model.train()(*batch()), out)


def test_names_are_stable():
    names = set(make(Bottleneck(start=1, frames="joint")).state_dict())
    layers = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    block = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    net = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "head.weight", "head.bias"}
    net |= {"norm.weight", "norm.bias"} | {f"blocks.{i}.{name}" for i in range(3) for name in block}
    assert names == {f"{m}.net.{name}" for m in ("video", "audio") for name in net} | {
        "fusion.bottleneck",
        "fusion.time_embed",
    }


def test_what_should_not_decay():
    model = make(Bottleneck(start=1))
    assert model.no_weight_decay() == {
        "fusion.bottleneck",
        *(f"{m}.net.{name}" for m in ("video", "audio") for name in ("cls_token", "pos_embed")),
    }
    assert make(Bottleneck(start=1, tokens=0)).no_weight_decay() == model.no_weight_decay() - {"fusion.bottleneck"}


def test_models_that_cannot_be():
    with pytest.raises(UserError, match="list of classes is empty"):
        make(Video(), classes=())
    with pytest.raises(UserError, match=r"frontend\.mean and frontend\.std are not set"):
        AVModel.build(Model(video=TINY, audio=TINY, fusion=Audio()), CLASSES, SAMPLING, Frontend(num_mels=16))


def test_learns_on_a_small_problem():
    """Sound tells what pictures do not: after a few steps of the whole model the loss has fallen."""
    model = make(Bottleneck(start=1, frames="mean")).train()
    frames, mel, *_ = batch(windows=1)
    labels = torch.tensor([0, 1, 2, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(frames, mel), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 < 0.9 < losses[0]
