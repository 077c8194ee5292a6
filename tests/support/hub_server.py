"""A small Hugging Face Hub on loopback: repositories that can be created, uploaded to (LFS), listed and read.

It answers only the calls that `huggingface_hub` makes to create a repository or a branch, to commit files, list them and
download them with ranges. Pass its `environment` to a subprocess: the client reads these variables at import.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path / "home")})
        assert hub.files("someone/digits")["index.json"] == ...
"""

import base64
import hashlib
import json
import re
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import hf_xet
import yaml

from tests.support.http_server import CUT, HUB_COMMIT, HttpServer, Request, Response

TOKEN = "hf_loopback"
LARGE = (".tar", ".safetensors", ".onnx", ".pt2", ".npz", ".png")  # kept as LFS objects


class HubServer:
    """The Hub; use it as a context manager.

    Attributes:
        token: required for writing; reading needs none.
        commits: (repository, revision, paths) of every commit.
        failures: status codes of the next responses, by a text that "METHOD path" contains: {"PUT /lfs/": [500, 503]};
            `CUT` (0) closes the connection.
        retry_after: the Retry-After of failures, in seconds, or None.
        corrupted: file name -> number of downloads whose bytes are changed.
        private: repositories that were created as private.
    """

    def __init__(self, token: str = TOKEN) -> None:
        self.token = token
        self.commits: list[tuple[str, str, list[str]]] = []
        self.failures: dict[str, list[int]] = {}
        self.retry_after: int | None = None
        self.corrupted: dict[str, int] = {}
        self.private: set[str] = set()
        self.buckets: dict[str, dict[str, bytes]] = {}  # bucket -> path -> content; read only, see `BucketClient`
        self._objects: dict[str, bytes] = {}  # LFS, by sha256
        self._repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> revision -> path -> content
        self._snapshots: dict[str, dict[str, bytes]] = {}  # commit -> path -> content
        self._lock = threading.Lock()
        self._server = HttpServer(answer=self._answer)

    def __enter__(self) -> "HubServer":
        self._server.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.__exit__(*exception)

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT"""
        return self._server.url

    @property
    def requests(self) -> list[str]:
        """ "METHOD path" of every request, in order."""
        return [f"{request.method} {urlsplit(request.path).path}" for request in self._server.requests]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables that point a client at this server; `token` None is the valid one, "" is no token."""
        given = self.token if token is None else token
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return {**variables, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": given}

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of a revision of the repository."""
        return self._repos.get(repo, {}).get(revision, {})

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        """Add `files` to the repository."""
        there = self._repos.setdefault(repo, {"main": {}}).setdefault(revision, {})
        there.update(files)
        state = repr(sorted((name, hashlib.sha256(content).hexdigest()) for name, content in there.items()))
        self._snapshots[hashlib.sha1(state.encode()).hexdigest()] = dict(there)

    # ---- responses ----

    def _answer(self, request: Request) -> Response:
        path = urlsplit(request.path).path
        failure = self._failure(f"{request.method} {path}")
        if failure == CUT:
            return Response(CUT)
        if failure is not None:
            later = () if self.retry_after is None else (("Retry-After", str(self.retry_after)),)
            return _json(failure, {"error": f"failure {failure}, as the test requested"}, *later)
        writes = request.method in ("POST", "PUT") and not path.startswith("/lfs/") and "paths-info" not in path
        if writes and request.authorization != f"Bearer {self.token}":
            return _json(401, {"error": "Invalid username or password."})
        if path.startswith("/lfs/"):
            return Response(self._store(path.removeprefix("/lfs/"), request.body))
        if request.method == "POST":
            return _json(*self._api(path, request.body))
        if "/resolve/" in path:
            return self._file(path, request.method)
        return _json(*self._information(path))

    def _failure(self, request: str) -> int | None:
        with self._lock:
            for text, statuses in self.failures.items():
                if text in request and statuses:
                    return statuses.pop(0)
        return None

    def _api(self, path: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) of a POST."""
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
        facts = {
            "id": match[1],
            "sha": f"{len(self.commits):040x}",
            "private": match[1] in self.private,
            "tags": [],
            "downloads": 0,
        }
        return 200, {**facts, "siblings": [{"rfilename": name} for name in sorted(there)]}

    def _file(self, path: str, method: str) -> Response:
        """A file of a branch, a commit or a bucket."""
        if bucket := re.fullmatch(r"/buckets/([^/]+/[^/]+)/resolve/(.+)", path):
            content = self.buckets.get(bucket[1], {}).get(unquote(bucket[2]))
            if content is None:
                return Response(404, b"", (("X-Error-Code", "EntryNotFound"),))
            return Response(200, content, (("Accept-Ranges", "bytes"),), file=True)
        match = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision, name = (unquote(part) for part in match.groups()) if match else ("", "", "")
        branch = self._repos.get(repo, {}).get(revision)
        files = self._snapshots.get(revision, branch)
        if files is None:
            return Response(
                404, b"", (("X-Error-Code", "RevisionNotFound" if repo in self._repos else "RepoNotFound"),)
            )
        commit = next((c for c, snapshot in reversed(self._snapshots.items()) if snapshot == files), HUB_COMMIT)
        facts = ("X-Repo-Commit", revision if revision in self._snapshots else commit)
        if name not in files:
            return Response(404, b"", (facts, ("X-Error-Code", "EntryNotFound")))
        content = files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if method == "GET" and self.corrupted.get(name):
            self.corrupted[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        return Response(200, content, (facts, ("ETag", etag), ("Accept-Ranges", "bytes")), file=True)


class BucketClient:
    """Stands for `HfApi`: uploads to the buckets of a `HubServer`. The real client sends the bytes to Xet, a server of its own."""

    def __init__(self, server: HubServer) -> None:
        self._buckets = server.buckets

    def create_bucket(self, bucket_id: str, *, exist_ok: bool, private: bool | None) -> None:
        assert exist_ok
        self._buckets.setdefault(bucket_id, {})

    def batch_bucket_files(self, bucket_id: str, *, add: list[tuple[str, str]]) -> None:
        for source, destination in add:
            self._buckets[bucket_id][destination] = Path(source).read_bytes()

    def get_bucket_paths_info(self, bucket_id: str, paths: list[str]) -> list[Any]:
        there = self._buckets[bucket_id]
        return [SimpleNamespace(path=path, xet_hash=_xet_hash(there[path])) for path in paths if path in there]


def _xet_hash(content: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return str(hf_xet.hash_files([file.name])[0].hash)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha256(content).hexdigest()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    facts = {"type": "file", "path": name, "size": len(content), "oid": blob}
    return {**facts, "lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if name.endswith(LARGE) else facts


def _json(status: int, value: Any, *headers: tuple[str, str]) -> Response:
    facts = [("X-Repo-Commit", HUB_COMMIT), ("Content-Type", "application/json"), *headers]
    if isinstance(value, dict) and "error" in value:
        facts.append(("X-Error-Message", str(value["error"])))
        if status == 404:  # the client distinguishes a missing repository from a missing file by this header
            facts.append(("X-Error-Code", "RevisionNotFound" if "rev id" in value["error"] else "RepoNotFound"))
    return Response(status, json.dumps(value).encode(), tuple(facts))
