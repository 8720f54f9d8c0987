"""Every kind of fusion against what it is defined as, written out literally with timm's own blocks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastav.core.errors import UserError
from fastav.model.bottleneck_block import BottleneckBlock
from fastav.model.fusion import MBT, Audio, Bottleneck, Early, FusionInputs, Late, Score, Video, mean_over_windows
from fastav.model.tower import TowerConfig

B, T, W, K = 2, 3, 2, 5
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
ALL = [
    Video(),
    Audio(),
    Late(),
    Score(),
    Early(),
    *(
        Bottleneck(start=1, frames=frames, update=update)
        for frames in ("mean", "shared", "joint")
        for update in ("sequential", "mean")
    ),
    Bottleneck(start=2, head="concat", frames="shared"),
    MBT(start=1, patch=8, tubelet=3),
    MBT(start=1, patch=8, sampled=2, head="gap", hidden=7, shared=True),
    MBT(start=1, patch=8, tubelet=1, head="gmp", mixing="cross"),
    MBT(start=1, patch=8, tubelet=3, head="gsp", mixing="joint", shared=True),
    MBT(start=1, patch=8, tubelet=3, mixing="joint"),
    MBT(start=3, patch=8, tubelet=3),
]
PARTS = ("frames", "update", "mixing", "head")
NAMES = ["-".join([type(c).__name__, *(str(getattr(c, part)) for part in PARTS if hasattr(c, part))]) for c in ALL]


class Fused(nn.Module):
    """Towers and fusion, as the model joins them."""

    def __init__(self, config, video=None, audio=None, dtype=torch.float64, num_frames=T):
        super().__init__()
        torch.manual_seed(5)
        heads = K if config.tower_heads else 0
        make = {"video": ((16, 16), video or {}), "audio": ((16, 24), audio or {})}
        towers = {}
        for modality, (size, changes) in make.items():
            settings = {"name": "vit_tiny_patch16_224", "args": TINY} | changes
            tower = TowerConfig(**settings).build(modality=modality, input_size=size, num_classes=heads)
            towers[modality] = tower if modality in config.modalities else None
        # Trained towers have spread parameters; timm's initial ones are too small to tell mistakes.
        for tower in filter(None, towers.values()):
            for parameter in tower.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
        self.plain = copy.deepcopy(towers)
        self.fusion = config.build(towers["video"], towers["audio"], K, num_frames)
        for parameter in self.fusion.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        self.video, self.audio = towers["video"], towers["audio"]
        self.to(dtype)
        for tower in filter(None, self.plain.values()):
            tower.to(dtype).eval()
        self.eval()

    def forward(self, streams):
        return self.fusion(self.video, self.audio, streams)


def feed(frames=T, windows=W, clips=B, dtype=torch.float64, **masks):
    generator = torch.Generator().manual_seed(frames + 7 * windows)
    video = torch.randn(clips, frames, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    audio = torch.randn(clips, windows, 1, 16, 24, generator=generator, dtype=torch.float64).to(dtype)
    masks = {name: torch.tensor(value) for name, value in masks.items()}
    return FusionInputs(video, audio.expand(-1, -1, 3, -1, -1), **masks)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def literal(model, streams, b, w, has=(True, True)):
    """One clip, one window: [x || z] through timm's blocks, frame by frame; features of both modalities."""
    config, video, audio = model.fusion.config, model.plain["video"], model.plain["audio"]
    frames = [video.embed(streams.frames_BTCHW[b, t, None]) for t in range(streams.frames_BTCHW.shape[1])]
    if config.frames == "joint":
        time = model.fusion.time_embed
        patches = [frame[:, 1:] + time[t] for t, frame in enumerate(frames)]
        frames = [torch.cat([frames[0][:, :1], *patches], 1)]
    sound = audio.embed(streams.mel_BWCML[b, w, None])
    z = model.fusion.bottleneck

    def seen(block, z):
        if config.frames == "shared":
            return shared(block, frames, z)
        outs = [block(torch.cat([frame, z], 1)) for frame in frames]
        n = frames[0].shape[1]
        return [out[:, :n] for out in outs], torch.stack([out[:, n:] for out in outs]).mean(0)

    def heard(block, z):
        out = block(torch.cat([sound, z], 1))
        return out[:, : sound.shape[1]], out[:, sound.shape[1] :]

    for layer, (video_block, audio_block) in enumerate(zip(video.blocks, audio.blocks, strict=True)):
        if layer < config.start:
            frames, sound = [video_block(frame) for frame in frames], audio_block(sound)
            continue
        if config.update == "sequential":  # SSW60, equations 3 and 4
            frames, z_hat = seen(video_block, z)
            z_hat = z_hat if has[0] else z
            sound, z_new = heard(audio_block, z_hat)
            z = z_new if has[1] else z_hat
        else:  # MBT
            frames, z_v = seen(video_block, z)
            sound, z_a = heard(audio_block, z)
            updated = [new for new, there in zip((z_v, z_a), has, strict=True) if there]
            z = sum(updated) / len(updated)
    return sum(video.pool(frame) for frame in frames) / len(frames), audio.pool(sound)


