"""The HTTP server of the tests, on loopback: files with byte ranges, faults on demand, a log of all requests.

with HttpServer() as server:
    server.files["/a.tar"] = content
    server.faults["/a.tar"] = [Fault(status=503), Fault(cut_after=100)]  # for the next two GETs
    server.always["/b.tar"] = Fault(stall_after=0)                       # for every GET
    ... server.url ... server.requests ... server.bytes_served("/a.tar")

`HttpServer(answer=...)` computes its responses instead of serving `files`: `HubServer` is made that way.
"""

import hashlib
import http.server
import re
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

PAGE = b"<html><body>Please log in.</body></html>"
HUB_COMMIT = "0" * 40
CUT = 0  # a status: close the connection without a response


@dataclass(frozen=True, repr=False)
class Fault:
    """How a request for a file is answered; the defaults are a correct response.

    Attributes:
        status: another status than 200, with an HTML page as its body.
        headers: additional response headers.
        cut_after: close the connection after this many bytes of the body; with `reset`, by a TCP reset.
        stall_after: send nothing more after this many bytes of the body; -1 sends no header either.
        pieces, pause: send the body in this many pieces, with pauses of this many seconds.
        corrupt: flip one bit of the body.
        ignore_range: send 200 and the whole file to a range request.
        wrong_range: send 206 with a range that starts one byte too late.
        chunked, bare: omit Content-Length; send chunks, or end the body by closing the connection.
        page: send 200 with an HTML page instead of the file.
        redirect: send 302 to this address, followed by the path.
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
    """A request, and how many bytes of a file were sent in response."""

    method: str
    path: str
    host: str
    range: str | None
    authorization: str | None
    body: bytes = field(default=b"", repr=False)
    served: int = 0


@dataclass(frozen=True)
class Response:
    """A response; a `file` is sent in the requested range and is subject to faults."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    file: bool = False


@dataclass(repr=False)
class HttpServer:
    """A server on 127.0.0.1 that runs inside its `with` block.

    Attributes:
        files: path -> content; any other path is a 404.
        faults: path -> faults of the next GETs, in turn.
        always: path -> fault of each GET once `faults` is used up.
        hub: add the headers of the Hugging Face Hub; a `redirect` then holds for HEAD too.
        token: the required value of the header Authorization, else 401.
        answer: computes every response instead of `files`, `hub` and `token`.
        requests: all requests, in order.
        counts: "METHOD path" -> number of requests.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    hub: bool = False
    token: str | None = None
    answer: Callable[[Request], Response] | None = None
    requests: list[Request] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> "HttpServer":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT"""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def other_name(self) -> str:
        """The address of the same server under another host name, like that of a CDN."""
        return f"http://localhost:{self._server.server_port}"

    def gets(self, path: str) -> list[Request]:
        """The GET requests for `path`, in order."""
        return [request for request in self.requests if request.method == "GET" and request.path == path]

    def ranges(self, path: str) -> list[str | None]:
        """The header Range of each GET for `path`."""
        return [request.range for request in self.gets(path)]

    def bytes_served(self, path: str) -> int:
        """Bytes sent of the file at `path`; error pages do not count."""
        return sum(request.served for request in self.gets(path))

    def received(self, request: Request) -> Fault:
        """Log `request` and return the fault that applies to it."""
        with self._lock:
            self.requests.append(request)
            self.counts[f"{request.method} {request.path}"] += 1
            always = self.always.get(request.path, Fault())
            if request.method == "HEAD":
                return always
            return self.faults[request.path].pop(0) if self.faults.get(request.path) else always

    def respond(self, request: Request) -> Response:
        """The response to `request`, without its fault."""
        if self.answer is not None:
            return self.answer(request)
        if self.token is not None and request.authorization != self.token and request.host == "127.0.0.1":
            return Response(401, PAGE, (("X-Error-Code", "RepoNotFound"),) if self.hub else ())
        content = self.files.get(request.path)
        if content is None:
            return Response(404, PAGE, (("X-Error-Code", "EntryNotFound"),) if self.hub else ())
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        of_hub = ("X-Repo-Commit", HUB_COMMIT), ("ETag", etag), ("X-Linked-Size", str(len(content)))
        return Response(200, content, of_hub if self.hub else (), file=True)


class _Server(http.server.ThreadingHTTPServer):
    owner: HttpServer
    request_queue_size = 64
    block_on_close = True
    daemon_threads = False  # `server_close` waits for the handlers

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # an orderly shutdown would replace a reset

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client closed the connection


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _Server

    def _handle(self) -> None:
        owner, headers = self.server.owner, self.headers
        host = headers.get("Host", "").partition(":")[0]
        body = self.rfile.read(int(headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, host, headers.get("Range"), headers.get("Authorization"), body)
        fault = owner.received(request)
        response = owner.respond(request)
        self.close_connection = True
        if response.status == CUT:
            return
        if not response.file:
            self._send_page(response)
        elif fault.stall_after == -1:
            self._stall()
        elif fault.status != 200:
            self._send_page(Response(fault.status, PAGE, fault.headers))
        elif fault.redirect is not None and (self.command == "GET" or owner.hub):
            location = ("Location", fault.redirect + self.path)
            self._send_page(Response(302, b"", (location, *fault.headers, *response.headers)))
        elif fault.page:
            self._send_page(Response(200, PAGE, (("Content-Type", "text/html; charset=utf-8"), *fault.headers)))
        else:
            self._send_file(request, fault, response)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *arguments: object) -> None:
        pass

    def _start(self, status: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for key, value in (*headers, ("Connection", "close")):
            self.send_header(key, value)
        self.end_headers()

    def _send_page(self, response: Response) -> None:
        self._start(response.status, *response.headers, ("Content-Length", str(len(response.body))))
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def _send_file(self, request: Request, fault: Fault, response: Response) -> None:
        content, status, headers = response.body, 200, [*fault.headers, *response.headers]
        start, end = 0, len(content)
        asked = None if fault.ignore_range else re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "")
        if asked is not None:
            start, end = int(asked[1]) + fault.wrong_range, min(int(asked[2] or end) + 1, end)
            if start >= end:
                return self._send_page(Response(416, PAGE, (("Content-Range", f"bytes */{len(content)}"),)))
            status = 206
            headers.append(("Content-Range", f"bytes {start}-{end - 1}/{len(content)}"))
        body = bytearray(content[start:end])
        if fault.corrupt:
            body[len(body) // 2] ^= 1
        if fault.chunked:
            headers.append(("Transfer-Encoding", "chunked"))
        elif not fault.bare:
            headers.append(("Content-Length", str(len(body))))
        self._start(status, *headers)
        if self.command == "GET":
            self._send_body(request, fault, bytes(body))
        return None

    def _send_body(self, request: Request, fault: Fault, body: bytes) -> None:
        end = min(size for size in (fault.cut_after, fault.stall_after, len(body)) if size is not None)
        piece = max(-(-end // fault.pieces), 1)
        for first in range(0, end, piece):
            part = body[first : min(first + piece, end)]
            request.served += len(part)  # before the client can have it
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if fault.chunked else part)
            self.server.owner.closing.wait(fault.pause)
        if fault.stall_after is not None:
            self._stall()
        elif fault.chunked and end == len(body):
            self.wfile.write(b"0\r\n\r\n")
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _stall(self) -> None:
        """Send nothing until the client closes the connection."""
        while not self.server.owner.closing.wait(0.02):
            if select.select([self.connection], [], [], 0)[0]:
                break
