from __future__ import annotations

import json
import math

import msgspec
import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import nn

from fastav.core.errors import FastavError, UserError
from fastav.optim.ema import Ema
from fastav.optim.optimizer import Optim
from fastav.optim.optimizer_state import optimizer_tensors, restore_optimizer
from fastav.optim.schedule import Constant, Cosine, Plateau, Step

NAMES = ["adamw", "sgd", "adam", "rmsprop", "adagrad"]


class Tower(nn.Module):
    def __init__(self, **args) -> None:
        super().__init__()
        small = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
        self.net = timm.create_model("vit_tiny_patch16_224", **{**small, **args})


class Fusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottleneck = nn.Parameter(torch.zeros(1, 4, 16))
        self.tempo = nn.Parameter(torch.zeros(1, 4, 16))
        self.head = nn.Linear(32, 5)

    def no_weight_decay(self) -> set[str]:
        return {"tempo"}


class Model(nn.Module):
    """Named as an audiovisual model is: two ViT towers of different depth and a fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.audio, self.fusion = Tower(), Tower(depth=2), Fusion()


class Net(nn.Module):
    """Small enough to train for real; one parameter never gets a gradient, as an unused modality's does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu())


def train(
    model: Net, optimizer: torch.optim.Optimizer, schedule, start: int, stop: int, ema: Ema | None = None
) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
        schedule.set_step(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update()


def groups_by_parameter(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


def test_what_is_decayed():
    optimizer, _ = Optim(weight_decay=0.3).build(Model(), 10)
    decay = {name: group["weight_decay"] for name, group in groups_by_parameter(optimizer).items()}
    for name in (
        "video.net.cls_token", "video.net.pos_embed", "video.net.patch_embed.proj.bias", "video.net.norm.weight",
        "audio.net.blocks.0.norm1.weight", "audio.net.blocks.0.mlp.fc1.bias", "fusion.bottleneck", "fusion.tempo",
        "fusion.head.bias",
    ):  # fmt: skip
        assert decay[name] == 0, name
    for name in ("video.net.patch_embed.proj.weight", "audio.net.blocks.1.attn.qkv.weight", "fusion.head.weight"):
        assert decay[name] == 0.3, name


def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none():
    model = Model()
    for parameter in model.video.net.blocks[0].parameters():
        parameter.requires_grad_(False)
    optimizer, _ = Optim(layer_decay=0.5).build(model, 10, {"video": 0.1})
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert not any(name.startswith("video.net.blocks.0.") for name in names)
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)
    for group in optimizer.param_groups:
        own = dict(model.named_parameters())
        assert [own[name] is p for name, p in zip(group["param_names"], group["params"], strict=True)]


def test_layer_wise_rates_fall_from_the_head_down_by_each_towers_own_depth():
    optimizer, schedule = Optim(lr=1.0, layer_decay=0.5, schedule=Constant()).build(Model(), 10, {"video": 0.1})
    assert schedule.set_step(3) == pytest.approx(1.0)
    lr = {name: group["lr"] for name, group in groups_by_parameter(optimizer).items()}
    expected = {
        "video.net.head.weight": 0.1,
        "video.net.norm.weight": 0.05,  # with the last block
        "video.net.blocks.2.attn.qkv.weight": 0.05,
        "video.net.blocks.1.attn.qkv.weight": 0.025,
        "video.net.blocks.0.attn.qkv.bias": 0.0125,
        "video.net.pos_embed": 0.00625,
        "audio.net.head.bias": 1.0,
        "audio.net.blocks.1.norm1.weight": 0.5,
        "audio.net.patch_embed.proj.weight": 0.125,
        "fusion.bottleneck": 1.0,
        "fusion.head.weight": 1.0,
    }
    assert {name: lr[name] for name in expected} == pytest.approx(expected)


def test_layer_wise_rates_agree_with_timms_own_groups():
    net = Tower().net
    optimizer, _ = Optim(layer_decay=0.7, weight_decay=0.05).build(net, 10)
    ours = {name: (g["lr_scale"], g["weight_decay"]) for name, g in groups_by_parameter(optimizer).items()}
    from timm.optim import param_groups_layer_decay

    names = {id(p): name for name, p in net.named_parameters()}
    theirs = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(net, 0.05, net.no_weight_decay(), layer_decay=0.7)
        for p in group["params"]
    }
    assert ours.keys() == theirs.keys()
    for name, pair in ours.items():
        assert pair == pytest.approx(theirs[name]), name


