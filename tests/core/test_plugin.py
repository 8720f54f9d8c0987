"""Fusions, spectrograms, decoders and data sets from outside the project, named `module:attribute`."""

from __future__ import annotations

import inspect
import json
import textwrap

import pytest
import torch

from fastav.__main__ import main
from fastav.core.errors import UserError
from fastav.core.plugin import load_external
from fastav.data.plan import Sampling
from fastav.media.spectrogram import Frontend
from fastav.model.av_model import AVModel, Model
from fastav.model.fusion import ExternalFusion
from fastav.model.fusion.base import FusionKind
from fastav.model.tower import TowerConfig
from fastav.recipe.parse import load_recipe, to_toml

CODE = '''
import numpy as np
import torch
from torch import nn

from fastav.data.clip import Clip
from fastav.data.manifest import Manifest
from fastav.datasets.clip_list import ClipList
from fastav.media.pyav import PyAV
from fastav.model.fusion.base import FusionKind
from fastav.model.fusion.inputs import audio_features, mean_over_windows, video_features


class Product(FusionKind, frozen=True):
    power: float = 1.0

    def build(self, video, audio, num_classes, num_frames):
        return ProductFusion(self.power)


class ProductFusion(nn.Module):
    def __init__(self, power):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(power))

    def forward(self, video, audio, streams):
        video_BK = video.head(video_features(video, streams))
        audio_BK = mean_over_windows(audio.head(audio_features(audio, streams)), streams.window_BW)
        return self.power * (video_BK + audio_BK)

    def flops(self, video, audio, frames, windows):
        return frames * video.feature_flops() + windows * audio.feature_flops()


def not_a_fusion():
    return 3


def loudness(config, gain):
    def compute(wave_CS):
        frames = int(config.num_frames(wave_CS.shape[-1]))
        level = gain * torch.arange(frames, dtype=torch.float32)
        return level.expand(wave_CS.shape[0], config.num_mels, frames)

    return compute


def wrong_size(config):
    return lambda wave_CS: torch.zeros(1, 2, 3)


class Logged:
    """Decodes as PyAV does, and counts."""

    clips = 0

    def __init__(self, threads=1):
        self.threads = threads

    def build(self, spec):
        decoder = PyAV().build(spec)
        plain = decoder.decode

        def decode(clip, plans):
            Logged.clips += 1
            return plain(clip, plans)

        decoder.decode = decode
        return decoder


class Birds:
    """Birds of one made data set.

    As indexed from its own manifest.
    """

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("root")

    @staticmethod
    def list_clips(args):
        manifest = Manifest.open(args.root)
        rows = manifest.clips(range(4))
        return ClipList([Clip(c.id, video=c.video, audio=c.audio, labels=c.labels, split=c.split) for c in rows])
'''


@pytest.fixture(autouse=True)
def birds(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_birds.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield
    import sys

    sys.modules.pop("my_birds", None)


def recipe_of(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_kind_from_outside_is_written_short_and_kept_whole(tmp_path):
    path = recipe_of(tmp_path, '[model.fusion]\nkind = "my_birds:Product"\npower = 2.0\n')
    recipe = load_recipe(path)
    assert recipe.model.fusion == ExternalFusion("my_birds:Product", {"power": 2.0})
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    words = ["--model.fusion.kind", "my_birds:Product", "--model.fusion.power", "3"]
    assert load_recipe(None, words).model.fusion == ExternalFusion("my_birds:Product", {"power": 3})
    assert load_recipe(path, ["--model.fusion.kind", "late"]).model.fusion.tower_heads is False
    assert load_recipe(None, ["--decode.kind", "my_birds:Logged"]).decode.factory == "my_birds:Logged"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("no_birds:Product", {}, "kind: cannot import \"no_birds\": No module named 'no_birds'; install it"),
        ("my_birds:Produkt", {}, 'model.fusion.kind: module "my_birds" has no "Produkt"; did you mean "Product"?'),
        ("my_birds:Product", {"power": "x"}, "model.fusion.args: my_birds:Product: Expected `float`, got `str`"),
        ("my_birds:Product", {"pwer": 1.0}, "fusion.args: my_birds:Product: Object contains unknown field `pwer`"),
        ("my_birds:not_a_fusion", {"x": 1}, "fusion.args: my_birds:not_a_fusion: not_a_fusion() got an unexpected"),
        ("my_birds:not_a_fusion", {}, '"my_birds:not_a_fusion" returns a int, expected a subclass of fastav.model'),
    ],
)  # fmt: skip
def test_mistakes_name_the_key_and_the_code(name, args, message):
    with pytest.raises(UserError) as caught:
        ExternalFusion(name, args).make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_without_its_parts_is_refused():
    with pytest.raises(UserError, match="not of the form module:attribute"):
        load_external(":x", "decode.kind")


