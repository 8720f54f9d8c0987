"""`fastav export weights`: models out of checkpoints, whoever wrote them."""

from __future__ import annotations

import shutil

import pytest
import torch

from fastav.__main__ import main
from fastav.model.av_model import AVModel
from fastav.recipe.parse import load_recipe
from fastav.train import train
from tests import FILES

OLD = FILES / "checkpoints"


def states(*folders):
    return [AVModel.from_pretrained(folder).state_dict() for folder in folders]


def test_the_last_checkpoint_is_the_runs_model(tiny_packed, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--train.epochs", "1", "--optim.ema", "0.9", "--saving.every", "1", "--saving.keep", "9"]
    train(load_recipe(None, [*tiny_packed("bottleneck", out), *words]))
    assert main(["export", "weights", str(out)]) == 0
    last = max((out / "exported").iterdir())
    assert str(last) in capsys.readouterr().err
    assert main(["export", "weights", str(out), "--raw", "--out", str(tmp_path / "raw")]) == 0
    assert main(["export", "weights", str(out), "--step", "1", "--out", str(tmp_path / "first")]) == 0
    whole, exported, raw, first = states(out / "model", last, tmp_path / "raw", tmp_path / "first")
    assert all(torch.equal(whole[name], exported[name]) for name in whole)
    assert not all(torch.equal(whole[name], raw[name]) for name in whole)
    assert not all(torch.equal(exported[name], first[name]) for name in whole)
    assert main(["export", "weights", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["export", "weights", str(out), "--step", "77"]) == 2
    assert "no checkpoint of step 77; available steps: 1, 2" in capsys.readouterr().err
    assert main(["export", "weights", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("number", [1, 2])
def test_older_formats(number, tmp_path, monkeypatch, capsys):
    """Their classes are in the manifest alone."""
    shutil.copytree(OLD / f"format_{number}", tmp_path / "run" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "weights", "run"]) == 2
    assert "data/manifest.parquet" in capsys.readouterr().err
