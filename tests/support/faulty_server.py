"""A loopback HTTP server with byte ranges that misbehaves as it is told and remembers what it was asked.

with FaultyServer() as server:
    server.files["/a.tar"] = content
    server.faults["/a.tar"] = [Fault(status=503), Fault(cut_after=100)]  # one per GET, then the server is honest
    server.always["/b.tar"] = Fault(stall_after=0)                       # every GET
    ... server.url ... server.requests ... server.bytes_served("/a.tar")
"""

import hashlib
import http.server
import re
import select
import socket
import struct
import threading
from dataclasses import dataclass, field, fields
from typing import Any

PAGE = b"<html><body>Please log in.</body></html>"
HUB_COMMIT = "0" * 40


@dataclass(frozen=True, repr=False)
class Fault:
    """How one request is answered; the default is the honest answer.

    Attributes:
        status: another than 200 is an error without a file.
        headers: added to the answer.
        cut_after: bytes of the body after which the connection ends; with `reset` it ends with a TCP reset.
        stall_after: bytes of the body after which nothing comes any more; -1: not even an answer.
        pieces, pause: the body comes in so many pieces, with pauses of so many seconds.
        corrupt: one bit of the body is wrong.
        ignore_range: 200 and everything, whatever was asked.
        wrong_range: 206 with bytes that lie one further.
        chunked, bare: without Content-Length, in chunks or ended by the end of the connection.
        page: 200 with an HTML page in place of the file.
        redirect: 302 to this address, followed by the path.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    cut_after: int | None = None
    reset: bool = False
    stall_after: int | None = None
    pieces: int = 1
    pause: float = 0.0
    corrupt: bool = False
    ignore_range: bool = False
    wrong_range: bool = False
    chunked: bool = False
    bare: bool = False
    page: bool = False
    redirect: str | None = None

    def __repr__(self) -> str:
        given = (item.name for item in fields(self) if getattr(self, item.name) != item.default)
        return f"Fault({', '.join(f'{name}={getattr(self, name)}' for name in given)})"


@dataclass
class Request:
    """What was asked and how much of a body was sent."""

    method: str
    path: str
    host: str
    range: str | None
    authorization: str | None
    served: int = 0


@dataclass(repr=False)
class FaultyServer:
    """Serves `files` (path -> content) on 127.0.0.1 with faults; as a context manager it runs inside the block.

    Attributes:
        files: path -> content; any other path is a 404.
        faults: path -> what the next GETs meet, in turn.
        always: path -> what each GET meets once `faults` is used up.
        hub: answer HEAD with the headers of the Hugging Face Hub; a `redirect` holds for HEAD too.
        token: what the header Authorization must be, else 401.
        requests: all that were received, in order.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    hub: bool = False
    token: str | None = None
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> "FaultyServer":
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT"""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def other_name(self) -> str:
        """The same server by another host name, as a CDN would be."""
        return f"http://localhost:{self._server.server_port}"

    def gets(self, path: str) -> list[Request]:
        """The GET requests for `path`, in order."""
        return [request for request in self.requests if request.method == "GET" and request.path == path]

    def ranges(self, path: str) -> list[str | None]:
        """The header Range of each GET for `path`."""
        return [request.range for request in self.gets(path)]

    def bytes_served(self, path: str) -> int:
        """Bytes of bodies of files (not of error pages) that were sent for `path`."""
        return sum(request.served for request in self.gets(path))

    def _met(self, request: Request) -> Fault:
        """The fault that `request` meets."""
        with self._lock:
            self.requests.append(request)
            always = self.always.get(request.path, Fault())
            if request.method == "HEAD":
                return always
            return self.faults[request.path].pop(0) if self.faults.get(request.path) else always


class _Server(http.server.ThreadingHTTPServer):
    owner: FaultyServer
    request_queue_size = 64
    block_on_close = True
    daemon_threads = False  # so that `server_close` waits for the handlers

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without the orderly end that would come before a reset

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        owner, headers = self.server.owner, self.headers
        name = headers.get("Host", "").partition(":")[0]
        request = Request(self.command, self.path, name, headers.get("Range"), headers.get("Authorization"))
        fault = owner._met(request)
        content = owner.files.get(self.path)
        self.close_connection = True
        if owner.token is not None and request.authorization != owner.token and request.host == "127.0.0.1":
            self._head(401, PAGE, (("X-Error-Code", "RepoNotFound"),) if owner.hub else ())
        elif content is None:
            self._head(404, PAGE, (("X-Error-Code", "EntryNotFound"),) if owner.hub else ())
        elif fault.stall_after == -1:
            self._stall()
        elif fault.status != 200:
            self._head(fault.status, PAGE, fault.headers)
        elif fault.redirect is not None and (self.command == "GET" or owner.hub):
            self._head(302, b"", (("Location", fault.redirect + self.path), *fault.headers, *self._of_hub(content)))
        elif fault.page:
            self._head(200, PAGE, (("Content-Type", "text/html; charset=utf-8"), *fault.headers))
        else:
            self._serve(request, fault, content)

    def _of_hub(self, content: bytes) -> tuple[tuple[str, str], ...]:
        if not self.server.owner.hub:
            return ()
        etag = hashlib.sha256(content).hexdigest()
        return ("X-Repo-Commit", HUB_COMMIT), ("ETag", f'"{etag}"'), ("X-Linked-Size", str(len(content)))

    def _head(self, status: int, page: bytes, headers: tuple[tuple[str, str], ...]) -> None:
        """A whole answer that is no file."""
        self.send_response(status)
        for key, value in (*headers, ("Content-Length", str(len(page))), ("Connection", "close")):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    def _serve(self, request: Request, fault: Fault, content: bytes) -> None:
        start, asked = 0, re.fullmatch(r"bytes=(\d+)-", request.range or "")
        if asked is not None and not fault.ignore_range:
            start = int(asked[1]) + fault.wrong_range
            if start >= len(content):
                return self._head(416, PAGE, (("Content-Range", f"bytes */{len(content)}"),))
        body = bytearray(content[start:])
        if fault.corrupt:
            body[len(body) // 2] ^= 1
        self.send_response(206 if asked is not None and not fault.ignore_range else 200)
        if asked is not None and not fault.ignore_range:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if fault.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not fault.bare:
            self.send_header("Content-Length", str(len(body)))
        for key, value in (*fault.headers, *self._of_hub(content), ("Connection", "close")):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self._send(request, fault, bytes(body))
        return None

    def _send(self, request: Request, fault: Fault, body: bytes) -> None:
        end = min(x for x in (fault.cut_after, fault.stall_after, len(body)) if x is not None)
        piece = max(-(-end // fault.pieces), 1)
        for first in range(0, end, piece):
            part = body[first : min(first + piece, end)]
            request.served += len(part)  # before the client can have it
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if fault.chunked else part)
            self.server.owner._closing.wait(fault.pause)
        if fault.stall_after is not None:
            self._stall()
        elif fault.chunked and end == len(body):
            self.wfile.write(b"0\r\n\r\n")
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _stall(self) -> None:
        """Say nothing until the client goes away."""
        while not self.server.owner._closing.wait(0.02):
            if select.select([self.connection], [], [], 0)[0]:
                break
