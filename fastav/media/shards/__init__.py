"""Shards: tar files of packed clips, the splice that reads just what a plan needs of them, and where they are read."""

from fastav.media.shards.format import FLAC_BLOCK as FLAC_BLOCK
from fastav.media.shards.splice import Packed as Packed
from fastav.media.shards.splice import Shards as Shards
from fastav.media.shards.splice import SplicedFrames as SplicedFrames
from fastav.media.shards.splice import SplicedSound as SplicedSound
from fastav.media.shards.store import Reading as Reading
from fastav.media.shards.store import Traffic as Traffic
