"""A small Hugging Face Hub on loopback: data sets and models that can be made, uploaded to (LFS), listed and read.

It answers what `huggingface_hub` asks when it creates a repository or a branch, commits files, lists them and fetches them
with ranges; nothing more. Give its `environment` to a subprocess: the client reads it once, at import.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path / "home")})
        assert hub.files("someone/digits")["index.json"] == ...
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
LARGE = (".tar", ".safetensors", ".onnx", ".pt2", ".npz", ".png")  # kept as LFS objects


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        token: what a writer must show; reading needs none.
        requests: "METHOD path" of every request, in the order of their arrival.
        commits: (repository, revision, paths) of every commit.
        failures: status codes to answer next, by a text that "METHOD path" contains: {"PUT /lfs/": [500, 503]}. A status
            of 0 cuts the connection.
        retry_after: what failures ask the client to wait, in seconds, if anything.
        corrupted: names of files whose bytes are given out changed, so many times.
        private: repositories that were made private.
    """

    def __init__(self, token: str = TOKEN) -> None:
        self.token = token
        self.requests: list[str] = []
        self.commits: list[tuple[str, str, list[str]]] = []
        self.failures: dict[str, list[int]] = {}
        self.retry_after: int | None = None
        self.corrupted: dict[str, int] = {}
        self.private: set[str] = set()
        self._objects: dict[str, bytes] = {}  # LFS, by sha256
        self._repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> revision -> path -> content
        self._snapshots: dict[str, dict[str, bytes]] = {}  # commit -> path -> content
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables that point a client at this server: `token` None is the right one, "" none at all."""
        given = self.token if token is None else token
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return {**variables, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": given}

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What the repository holds."""
        return self._repos.get(repo, {}).get(revision, {})

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        """Let the repository hold `files` too."""
        there = self._repos.setdefault(repo, {"main": {}}).setdefault(revision, {})
        there.update(files)
        state = repr(sorted((name, hashlib.sha256(content).hexdigest()) for name, content in there.items()))
        self._snapshots[hashlib.sha1(state.encode()).hexdigest()] = dict(there)

    # ---- answers ----

    def _failure(self, request: str) -> int | None:
        with self._lock:
            self.requests.append(request)
            for text, statuses in self.failures.items():
                if text in request and statuses:
                    return statuses.pop(0)
        return None

    def _api(self, path: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) of a POST that writes or asks."""
        if path == "/api/repos/create":
            facts = json.loads(body)
            name = f"{facts['organization']}/{facts['name']}" if facts.get("organization") else facts["name"]
            address = {"url": f"{self.url}/{'datasets/' if facts.get('type') == 'dataset' else ''}{name}", "id": name}
            if name in self._repos:
                return 409, {"error": "You already created this repo", **address}
            self._repos[name] = {"main": {}}
            if facts.get("private") or facts.get("visibility") == "private":
                self.private.add(name)
            return 200, address
        if path == "/api/validate-yaml":
            front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
            good = front is None or isinstance(yaml.safe_load(front[1]), dict)
            return 200, {"errors": [] if good else [{"message": "the front matter is no mapping"}], "warnings": []}
        if match := re.fullmatch(r"(?:/datasets)?/(.+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self._lfs_object(o) for o in json.loads(body)["objects"]]}
        if match := re.fullmatch(
            r"/api/(?:datasets|models)/([^/]+/[^/]+)/(branch|preupload|commit|paths-info)/(.+)", path
        ):
            repo, verb, revision = match[1], match[2], unquote(match[3])
            if repo not in self._repos:
                return 404, {"error": "Repository not found"}
            if verb == "branch":
                if revision in self._repos[repo]:
                    return 409, {"error": "Reference already exists"}
                self._repos[repo][revision] = dict(self._repos[repo]["main"])
                return 200, {}
            if revision not in self._repos[repo]:
                return 404, {"error": f"Invalid rev id: {revision}"}
            if verb == "preupload":
                files = [{"path": f["path"], **self._mode(f["path"])} for f in json.loads(body)["files"]]
                return 200, {"files": files}
            if verb == "commit":
                return self._commit(repo, revision, body)
            there = self.files(repo, revision)
            return 200, [_entry(name, there[name]) for name in parse_qs(body.decode())["paths"] if name in there]
        return 404, {"error": f"no such call: {path}"}

    @staticmethod
    def _mode(path: str) -> dict[str, Any]:
        return {"uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}

    def _lfs_object(self, asked: dict[str, Any]) -> dict[str, Any]:
        facts = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self._objects:
            return facts  # nothing to upload
        return {**facts, "actions": {"upload": {"href": f"{self.url}/lfs/{asked['oid']}", "header": {}}}}

    def _store(self, oid: str, body: bytes) -> int:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400
        self._objects[oid] = body
        return 200

    def _commit(self, repo: str, revision: str, body: bytes) -> tuple[int, Any]:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self._objects:
                    return 400, {"error": f"LFS object {value['oid']} was not uploaded"}
                files[value["path"]] = self._objects[value["oid"]]
        self.put(repo, files, revision)
        self.commits.append((repo, revision, list(files)))
        oid = f"{len(self.commits):040x}"
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}

    def _information(self, path: str) -> tuple[int, Any]:
        """(status, JSON) of a GET."""
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "someone", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        match = re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(tree|revision)/([^/]+).*)?", path)
        if match is None or match[1] not in self._repos:
            return 404, {"error": "Repository not found"}
        revision = unquote(match[3] or "main")
        if revision not in self._repos[match[1]]:
            return 404, {"error": f"Invalid rev id: {revision}"}
        there = self.files(match[1], revision)
        if match[2] == "tree":
            return 200, [_entry(name, content) for name, content in sorted(there.items())]
        facts = {"id": match[1], "sha": f"{len(self.commits):040x}", "private": False, "tags": [], "downloads": 0}
        return 200, {**facts, "siblings": [{"rfilename": name} for name in sorted(there)]}

    def _resolved(self, path: str) -> tuple[bytes | None, str]:
        """(content, commit) of a file of a branch or a commit."""
        match = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return None, "0" * 40
        repo, revision, name = match[1], unquote(match[2]), unquote(match[3])
        if revision in self._snapshots:
            return self._snapshots[revision].get(name), revision
        there = self.files(repo, revision)
        commit = next((c for c, files in reversed(self._snapshots.items()) if files == there), "0" * 40)
        return there.get(name), commit

    def damaged(self, name: str, content: bytes) -> bytes:
        """What is given out as `content`."""
        if not content or not self.corrupted.get(name):
            return content
        self.corrupted[name] -= 1
        return content[:-1] + bytes([content[-1] ^ 1])

    def _known(self, path: str) -> bool:
        match = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        revision = unquote(match[2]) if match else ""
        return match is not None and (revision in self._snapshots or revision in self._repos.get(match[1], {}))


def _entry(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha256(content).hexdigest()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    facts = {"type": "file", "path": name, "size": len(content), "oid": blob}
    return {**facts, "lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if name.endswith(LARGE) else facts


def _handler(hub: HubServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"X_Repo_Commit": "0" * 40, "Content_Length": str(len(content)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _json(self, status: int, value: Any, **headers: str) -> None:
            # The client tells a missing repository from a missing file by this header.
            error = {"X_Error_Message": str(value["error"])} if isinstance(value, dict) and "error" in value else {}
            if status == 404:
                error["X_Error_Code"] = "RevisionNotFound" if "rev id" in error["X_Error_Message"] else "RepoNotFound"
            self._answer(status, json.dumps(value).encode(), Content_Type="application/json", **error, **headers)

        def _handle(self) -> None:
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            failure = hub._failure(f"{self.command} {path}")
            if failure == 0:
                self.close_connection = True
                return
            writes = self.command in ("POST", "PUT") and not path.startswith("/lfs/") and "paths-info" not in path
            if failure is not None:
                later = {} if hub.retry_after is None else {"Retry_After": str(hub.retry_after)}
                self._json(failure, {"error": f"failure {failure}, as the test wants it"}, **later)
            elif writes and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._json(401, {"error": "Invalid username or password."})
            elif path.startswith("/lfs/"):
                self._answer(hub._store(path.removeprefix("/lfs/"), body))
            elif self.command == "POST":
                self._json(*hub._api(path, body))
            elif "/resolve/" in path:
                if hub._known(path):
                    self._file(path, *hub._resolved(path))
                else:
                    self._answer(
                        404,
                        X_Error_Code="RevisionNotFound"
                        if path.split("/resolve/")[0].strip("/").removeprefix("datasets/") in hub._repos
                        else "RepoNotFound",
                    )
            else:
                self._json(*hub._information(path))

        def _file(self, path: str, content: bytes | None, commit: str) -> None:
            facts = {"X_Repo_Commit": commit}
            if content is None:
                self._answer(404, X_Error_Code="EntryNotFound", **facts)
                return
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            if self.command == "GET":
                content = hub.damaged(path.rpartition("/")[2], content)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted is None:
                self._answer(200, content, ETag=etag, Accept_Ranges="bytes", **facts)
                return
            first = int(wanted[1])
            last = min(int(wanted[2] or len(content) - 1), len(content) - 1)
            if first > last:
                self._answer(416, Content_Range=f"bytes */{len(content)}")
                return
            part = content[first : last + 1]
            self._answer(206, part, ETag=etag, Content_Range=f"bytes {first}-{last}/{len(content)}", **facts)

        do_GET = do_HEAD = do_POST = do_PUT = _handle

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