def test_layer_wise_rates_of_a_resnet():
    model = nn.Module()
    model.video = timm.create_model("resnet18", num_classes=4)
    optimizer, _ = Optim(lr=1.0, layer_decay=0.5).build(model, 10)
    scale = {name: group["lr_scale"] for name, group in groups_by_parameter(optimizer).items()}
    ladder = [
        scale[f"video.{n}"] for n in ("conv1.weight", "layer1.0.conv1.weight", "layer4.1.conv2.weight", "fc.weight")
    ]
    assert ladder == sorted(ladder)
    assert len(set(ladder)) == 4
    assert ladder[-1] == 1


@pytest.mark.parametrize("name", NAMES)
def test_settings_reach_the_optimizer(name):
    config = Optim(name=name, lr=0.5, weight_decay=0.2, betas=(0.8, 0.9), momentum=0.7, eps=0.3)
    optimizer, _ = config.build(Net(), 10)
    assert type(optimizer).__module__.startswith("torch.optim")
    assert type(optimizer).__name__.lower() == name
    expected = {
        "adamw": {"betas": (0.8, 0.9)},
        "adam": {"betas": (0.8, 0.9)},
        "sgd": {"momentum": 0.7, "nesterov": True},
    }
    expected |= {"rmsprop": {"momentum": 0.7}, "adagrad": {}}
    for key, value in expected[name].items():
        assert optimizer.param_groups[0][key] == value
    if name != "sgd":
        assert optimizer.param_groups[0]["eps"] == 0.3
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}


def test_sgd_without_momentum_is_allowed():
    optimizer, _ = Optim(name="sgd", momentum=0.0).build(Net(), 10)
    assert optimizer.param_groups[0]["nesterov"] is False


def test_nothing_to_train_is_said_when_there_are_steps():
    model = Net().requires_grad_(False)
    with pytest.raises(UserError, match="every parameter is frozen"):
        Optim().build(model, 10)
    Optim().build(model, 1)[1].set_step(0)


def rates(config: Optim, total: int) -> list[float]:
    _, schedule = config.build(Net(), total)
    return [schedule.set_step(n) for n in range(total)]


def test_cosine():
    found = rates(Optim(lr=1.0, schedule=Cosine(warmup=0.1, min_lr=0.2)), 100)
    assert found[:10] == pytest.approx([(n + 1) / 11 for n in range(10)])  # never 0
    assert found[10] == pytest.approx(1.0)
    assert found[55] == pytest.approx(0.6)
    assert found[99] == pytest.approx(0.2, abs=1e-3)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_constant_and_step():
    assert rates(Optim(lr=1.0, schedule=Constant(warmup=3)), 6) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates(Optim(lr=1.0, schedule=Step(every=2, factor=0.5)), 6) == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])
    assert rates(Optim(lr=1.0, schedule=Step(every=0.5, factor=0.5)), 6) == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("schedule", [Cosine(), Constant(warmup=2), Step(every=2), Plateau()])
def test_the_rate_depends_on_the_steps_number_alone(schedule):
    config = Optim(lr=1.0, schedule=schedule)
    ahead = rates(config, 20)
    _, again = config.build(Net(), 20)
    assert [again.set_step(n) for n in reversed(range(20))] == list(reversed(ahead))
    assert [again.set_step(7) for _ in range(3)] == [ahead[7]] * 3


def test_a_run_shorter_than_its_warm_up():
    assert rates(Optim(lr=1.0, schedule=Cosine(warmup=9)), 2) == pytest.approx([0.1, 0.2])
    assert rates(Optim(lr=1.0), 1) == pytest.approx([1.0])