def shared(block, frames, z):
    """A block over all frames and one bottleneck with a dense mask: a frame's tokens do not see other frames."""
    n, t = frames[0].shape[1], len(frames)
    x = torch.cat([*frames, z], 1)
    frame_of = torch.cat([torch.arange(t).repeat_interleave(n), torch.full((z.shape[1],), -1)])
    same = frame_of[:, None] == frame_of[None]
    allowed = same | (frame_of[None] == -1) | (frame_of[:, None] == -1)
    out = block(x, attn_mask=allowed[None, None])
    return list(out[:, : n * t].split(n, 1)), out[:, n * t :]


def literal_logits(model, streams, has=(True, True)):
    rows = []
    for b in range(B):
        windows = []
        for w in range(streams.mel_BWCML.shape[1]):
            seen, heard = literal(model, streams, b, w, has)
            if model.fusion.config.head == "concat":
                zero = torch.zeros_like(seen)
                windows.append(model.fusion.head(torch.cat([seen if has[0] else zero, heard if has[1] else zero], 1)))
            else:
                logits = [model.plain["video"].head(seen), model.plain["audio"].head(heard)]
                present = [value for value, there in zip(logits, has, strict=True) if there]
                windows.append(sum(present) / len(present))
        rows.append(torch.stack(windows).mean(0))
    return torch.cat(rows)


BOTTLENECKS = [c for c in ALL if isinstance(c, Bottleneck)]


@pytest.mark.parametrize("config", BOTTLENECKS, ids=lambda c: f"{c.frames}-{c.update}-{c.head}")
def test_bottleneck_is_the_published_layers(config):
    """Also: the layers before the fusion, run once per clip, are as if run for every window."""
    model = Fused(config)
    assert [isinstance(b, BottleneckBlock) for b in model.video.blocks] == [i >= config.start for i in range(3)]
    close(model(feed()), literal_logits(model, feed()))


@pytest.mark.parametrize("has", [(True, False), (False, True)])
@pytest.mark.parametrize("config", BOTTLENECKS, ids=lambda c: f"{c.frames}-{c.update}-{c.head}")
def test_bottleneck_without_one_modality_is_the_other_alone(config, has):
    model = Fused(config)
    masks = {"has_video_B": [has[0], True], "has_audio_B": [has[1], True]}
    expected = torch.cat([literal_logits(model, feed(), has)[:1], literal_logits(model, feed())[1:]])
    close(model(feed(**masks)), expected)
    # What stands in for the missing modality has no influence, and no gradient.
    streams = feed(**masks)
    missing = streams.frames_BTCHW if has[1] else streams.mel_BWCML.clone()
    missing.requires_grad_()
    streams = streams._replace(**{"frames_BTCHW" if has[1] else "mel_BWCML": missing})
    model(streams)[0].sum().backward()
    assert missing.grad.abs().max() == 0


def test_updates_and_frames_differ():
    outs = [Fused(c)(feed()) for c in BOTTLENECKS if c.head == "mean" and c.frames != "joint"]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])


@pytest.mark.parametrize("update", ["sequential", "mean"])
def test_one_frame_is_the_same_in_all_kinds(update):
    outs = [Fused(Bottleneck(start=1, frames=f, update=update), num_frames=1) for f in ("mean", "shared", "joint")]
    outs[2].fusion.time_embed.data.zero_()
    for model in outs:
        model.fusion.bottleneck.data.copy_(outs[0].fusion.bottleneck)
    logits = [model(feed(frames=1)) for model in outs]
    close(logits[0], logits[1])
    close(logits[0], logits[2])


