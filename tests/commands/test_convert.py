"""`fastav convert scenic`: checkpoints as flax writes them, and models that start from what was made of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from fastav.__main__ import main
from fastav.core.errors import UserError
from fastav.data.plan import Sampling
from fastav.media.spectrogram import Frontend
from fastav.model.av_model import AVModel
from fastav.model.fusion import FusionInputs
from fastav.model.scenic_checkpoint import read_checkpoint
from tests.model.fusion.test_mbt import MODALITY, config_of, parity, tree_of

__all__ = ["parity"]

WIDTH, HEADS, MLP, DEPTH, K = 16, 2, 24, 3, 5


def flax_bytes(value):
    """An array as flax's msgpack has it."""
    shape, name = value.shape, value.dtype.name
    return msgspec.msgpack.Ext(1, msgspec.msgpack.encode((shape, name, value.tobytes())))


def nested(flat):
    tree: dict = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[leaf] = flax_bytes(value) if isinstance(value, np.ndarray) else value
    return tree


def write(path, flat, place=("optimizer", "target")):
    whole = nested(flat)
    for key in reversed(place):
        whole = {key: whole}
    path.write_bytes(msgspec.msgpack.encode(whole | ({"global_step": 7, "accum_train_time": 3.5} if place else {})))
    return path


