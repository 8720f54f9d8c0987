"""The main path: a run from manifest to model, its resume, and everything that ends it early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastav.__main__ import main as fastav
from fastav.core.errors import FastavError, Stopped, TooManyBroken, UserError
from fastav.model.av_model import AVModel
from fastav.recipe.parse import load_recipe, to_toml
from fastav.task.predictions import read_predictions
from fastav.train import Trainer, train
from fastav.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]


def run(words: list[str]):
    return train(load_recipe(None, words))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """One uninterrupted run with everything that a checkpoint has to hold: EMA, mixup, dropped paths."""
    from tests.conftest import TINY

    out = tmp_path_factory.mktemp("whole") / "run"
    words = [
        *TINY, "--model.fusion.kind", "bottleneck", "--model.fusion.start", "1", "--data.manifest", str(made),
        "--sampling.mixup", "0.4", "--optim.ema", "0.8", "--model.video.drop_path", "0.2", "--saving.every", "3",
    ]  # fmt: skip
    run([*words, "--out", str(out)])
    return out, words


def test_a_run_leaves_a_whole_folder(whole):
    out, _ = whole
    names = {path.name for path in out.iterdir()}
    assert {
        "recipe.toml",
        "env.json",
        "metrics.jsonl",
        "status.json",
        "checkpoints",
        "model",
        "predictions.parquet",
        "metrics.json",
    } <= names
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "done"
    assert status["step"] == status["total_steps"] == 12
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 13))
    assert all(row["clips_per_s"] > 0 and 0 <= row["stall_pct"] <= 100 for row in rows(out) if "loss" in row)
    assert Checkpoints(out / "checkpoints").steps() == [9, 12]
    resolved = load_recipe(out / "recipe.toml")
    assert resolved.frontend.mean is not None
    assert resolved.frontend.std is not None
    predictions = read_predictions(out / "predictions.parquet")
    assert len(predictions) == 16
    assert json.loads((out / "metrics.json").read_text())["metrics"]["num_clips"] == 16


def test_the_saved_model_is_the_averaged_one_and_gives_the_written_predictions(whole):
    out, _ = whole
    model = AVModel.from_pretrained(out / "model").eval()
    averaged = Checkpoints(out / "checkpoints").read(12).tensors("ema")
    state = dict(model.named_parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in averaged.items() if name in state)
    assert len(model.classes) == 8


def test_broken_clips_are_named_and_the_run_goes_on(whole):
    out, _ = whole
    listed = (out / "skipped.csv").read_text().splitlines()
    assert listed[0] == "id,path,stage,reason,step"
    assert len(listed) >= 2
    assert rows(out)[-2]["broken"] >= 1


def test_resume_from_any_checkpoint_ends_with_the_same_bits(whole, tmp_path):
    out, words = whole
    halved = tmp_path / "run"

    class Halt(Exception):
        pass

    trainer = Trainer(load_recipe(None, [*words, "--out", str(halved)]), signals=_NoSignal())
    step = trainer.step

    def halting(batches):
        if trainer.state.step == 5:  # two steps after the checkpoint of step 3: they are made again
            raise Halt
        return step(batches)

    trainer.step = halting
    with pytest.raises(Halt):
        trainer.fit()
    assert Checkpoints(halved / "checkpoints").steps() == [3]
    assert len(losses(halved)) == 5
    run([*words, "--out", str(halved)])
    assert same(out, halved)
    assert losses(halved) == losses(out)
    assert (halved / "skipped.csv").read_text() == (out / "skipped.csv").read_text()


class _NoSignal:
    name = ""


def test_running_a_finished_run_again_changes_nothing(whole):
    out, words = whole
    before = weights(out)
    evaluation = run([*words, "--out", str(out)])
    assert evaluation is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def test_another_recipe_is_refused_and_names_the_key(whole):
    out, words = whole
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.5"):
        run([*words, "--out", str(out), "--optim.lr", "0.5"])


def test_changed_rows_are_refused(whole, made, tmp_path):
    out, words = whole
    copy = tmp_path / "copy"
    Checkpoints(copy / "checkpoints")
    import shutil

    shutil.copytree(out, copy, dirs_exist_ok=True)
    other = tmp_path / "other.parquet"
    from fastav.data.manifest import Manifest, write_manifest

    manifest = Manifest.open(made)
    clips = manifest.clips(range(len(manifest)))
    write_manifest(other, clips[:-1], classes=manifest.classes)
    with pytest.raises(UserError, match="has changed since"):
        run([*words, "--out", str(copy), "--data.manifest", str(other)])


@pytest.mark.parametrize("kind", ["video", "audio", "late", "early"])
def test_every_fusion_trains(kind, tiny_packed, tmp_path):
    evaluation = run(tiny_packed(kind, tmp_path / "run", "--train.epochs", "0.5"))
    assert evaluation is not None
    assert evaluation.metrics["num_clips"] == 16
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


def test_mbt_trains_a_loss_for_each_modality(tiny_packed, tmp_path):
    words = ["--model.fusion.patch", "8", "--model.fusion.start", "1", "--train.epochs", "0.5"]
    evaluation = run(tiny_packed("mbt", tmp_path / "run", *words))
    assert evaluation is not None
    assert evaluation.metrics["num_clips"] == 16
    model = AVModel.from_pretrained(tmp_path / "run")
    assert model.fusion.head.weight.abs().sum() > 0


def test_score_fusion_trains_nothing_and_is_the_mean_of_the_two_runs(tiny_packed, tmp_path):
    for kind in ("video", "audio"):
        run(tiny_packed(kind, tmp_path / kind, "--train.epochs", "0.5"))
    run(
        tiny_packed(
            "score",
            tmp_path / "score",
            "--train.epochs",
            "0",
            "--model.video.init_from",
            "video",
            "--model.audio.init_from",
            "audio",
        )
    )
    video, audio, score = (
        read_predictions(tmp_path / name / "predictions.parquet") for name in ("video", "audio", "score")
    )
    assert video.ids == audio.ids == score.ids
    expected = (video.probabilities_NK + audio.probabilities_NK) / 2
    assert abs(score.probabilities_NK - expected).max() < 1e-5


def test_accumulation_gives_the_same_losses(tiny_packed, tmp_path):
    run(tiny_packed("late", tmp_path / "whole", "--train.epochs", "1", "--train.threads", "1"))
    run(
        tiny_packed(
            "late", tmp_path / "parts", "--train.epochs", "1", "--train.threads", "1", "--train.micro_batch", "2"
        )
    )
    gaps = [abs(a - b) for a, b in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True)]
    assert max(gaps) <= 1e-6


def test_a_sigterm_saves_exits_75_and_the_same_command_resumes(whole, tmp_path):
    words = [*whole[1], "--train.threads", "1"]
    out, stopped = tmp_path / "whole", tmp_path / "run"
    run([*words, "--out", str(out)])
    told = [*_as_recipe(words, tmp_path), "--out", str(stopped)]
    # It sends itself the signal, between the checkpoints of steps 3 and 6.
    env = os.environ | {"FASTAV_RECORD": str(tmp_path / "taken"), "FASTAV_STOP_AT": "5"}
    command = [sys.executable, "-m", "tests.ranks.recorded", *told]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == Stopped.exit_code == 75, done.stderr
    assert "stopped by SIGTERM after step 5/12" in done.stderr.splitlines()[-1]
    assert json.loads((stopped / "status.json").read_text())["state"] == "stopped"
    assert Checkpoints(stopped / "checkpoints").steps() == [3, 5]
    done = subprocess.run(
        [sys.executable, "-m", "fastav", "train", *told], capture_output=True, text=True, timeout=240
    )  # not `run`: the bits must be the same in another process
    assert done.returncode == 0, done.stderr
    assert "resumed after step 5" in done.stderr
    assert same(out, stopped)


def _as_recipe(words: list[str], folder: Path) -> list[str]:
    path = folder / "recipe.toml"
    path.write_text(to_toml(load_recipe(None, words)))
    return [str(path)]


def test_two_processes_train_as_one(tiny, tmp_path):
    """Two recipes by one command: the processes part and meet again in between, with another model."""
    quick = ["--train.epochs", "1", "--train.threads", "1", "--data.test", ""]
    paths = []
    for kind in ("bottleneck", "video"):
        run(tiny(kind, tmp_path / "one" / kind, *quick))
        words = tiny(kind, tmp_path / "two" / kind, *quick, "--train.num_processes", "2")
        paths.append(tmp_path / f"{kind}.toml")
        paths[-1].write_text(to_toml(load_recipe(None, words)))
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [str(torchrun), "--standalone", "--nproc-per-node", "2", "-m", "fastav.train", *map(str, paths)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    for kind in ("bottleneck", "video"):
        one, two = losses(tmp_path / "one" / kind), losses(tmp_path / "two" / kind)
        assert len(one) == len(two) == 6
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-6
        a, b = weights(tmp_path / "one" / kind), weights(tmp_path / "two" / kind)
        norm = sum(float(t.double().square().sum()) for t in a.values()) ** 0.5
        gap = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a) ** 0.5
        assert gap <= 1e-5 * norm
    skipped = [(tmp_path / n / "bottleneck" / "skipped.csv").read_text().splitlines() for n in ("one", "two")]
    assert {line.split(",")[0] for line in skipped[0]} == {line.split(",")[0] for line in skipped[1]}


def test_too_many_broken_clips_end_the_run_with_exit_3(tiny, tmp_path, made, capsys):
    path = tmp_path / "r.toml"
    path.write_text(to_toml(load_recipe(None, tiny("video", tmp_path / "run", "--train.epochs", "4"))))
    from fastav.data.manifest import Manifest, write_manifest

    manifest = Manifest.open(made)
    clips = manifest.clips(range(len(manifest)))
    import dataclasses

    broken = [
        dataclasses.replace(clip, video=tmp_path / f"gone_{i}.mp4") if i % 3 == 0 else clip
        for i, clip in enumerate(clips)
    ]
    write_manifest(tmp_path / "broken.parquet", broken, classes=manifest.classes)
    words = ["train", str(path), "--data.manifest", str(tmp_path / "broken.parquet"), "--loading.max_broken", "0.1"]
    assert fastav(words) == TooManyBroken.exit_code == 3
    assert "could not be read" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert "gone_" in (tmp_path / "run" / "skipped.csv").read_text()


def test_a_loss_that_stays_non_finite_stops_the_run(tiny_packed, tmp_path):
    words = tiny_packed(
        "video",
        tmp_path / "run",
        "--optim.lr",
        "1e30",
        "--optim.clip_norm",
        "0",
        "--guard.limit",
        "3",
        "--data.test",
        "",
    )
    with pytest.raises(FastavError, match="not finite for 3 steps in a row"):
        run([*words, "--train.epochs", "4"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.manifest", ""], "data.manifest is not set"),
        (["--data.manifest", "no.parquet"], "no.parquet"),
        (["--data.test", "tset"], 'no split "tset"; it has: train, test'),
        (["--data.train", "trian"], 'no split "trian"; it has: train, test'),
        (["--train.micro_batch", "3"], "expected a divisor of the"),
        (["--sampling.mixup", "0.2", "--train.micro_batch", "1"], "expected a multiple of 2"),
        (["--train.num_processes", "2"], "train.num_processes = 2, but the launcher started 1"),
        (["--train.strategy", "ddp"], 'the launcher requests "single"'),
        (["--log.trackers", "tensorbord"], "log.trackers"),
        (["--data.aliases", "no.csv"], "no.csv"),
        (["--saving.best", "top1_micro"], 'did you mean "top1_micro_pct"'),
    ],
)
def test_what_does_not_fit_together_is_one_line(tiny_packed, tmp_path, words, message):
    with pytest.raises(UserError, match=message) as caught:
        run(tiny_packed("video", tmp_path / "run", *words))
    assert "\n" not in str(caught.value)


def test_two_processes_that_never_met_are_refused(tiny_packed, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "-1")
    from fastav.training.process_setup import Ranks

    recipe = load_recipe(None, tiny_packed("video", tmp_path / "run"))
    with pytest.raises(UserError, match="each would train alone"):
        Ranks(recipe.train)


def test_tensorboard_gets_the_numbers(tiny_packed, tmp_path):
    run(tiny_packed("video", tmp_path / "run", "--train.epochs", "0.5", "--log.trackers", "tensorboard"))
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_repeat_decodes_once_and_plateau_and_best_are_kept(tiny_packed, tmp_path):
    words = tiny_packed(
        "video", tmp_path / "run", "--sampling.repeat", "2", "--optim.schedule.kind", "plateau",
        "--train.eval_every", "0.5",
        "--train.epochs", "1.5", "--saving.keep", "1",
    )  # fmt: skip
    run(words)
    trained = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert trained[-1]["unique_clips_per_s"] == pytest.approx(trained[-1]["clips_per_s"] / 2)
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert best["step"] in Checkpoints(tmp_path / "run" / "checkpoints").steps()


def test_a_single_modality_still_says_what_the_clips_have(tiny_packed, tmp_path):
    evaluation = run(tiny_packed("video", tmp_path / "run", "--train.epochs", "0.5"))
    assert evaluation.metrics["num_clips_without_audio"] == 0
    assert evaluation.metrics["num_clips_without_video"] == 0
    assert read_predictions(tmp_path / "run" / "predictions.parquet").has_audio_N.all()