@pytest.mark.parametrize("config", [Bottleneck(start=1, tokens=0), Bottleneck(start=3)])
def test_without_bottleneck_it_is_the_mean_of_the_towers(config):
    model = Fused(config)
    assert not list(model.fusion.parameters())
    video, audio = model.plain["video"], model.plain["audio"]
    seen = video.head(video.features(feed().frames_BTCHW.flatten(0, 1)).unflatten(0, (B, T)).mean(1))
    heard = audio.head(audio.features(feed().mel_BWCML.flatten(0, 1))).unflatten(0, (B, W)).mean(1)
    close(model(feed()), (seen + heard) / 2)


def test_video_and_audio_alone():
    video, audio = Fused(Video()), Fused(Audio())
    seen = [video.video.features(feed().frames_BTCHW[:, t]) for t in range(T)]
    close(video(feed()), video.video.head(sum(seen) / T))
    heard = [audio.audio.net(feed().mel_BWCML[:, w]) for w in range(W)]
    close(audio(feed()), sum(heard) / W)
    masked = audio(feed(window_BW=[[True, False], [False, False]]))
    close(masked, heard[0])
    # One frame, one window: timm's own output, bit for bit.
    single = feed(frames=1, windows=1, window_BW=[[True], [True]])
    assert torch.equal(video(single), video.video.net(single.frames_BTCHW[:, 0]))
    assert torch.equal(audio(single), audio.audio.net(single.mel_BWCML[:, 0]))


def test_late_is_a_linear_layer_on_both_class_tokens():
    model = Fused(Late())
    video, audio = model.plain["video"], model.plain["audio"]
    seen = torch.stack([video.net.forward_features(feed().frames_BTCHW[:, t])[:, 0] for t in range(T)]).mean(0)
    heard = torch.stack([audio.net.forward_features(feed().mel_BWCML[:, w])[:, 0] for w in range(W)])
    head = model.fusion.head
    close(model(feed()), torch.stack([head(torch.cat([seen, h], 1)) for h in heard]).mean(0))
    alone = torch.stack([head(torch.cat([seen, 0 * h], 1)) for h in heard]).mean(0)
    close(model(feed(has_audio_B=[True, False]))[1], alone[1])
    assert not any(isinstance(m.head, nn.Linear) for m in (model.video.net, model.audio.net))


def test_score_is_the_weighted_sum_of_predictions():
    probabilities, sigmoids, logits = (
        Fused(Score(weight=0.7, of=of)) for of in ("probabilities", "sigmoids", "logits")
    )
    video, audio = probabilities.video, probabilities.audio
    seen = video.head(video.features(feed().frames_BTCHW.flatten(0, 1)).unflatten(0, (B, T)).mean(1))
    heard = audio.head(audio.features(feed().mel_BWCML.flatten(0, 1))).unflatten(0, (B, W)).mean(1)
    close(probabilities(feed()).softmax(1), 0.7 * seen.softmax(1) + 0.3 * heard.softmax(1))
    close(sigmoids(feed()).sigmoid(), 0.7 * seen.sigmoid() + 0.3 * heard.sigmoid())
    close(logits(feed()), 0.7 * seen + 0.3 * heard)
    part = feed(has_video_B=[True, False], has_audio_B=[False, False])
    close(probabilities(part)[0].softmax(0), seen[0].softmax(0))
    close(logits(part)[0], seen[0])
    close(logits(part)[1], 0.7 * seen[1] + 0.3 * heard[1])
    assert not any(p.requires_grad for p in probabilities.parameters())
    assert not any(m.training for m in probabilities.train().video.modules() if m is not probabilities.video)


def test_score_of_sure_towers_stays_finite():
    model = Fused(Score(of="sigmoids"), dtype=torch.float32)
    for tower in (model.video, model.audio):
        tower.net.head.weight.data *= 1e4
    assert model(feed(dtype=torch.float32)).isfinite().all()


