"""Byte ranges of local files, of a real HTTP server, and of the cache between: right, shared, bounded, kill-proof."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastav.core.errors import MediaError, UserError
from fastav.media.shards import ShardReading
from fastav.media.shards.byte_ranges import LocalFiles, merge_ranges
from fastav.media.shards.cache import Cached
from fastav.media.shards.remote import Remote
from tests.helpers.range_server import serving

SIZE = 300_000
BLOCK = 98_304  # larger than the gaps that are fetched with their neighbours


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name in ("a.tar", "b.tar", "c.tar"):
        (folder / name).write_bytes(rng.bytes(SIZE))
    return folder


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("fastav.media.shards.remote.FIRST_PAUSE_S", 0.01)


def ranges_of(rng, count=6):
    at = rng.integers(0, SIZE - 5000, count)
    return [(int(a), int(n)) for a, n in zip(at, rng.integers(1, 5000, count), strict=True)]


def expected(folder, name, ranges):
    data = (folder / name).read_bytes()
    return [data[at : at + size] for at, size in ranges]


def message(function, *args):
    with pytest.raises((MediaError, UserError)) as error:
        function(*args)
    return str(error.value)


# Local files --------------------------------------------------------------------------------------------------------


def test_ranges_that_nearly_touch_are_one_read():
    assert merge_ranges([(100, 50), (0, 10), (150, 5), (12, 3)], 4) == [(0, 15, [1, 3]), (100, 55, [0, 2])]
    assert merge_ranges([(0, 100), (10, 5)], 0) == [(0, 100, [0, 1])]


def test_local_ranges_in_any_order(folder):
    store, rng = LocalFiles(), np.random.default_rng(1)
    for _ in range(20):
        ranges = ranges_of(rng)
        assert store.read(str(folder / "a.tar"), ranges) == expected(folder, "a.tar", ranges)
    assert store.read_stats.num_bytes > 0
    assert store.read(str(folder / "a.tar"), []) == []


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_few_descriptors_serve_many_threads(folder):
    store = LocalFiles(most=1)
    names = ["a.tar", "b.tar", "c.tar"]

    def work(seed):
        rng = np.random.default_rng(seed)
        for i in range(200):
            name, ranges = names[(seed + i) % 3], ranges_of(rng, 2)
            assert store.read(str(folder / name), ranges) == expected(folder, name, ranges)

    before = open_files()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert open_files() <= before + 1


def test_local_faults_are_named(folder, tmp_path):
    store = LocalFiles()
    assert message(store.read, str(tmp_path / "no.tar"), [(0, 1)]).endswith("no.tar: shard: no such file or directory")
    assert "a folder" in message(store.read, str(tmp_path), [(0, 1)]) or "directory" in message(
        store.read, str(tmp_path), [(0, 1)]
    )
    text = message(store.read, str(folder / "a.tar"), [(SIZE - 10, 20)])
    assert f"ends at byte {SIZE}, expected at least {SIZE + 10} bytes" in text


def test_a_replaced_file_is_seen_after_forget(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"old")
    store = LocalFiles()
    assert store.read(str(path), [(0, 3)]) == [b"old"]
    (tmp_path / "y").write_bytes(b"new")
    (tmp_path / "y").replace(path)
    store.forget(str(path), (0, 3))
    assert store.read(str(path), [(0, 3)]) == [b"new"]


def test_a_dropped_store_closes_its_files(folder):
    before = open_files()
    for _ in range(5):
        store = LocalFiles()
        for name in ("a.tar", "b.tar"):
            store.read(str(folder / name), [(0, 10)])
        del store
    assert open_files() == before


def test_a_stale_handle_is_opened_anew(folder, monkeypatch):
    store, pread, stale = LocalFiles(), os.pread, [True]

    def once(*words):
        if stale.pop() if stale else False:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(*words)

    monkeypatch.setattr(os, "pread", once)
    assert store.read(str(folder / "a.tar"), [(5, 9)]) == expected(folder, "a.tar", [(5, 9)])
    assert not stale


# URLs ---------------------------------------------------------------------------------------------------------------


def test_ranges_over_http(folder, server):
    store, rng = ShardReading().build(), np.random.default_rng(2)
    for name in ("a.tar", "b.tar"):
        ranges = ranges_of(rng, 9)
        assert store.read(f"{server.url}/{name}", ranges) == expected(folder, name, ranges)
    assert server.num_bytes < SIZE
    assert store.read_stats.num_bytes == server.num_bytes


def test_ranges_are_fetched_side_by_side(folder, server):
    server.latency_s = 0.2
    store = Remote(concurrency=16, retries=0)
    ranges = [(at, 10) for at in range(0, SIZE - 70_000, 70_000)]
    store.read(f"{server.url}/a.tar", [(0, 1)])
    begun = time.perf_counter()
    assert len(store.read(f"{server.url}/a.tar", ranges)) == 4
    assert time.perf_counter() - begun < 0.7  # one after the other they would take 0.8 s


def test_any_fsspec_url(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/pack/a.tar", (folder / "a.tar").read_bytes())
    ranges = [(5, 10), (200_000, 7)]
    assert ShardReading().build().read("memory://pack/a.tar", ranges) == expected(folder, "a.tar", ranges)


def test_what_passes_is_tried_again(folder, server):
    ranges = [(10, 100), (100_000, 100), (250_000, 100)]
    server.fail_first = 2
    assert Remote(4, 3).read(f"{server.url}/a.tar", ranges) == expected(folder, "a.tar", ranges)
    server.cut_first = 2
    assert Remote(4, 3).read(f"{server.url}/a.tar", ranges) == expected(folder, "a.tar", ranges)


def test_what_does_not_pass_is_named(server):
    store = Remote(4, 2)
    before = server.requests
    assert message(store.read, f"{server.url}/no.tar", [(0, 5)]) == f"{server.url}/no.tar: shard: no such shard"
    assert server.requests == before + 1
    server.fail_first = 99
    assert "(3 attempts)" in message(store.read, f"{server.url}/a.tar", [(0, 5)])
    server.fail_first = 0
    server.ignore_ranges = True
    assert "the server does not support range requests" in message(store.read, f"{server.url}/a.tar", [(0, 5)])
    assert "fsspec does not support ftpx://" in message(store.read, "ftpx://a/b.tar", [(0, 5)])


def test_a_server_that_is_busy_is_no_missing_shard(folder, server, tmp_path):
    server.fail_all, server.fail_first = True, 3
    assert cached(server, tmp_path).read(f"{server.url}/a.tar", [(7, 5)]) == expected(folder, "a.tar", [(7, 5)])
    server.fail_first = 99
    text = message(cached(server, tmp_path / "b").read, f"{server.url}/b.tar", [(0, 5)])
    assert "no such shard" not in text
    assert "attempts)" in text
    assert "no such shard" not in message(Remote(4, 1).identity, "http://127.0.0.1:9/x.tar")


def test_a_cache_of_less_than_a_few_blocks_is_refused(tmp_path):
    text = message(ShardReading(cache=str(tmp_path), cache_gib=0.001, fill_mib=4).build)
    assert "cache_gib: expected at least 0.015625 (four blocks of loading.shards.fill_mib 4), got 0.001" in text


def test_a_missing_driver_names_its_package(monkeypatch):
    def absent(protocol, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", absent)
    assert "reading s3:// needs a package: pip install s3fs" in message(Remote(1, 0).read, "s3://b/a.tar", [(0, 1)])


def test_a_forked_child_reads_too(folder, server):
    store = Remote(4, 0)
    store.read(f"{server.url}/a.tar", [(0, 5)])
    child = os.fork()
    if not child:
        good = store.read(f"{server.url}/a.tar", [(7, 50)]) == expected(folder, "a.tar", [(7, 50)])
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


# The cache ----------------------------------------------------------------------------------------------------------


def cached(server, path, most=1 << 30, block=BLOCK):
    return Cached(Remote(8, 1), path, most, block)


def blocks(path):
    return sorted(path.rglob("*.block"))


def test_blocks_are_fetched_once(folder, server, tmp_path):
    rng = np.random.default_rng(3)
    store = cached(server, tmp_path)
    for _ in range(30):
        ranges = ranges_of(rng)
        assert store.read(f"{server.url}/a.tar", ranges) == expected(folder, "a.tar", ranges)
    assert server.num_bytes <= SIZE
    again, before = cached(server, tmp_path), server.num_bytes
    assert again.read(f"{server.url}/a.tar", [(0, SIZE)]) == expected(folder, "a.tar", [(0, SIZE)])
    assert again.read(f"{server.url}/a.tar", [(0, SIZE)])
    assert server.num_bytes == max(before, SIZE)
    assert again.read_stats.cache_hits > 0


WORKER = """
import sys, numpy as np
from pathlib import Path
from fastav.media.shards.cache import Cached
from fastav.media.shards.remote import Remote
url, folder, cache, most, seed = sys.argv[1:]
store, rng = Cached(Remote(8, 3), Path(cache), int(most), 98304), np.random.default_rng(int(seed))
for _ in range(40):
    name = ("a.tar", "b.tar", "c.tar")[rng.integers(3)]
    at, size = int(rng.integers(0, 290000)), int(rng.integers(1, 9000))
    got = store.read(f"{url}/{name}", [(at, size), (at // 2, 100)])
    data = (Path(folder) / name).read_bytes()
    assert got == [data[at : at + size], data[at // 2 : at // 2 + 100]]
"""


def run_workers(server, folder, cache, most, count=4):
    words = [sys.executable, "-c", WORKER, server.url, str(folder), str(cache), str(most)]
    running = [subprocess.Popen([*words, str(seed)], stderr=subprocess.PIPE) for seed in range(count)]
    for process in running:
        assert process.wait(120) == 0, process.stderr.read().decode()


def test_many_processes_fetch_each_block_once(folder, server, tmp_path):
    run_workers(server, folder, tmp_path, 1 << 30)
    sent = [(path, begin) for path, begin, _ in server.ranges]
    pieces = {(path, block) for path, begin, end in server.ranges for block in range(begin // BLOCK, -(-end // BLOCK))}
    total = sum(-(-(end - begin) // BLOCK) for _, begin, end in server.ranges)
    assert len(sent) == len(set(sent))
    assert total == len(pieces)
    assert server.num_bytes <= 3 * SIZE


def test_the_bound_holds_while_others_read(folder, server, tmp_path):
    most = 200_000
    seen, done = [], threading.Event()

    def watch():
        while not done.is_set():
            sizes = 0
            for path in blocks(tmp_path):
                try:
                    sizes += path.stat().st_size
                except OSError:
                    continue
            seen.append(sizes)
            time.sleep(0.01)

    sink = threading.Thread(target=watch)
    sink.start()
    run_workers(server, folder, tmp_path, most, count=3)
    done.set()
    sink.join()
    assert 0 < max(seen) <= most
    assert sum(path.stat().st_size for path in blocks(tmp_path)) <= most


def test_a_killed_process_leaves_nothing_wrong(folder, server, tmp_path):
    server.latency_s = 0.05
    words = [sys.executable, "-c", WORKER, server.url, str(folder), str(tmp_path), str(1 << 30), "7"]
    process = subprocess.Popen(words)
    deadline = time.monotonic() + 60
    while not blocks(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.latency_s = 0.0
    run_workers(server, folder, tmp_path, 1 << 30, count=1)
    assert [path for path in tmp_path.rglob("*.tmp") if time.time() - path.stat().st_mtime > 3600] == []


def test_a_damaged_block_is_fetched_again(folder, server, tmp_path):
    store = cached(server, tmp_path)
    store.read(f"{server.url}/a.tar", [(0, 100)])
    blocks(tmp_path)[0].write_bytes(b"short")
    assert store.read(f"{server.url}/a.tar", [(0, 100)]) == expected(folder, "a.tar", [(0, 100)])
    blocks(tmp_path)[0].write_bytes(bytes(BLOCK))  # of the right size, but wrong: only the reader's checksums see it
    assert store.read(f"{server.url}/a.tar", [(0, 100)]) == [bytes(100)]
    store.forget(f"{server.url}/a.tar", (0, 100))
    assert blocks(tmp_path) == []
    assert store.read(f"{server.url}/a.tar", [(0, 100)]) == expected(folder, "a.tar", [(0, 100)])


def test_a_shard_that_changed_is_another_one(server, tmp_path, folder):
    path = folder / "changing.tar"
    path.write_bytes(b"1" * 1000)
    assert cached(server, tmp_path).read(f"{server.url}/changing.tar", [(0, 4)]) == [b"1111"]
    path.write_bytes(b"2" * 1000)
    assert cached(server, tmp_path).read(f"{server.url}/changing.tar", [(0, 4)]) == [b"2222"]
    assert "ends at byte 1000" in message(cached(server, tmp_path).read, f"{server.url}/changing.tar", [(990, 20)])


def test_files_of_others_are_left_alone(folder, server, tmp_path):
    (tmp_path / "mine.txt").write_text("x" * 1000)
    inside = tmp_path / "fastav-blocks-1" / "ab"
    inside.mkdir(parents=True)
    (inside / "notes.txt").write_text("y")
    store = cached(server, tmp_path, most=70_000)
    for at in range(0, SIZE - 10, 30_000):
        store.read(f"{server.url}/a.tar", [(at, 10)])
    assert (tmp_path / "mine.txt").exists()
    assert (inside / "notes.txt").exists()


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_read_through(folder, server, tmp_path, monkeypatch, caplog, fault):
    def full(self, data):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(Path, "write_bytes", full)
    store = cached(server, tmp_path)
    with caplog.at_level(logging.WARNING, "fastav.media.shards"):
        for _ in range(3):
            assert store.read(f"{server.url}/a.tar", [(5, 40_000)]) == expected(folder, "a.tar", [(5, 40_000)])
    assert len(caplog.records) == 1
    assert "reading shards without it" in caplog.text


@pytest.mark.parametrize("fault", ["EIO", "short"])
def test_a_cache_that_cannot_be_read_is_read_past(folder, server, tmp_path, monkeypatch, caplog, fault):
    store, pread = cached(server, tmp_path), os.pread
    store.read(f"{server.url}/a.tar", [(0, 10)])

    def broken(*words):
        if fault == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(*words)[:-1]

    monkeypatch.setattr(os, "pread", broken)
    with caplog.at_level(logging.WARNING, "fastav.media.shards"):
        assert store.read(f"{server.url}/a.tar", [(5, 40)]) == expected(folder, "a.tar", [(5, 40)])
    assert "cannot use the cache" in caplog.text


def test_wrong_blocks_that_cannot_be_deleted_are_passed(folder, server, tmp_path, monkeypatch):
    store = cached(server, tmp_path)
    store.read(f"{server.url}/a.tar", [(0, 10)])
    blocks(tmp_path)[0].write_bytes(bytes(BLOCK))

    def fixed(self, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", fixed)
    store.forget(f"{server.url}/a.tar", (0, 10))
    assert store.read(f"{server.url}/a.tar", [(0, 10)]) == expected(folder, "a.tar", [(0, 10)])


def test_a_child_forked_in_the_middle_keeps_no_lock(server, tmp_path):
    store = cached(server, tmp_path)
    with store.flocked(tmp_path / "a.lock"):
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
    try:
        asked = time.perf_counter()
        with store.flocked(tmp_path / "a.lock"):
            assert time.perf_counter() - asked < 10
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_packed_clips_over_http_and_the_cache(made, tmp_path):
    from fastav.data.manifest import Manifest
    from fastav.media.shards import ShardReader
    from fastav.pack.build import build_pack
    from fastav.pack.settings import PackSettings

    near = build_pack(Manifest.open(made), tmp_path / "p", PackSettings(), workers=1)
    clip = near.clip(3)
    with serving(tmp_path / "p") as server:
        far = near.with_shards(server.url).split("train").clip(3)
        assert far.shard.startswith(server.url)
        numbers, samples = [0, 5, clip.num_frames - 1], (0, clip.num_samples)
        here = ShardReader(ShardReading()).fetch(clip, numbers, samples)
        assert ShardReader(ShardReading()).fetch(far, numbers, samples) == here
        shards = ShardReader(ShardReading(cache=str(tmp_path / "cache"), fill_mib=1))
        assert shards.fetch(far, numbers, samples) == here
        for path in blocks(tmp_path / "cache"):
            path.write_bytes(bytes(path.stat().st_size))
        assert shards.fetch(far, numbers, samples) == here  # the checksums see it, and it is fetched again
