"""Other video readers, each in its best form: one decoding thread, only the frames that the plan names.

Every reader takes the same plan and returns uint8 [T, 3, size, size]. torchcodec, decord and PyAV return RGB frames,
which are cropped and resized by the function that fastav uses. SPDL crops and scales in FFmpeg's filter graph, as its
users do.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from fastav.data.clip import Clip, ClipPlan
from fastav.media.crop import crop_box, resize_crop
from fastav.media.decoder import DecodeSpec
from fastav.media.pyav import PyAV
from fastav.media.shards import ShardReader, ShardReading

SIZE = 224


class Peer(Protocol):
    """Reads the planned frames of one clip."""

    def frames(self, plan: ClipPlan) -> Tensor:
        """Returns uint8 [T, 3, SIZE, SIZE]."""
        ...


class Ours:
    """fastav's CPU decoder on a packed or a raw row."""

    def __init__(self, clip: Clip) -> None:
        self._clip, self._decoder = clip, PyAV().build(DecodeSpec(("video",), image_size=SIZE))
        self.shards = ShardReader(ShardReading())

    def frames(self, plan: ClipPlan) -> Tensor:
        """Returns uint8 [T, 3, SIZE, SIZE]."""
        made = self._decoder.decode(self._clip, [plan])[0].frames_TCHW
        assert made is not None, "the clip has video"
        return made


class TorchCodec:
    """torchcodec's CPU decoder."""

    def __init__(self, path: Path, mode: str) -> None:
        self._path, self._mode = str(path), mode

    def frames(self, plan: ClipPlan) -> Tensor:
        """Returns uint8 [T, 3, SIZE, SIZE]."""
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(self._path, seek_mode=self._mode, dimension_order="NHWC", num_ffmpeg_threads=1)
        found = decoder.get_frames_at(plan.frames_T.tolist()).data
        return resize_crop(found, plan.crop, plan.flip, SIZE)


