"""Checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
import torch

from fastav.core.errors import FastavError, UserError
from fastav.distributed.gloo_group import GlooGroup
from fastav.model.av_model import AVModel
from fastav.optim.ema import Ema
from fastav.optim.optimizer_state import restore_optimizer
from fastav.recipe.parse import parse_recipe, to_table, with_renamed_keys
from fastav.recipe.schema import Recipe
from fastav.training.checkpoint import Checkpoints, check_resumable
from fastav.training.checkpoint_writer import CheckpointWriter, TensorSplit
from tests import FILES

OLD = FILES / "checkpoints"
SUMS_OF_OLD = {"model": 45.043644, "ema": 46.975115}  # the same training, by one process and by two


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/a.weight": torch.randn(7, 5, generator=generator),
        "model/b": torch.arange(3),
        "model/h": torch.ones(4, dtype=torch.bfloat16),
        "optimizer/a.weight:exp_avg": torch.randn(7, 5, generator=generator),
        "optimizer/a.weight:step": torch.tensor(3.0),
    }


def save(checkpoints: Checkpoints, step: int, best: int | None = None, **options) -> Path:
    checkpoint_writer = CheckpointWriter(checkpoints, **options)
    told = None if best is None else {"step": best, "metric": "top1", "value": 0.1 + 0.2}
    checkpoint_writer.start(step, tensors(step), {"best": told}, told)
    checkpoint_writer.wait()
    return checkpoints.path(step)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path, asynchronous):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 12, best=12, asynchronous=asynchronous)
    read = checkpoints.newest()
    assert read is not None
    assert read.step == 12
    assert read.state["best"]["value"] == 0.1 + 0.2
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 12
    found = {f"{kind}/{name}": value for kind in ("model", "optimizer") for name, value in read.tensors(kind).items()}
    assert found.keys() == tensors(12).keys()
    for name, tensor in tensors(12).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert not list(tmp_path.rglob("*.pkl"))
    assert {path.suffix for path in checkpoints.path(12).iterdir()} == {".safetensors", ".json"}


def test_what_is_written_is_what_was_there_when_it_began(tmp_path):
    checkpoints, changing = Checkpoints(tmp_path), {"model/a": torch.zeros(200_000)}
    checkpoint_writer = CheckpointWriter(checkpoints)
    for step in (1, 2, 3):
        changing["model/a"].fill_(step)
        checkpoint_writer.start(step, changing, {})
        changing["model/a"].fill_(-1)
    checkpoint_writer.wait()
    assert all(torch.equal(checkpoints.read(n).tensors("model")["a"], torch.full((200_000,), n)) for n in (2, 3))


def test_what_is_asked_for_must_be_there(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    with pytest.raises(FastavError, match=r"model c: expected size \(2,\), checkpoint has nothing"):
        checkpoints.read(1).load("model", {"c": torch.empty(2)})
    with pytest.raises(FastavError, match=r"model b: expected size \(4,\), checkpoint has size \(3,\)"):
        checkpoints.read(1).load("model", {"b": torch.empty(4)})


def test_ranks_share_out_what_all_of_them_have():
    named = [(f"t{n}", torch.full((size,), float(n))) for n, size in enumerate((50, 10, 20, 30, 5, 40))]
    parts = [TensorSplit(GlooGroup(rank, 3)).select(named) for rank in range(3)]
    assert sorted(name for part in parts for name in part) == [name for name, _ in named]
    assert max(sum(t.numel() for t in part.values()) for part in parts) <= 70


def test_ranks_that_list_other_tensors_write_nothing(tmp_path):
    """Each would leave out what it takes to be the other's; nothing would be missed before the next resume."""
    names = [("exp_avg", "exp_avg_sq"), ("exp_avg_sq", "exp_avg")]
    orders = []
    for listed in names:
        shares = TensorSplit(GlooGroup(0, 2))
        shares.select((f"optimizer/a:{name}", torch.ones(3)) for name in listed)
        orders.append(shares.order)
    assert orders[0] != orders[1]

    class Other(GlooGroup):
        def gather(self, item):
            return [item, ("other", orders[1])] if orders[0] in item else [item]

    checkpoint_writer = CheckpointWriter(Checkpoints(tmp_path, gloo_group=Other()))
    checkpoint_writer.start(3, tensors(3), {}, order=orders[1])
    checkpoint_writer.wait()
    checkpoint_writer.start(5, tensors(5), {}, order=orders[0])
    with pytest.raises(FastavError, match=r"step 5: internal error: ranks disagree on the order.*step 3 is intact"):
        checkpoint_writer.wait()
    assert not Checkpoints(tmp_path).path(5).exists()