def early_literal(model, streams, b, w, has=(True, True)):
    video, audio = model.video, model.audio
    frames = [video.embed(streams.frames_BTCHW[b, t, None]) for t in range(T)]
    seen = torch.cat([frames[0][:, :1], *(f[:, 1:] + model.fusion.time_embed[t] for t, f in enumerate(frames))], 1)
    x = [s for s, there in zip((seen, audio.embed(streams.mel_BWCML[b, w, None])), has, strict=True) if there]
    parts = [s.shape[1] for s in x]
    x = torch.cat(x, 1)
    for block in model.plain["video"].blocks:
        x = block(x)
    return sum(video.head(video.pool(part)) for part in x.split(parts, 1)) / len(parts)


def test_early_is_joint_self_attention_in_one_encoder():
    model = Fused(Early())
    out = model(feed())
    masked = model(feed(has_video_B=[True, False], has_audio_B=[False, True]))
    for b in range(B):
        close(out[b, None], sum(early_literal(model, feed(), b, w) for w in range(W)) / W)
        has = ((True, False), (False, True))[b]
        close(masked[b, None], sum(early_literal(model, feed(), b, w, has) for w in range(W)) / W)
    assert model(feed(has_video_B=[False, False], has_audio_B=[False, False])).isfinite().all()
    assert {name.split(".")[1] for name, _ in model.audio.named_parameters()} == {
        "cls_token",
        "pos_embed",
        "patch_embed",
    }


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_flops_are_pytorchs_count(config):
    model = Fused(config, dtype=torch.float32).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(feed(dtype=torch.float32))
    assert B * model.fusion.flops(model.video, model.audio, T, W) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_clips_do_not_touch_one_another(config):
    model = Fused(config)
    streams = feed(clips=4, has_video_B=[True, True, False, True], has_audio_B=[True, False, True, True])
    order = torch.tensor([2, 0, 3, 1])
    swapped = FusionInputs(*(None if s is None else s[order] for s in streams))
    close(model(swapped), model(streams)[order])


