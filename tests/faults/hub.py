"""A hub on this machine with one model, whose answer can break off in the middle of a file."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


class Hub:
    """What the server does: `cut` is the byte of the weights after which it says no more and refuses whoever asks.

    Attributes:
        struck: whether it did.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.cut: int | None = None
        self.struck = False
        self.url = ""

    def use(self) -> None:
        """Has this process take it for the hub."""
        from huggingface_hub import constants

        constants.ENDPOINT = self.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_CACHE = str(self.cache)
        constants.HF_HUB_DISABLE_XET = True


@contextlib.contextmanager
def serve(folder: Path, root: Path) -> Iterator[Hub]:
    """A hub that has the files of a folder as `faults/tiny`; its clients keep what they fetch under `root`."""
    hub = Hub(folder, root / "hub")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path, files = urlsplit(self.path).path, sorted(folder.iterdir())
            if hub.struck and hub.cut is not None:
                self.close_connection = True  # no answer at all
                return
            if path.startswith("/api/models/") and "/tree/" in path:
                tree = [{"type": "file", "path": one.name, "size": one.stat().st_size, "oid": "0"} for one in files]
                self._send(json.dumps(tree).encode(), "application/json", body=body)
                return
            if path.startswith("/api/models/"):
                names = [{"rfilename": one.name} for one in files]
                told = {"_id": "1", "id": "faults/tiny", "modelId": "faults/tiny", "sha": COMMIT, "siblings": names}
                self._send(json.dumps(told).encode(), "application/json", body=body)
                return
            file = folder / path.rpartition("/")[2]
            if "/resolve/" not in path or not file.is_file():
                self.send_error(404)
                return
            self._send(file.read_bytes(), "application/octet-stream", body=body, name=file.name)

        def _send(self, content: bytes, kind: str, *, body: bool, name: str = "") -> None:
            first = 0
            if (asked := self.headers.get("Range", "")).startswith("bytes=") and name:
                first = int(asked.removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if first else 200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content) - first))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if not body:
                return
            if name == WEIGHTS and hub.cut is not None:
                hub.struck = True
                self.wfile.write(content[first : hub.cut])
                self.close_connection = True
                return
            self.wfile.write(content[first:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