def test_a_run_with_fusion_spectrogram_and_decoder_from_outside(tiny, made, tmp_path, capsys):
    import my_birds

    out = tmp_path / "run"
    words = [
        *tiny("my_birds:Product", out, "--model.fusion.power", "0.5", "--train.epochs", "0.5"),
        "--decode.kind", "my_birds:Logged", "--frontend.factory", "my_birds:loudness", "--frontend.args.gain", "0.5",
    ]  # fmt: skip
    assert main(["train", str(recipe_of(tmp_path, "")), *words]) == 0
    assert "my_birds:Logged (requested)" in capsys.readouterr().err
    assert my_birds.Logged.clips > 16
    description = json.loads((out / "model" / "model.json").read_text())
    assert description["model"]["fusion"] == {
        "kind": "external", "factory": "my_birds:Product", "args": {"power": 0.5},
    }  # fmt: skip
    with pytest.raises(UserError, match=r'loading it runs code of "my_birds:Product" .*pass factories'):
        AVModel.from_pretrained(out / "model")
    model = AVModel.from_pretrained(out / "model", factories=["my_birds:Product"])
    assert model.fusion.power.item() != 0.5
    assert main(["evaluate", str(out)]) == 0
    assert main(["report", str(out)]) == 0


def test_a_spectrogram_from_outside_is_cut_into_windows(tmp_path):
    frontend = Frontend(factory="my_birds:loudness", args={"gain": 2.0})
    wave_CS = torch.zeros(1, 1280)  # 11 mel frames
    made = frontend.build().windows(wave_CS, torch.tensor([0, 8, -1, 11]).numpy(), 4)
    assert made.shape == (4, 1, 128, 4)
    assert made[0, 0, 5].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert made[1, 0, 5].tolist() == [16.0, 18.0, 20.0, -100.0]
    assert made[2:].unique().tolist() == [-100.0]
    assert frontend.needed_samples(torch.tensor([3]).numpy(), 4, 1280) == (0, 1280)
    with pytest.raises(UserError, match=r"gives a spectrogram of \[1, 2, 3\], expected \[1, 128, 11\]"):
        Frontend(factory="my_birds:wrong_size").build().windows(wave_CS, torch.tensor([0]).numpy(), 4)
    with pytest.raises(UserError, match=r"frontend.args: my_birds:loudness: .*missing 1 required positional"):
        Frontend(factory="my_birds:loudness").build()


def test_a_data_set_from_outside_is_indexed(made, tmp_path, capsys):
    out = tmp_path / "birds.parquet"
    assert main(["index", "my_birds:Birds", str(made), "--out", str(out)]) == 0
    assert "4 clips" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["index", "my_birds:Birds", "--help"])
    assert "Birds of one made data set." in capsys.readouterr().out
    assert main(["index", "my_birds:Product", str(made), "--out", str(out)]) == 2
    message = 'fastav index: "my_birds:Product" has no function add_arguments(), which a data set needs'
    assert message in capsys.readouterr().err


def test_the_documented_fusion_runs(tmp_path, monkeypatch):
    """The example in `FusionKind` is complete: as a file, it builds, trains and ignores a missing modality."""
    lines = inspect.getdoc(FusionKind).splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip() == "import torch")
    (tmp_path / "documented.py").write_text(textwrap.dedent("\n".join(lines[first:])))
    monkeypatch.syspath_prepend(tmp_path)
    args = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    tower = TowerConfig(name="vit_tiny_patch16_224", args=args)
    config = Model(video=tower, audio=tower, fusion=ExternalFusion("documented:GatedSum", {"gate": 0.5}))
    sampling = Sampling(frames=2, image_size=16, window=24)
    model = AVModel.build(config, ("crow", "gull"), sampling, Frontend(num_mels=16, mean=-40.0, std=20.0))
    frames, mel = torch.zeros(3, 2, 3, 16, 16, dtype=torch.uint8), torch.zeros(3, 1, 1, 16, 24)
    model(frames, mel).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.flops() > 0
    has_audio = torch.tensor([True, False, True])
    silent = model(frames, mel, has_audio_B=has_audio)[1]
    torch.testing.assert_close(model(frames, mel + 9, has_audio_B=has_audio)[1], silent)