def own_parameters(model):
    """Those of towers and fusion, without the towers' copies that tests compare to."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("plain")}


@pytest.mark.parametrize(
    "config", [pytest.param(c, id=n) for c, n in zip(ALL, NAMES, strict=True) if not isinstance(c, Score)]
)
def test_every_parameter_learns(config):
    """No parameter is left without a gradient, which distributed training would wait for."""
    model = Fused(config, dtype=torch.float32).train()
    model(feed(dtype=torch.float32)).square().sum().backward()
    idle = [name for name, p in own_parameters(model).items() if p.grad is None]
    still = [name for name, p in own_parameters(model).items() if p.grad is not None and p.grad.norm() == 0]
    assert (idle, still) == ([], [])


def test_score_fusion_learns_nothing():
    """It sums what two finished models say, and has nothing that distributed training could wait for."""
    model = Fused(Score(), dtype=torch.float32).train()
    parameters = own_parameters(model)
    assert {name.partition(".")[0] for name in parameters} == {"video", "audio"}
    assert not [name for name, p in parameters.items() if p.requires_grad]
    assert not model(feed(dtype=torch.float32)).requires_grad


@pytest.mark.parametrize("frames", ["mean", "shared", "joint"])
def test_gradients(frames):
    args = TINY | {"embed_dim": 4, "depth": 2, "num_heads": 1, "mlp_ratio": 1.0, "patch_size": 16}
    model = Fused(Bottleneck(start=1, tokens=2, frames=frames), {"args": args}, {"args": args}, num_frames=2)
    streams = feed(frames=2, windows=1)
    tensors = {name: p for name, p in model.named_parameters() if name.startswith(("fusion", "video.net.blocks.1"))}
    tensors |= {name: p for name, p in model.named_parameters() if name.startswith("audio.net.blocks.1.attn")}

    def logits(*values):
        return torch.func.functional_call(model, dict(zip(tensors, values, strict=True)), (streams,))

    assert torch.autograd.gradcheck(logits, tuple(tensors.values()), atol=1e-6)


def test_stochastic_depth_takes_a_clips_tokens_and_bottleneck_together():
    block = Fused(Bottleneck(start=1, frames="shared"), {"drop_path": 1.0}, dtype=torch.float32).video.blocks[2]
    x, z = torch.randn(4, 3, 5, 32), torch.randn(4, 4, 32)
    same_x, same_z = block.train()(x, z, 2)
    assert torch.equal(same_x, x)
    assert torch.equal(same_z, z)
    block.drop_path1.rate = block.drop_path2.rate = 0.5
    torch.manual_seed(1)
    kept = set()
    for _ in range(60):
        new_x, new_z = block(x, z, 2)
        changed = torch.stack([(new_x != x).flatten(1).any(1), (new_z != z).flatten(1).any(1)]).unflatten(1, (2, 2))
        # Both streams of a clip, and both its windows, fare alike.
        assert all(changed[:, clip].unique().numel() == 1 for clip in range(2))
        kept.add(tuple(changed[0, :, 0].tolist()))
    assert kept == {(True, True), (True, False), (False, True), (False, False)}


def test_frozen_blocks_stay_frozen_in_fusion():
    model = Fused(Bottleneck(start=1), {"freeze": 2, "drop_path": 0.5}).train()
    assert [block.training for block in model.video.blocks] == [False, False, True]
    assert not model.video.blocks[1].drop_path1.training
    assert model.video.blocks[2].drop_path1.training


def test_towers_of_different_width():
    narrow = {"args": TINY | {"embed_dim": 16}}
    with pytest.raises(
        UserError, match=r"model\.fusion\.project: the video tower has width 32, the audio tower 16; set project = true"
    ):
        Fused(Bottleneck(start=1), audio=narrow)
    model = Fused(Bottleneck(start=1, project=True), audio=narrow)
    assert model.fusion.to_audio.weight.shape == (16, 32)
    model(feed()).sum().backward()
    assert model.fusion.to_video.weight.grad.norm() > 0
    # With one fusion layer nothing goes back, so that nothing is there to go unused.
    assert isinstance(Fused(Bottleneck(start=2, project=True), audio=narrow).fusion.to_video, nn.Identity)
    with pytest.raises(
        UserError, match=r"model\.audio: width 16 and 1 class and register tokens, the video tower has 32"
    ):
        Fused(Early(), audio=narrow)
    assert Fused(Late(), audio=narrow)(feed()).shape == (B, K)


def test_what_does_not_fit_is_named():
    resnet = {"name": "resnet18", "args": {}}
    for config, changes, message in [
        (Bottleneck(), {}, r"model\.fusion\.start = 8: the towers have only 3 layers"),
        (
            Bottleneck(start=1),
            {"audio": {"args": TINY | {"depth": 2}}},
            "the video tower has 3 layers, the audio tower 2",
        ),
        (
            Bottleneck(start=1),
            {"audio": resnet},
            r'model\.audio\.name: "resnet18" is not a plain timm ViT, which fusion "bottleneck"',
        ),
        (Early(), {"video": resnet}, r'model\.video\.name: "resnet18" is not a plain timm ViT, which fusion "early"'),
        (Bottleneck(start=1), {"video": {"args": TINY | {"qk_norm": True}}}, r"block 1 .* needs plain attention"),
        (Bottleneck(start=1, attention="refrence"), {}, r'attention: "refrence" is unknown; did you mean "reference"'),
    ]:
        with pytest.raises(UserError, match=message):
            Fused(config, **changes)
    assert Fused(Late(), audio=resnet)(feed()).shape == (B, K)


def test_names_of_parameters_do_not_depend_on_the_fusion():
    model = Fused(Bottleneck(start=1, frames="joint"))
    for modality in ("video", "audio"):
        own = getattr(model, modality).state_dict()
        assert list(own) == list(model.plain[modality].state_dict())
    assert set(model.fusion.state_dict()) == {"bottleneck", "time_embed"}
    assert set(Fused(Bottleneck(start=1, head="concat")).fusion.state_dict()) == {
        "bottleneck",
        "head.weight",
        "head.bias",
    }
    assert set(Fused(Early()).fusion.state_dict()) == {"time_embed"}
    assert set(Fused(Late()).fusion.state_dict()) == {"head.weight", "head.bias"}


def test_windows():
    values = torch.arange(12.0).view(2, 3, 2)
    real = torch.tensor([[True, True, False], [False, False, False]])
    assert mean_over_windows(values, real).tolist() == [[1.0, 2.0], [6.0, 7.0]]
