"""Shards: tar files of packed clips, read from local files, URLs or a cache. Only the needed byte ranges are read."""

from fastav.media.shards.byte_ranges import ReadStats as ReadStats
from fastav.media.shards.format import FLAC_BLOCK as FLAC_BLOCK
from fastav.media.shards.gop_splice import FetchedClip as FetchedClip
from fastav.media.shards.gop_splice import ShardReader as ShardReader
from fastav.media.shards.gop_splice import SplicedAudio as SplicedAudio
from fastav.media.shards.gop_splice import SplicedFrames as SplicedFrames
from fastav.media.shards.store_config import ShardReading as ShardReading