def made(head="token", shared=False, tubelet=2, frames=4, bottleneck=4):
    """A tree of random numbers: frames of 16 x 16, spectrograms of 16 bands x 48, patches of 8."""
    rng = np.random.default_rng(0)
    prefix = int(head == "token")

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    flat = {
        "embedding/kernel": draw(*([tubelet] if tubelet else []), 8, 8, 3, WIDTH),
        "embedding/bias": draw(WIDTH),
        "embedding_spectrogram/kernel": draw(8, 8, 3, WIDTH),
        "embedding_spectrogram/bias": draw(WIDTH),
        "Transformer/posembed_input/pos_embedding": draw(1, prefix + 4 * frames // (tubelet or 1), WIDTH),
        "Transformer/posembed_input_spectrogram/pos_embedding": draw(1, prefix + 12, WIDTH),
        "Transformer/encoder_norm/scale": draw(WIDTH),
        "Transformer/encoder_norm/bias": draw(WIDTH),
        "output_projection/kernel": draw(WIDTH, K),
        "output_projection/bias": draw(K),
    }
    if prefix:
        flat |= {"cls": draw(1, 1, WIDTH), "clsspectrogram": draw(1, 1, WIDTH)}
    if bottleneck:
        flat["bottleneck"] = draw(1, bottleneck + prefix, WIDTH)
    for number in range(DEPTH):
        for suffix in ("",) if shared else ("", "_spectrogram"):
            block = f"Transformer/encoderblock_{number}{suffix}"
            attention = f"{block}/MultiHeadDotProductAttention_0"
            for part in ("query", "key", "value"):
                flat[f"{attention}/{part}/kernel"] = draw(WIDTH, HEADS, WIDTH // HEADS)
                flat[f"{attention}/{part}/bias"] = draw(HEADS, WIDTH // HEADS)
            flat[f"{attention}/out/kernel"] = draw(HEADS, WIDTH // HEADS, WIDTH)
            flat[f"{attention}/out/bias"] = draw(WIDTH)
            for norm in ("LayerNorm_0", "LayerNorm_1"):
                flat |= {f"{block}/{norm}/scale": draw(WIDTH), f"{block}/{norm}/bias": draw(WIDTH)}
            flat |= {
                f"{block}/MlpBlock_0/Dense_0/kernel": draw(WIDTH, MLP),
                f"{block}/MlpBlock_0/Dense_0/bias": draw(MLP),
            }
            flat |= {
                f"{block}/MlpBlock_0/Dense_1/kernel": draw(MLP, WIDTH),
                f"{block}/MlpBlock_0/Dense_1/bias": draw(WIDTH),
            }
    return flat


SIZES = ["--start", "1", "--image-size", "16", "--num-mels", "16"]


def convert(checkpoint, out, *more):
    return main(["convert", "scenic", str(checkpoint), str(out), *SIZES, *more])


@pytest.mark.parametrize(
    "case", ["token_bottleneck", "gap_bottleneck", "token_bottleneck_rep", "token_bottleneck_shared",
             "gap_vanilla_shared", "token_crossattn_sepweights"],
)  # fmt: skip
def test_a_converted_checkpoint_gives_the_authors_logits(parity, case, tmp_path):
    """Its frames are 24 x 16; as many patches as those of 16 x 16 and more of them, in the same order."""
    arrays, everything = parity
    told = everything["cases"][case]["config"]
    rgb, spectrogram = (torch.from_numpy(arrays[f"inputs/{name}"]).float() for name in ("rgb", "spectrogram"))
    checkpoint = write(tmp_path / "checkpoint_7", tree_of(arrays, f"{case}/params"))
    sizes = ["--start", told.get("fusion_layer", 0), "--image-size", 16, "--num-mels", spectrogram.shape[2]]
    order = config_of(told).order
    words = ["convert", "scenic", checkpoint, tmp_path / "model", *sizes, "--order", order, "--mean", 0, "--std", 1]
    assert main([str(word) for word in words]) == 0
    model = AVModel.from_pretrained(tmp_path / "model")
    assert all(name in MODALITY for name in told["modality_fusion"])
    frames = rgb.permute(0, 1, 4, 2, 3)
    streams = FusionInputs(frames, spectrogram.permute(0, 3, 2, 1).unsqueeze(1))
    with torch.no_grad():
        found = model.fusion(model.video, model.audio, streams)
    torch.testing.assert_close(found, torch.from_numpy(arrays[f"{case}/logits_f32"]).float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("place", [("optimizer", "target"), ("optimizer", "target", "params"), ("params",), ()])
def test_parameters_are_found_where_versions_keep_them(place, tmp_path):
    tree = read_checkpoint(write(tmp_path / "c", made(), place))
    assert np.array_equal(tree["cls"], made()["cls"])
    assert ("global_step" in tree) is False


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "3 layers, width 16, separate encoders; bottleneck from layer 1 on with 4 tokens; head token, 5 classes; "
             "tubelets of 2 frames, 4 frames of 16 px, spectrogram 16 x 48"),
        ({"head": "gap"}, "head gap"),
        ({"tubelet": 0, "frames": 3}, "single frames, 3 frames of 16 px"),
        ({"shared": True, "bottleneck": 0}, "shared encoders; joint from layer 1 on; head"),
        ({"bottleneck": 0}, "separate encoders; cross from layer 1 on; head"),
    ],
)  # fmt: skip
def test_what_a_checkpoint_tells_is_detected(changes, told, tmp_path, capsys):
    assert convert(write(tmp_path / "c", made(**changes)), tmp_path / "m") == 0
    shown = capsys.readouterr().out
    assert told in shown
    assert "mean and std are unknown" in shown
    model = AVModel.from_pretrained(tmp_path / "m")
    assert model.classes == ("0", "1", "2", "3", "4")
    frames = torch.zeros(2, model.inputs.frames, 3, 16, 16, dtype=torch.uint8)
    assert model(frames, torch.zeros(2, 1, 1, 16, 48)).isfinite().all()


def test_late_fusion_has_no_use_for_the_bottleneck(tmp_path):
    checkpoint = write(tmp_path / "c", made())
    assert convert(checkpoint, tmp_path / "m", "--start", "3") == 0
    assert not any("bottleneck" in name for name in AVModel.from_pretrained(tmp_path / "m").state_dict())


def test_chunks_and_bfloat16(tmp_path):
    flat = made()
    cls = flat["cls"].reshape(-1)
    chunks = {str(i): flax_bytes(cls[i * 10 : i * 10 + 10]) for i in range(2)}
    shape = {"0": 1, "1": 1, "2": WIDTH}
    low = (flat["clsspectrogram"].view(np.uint32) >> 16).astype(np.uint16)
    whole = nested({name: value for name, value in flat.items() if not name.startswith("cls")})
    whole["cls"] = {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}
    raw = msgspec.msgpack.encode((low.shape, "bfloat16", low.tobytes()))
    whole["clsspectrogram"] = msgspec.msgpack.Ext(1, raw)
    (tmp_path / "c").write_bytes(msgspec.msgpack.encode({"params": whole}))
    tree = read_checkpoint(tmp_path / "c")
    assert np.array_equal(tree["cls"], flat["cls"])
    assert np.allclose(tree["clsspectrogram"], flat["clsspectrogram"], rtol=1e-2)
    assert tree["clsspectrogram"].dtype == np.float32


def without(name):
    return {key: value for key, value in made().items() if key != name}


@pytest.mark.parametrize(
    ("flat", "words", "message"),
    [
        (b"PK\x03\x04 not msgpack at all", [], "not a flax checkpoint"),
        ({"encoder/kernel": np.zeros(3)}, [], "contains no parameters of a Transformer; its keys are: optimizer"),
        (without("embedding_spectrogram/kernel"), [], "expected an MBT of frames and spectrogram"),
        (made(), ["--image-size", "24"], "--image-size 24: patches of 8 px do not divide the 8 positions"),
        (made(), ["--num-mels", "40"], "--num-mels 40: patches of 8 do not divide the 12 positions"),
        (made(), ["--start", "4"], "model.fusion.start = 4: the towers have only 3 layers"),
        (made(), ["--mean", "1"], "--mean, --std: expected both or neither"),
        (made(), ["--classes", "{tmp}/two.txt"], "has 2 distinct names, expected the checkpoint's 5"),
        (made(), ["--classes", "{tmp}/none.txt"], "cannot be read"),
        (without("output_projection/bias"), [], "has no 'output_projection/bias'; every MBT has it"),
        (without("Transformer/encoder_norm/bias"), [], "1 missing (fusion.norm.bias)"),
        (made() | {"Transformer/extra": np.zeros(3, np.float32)}, [], 'Transformer/extra"; not part of'),
    ],
)
def test_what_cannot_be_converted_is_named(flat, words, message, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("coot\ncrow\n")
    file = tmp_path / "c"
    if isinstance(flat, bytes):
        file.write_bytes(flat)
    else:
        write(file, flat)
    assert convert(file, tmp_path / "m", *(word.format(tmp=tmp_path) for word in words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_objects_are_refused_and_nothing_is_run(tmp_path):
    evil = msgspec.msgpack.Ext(1, msgspec.msgpack.encode(((1,), "object", b"\0" * 8)))
    (tmp_path / "c").write_bytes(msgspec.msgpack.encode({"params": {"Transformer": {"x": evil}}}))
    with pytest.raises(UserError, match="unsupported array type object"):
        read_checkpoint(tmp_path / "c")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "nothing")


def test_an_old_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    assert convert(write(tmp_path / "c", made()), tmp_path / "m") == 2
    assert "already exists" in capsys.readouterr().err


def test_a_model_starts_from_a_converted_one(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\n")
    assert convert(write(tmp_path / "c", made()), tmp_path / "m", "--classes", str(names)) == 0
    saved = AVModel.from_pretrained(tmp_path / "m")
    config = msgspec.structs.replace(saved.config, init_from=str(tmp_path / "m"))
    sampling = Sampling(frames=4, image_size=16, window=48, eval_windows=(0,))
    frontend = Frontend(num_mels=16, mean=-3.0, std=2.0)
    same = AVModel.build(config, "abcde", sampling, frontend)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in same.state_dict().items())
    others = AVModel.build(config, "xyz", sampling, frontend)
    assert others.fusion.head.weight.shape == (3, WIDTH)
    assert torch.equal(others.fusion.bottleneck, saved.fusion.bottleneck)
    others.save(tmp_path / "again")
    assert AVModel.from_pretrained(tmp_path / "again").config.init_from == str(tmp_path / "m")
    with pytest.raises(UserError, match=r"do not match this model: .*fusion.position.video: got \(1, 9, 16\)"):
        AVModel.build(config, "abcde", msgspec.structs.replace(sampling, frames=6), frontend)
    video = msgspec.structs.replace(config.video, weights="x.safetensors")
    with pytest.raises(UserError, match="both set"):
        AVModel.build(msgspec.structs.replace(config, video=video), "abcde", sampling, frontend)
    assert Path(tmp_path / "m" / "model.json").is_file()