class PyAVSeek:
    """PyAV: seeks to each keyframe that is needed and decodes up to the planned frames."""

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = str(path), fps

    def frames(self, plan: ClipPlan) -> Tensor:
        """Returns uint8 [T, 3, SIZE, SIZE]."""
        found: dict[int, Any] = {}
        wanted = sorted(set(plan.frames_T.tolist()))
        with av.open(self._path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            tick = 1 / self._fps / stream.time_base
            at = -1
            for number in wanted:
                if number <= at:
                    continue
                container.seek(round(number * tick), stream=stream)
                for frame in container.decode(stream):
                    at = round(frame.pts / tick)
                    if at in wanted:
                        found[at] = frame.to_ndarray(format="rgb24")
                    if at >= number:
                        break
        return resize_crop(np.stack([found[n] for n in plan.frames_T.tolist()]), plan.crop, plan.flip, SIZE)


class PyAVLinear:
    """PyAV: decodes from the start of the file to the last planned frame."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def frames(self, plan: ClipPlan) -> Tensor:
        """Returns uint8 [T, 3, SIZE, SIZE]."""
        found: dict[int, Any] = {}
        wanted = set(plan.frames_T.tolist())
        with av.open(self._path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    found[number] = frame.to_ndarray(format="rgb24")
                    if len(found) == len(wanted):
                        break
        return resize_crop(np.stack([found[n] for n in plan.frames_T.tolist()]), plan.crop, plan.flip, SIZE)


class Decord:
    """decord's CPU reader."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def frames(self, plan: ClipPlan) -> Tensor:
        """Returns uint8 [T, 3, SIZE, SIZE]."""
        import decord

        reader = decord.VideoReader(self._path, ctx=decord.cpu(0), num_threads=1)
        return resize_crop(reader.get_batch(plan.frames_T.tolist()).asnumpy(), plan.crop, plan.flip, SIZE)


class Spdl:
    """SPDL: demuxes, decodes the planned frames, crops and scales in a filter graph."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        self._path, self._width, self._height = str(path), width, height

    def frames(self, plan: ClipPlan) -> Tensor:
        """Returns uint8 [T, 3, SIZE, SIZE]."""
        import spdl.io

        left, top, right, bottom = crop_box(plan.crop, self._height, self._width)
        crop = f"crop={right - left}:{bottom - top}:{left}:{top}:exact=1,"
        flip = "hflip," if plan.flip else ""
        chain = f"{crop}scale={SIZE}:{SIZE}:flags=bilinear,{flip}format=pix_fmts=rgb24"
        wanted = sorted(set(plan.frames_T.tolist()))
        packets = spdl.io.demux_video(self._path)
        config = spdl.io.decode_config(decoder_options={"threads": "1"})
        decoded = spdl.io.sample_decode_video(packets, wanted, decode_config=config, filter_desc=chain)
        found_NHWC = torch.from_numpy(spdl.io.to_numpy(spdl.io.convert_frames(decoded)))
        places = [wanted.index(n) for n in plan.frames_T.tolist()]
        return found_NHWC[places].permute(0, 3, 1, 2).contiguous()


class Dump:
    """Ten JPEGs that were extracted beforehand; the nearest one is used for each planned frame."""

    def __init__(self, folder: Path, num_frames: int) -> None:
        self._files, self._num_frames = sorted(folder.glob("*.jpg"), key=lambda p: int(p.stem)), num_frames

    def frames(self, plan: ClipPlan) -> Tensor:
        """Returns uint8 [T, 3, SIZE, SIZE]."""
        count = len(self._files)
        places = (plan.frames_T * count // self._num_frames).clip(0, count - 1).tolist()
        pictures = [decode_jpeg(read_file(str(self._files[p])), ImageReadMode.RGB) for p in places]
        return resize_crop(torch.stack(pictures).permute(0, 2, 3, 1).contiguous(), plan.crop, plan.flip, SIZE)


class _Planned(IterableDataset[Tensor]):
    """Endless clips of a reader; each worker process starts at another plan."""

    def __init__(self, peer: Peer, plans: Sequence[ClipPlan]) -> None:
        self._peer, self._plans = peer, plans

    def __iter__(self) -> Iterator[Tensor]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        start = worker.id if worker is not None else 0
        for i in count(start):
            yield self._peer.frames(self._plans[i % len(self._plans)])


def processes(peer: Peer, plans: Sequence[ClipPlan], workers: int) -> Iterator[Tensor]:
    """Runs a reader in the worker processes of torch's DataLoader."""
    loader = DataLoader(
        _Planned(peer, plans), batch_size=None, num_workers=workers, prefetch_factor=2,
        multiprocessing_context="forkserver",
    )  # fmt: skip
    return iter(loader)


def peers_of(path: Path, clip: Clip) -> dict[str, Callable[[], Peer]]:
    """Returns the readers of a file by name, without those that cannot be loaded on this machine."""
    readers: dict[str, tuple[str, Callable[[], Peer]]] = {
        "torchcodec exact": ("torchcodec.decoders", lambda: TorchCodec(path, "exact")),
        "torchcodec approximate": ("torchcodec.decoders", lambda: TorchCodec(path, "approximate")),
        "PyAV by hand": ("av", lambda: PyAVSeek(path, clip.fps)),
        "SPDL": ("spdl.io", lambda: Spdl(path, clip.width, clip.height)),
        "decord": ("decord", lambda: Decord(path)),
        "PyAV linear": ("av", lambda: PyAVLinear(path)),
    }
    return {name: make for name, (module, make) in readers.items() if loads(module)}


@functools.cache
def loads(module: str) -> bool:
    """Returns whether a module can be used; torchcodec and SPDL need FFmpeg's libraries on the system."""
    try:
        loaded = importlib.import_module(module)
        if module == "spdl.io":
            loaded.decode_config()  # loads FFmpeg's libraries
    except (ImportError, OSError, RuntimeError):
        return False
    return True