@pytest.mark.parametrize("number", [1, 2])
def test_checkpoints_of_every_format_load(number):
    """Of one small run, by one process in format 1 and by two under FSDP in format 2."""
    read = Checkpoints(OLD / f"format_{number}").newest()
    assert read is not None
    assert (read.step, read.state["format"]) == (2, number)
    recipe = parse_recipe(with_renamed_keys(read.state["recipe"]), {}, "old")
    model = AVModel.build(recipe.model, [f"class {n}" for n in range(8)], recipe.sampling, recipe.frontend)
    read.load("model", model.state_dict())
    total = sum(float(value.double().sum()) for value in model.state_dict().values())
    assert total == pytest.approx(SUMS_OF_OLD["model"], abs=1e-5)
    optimizer, _ = recipe.optim.build(model, 4)
    restore_optimizer(optimizer, read.tensors("optimizer"), read.state["optimizer"])
    ema = Ema(model, 0.9)
    ema.load_state_dict(read.tensors("ema"))
    assert ema.num_updates == 2
    averages = sum(float(value.double().sum()) for value in ema.state_dict().values())
    assert averages == pytest.approx(SUMS_OF_OLD["ema"], abs=1e-5)


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20, 25):
        save(checkpoints, step, best=10 if step >= 10 else 5)
    assert checkpoints.steps() == [10, 20, 25]


def test_damaged_newer_ones_do_not_push_out_whole_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (80, 100, 120):
        save(checkpoints, step)
    for step in (100, 120):
        (checkpoints.path(step) / "state.json").write_text("")
    save(checkpoints, 90)
    with pytest.warns(UserWarning, match="falling back"):
        read = checkpoints.newest()
    assert read is not None
    assert read.step == 90


def test_none_before_the_first(tmp_path):
    assert Checkpoints(tmp_path / "missing").newest() is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no_sums", "empty_state"])
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 1)
    newest = save(checkpoints, 2)
    (file,) = newest.glob("*.safetensors")
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "remove":
        file.unlink()
    elif damage == "no_sums":
        (newest / "checksums.json").unlink()
    else:
        (newest / "state.json").write_text("")
    with pytest.warns(UserWarning, match="falling back"):
        read = checkpoints.newest()
    assert read is not None
    assert read.step == 1


def test_all_damaged_is_an_error_and_not_a_silent_new_start(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (save(checkpoints, 1) / "state.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="falling back"),
        pytest.raises(FastavError, match="every checkpoint is damaged"),
    ):
        checkpoints.newest()


def test_checksums_cannot_point_outside_the_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = save(checkpoints, 1)
    (tmp_path / "secret").write_text("x")
    (path / "checksums.json").write_text('{"../secret": "0"}')
    with pytest.raises(FastavError, match="is outside the checkpoint"):
        checkpoints.read(1)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr("fastav.training.checkpoint_writer.FORMAT", 99)
    save(checkpoints, 1)
    with pytest.raises(FastavError, match="newer"):
        checkpoints.read(1)


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    leftover = tmp_path / ".step_00000002.99999.tmp"
    leftover.mkdir()
    (leftover / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    read = checkpoints.newest()
    assert read is not None
    assert read.step == 1
    save(checkpoints, 3)
    assert not leftover.exists()


def test_a_full_disk_while_saving_is_one_clear_error_and_loses_nothing(tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails in the middle, as there."""
    script = f"""
        import pathlib, resource, signal, torch
        from fastav.training.checkpoint import Checkpoints
        from fastav.core.errors import FastavError
        from fastav.training.checkpoint_writer import CheckpointWriter
        checkpoint_writer = CheckpointWriter(Checkpoints(pathlib.Path({str(tmp_path)!r})))
        checkpoint_writer.start(1, {{"model/a": torch.ones(10)}}, {{}})
        checkpoint_writer.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoint_writer.start(2, {{"model/a": torch.ones(100_000)}}, {{}})
        try:
            checkpoint_writer.wait()
        except FastavError as error:
            print(error)
        checkpoint_writer.start(3, {{"model/a": torch.ones(11)}}, {{}})
        checkpoint_writer.wait()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot save the checkpoint of step 2: File too large" in done.stdout
    assert "the checkpoint of step 1 is intact" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
    assert torch.equal(Checkpoints(tmp_path).read(1).tensors("model")["a"], torch.ones(10))


def test_a_different_recipe_is_refused_by_key_and_a_harmless_one_is_not(tmp_path):
    saved = to_table(Recipe())
    harmless = msgspec.structs.replace(
        Recipe(),
        out="elsewhere",
        loading=msgspec.structs.replace(Recipe().loading, workers=7),
        saving=msgspec.structs.replace(Recipe().saving, keep=9),
    )
    check_resumable(saved, harmless, tmp_path)
    other = msgspec.structs.replace(Recipe(), train=msgspec.structs.replace(Recipe().train, batch=32, seed=4))
    with pytest.raises(UserError, match=r"train\.batch: 64 -> 32, train\.seed: 0 -> 4"):
        check_resumable(saved, other, tmp_path)
