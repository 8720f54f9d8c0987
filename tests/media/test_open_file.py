"""One way to open media: regular files, formats that consist of one file, and nothing that a file names."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from fastav.core.errors import MediaError
from fastav.data.clip import Clip
from fastav.media.decoder import DecodeSpec
from fastav.media.open_file import open_media
from fastav.media.probe import probe, probe_image, probe_mel
from fastav.media.pyav import PyAV
from fastav.media.shards.byte_ranges import LocalFiles
from tests.helpers.media import write_media
from tests.helpers.plans import clip_of, plan_of

PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "concat after blank lines": "\n \nffconcat version 1.0\nfile '{}'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n",
    "hls with a byte order mark": "\ufeff#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n",
    "live hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n",
    "dash": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>{}</BaseURL></Period></MPD>\n',
    "xml dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{}</BaseURL></MPD>\n',
    "sdp": "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 96\r\n",
    "pls": "[playlist]\nFile1={}\n",
    "vobsub": "# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\n# {}\n",
    "sbagen": "-SE\n00:00 off\nNOW alloff\n# {}\n",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("open") / "target.mp4", frames=10, size=(96, 64))


@pytest.mark.parametrize("kind", list(PLAYLISTS))
@pytest.mark.parametrize("suffix", ["mp4", "wav", "m3u8", "ffconcat"])
def test_what_a_file_names_is_not_opened(target, tmp_path, kind, suffix):
    path = tmp_path / f"list.{suffix}"
    path.write_text(PLAYLISTS[kind].format(target), encoding="utf-8", newline="")
    with pytest.raises(MediaError, match=r"playlist|not a media file|its format is not one of media files"):
        probe(path)
    row = replace(clip_of(target), video=path, audio=None, num_samples=0)  # a manifest that somebody sent
    with pytest.raises(MediaError):
        PyAV().build(DecodeSpec(("video",), 32)).decode(row, [plan_of()])


def test_special_files_are_named_at_once(tmp_path):
    for name in ("live.wav", "live.jpg", "live.npy", "live.tar"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "endless.mp4").symlink_to("/dev/zero")
    pipe, device = "is a named pipe, expected a regular file", "is a device, expected a regular file"
    for read, name, reason in (
        (probe, "live.wav", pipe), (probe_image, "live.jpg", pipe), (probe_mel, "live.npy", pipe),
        (probe, "endless.mp4", device), (open_media, "live.wav", pipe),
    ):  # fmt: skip
        with pytest.raises(MediaError, match=reason):
            read(tmp_path / name)
    decoder = PyAV().build(DecodeSpec(("video", "audio"), 32))
    for row in (
        Clip("v", video=tmp_path / "live.wav", num_frames=5, width=8, height=8),
        Clip("i", image=tmp_path / "live.jpg", num_frames=1, width=8, height=8),
        Clip("m", mel=tmp_path / "live.npy", num_mel_frames=9),
    ):
        with pytest.raises(MediaError, match=pipe):
            decoder.decode(row, [plan_of()])
    with pytest.raises(MediaError, match=pipe):
        LocalFiles().read(str(tmp_path / "live.tar"), [(0, 512)])


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("ogg", "libopus"), ("mka", "libopus"),
     ("aiff", "pcm_s16be"), ("caf", "pcm_s16le"), ("au", "pcm_s16be"), ("w64", "pcm_s16le"), ("tta", "tta"),
     ("ac3", "ac3"), ("m4a", "aac"), ("ts", "aac"), ("avi", "pcm_s16le")],
)  # fmt: skip
def test_ordinary_formats_are_recognised_by_content(tmp_path, suffix, codec):
    wave = 0.1 * np.sin(np.arange(48_000) / 9, dtype=np.float32)[None]
    path = write_media(tmp_path / f"a.{suffix}", wave=wave, rate=48_000, layout="mono", audio_codec=codec)
    named = path.rename(tmp_path / "a.data")
    with open_media(named) as container:
        assert len(container.streams.audio) == 1
