"""Checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import msgspec
import pytest
import torch

from fastav.checkpoint import Checkpoints, check_resumable
from fastav.errors import FastavError, UserError
from fastav.recipe import Recipe, to_table


def tensors(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    model = {
        "a.weight": torch.randn(7, 5, generator=generator),
        "b": torch.arange(3),
        "h": torch.ones(4, dtype=torch.bfloat16),
    }
    return {"model": model, "optimizer": {"0.exp_avg": torch.randn(7, 5, generator=generator)}}


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(12, tensors(0), {"best": {"value": 0.1 + 0.2}})
    read = checkpoints.newest()
    assert read is not None
    assert read.step == 12
    assert read.state["best"]["value"] == 0.1 + 0.2
    for stem, named in tensors(0).items():
        assert named.keys() == read.tensors[stem].keys()
        for name, tensor in named.items():
            assert read.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(read.tensors[stem][name], tensor)


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20, 25):
        checkpoints.save(step, tensors(step), {}, best=10 if step >= 10 else 5)
    assert checkpoints.steps() == [10, 20, 25]


def test_damaged_newer_ones_do_not_push_out_whole_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (80, 100, 120):
        checkpoints.save(step, tensors(step), {})
    for step in (100, 120):
        (checkpoints.path(step) / "state.json").write_text("")
    checkpoints.save(90, tensors(90), {})
    with pytest.warns(UserWarning, match="falling back"):
        read = checkpoints.newest()
    assert read is not None
    assert read.step == 90


def test_none_before_the_first(tmp_path):
    assert Checkpoints(tmp_path / "missing").newest() is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no_sums", "empty_state"])
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, tensors(1), {})
    newest = checkpoints.save(2, tensors(2), {})
    file = newest / "model.safetensors"
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
    path = checkpoints.save(1, tensors(1), {})
    (path / "state.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="falling back"),
        pytest.raises(FastavError, match="every checkpoint is damaged"),
    ):
        checkpoints.newest()


def test_checksums_cannot_point_outside_the_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, tensors(1), {})
    (tmp_path / "secret").write_text("x")
    (path / "checksums.json").write_text('{"../secret": "0"}')
    with pytest.raises(FastavError, match="checksum"):
        checkpoints.read(1)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr("fastav.checkpoint.FORMAT", 99)
    checkpoints.save(1, tensors(1), {})
    monkeypatch.undo()
    with pytest.raises(FastavError, match="newer"):
        checkpoints.read(1)


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1), {})
    leftover = tmp_path / ".step_00000002.99999.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    read = checkpoints.newest()
    assert read is not None
    assert read.step == 1
    checkpoints.save(3, tensors(3), {})
    assert not leftover.exists()


def test_a_full_disk_while_saving_is_one_clear_error_and_loses_nothing(tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails in the middle, as there."""
    script = f"""
        import resource, signal, torch
        from fastav.checkpoint import Checkpoints
        from fastav.errors import FastavError
        checkpoints = Checkpoints(__import__("pathlib").Path({str(tmp_path)!r}))
        checkpoints.save(1, {{"model": {{"a": torch.ones(10)}}}}, {{}})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoints.save(2, {{"model": {{"a": torch.ones(100_000)}}}}, {{}})
        except FastavError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot save the checkpoint of step 2" in done.stdout
    assert "the checkpoint of step 1 is intact" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001"]
    assert torch.equal(Checkpoints(tmp_path).read(1).tensors["model"]["a"], torch.ones(10))


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
