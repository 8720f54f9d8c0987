"""Converts an MBT checkpoint of its authors (scenic, flax) to a fastav model.

Example: `fastav convert scenic checkpoint_12345 models/mbt --classes classes.txt`

The head, the number of layers and bottleneck tokens, and the sizes of patches and tubelets are read from the
checkpoint. Options give the rest: the first layer with fusion, the sizes of frames and spectrogram, and the classes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from fastav.core.errors import UserError
from fastav.media.spectrogram import PRESETS, Frontend
from fastav.model.av_model import AVModel, Inputs, Model, load_strictly
from fastav.model.fusion import MBT
from fastav.model.scenic_checkpoint import Tree, mbt_state, read_checkpoint
from fastav.model.tower import TowerConfig

_UNKNOWN_STATISTICS = (0.0, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fastav convert`."""
    parser.add_argument(
        "kind", choices=["scenic"], help="scenic: a flax checkpoint (msgpack) written by the authors' code"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint file, such as checkpoint_12345")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the model; must be new or empty")
    parser.add_argument(
        "--start", type=int, default=8, metavar="LAYER",
        help="first layer with fusion, counted from 0; default 8, as in the authors' configuration",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, default=224, metavar="PX", help="side of a frame; default 224")
    parser.add_argument("--num-mels", type=int, default=128, metavar="M", help="mel bands; default 128")
    parser.add_argument(
        "--order", choices=("audio_video", "video_audio"), default="audio_video",
        help="order of the modalities in the token sequence; default audio_video",
    )  # fmt: skip
    parser.add_argument("--classes", type=Path, metavar="FILE", help="text file, one class name per line")
    parser.add_argument("--mean", type=float, metavar="DB", help="mean of the training spectrograms in dB; see below")
    parser.add_argument("--std", type=float, metavar="DB", help="their standard deviation in dB; see below")
    parser.epilog = (
        "Without --classes, the classes are numbered. --mean and --std: the authors precomputed their spectrograms in\n"
        "an unknown way, so mean and standard deviation on the scale of fastav are unknown. Fine-tuning\n"
        "(model.init_from = OUT) measures them on the new data. To predict without fine-tuning, give both."
    )


def main(args: argparse.Namespace) -> int:
    """Converts the checkpoint and prints the model that it found.

    Raises:
        UserError: The checkpoint is not an MBT, the options contradict it, or the output folder is not empty.
    """
    if args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
        raise UserError(f"{args.out}: already exists and is not empty; choose another folder")
    if (args.mean is None) != (args.std is None):
        raise UserError("--mean, --std: expected both or neither")
    tree = read_checkpoint(args.checkpoint)
    try:
        config, inputs, num_classes = describe(
            tree, start=args.start, image_size=args.image_size, num_mels=args.num_mels, order=args.order
        )
        state = mbt_state(tree)
    except KeyError as error:
        raise UserError(f"{args.checkpoint}: has no {error}; every MBT has it") from None
    classes = _classes(args.classes, num_classes)
    mean, std = _UNKNOWN_STATISTICS if args.mean is None else (args.mean, args.std)
    frontend: Frontend = msgspec.structs.replace(PRESETS["ast"], num_mels=args.num_mels, mean=mean, std=std)
    model = AVModel(config, classes, inputs, frontend)
    if "fusion.bottleneck" not in model.state_dict():
        state.pop("fusion.bottleneck", None)  # late fusion does not use it
    load_strictly(model, {name: value.float() for name, value in state.items()}, str(args.checkpoint))
    model.save(args.out)
    _print_summary(args.out, config, inputs, num_classes, args.mean is not None)
    return 0


