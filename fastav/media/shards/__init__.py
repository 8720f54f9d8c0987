"""Shards: tar files of packed clips, the splice that reads just what a plan needs of them, and where they are read."""

from fastav.media.shards.format import FLAC_BLOCK as FLAC_BLOCK
from fastav.media.shards.reading import ShardReading as ShardReading
from fastav.media.shards.splice import FetchedClip as FetchedClip
from fastav.media.shards.splice import ShardReader as ShardReader
from fastav.media.shards.splice import SplicedAudio as SplicedAudio
from fastav.media.shards.splice import SplicedFrames as SplicedFrames
from fastav.media.shards.store import ReadStats as ReadStats
