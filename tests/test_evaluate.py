"""Evaluating a run again, on other data, on two ranks, and with clips that cannot be read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastav.__main__ import main as fastav
from fastav.data.manifest import Manifest, write_manifest
from fastav.recipe.parse import load_recipe
from fastav.task.predictions import read_predictions
from fastav.train import train


@pytest.fixture(scope="module")
def trained(packed, tmp_path_factory):
    """A late-fusion run of a few steps."""
    from tests.conftest import TINY

    out = tmp_path_factory.mktemp("evaluate") / "run"
    words = [*TINY, "--model.fusion.kind", "late", "--data.manifest", str(packed), "--train.epochs", "0.5"]
    train(load_recipe(None, [*words, "--out", str(out)]))
    return out


def clips_of(made: Path, count: int):
    manifest = Manifest.open(made, split="test")
    return manifest.clips(range(len(manifest)))[:count], manifest.classes


def figures(run: Path, of: str) -> dict[str, float]:
    return json.loads((run / "evaluations" / of / "metrics.json").read_text())["metrics"]


def test_evaluating_again_gives_the_same_predictions(trained, made):
    before = read_predictions(trained / "predictions.parquet")
    assert fastav(["evaluate", str(trained)]) == 0
    again = read_predictions(trained / "predictions.parquet")
    assert again.ids == before.ids
    assert np.array_equal(again.probabilities_NK, before.probabilities_NK)


def test_a_split_that_does_not_fill_its_batches_counts_each_clip_once(trained, made, tmp_path):
    clips, classes = clips_of(made, 11)
    (tmp_path / "odd").mkdir()
    write_manifest(tmp_path / "odd" / "m.parquet", clips, classes=classes)
    assert fastav(["evaluate", str(trained), str(tmp_path / "odd" / "m.parquet"), "test"]) == 0
    found = figures(trained, "odd_m_test")
    assert found["num_clips"] == 11
    assert found["num_clips_broken"] == 0


def test_two_ranks_give_the_predictions_of_one(trained, made, tmp_path):
    clips, classes = clips_of(made, 13)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name / "m.parquet", clips, classes=classes)
    words = ["evaluate", str(trained), str(tmp_path / "one" / "m.parquet"), "test"]
    assert fastav([*words, "--train.threads", "1"]) == 0
    torchrun = Path(sys.executable).parent / "torchrun"
    words[2] = str(tmp_path / "two" / "m.parquet")
    command = [str(torchrun), "--standalone", "--nproc-per-node", "2", "-m", "fastav", *words, "--train.threads", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    one, two = (
        read_predictions(trained / "evaluations" / f"{n}_m_test" / "predictions.parquet") for n in ("one", "two")
    )
    assert one.ids == two.ids
    assert len(two) == 13
    assert np.abs(one.probabilities_NK - two.probabilities_NK).max() < 1e-5


def test_other_names_map_by_alias_and_strangers_are_named(trained, made, tmp_path, capsys):
    clips, classes = clips_of(made, 16)
    renamed = [dataclasses.replace(clip, labels=(clip.labels[0].upper(),)) for clip in clips]
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "m.parquet"
    write_manifest(path, renamed)
    (tmp_path / "aliases.csv").write_text("".join(f"{name.upper()},{name}\n" for name in classes[1:]))
    words = ["evaluate", str(trained), str(path), "test", "--data.aliases", str(tmp_path / "aliases.csv")]
    assert fastav(words) == 0
    shown = capsys.readouterr().err
    assert (
        f"1 classes of the data are unknown to the model, their clips count as unlabelled: {classes[0].upper()}"
        in shown
    )
    expected = sum(clip.labels[0] == classes[0] for clip in clips)
    assert figures(trained, "other_m_test")["num_clips_without_label"] == expected


def test_an_evaluation_that_cannot_read_its_clips_is_no_evaluation(trained, made, tmp_path, capsys):
    clips, classes = clips_of(made, 16)
    gone = [dataclasses.replace(c, video=tmp_path / f"gone{i}.mp4", audio=None) for i, c in enumerate(clips * 4)]
    named = [dataclasses.replace(c, id=f"clip{i}", num_samples=0) for i, c in enumerate(gone)]
    good = [dataclasses.replace(c, id=f"good{i}") for i, c in enumerate(clips)]
    write_manifest(tmp_path / "m.parquet", [*good, *named], classes=classes)
    words = ["evaluate", str(trained), str(tmp_path / "m.parquet"), "test", "--loading.max_broken", "0.1"]
    assert fastav(words) == 3
    assert "could not be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such_run"], "not a run folder"),
        (["{run}", "no.parquet"], "no.parquet"),
        (["{run}", "{made}", "tset"], 'no split "tset"'),
        (["{run}", "--data.aliases", "no.csv"], "no.csv"),
        (["{run}", "--sampling.frame", "2"], 'did you mean "sampling.frames"'),
    ],
)
def test_mistakes_are_one_line(trained, made, words, message, capsys):
    assert fastav(["evaluate", *(word.format(run=trained, made=made) for word in words)]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert message in printed[-1]


def test_a_run_without_a_model_is_not_looked_for_anywhere_else(trained, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").write_text((trained / "recipe.toml").read_text())
    assert fastav(["evaluate", str(tmp_path / "mine")]) == 2
    assert "model/ is missing" in capsys.readouterr().err


def test_a_malformed_alias_file_names_the_line(trained, tmp_path, capsys):
    (tmp_path / "aliases.csv").write_text("a,b\na,b,c\n")
    assert fastav(["evaluate", str(trained), "--data.aliases", str(tmp_path / "aliases.csv")]) == 2
    assert "aliases.csv:2: got 3 columns, expected two" in capsys.readouterr().err
