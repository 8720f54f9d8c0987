"""A real HTTP server on this machine that answers range requests, and can misbehave in stated ways."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves the files of a folder; counts what it sends.

    Attributes:
        fail_first: So many requests for content are answered with 503.
        fail_all: Those for a file's head are counted and answered likewise.
        cut_first: So many answers end early.
        ignore_ranges: Whole files are sent, whatever is asked.
        latency_s: Pause before each answer.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fail_first = self.cut_first = 0
        self.ignore_ranges, self.fail_all, self.latency_s = False, False, 0.0
        self.lock = threading.Lock()
        self.requests, self.num_bytes = 0, 0
        self.ranges: list[tuple[str, int, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, with_body):
        server = self.server
        time.sleep(server.latency_s)
        with server.lock:
            server.requests += 1
            fail = (with_body or server.fail_all) and server.fail_first > 0
            cut = with_body and not fail and server.cut_first > 0
            server.fail_first -= fail
            server.cut_first -= cut
        path = server.folder / self.path.lstrip("/")
        if fail or not path.is_file():
            self.send_response(503 if fail else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, asked = path.read_bytes(), self.headers.get("Range")
        begin, end = 0, len(data)
        if asked and not server.ignore_ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last or len(data) - 1) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if not with_body:
            return
        body = data[begin:end]
        with server.lock:
            server.num_bytes += len(body)
            server.ranges.append((self.path, begin, end))
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


@contextmanager
def serving(folder: Path):
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