def test_plateau_falls_after_patience_and_resumes():
    config = Optim(lr=1.0, schedule=Plateau(factor=0.5, patience=1, warmup=0, min_lr=0.2))
    _, schedule = config.build(Net(), 100)
    found = []
    for metric in (10, 20, 20, 15, 30, 29, math.nan, 28, 27, 26, 25):
        schedule.record_metric(metric)
        found.append(schedule.set_step(50))
        _, fresh = config.build(Net(), 100)
        fresh.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        schedule = fresh
        assert fresh.set_step(50) == found[-1]
    assert found == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2])


def test_schedules_are_read_by_their_kind():
    found = msgspec.convert({"schedule": {"kind": "plateau", "patience": 3}}, Optim)
    assert found.schedule == Plateau(patience=3)
    for wrong in ({"kind": "cosine", "patience": 3}, {"kind": "linear"}, {"kind": "step", "every": 0}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"schedule": wrong}, Optim)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_bit_for_bit_from_named_tensors(name):
    config = Optim(name=name, lr=0.01, schedule=Cosine(warmup=2))
    whole = Net()
    optimizer, schedule = config.build(whole, 12)
    train(whole, optimizer, schedule, 0, 12)

    half = Net()
    optimizer, schedule = config.build(half, 12)
    train(half, optimizer, schedule, 0, 5)
    tensors, meta = optimizer_tensors(optimizer)
    blob, text = save({k: v.contiguous() for k, v in tensors.items()}), json.dumps(meta)
    weights = {k: v.clone() for k, v in half.state_dict().items()}

    resumed = Net()
    resumed.load_state_dict(weights)
    optimizer, schedule = config.build(resumed, 12)
    restore_optimizer(optimizer, load(blob), json.loads(text))
    train(resumed, optimizer, schedule, 5, 12)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_restored_state_is_a_copy():
    model = Net()
    optimizer, schedule = Optim().build(model, 10)
    train(model, optimizer, schedule, 0, 2)
    tensors, meta = optimizer_tensors(optimizer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other = Net()
    optimizer, schedule = Optim().build(other, 10)
    restore_optimizer(optimizer, kept, meta)
    train(other, optimizer, schedule, 2, 4)
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)


def test_a_changed_recipe_keeps_its_own_settings():
    model = Net()
    optimizer, schedule = Optim(weight_decay=0.1).build(model, 10)
    train(model, optimizer, schedule, 0, 2)
    tensors, meta = optimizer_tensors(optimizer)
    other, _ = Optim(weight_decay=0.2, layer_decay=0.5).build(model, 10)
    restore_optimizer(other, tensors, meta)
    assert {group["weight_decay"] for group in other.param_groups} == {0.0, 0.2}
    assert optimizer_tensors(other)[0].keys() == tensors.keys()


def test_state_of_another_optimizer_or_model_is_refused():
    tensors, meta = optimizer_tensors(Optim(name="sgd").build(Net(), 10)[0])
    with pytest.raises(FastavError, match="saved optimizer is SGD, expected AdamW"):
        restore_optimizer(Optim().build(Net(), 10)[0], tensors, meta)
    with pytest.raises(FastavError, match=r'another model: "audio\.net\.blocks\.0\.attn\.proj\.bias" is missing'):
        restore_optimizer(Optim(name="sgd").build(Model(), 10)[0], tensors, meta)
    with pytest.raises(FastavError, match=r'"first\.bias" is unknown to the model'):
        restore_optimizer(
            Optim(name="sgd").build(Net().norm, 10)[0],
            tensors,
            {**meta, "parameters": ["weight", "bias", "first.bias"]},
        )


