"""
A Hub of our own on 127.0.0.1: as much of the Hub's HTTP interface as huggingface_hub needs to create a repo, push a
commit (weights by LFS), list and download files (weights from another address, in ranges), and check a card's
metadata. Repos live in memory. Who is logged in is "me", who may write to `me/...` and open pull requests elsewhere.
The server can be told to fail, see `Hub.fail`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TOKEN = "hf_" + "x" * 34


@dataclass
class Repo:
    private: bool = False
    # Whether it has terms, and whether "me" has accepted them.
    gated: bool = False
    accepted: bool = False
    # Branch name -> path -> content.
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    # Tag -> path -> content, as it was when the tag was made.
    tags: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, bytes] | None:
        """The files at a branch or tag, or at the commit that one is at."""
        named = self.branches | self.tags
        by_commit = {self.commit_hash(name): files for name, files in named.items()}
        return named.get(revision, by_commit.get(revision))

    def commit_hash(self, revision: str) -> str:
        named = self.branches | self.tags
        if revision not in named:
            return revision
        files = named[revision]
        text = json.dumps({path: hashlib.sha1(content).hexdigest() for path, content in sorted(files.items())})
        return hashlib.sha1(text.encode()).hexdigest()


# How a file that is cut off ends: the socket is closed after so many bytes.
CUT = "cut"


@dataclass
class Failure:
    """What becomes of the next `times` requests whose method and path match: a status, or `CUT`."""

    method: str
    pattern: str
    status: int | str
    times: int
    after: int = 0


class Hub:
    """
    The server's state, and what it saw: `requests` holds (method, path) of each, `ranges` the parts of files that were
    asked for. `blobs` are the files uploaded by LFS, by their checksum.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.endpoint = ""

    def fail(self, method: str, pattern: str, status: int | str, times: int = 10**6, after: int = 0) -> None:
        """Let requests fail: with an HTTP status, or (`CUT`) a socket closed unanswered or after so many bytes."""
        self.failures.append(Failure(method, pattern, status, times, after))

    def failure(self, method: str, path: str) -> Failure | None:
        for failure in self.failures:
            if failure.times and failure.method == method and re.fullmatch(failure.pattern, path):
                failure.times -= 1
                return failure
        return None

    def put(self, repo_id: str, folder: Path, prefix: str = "", branch: str = "main", **kwargs) -> None:
        """Put the files of a folder into a repo, made with `kwargs` if there is none."""
        repo = self.repos.setdefault(repo_id, Repo(**kwargs))
        files = {prefix + path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        repo.branches.setdefault(branch, {}).update(files)

    @contextmanager
    def running(self):
        hub = self

        class Handler(_Handler):
            state = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self):
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.state.requests.append((self.command, path))
        body = self._body()
        self._failure = self.state.failure(self.command, path)
        if self._failure is not None and self._failure.status != CUT:
            return self._error(self._failure.status, None, "told to fail")
        if self._failure is not None and not self._failure.after:
            return self._hang_up()
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method.__name__.split("_")[2] in (self.command.lower(), "read"):
                return method(self, body, query, **match.groupdict())
        return self._error(404, None, f"no such route: {self.command} {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: bytes, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._failure is not None and self._failure.status == CUT:
            self.wfile.write(content[: self._failure.after])
            self.wfile.flush()
            return self._hang_up()
        self.wfile.write(content)

    def _hang_up(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _json(self, value, status: int = 200):
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str | None, message: str):
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), Content_Type="application/json", **headers)

    @property
    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, repo_id: str, write: bool = False, by_anybody: bool = False) -> Repo | None:
        """The repo, or `None` after an error was sent."""
        repo = self.state.repos.get(repo_id)
        if write and not self._logged_in:
            self._error(401, None, "Invalid username or password.")
        elif write and not by_anybody and not repo_id.startswith("me/"):
            self._error(403, None, "You don't have the rights to write there")
        elif repo is None or (repo.private and not self._logged_in):
            # As the Hub: who is not logged in does not learn whether a private repo exists.
            self._error(404 if self._logged_in else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and not (self._logged_in and repo.accepted):
            self._error(403 if self._logged_in else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        else:
            return repo
        return None

    def _repo_at(self, repo_id: str, revision: str) -> tuple[Repo | None, dict[str, bytes] | None]:
        """The repo and its files at a revision; the files are `None` after an error was sent."""
        repo = self._repo(repo_id)
        files = None if repo is None else repo.files(revision)
        if repo is not None and files is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, files

    def _do_post_create(self, body, query):
        if not self._logged_in:
            return self._error(401, None, "Invalid username or password.")
        values = json.loads(body)
        repo_id = f"{values.get('organization') or 'me'}/{values['name']}"
        if not repo_id.startswith("me/"):
            return self._error(403, None, "You don't have the rights to create a model there")
        known = repo_id in self.state.repos
        repo = self.state.repos.setdefault(
            repo_id, Repo(private=bool(values.get("private")) or values.get("visibility") == "private")
        )
        url = f"{self.state.endpoint}/{repo_id}"
        if known:
            return self._json({"error": "You already created this model repo", "url": url}, status=409)
        return self._json({"url": url, "name": repo_id, "id": hex(id(repo))})

    def _do_read_whoami(self, body, query):
        return self._json({"name": "me", "type": "user", "orgs": []})

    def _do_post_yaml(self, body, query):
        errors = [{"message": message} for message in metadata_errors(json.loads(body)["content"])]
        return self._json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def _do_read_info(self, body, query, repo_id, revision="main"):
        repo, files = self._repo_at(repo_id, revision)
        if files is None:
            return None
        return self._json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": repo.commit_hash(revision),
                "private": repo.private,
                "siblings": [{"rfilename": path} for path in files],
                "tags": [],
            }
        )

    def _do_read_tree(self, body, query, repo_id, revision, folder=""):
        _, files = self._repo_at(repo_id, revision)
        if files is None:
            return None
        entries = []
        for path, content in sorted(files.items()):
            if path.startswith(f"{folder}/" if folder else ""):
                blob = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                entries.append(entry | ({"lfs": blob} if _is_lfs(path) else {}))
        return self._json(entries) if entries else self._error(404, "EntryNotFound", "Entry not found")

    def _do_delete_branch(self, body, query, repo_id, branch):
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return None
        del repo.branches[branch]
        return self._json({})

    def _do_post_branch(self, body, query, repo_id, branch):
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return None
        if branch.startswith("refs/"):
            return self._error(400, None, f"Invalid reference for a branch: {branch}")
        if branch in repo.branches:
            return self._error(409, None, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repo.branches[branch] = dict(repo.branches[start])
        return self._json({})

    def _do_post_preupload(self, body, query, repo_id, revision):
        repo = self._repo(repo_id, write=True, by_anybody=query.get("create_pr") == ["1"])
        if repo is None:
            return None
        if revision not in repo.branches:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [
            {"path": path, "uploadMode": "lfs" if _is_lfs(path) else "regular", "shouldIgnore": False, "oid": None}
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        return self._json({"files": files})

    def _do_post_commit(self, body, query, repo_id, revision):
        repo = self._repo(repo_id, write=True, by_anybody=query.get("create_pr") == ["1"])
        if repo is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        pull_request = None
        if query.get("create_pr") == ["1"]:
            number = sum(name.startswith("refs/pr/") for name in repo.branches) + 1
            base, revision = revision, f"refs/pr/{number}"
            repo.branches[revision] = dict(repo.branches[base])
            pull_request = f"{self.state.endpoint}/{repo_id}/discussions/{number}"
        # All of a commit or nothing.
        files, summaries = dict(repo.branches[revision]), []
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                summaries.append(value["summary"])
            elif key == "file" and not _is_lfs(value["path"]):
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.state.blobs:
                files[value["path"]] = self.state.blobs[value["oid"]]
            else:
                return self._error(400, None, f"this Hub cannot commit {line}")
        repo.branches[revision].clear()
        repo.branches[revision].update(files)
        repo.commits += summaries
        commit = repo.commit_hash(revision)
        return self._json(
            {
                "success": True,
                "commitOid": commit,
                "commitUrl": f"{self.state.endpoint}/{repo_id}/commit/{commit}",
                "pullRequestUrl": pull_request,
                "hookOutput": "",
            }
        )

    def _do_read_resolve(self, body, query, repo_id, revision, path):
        repo, files = self._repo_at(repo_id, revision)
        if files is None:
            return None
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        content, commit = files[path], repo.commit_hash(revision)
        if not _is_lfs(path):
            return self._file(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)
        oid = hashlib.sha256(content).hexdigest()
        self.state.blobs[oid] = content
        return self._send(
            302,
            b"",
            # Another host, as on the Hub: the client takes the file's size and checksum from here.
            Location=f"{self.state.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{oid}",
            X_Linked_Etag=f'"{oid}"',
            X_Linked_Size=str(len(content)),
            X_Repo_Commit=commit,
        )

    def _do_read_blob(self, body, query, oid):
        return self._file(self.state.blobs[oid], ETag=f'"{oid}"')

    def _file(self, content: bytes, **headers: str):
        """A file, or the part of it that is asked for."""
        headers |= {"Accept_Ranges": "bytes", "Content_Type": "application/octet-stream"}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._send(200, content, **headers)
        self.state.ranges.append(wanted)
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
        end = min(int(end or len(content) - 1), len(content) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        return self._send(206, content[int(start) : end + 1], **headers)

    def _do_post_lfs(self, body, query, repo_id):
        if self._repo(repo_id, write=True, by_anybody=True) is None:
            return None
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.state.endpoint}/upload/{wanted['oid']}"
            known = wanted["oid"] in self.state.blobs
            objects.append(wanted | ({} if known else {"actions": {"upload": {"href": href}}}))
        return self._json({"transfer": "basic", "objects": objects})

    def _do_put_blob(self, body, query, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, None, "this is another file")
        self.state.blobs[oid] = body
        return self._send(200, b"")


def metadata_errors(card: str) -> list[str]:
    """What the Hub, which has rules for the metadata that it uses, would say against that of a card."""
    match = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["The metadata must be an object"]
    errors = []

    def check(name: str, holds: bool) -> None:
        if not holds:
            errors.append(f'"{name}" is not valid')

    def is_text(value) -> bool:
        return isinstance(value, str) and bool(value.strip())

    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        check(name, all(map(_is_repo_id, values if isinstance(values, list) else [values])))
    for name in ("library_name", "pipeline_tag", "license"):
        check(name, name not in data or (is_text(data[name]) and bool(re.fullmatch(r"[a-z0-9.-]+", data[name]))))
    check("base_model_relation", data.get("base_model_relation", "adapter") in ("adapter", "finetune", "merge"))
    check("tags", isinstance(data.get("tags", []), list) and all(map(is_text, data.get("tags", []))))
    for model in data.get("model-index", []):
        check("model-index.name", is_text(model.get("name")) and bool(model.get("results")))
        for result in model.get("results", []):
            check("model-index.task.type", is_text(result["task"].get("type")))
            check("model-index.dataset", all(is_text(result["dataset"].get(key)) for key in ("type", "name")))
            check("model-index.metrics", bool(result.get("metrics")))
            for metric in result.get("metrics", []):
                check("model-index.metrics.type", is_text(metric.get("type")))
                check("model-index.metrics.value", isinstance(metric.get("value"), (int, float, str)))
    return errors


def _is_repo_id(name) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = [
    (r"/api/repos/create", _Handler._do_post_create),
    (r"/api/whoami-v2", _Handler._do_read_whoami),
    (r"/api/validate-yaml", _Handler._do_post_yaml),
    (rf"/api/models/{_ID}", _Handler._do_read_info),
    (rf"/api/models/{_ID}/revision/(?P<revision>.+)", _Handler._do_read_info),
    (rf"/api/models/{_ID}/branch/(?P<branch>.+)", _Handler._do_post_branch),
    (rf"/api/models/{_ID}/branch/(?P<branch>.+)", _Handler._do_delete_branch),
    (rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler._do_read_tree),
    (rf"/api/models/{_ID}/preupload/(?P<revision>.+)", _Handler._do_post_preupload),
    (rf"/api/models/{_ID}/commit/(?P<revision>.+)", _Handler._do_post_commit),
    (rf"/{_ID}\.git/info/lfs/objects/batch", _Handler._do_post_lfs),
    (r"/upload/(?P<oid>\w+)", _Handler._do_put_blob),
    (r"/cdn/(?P<oid>\w+)", _Handler._do_read_blob),
    (rf"/{_ID}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)", _Handler._do_read_resolve),
]