def describe(
    tree: Tree, *, start: int, image_size: int, num_mels: int, order: str = "audio_video"
) -> tuple[Model, Inputs, int]:
    """Derives the model from a parameter tree.

    Args:
        tree: Parameters of the checkpoint: path -> array.
        start: First layer with fusion, from 0.
        image_size: Side of a frame in pixels.
        num_mels: Mel bands of the spectrogram.
        order: Order of the modalities in the token sequence: `audio_video` or `video_audio`.

    Returns:
        The config of towers and fusion, the input sizes, and the number of classes.

    Raises:
        UserError: The tree is not an MBT of both modalities, or the sizes contradict its position embeddings.
    """
    missing = [name for name in ("embedding/kernel", "embedding_spectrogram/kernel") if name not in tree]
    if missing:
        raise UserError(f"the checkpoint has no {missing[0]}: expected an MBT of frames and spectrogram")
    frames_kernel, query = (
        tree["embedding/kernel"],
        tree["Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"],
    )
    width, heads = query.shape[0], query.shape[1]
    mlp = tree["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"].shape[1]
    depth = sum(name.endswith("/LayerNorm_0/scale") and "_spectrogram" not in name for name in tree)
    patch = frames_kernel.shape[-4]
    tubelet = frames_kernel.shape[0] if frames_kernel.ndim == 5 else 0
    shared = "Transformer/encoderblock_0_spectrogram/LayerNorm_0/scale" not in tree
    prefix = int("cls" in tree)
    tokens = tree["bottleneck"].shape[1] - prefix if "bottleneck" in tree else 4
    frames = _frames(tree, prefix, image_size, patch) * max(tubelet, 1)
    window = _window(tree, prefix, num_mels, patch)
    args: dict[str, Any] = {
        "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": mlp / width,
        "act_layer": "gelu_tanh", "class_token": False, "global_pool": "avg",
    }  # fmt: skip
    tower = TowerConfig(name="vit_base_patch16_224", args=args)
    fusion = msgspec.convert(
        {
            "kind": "mbt", "start": start, "tokens": tokens, "head": "token" if prefix else "gap", "shared": shared,
            "mixing": "bottleneck" if "bottleneck" in tree else "joint" if shared else "cross",
            "tubelet": max(tubelet, 1), "sampled": 0 if tubelet else frames, "patch": patch, "rescale": False,
            "hidden": tree["pre_logits/bias"].shape[0] if "pre_logits/bias" in tree else 0, "order": order,
        }, MBT,
    )  # fmt: skip
    inputs = Inputs(frames=frames, image_size=image_size, num_mels=num_mels, window=window)
    return Model(video=tower, audio=tower, fusion=fusion), inputs, tree["output_projection/bias"].shape[0]


def _frames(tree: Tree, prefix: int, image_size: int, patch: int) -> int:
    """Returns the number of frames (or tubelets) of the video position embedding."""
    length = tree["Transformer/posembed_input/pos_embedding"].shape[1] - prefix
    frames, remainder = divmod(length, max(1, (image_size // patch) ** 2))
    if remainder or not frames or image_size % patch:
        side = math.isqrt(length) * patch
        raise UserError(
            f"--image-size {image_size}: patches of {patch} px do not divide the {length} positions of the "
            f"checkpoint's video embedding; expected {side} or less"
        )
    return frames


def _window(tree: Tree, prefix: int, num_mels: int, patch: int) -> int:
    """Returns the number of mel frames of the audio position embedding."""
    length = tree["Transformer/posembed_input_spectrogram/pos_embedding"].shape[1] - prefix
    columns, remainder = divmod(length, max(1, num_mels // patch))
    if remainder or num_mels % patch:
        raise UserError(
            f"--num-mels {num_mels}: patches of {patch} do not divide the {length} positions of the checkpoint's "
            "audio embedding"
        )
    return columns * patch


def _classes(file: Path | None, count: int) -> Sequence[str]:
    """Reads the class names; without a file, the classes are numbered."""
    if file is None:
        return [str(number) for number in range(count)]
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {file}: cannot be read: {error}") from None
    if len(names) != count or len(set(names)) != count:
        raise UserError(f"--classes {file}: has {len(set(names))} distinct names, expected the checkpoint's {count}")
    return names


def _print_summary(out: Path, config: Model, inputs: Inputs, num_classes: int, measured: bool) -> None:
    fusion: Any = config.fusion
    video = config.video.args
    console = Console()
    tokens_of = f"tubelets of {fusion.tubelet} frames" if not fusion.sampled else "single frames"
    console.print(
        f"MBT of {video['depth']} layers, width {video['embed_dim']}, {'shared' if fusion.shared else 'separate'} "
        f"encoders; {fusion.mixing} from layer {fusion.start} on"
        + (f" with {fusion.tokens} tokens" if fusion.mixing == "bottleneck" else "")
        + f"; head {fusion.head}, {num_classes} classes; {tokens_of}, {inputs.frames} frames of {inputs.image_size} px"
        f", spectrogram {inputs.num_mels} x {inputs.window}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if not measured:
        console.print(
            "mean and std are unknown and set to 0 and 1: give --mean and --std to predict with this model "
            "(fine-tuning measures them)", highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(
        f'wrote {out}; fine-tune it with --model.init_from "{out}" and the same [model] table', highlight=False
    )