def test_ema_is_the_recurrence_and_copies_buffers():
    model = Net()
    optimizer, schedule = Optim(lr=0.05).build(model, 30)
    ema, expected = Ema(model, 0.9), {name: p.detach().clone() for name, p in model.named_parameters()}
    for n in range(1, 11):
        train(model, optimizer, schedule, n, n + 1, ema)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = {
            name: decay * old + (1 - decay) * p.detach()
            for (name, p), old in zip(model.named_parameters(), expected.values(), strict=True)
        }
    state = ema.state_dict()
    for name, value in expected.items():
        assert torch.allclose(state[name], value, atol=1e-6), name
    assert torch.equal(state["norm.running_mean"], model.norm.running_mean)
    assert int(state["norm.num_batches_tracked"]) == 10


def test_ema_swap_puts_the_weights_back_bit_for_bit_even_on_an_error():
    model = Net()
    optimizer, schedule = Optim(lr=0.05).build(model, 30)
    ema = Ema(model, 0.9)
    train(model, optimizer, schedule, 0, 5, ema)
    model.norm.running_mean.fill_(math.nan)  # as a step with an overflow leaves it, which the guard then leaves out
    own, objects = {k: v.clone() for k, v in model.state_dict().items()}, list(model.parameters())
    with pytest.raises(RuntimeError, match="inside"), ema.swap():  # noqa: PT012
        assert torch.equal(model.first.weight, ema.state_dict()["first.weight"])
        assert model.norm.running_mean.isfinite().all()
        raise RuntimeError("inside")
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), own[key].nan_to_num(7)), key
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))


def test_ema_goes_on_bit_for_bit_from_its_tensors():
    whole, half = Net(), Net()
    emas = []
    for model, stops in ((whole, (8,)), (half, (3, 8))):
        optimizer, schedule = Optim(lr=0.05).build(model, 30)
        ema, start = Ema(model, 0.99), 0
        for stop in stops:
            train(model, optimizer, schedule, start, stop, ema)
            blob, start = save({k: v.contiguous() for k, v in ema.state_dict().items()}), stop
            ema = Ema(model, 0.99)
            ema.load_state_dict(load(blob))
        emas.append(ema.state_dict())
    assert all(torch.equal(emas[0][name], emas[1][name]) for name in emas[0])
    with pytest.raises(FastavError, match="averaged weights is of another model"):
        Ema(Model(), 0.9).load_state_dict(emas[0])


def test_ema_of_half_precision_weights_is_kept_in_float32():
    model = nn.Linear(4, 4).bfloat16()
    ema = Ema(model, 0.999)
    before = ema.state_dict()["weight"].clone()
    with torch.no_grad():
        model.weight.add_(0.01)
    ema.update()
    assert ema.state_dict()["weight"].dtype == torch.float32
    assert not torch.equal(ema.state_dict()["weight"], before)
    with ema.swap():
        assert model.weight.dtype == torch.bfloat16


def test_frozen_parameters_are_not_averaged():
    model = Net()
    model.first.requires_grad_(False)
    assert "first.weight" not in Ema(model, 0.9).state_dict()


def test_ema_of_shards_is_the_shard_of_the_ema():
    """Two ranks' worth of shards without a second process: a group that pretends to communicate, as nothing does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        pytest.skip("another test's process group is in force")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        plain, sharded = nn.Linear(6, 8), nn.Linear(6, 8)

        def shard(tensor: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(tensor.detach()[4:].clone(), mesh, [Shard(0)])

        for name, parameter in list(plain.named_parameters()):
            setattr(sharded, name, nn.Parameter(shard(parameter)))
        emas = Ema(plain, 0.9), Ema(sharded, 0.9)
        with torch.no_grad():
            for _ in range(3):
                plain.weight.mul_(1.5)
                sharded.weight.mul_(1.5)
                for ema in emas:
                    ema.update()
        found = emas[1].state_dict()["weight"]
        assert isinstance(found, DTensor)
        assert torch.equal(found.to_local(), emas[0].state_dict()["weight"][4:])
        own = sharded.weight.to_local().clone()
        with emas[1].swap():
            assert torch.equal(sharded.weight.to_local(), found.to_local())
        assert torch.equal(sharded.weight.to_local(), own)
    finally:
        dist.destroy_process_group()
