"""A Hugging Face Hub on the loopback interface, in memory: what `huggingface_hub` asks for, and faults on demand.

    with HubServer() as hub:
        hub.fail("PUT", "/lfs/", status=500, times=1)
        # clients with HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET=1

Repositories are branches of whole commits. As on the real Hub, a private repository does not exist for strangers, large
files travel by LFS (in parts above `part_bytes`) and are redirected to another address, and README.md must have valid
metadata. The content-addressed storage (xet) is not spoken, so clients must have it disabled.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
USER = "someone"
LARGE_FILES = (".safetensors", ".png", ".bin")
"""What the default .gitattributes of a Hub repository stores by LFS whatever its size."""


@dataclass(frozen=True)
class File:
    """Content of one path in one commit."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """What the Hub calls it: sha256 of a large file, git's blob hash of a small one."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One state of a branch."""

    oid: str
    message: str
    files: Mapping[str, File]


@dataclass
class Repo:
    """Branch -> commits, oldest first; tag -> commit."""

    name: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, tag or hash names."""
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return self.tags.get(revision) or next((commit for commit in commits if commit.oid == revision), None)


@dataclass
class Fault:
    """Requests of `method` whose path has `part`: answered with `status`, or cut after half of the body, `times` times.

    `done`: the request is carried out first, and only the answer is lost.
    """

    method: str
    part: str
    status: int | None
    times: int
    done: bool


class Refusal(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer:
    """Serves while the block runs; `repos`, `requests` and `faults` are there to look at and to change."""

    def __init__(self, part_bytes: int = 1 << 30) -> None:
        self.part_bytes, self.token = part_bytes, TOKEN
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # Another host, as on the real Hub, so that clients treat it as a stranger to whom no token is sent.
        self.cdn = self.url.replace("127.0.0.1", "localhost")

    def __enter__(self) -> HubServer:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(
        self, method: str, part: str, *, status: int | None = None, times: int = 1_000, done: bool = False
    ) -> None:
        """Let requests fail from now on; without a `status` the connection is cut in the middle of the body."""
        self.faults.append(Fault(method, part, status, times, done))

    def fault_for(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, counted."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault
        return None

    def asked(self, method: str, part: str) -> int:
        """How many requests there were."""
        return sum(kind == method and part in path for kind, path in self.requests)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes of what a revision holds, without the file that the Hub itself puts there."""
        commit = self.repos[repo].at(revision)
        assert commit is not None
        return {path: file.data for path, file in commit.files.items() if path != ".gitattributes"}

    def add_commit(self, repo: Repo, branch: str, message: str, files: Mapping[str, File]) -> Commit:
        """A new last commit of `branch`."""
        number = sum(map(len, self.repos[repo.name].branches.values())) if repo.name in self.repos else 0
        oid = hashlib.sha1(f"{repo.name} {branch} {number} {message}".encode()).hexdigest()
        commit = Commit(oid, message, dict(files))
        repo.branches.setdefault(branch, []).append(commit)
        return commit


PARTS = {"repo": r"[\w.-]+/[\w.-]+", "rev": "[^/]+", "path": ".+", "oid": "[0-9a-f]{64}", "number": r"\d+"}
"""Name in an address -> what it may be; revisions and paths are quoted."""

Route = Callable[["_Handler", dict[str, str]], None]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Register a handler of the addresses that `pattern` describes with the names in `PARTS`."""
    for name, part in PARTS.items():
        pattern = pattern.replace(f"{{{name}}}", f"(?P<{name}>{part})")

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: `hub.requests` is the log."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        fault = self.hub.fault_for(self.command, url.path)
        if fault and fault.status is None and not fault.done:
            self._read(share=0.5)
            return self._cut()
        self.body, self.lost = self._read(), fault is not None and fault.done
        try:
            if fault and fault.status is not None:
                raise Refusal(fault.status, f"injected {fault.status}")
            self._dispatch(url.path)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            message = {"X-Error-Message": refusal.message}
            self.reply({"error": refusal.message, **refusal.body}, refusal.status, headers | message)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _dispatch(self, path: str) -> None:
        for method, pattern, function in ROUTES:
            found = pattern.fullmatch(path)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                with self.hub.lock:
                    return function(self, found.groupdict())
        raise Refusal(404, f"no such address: {self.command} {path}")

    def _read(self, share: float = 1.0) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
                if share < 1.0:
                    return b"".join(chunks)
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(int(self.headers.get("Content-Length", 0)) * share))

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def reply(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """JSON, or bytes as they are."""
        if self.lost:
            return self._cut()
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def user(self) -> str | None:
        """Who asks. A wrong token is an error, none is a stranger."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USER if given else None

    def require_owner(self, repo: str) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if repo.split("/")[0] != USER:
            raise Refusal(403, f"You don't have the rights to write to {repo}")

    def repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.user is None):
            # Strangers cannot tell a private repository from none.
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def commit(self, name: str, revision: str) -> Commit:
        found = self.repo(name).at(unquote(revision))
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


@route("GET", "/api/whoami-v2")
def _whoami(ask: _Handler, _: dict[str, str]) -> None:
    if ask.user is None:
        raise Refusal(401, "Invalid username or password.")
    ask.reply({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})


@route("POST", "/api/repos/create")
def _create(ask: _Handler, _: dict[str, str]) -> None:
    given = ask.json()
    name = f"{given['organization'] or USER}/{given['name']}"
    ask.require_owner(name)
    if name in ask.hub.repos:
        raise Refusal(409, "You already created this model repo", url=f"{ask.hub.url}/{name}")
    repo = Repo(name, private=given.get("visibility") == "private")
    ask.hub.add_commit(repo, "main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
    ask.hub.repos[name] = repo
    ask.reply({"url": f"{ask.hub.url}/{name}", "name": name, "id": "0"})


@route("POST", "/api/validate-yaml")
def _validate(ask: _Handler, _: dict[str, str]) -> None:
    errors = metadata_errors(ask.json()["content"])
    ask.reply({"errors": [{"message": each} for each in errors], "warnings": []}, 400 if errors else 200)


@route("POST", "/api/models/{repo}/preupload/{rev}")
def _preupload(ask: _Handler, at: dict[str, str]) -> None:
    ask.require_owner(at["repo"])
    there = ask.commit(at["repo"], at["rev"]).files
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) or file["size"] > 10_000_000 else "regular",
            "shouldIgnore": False,
            "oid": there[file["path"]].oid if file["path"] in there else None,
        }
        for file in ask.json()["files"]
    ]
    ask.reply({"files": modes})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def _batch(ask: _Handler, at: dict[str, str]) -> None:
    ask.require_owner(at["repo"])
    ask.reply({"transfer": "basic", "objects": [_upload_actions(ask.hub, each) for each in ask.json()["objects"]]})


def _upload_actions(hub: HubServer, wanted: dict[str, Any]) -> dict[str, Any]:
    oid, size = wanted["oid"], wanted["size"]
    if oid in hub.large:
        return {"oid": oid, "size": size}
    upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{oid}"}
    if size > hub.part_bytes:
        parts = range(1, ceil(size / hub.part_bytes) + 1)
        urls = {f"{number:05d}": f"{hub.url}/lfs-part/{oid}/{number}" for number in parts}
        upload = {"href": f"{hub.url}/lfs-complete/{oid}", "header": {"chunk_size": str(hub.part_bytes), **urls}}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/lfs-verify"}}}


@route("PUT", "/lfs/{oid}")
def _put(ask: _Handler, at: dict[str, str]) -> None:
    _store(ask.hub, at["oid"], ask.body)
    ask.reply(b"")


@route("PUT", "/lfs-part/{oid}/{number}")
def _put_part(ask: _Handler, at: dict[str, str]) -> None:
    ask.hub.parts[at["oid"], int(at["number"])] = ask.body
    ask.reply(b"", headers={"ETag": f'"{hashlib.md5(ask.body).hexdigest()}"'})


@route("POST", "/lfs-complete/{oid}")
def _complete(ask: _Handler, at: dict[str, str]) -> None:
    numbers = [part["partNumber"] for part in ask.json()["parts"]]
    _store(ask.hub, at["oid"], b"".join(ask.hub.parts.pop((at["oid"], number)) for number in numbers))
    ask.reply({})


def _store(hub: HubServer, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "the content is not what was announced")
    hub.large[oid] = data


@route("POST", "/lfs-verify")
def _verify(ask: _Handler, _: dict[str, str]) -> None:
    given = ask.json()
    if len(ask.hub.large.get(given["oid"], b"")) != given["size"]:
        raise Refusal(404, "no such object")
    ask.reply({})


@route("POST", "/api/models/{repo}/commit/{rev}")
def _commit(ask: _Handler, at: dict[str, str]) -> None:
    ask.require_owner(at["repo"])
    repo, branch, last = ask.repo(at["repo"]), unquote(at["rev"]), ask.commit(at["repo"], at["rev"])
    lines = [json.loads(line) for line in ask.body.splitlines()]
    header = lines[0]["value"]
    if header.get("parentCommit", last.oid) != last.oid:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(last.files)
    for line in lines[1:]:
        _apply(ask.hub, files, line["key"], line["value"])
    commit = ask.hub.add_commit(repo, branch, header["summary"], files)
    ask.reply({"success": True, "commitOid": commit.oid, "commitUrl": f"{ask.hub.url}/{repo.name}/commit/{commit.oid}"})


def _apply(hub: HubServer, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    if key == "file":
        files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
    elif key == "lfsFile":
        if value["oid"] not in hub.large:
            raise Refusal(400, f"LFS pointer {value['path']} points to a file that does not exist")
        files[value["path"]] = File(hub.large[value["oid"]], large=True)
    elif files.pop(value["path"], None) is None:
        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")


@route("POST", "/api/models/{repo}/branch/{rev}")
def _branch(ask: _Handler, at: dict[str, str]) -> None:
    ask.require_owner(at["repo"])
    repo, name = ask.repo(at["repo"]), unquote(at["rev"])
    if name in repo.branches:
        raise Refusal(409, f"Reference {name} already exists")
    repo.branches[name] = [ask.commit(at["repo"], ask.json().get("startingPoint", "main"))]
    ask.reply({})


@route("POST", "/api/models/{repo}/tag/{rev}")
def _tag(ask: _Handler, at: dict[str, str]) -> None:
    ask.require_owner(at["repo"])
    ask.repo(at["repo"]).tags[ask.json()["tag"]] = ask.commit(at["repo"], at["rev"])
    ask.reply({})


@route("GET", "/api/models/{repo}/refs")
def _refs(ask: _Handler, at: dict[str, str]) -> None:
    repo = ask.repo(at["repo"])
    heads = {name: commits[-1] for name, commits in repo.branches.items()}
    ask.reply({"branches": _named("heads", heads), "tags": _named("tags", repo.tags), "converts": []})


def _named(kind: str, refs: Mapping[str, Commit]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": each.oid} for name, each in refs.items()]


@route("GET", "/api/models/{repo}/tree/{rev}")
def _tree(ask: _Handler, at: dict[str, str]) -> None:
    files = ask.commit(at["repo"], at["rev"]).files
    large = {path: {"oid": f.oid, "size": len(f.data), "pointerSize": 134} for path, f in files.items() if f.large}
    ask.reply(
        [
            {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
            | ({"lfs": large[path]} if path in large else {})
            for path, file in files.items()
        ]
    )


@route("GET", "/api/models/{repo}/revision/{rev}")
@route("GET", "/api/models/{repo}")
def _info(ask: _Handler, at: dict[str, str]) -> None:
    repo, commit = ask.repo(at["repo"]), ask.commit(at["repo"], at.get("rev", "main"))
    names = [{"rfilename": path} for path in commit.files]
    ask.reply({"id": repo.name, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": names})


@route("GET", "/{repo}/resolve/{rev}/{path}")
def _resolve(ask: _Handler, at: dict[str, str]) -> None:
    commit = ask.commit(at["repo"], at["rev"])
    head = {"X-Repo-Commit": commit.oid}
    file = commit.files.get(unquote(at["path"]))
    if file is None:
        return ask.reply({"error": "Entry not found"}, 404, head | {"X-Error-Code": "EntryNotFound"})
    if not file.large:
        return ask.reply(file.data, headers=head | {"ETag": f'"{file.oid}"'})
    linked = {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
    ask.reply(b"", 302, head | linked | {"Location": f"{ask.hub.cdn}/cdn/{file.oid}"})


@route("GET", "/cdn/{oid}")
def _cdn(ask: _Handler, at: dict[str, str]) -> None:
    if ask.user is not None:
        raise Refusal(400, "only one authentication mechanism is allowed: the token does not belong here")
    data = ask.hub.large[at["oid"]]
    begin = int(re.findall(r"bytes=(\d+)-", ask.headers.get("Range", "bytes=0-"))[0])
    partial = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
    ask.reply(data[begin:], 206 if begin else 200, {"ETag": f'"{at["oid"]}"', **partial})


def metadata_errors(card: str) -> list[str]:
    """What the Hub would say against the metadata of a README.md: types, ids, model-index entries without a field."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if found is None:
        return ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"invalid yaml: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    errors = [
        f'"{key}" must be an array of strings'
        for key in ("tags", "metrics")
        if key in data and not (isinstance(data[key], list) and all(isinstance(each, str) for each in data[key]))
    ]
    for key in ("base_model", "datasets"):
        ids = data.get(key, [])
        wrong = [each for each in (ids if isinstance(ids, list) else [ids]) if not _is_id(each)]
        errors += [f'"{key}" with value {each!r} is not valid. Use an id from https://hf.co/{key}' for each in wrong]
    return errors + [error for model in data.get("model-index", []) for error in _index_errors(model)]


def _index_errors(model: Any) -> list[str]:
    if not isinstance(model, dict) or not isinstance(model.get("name"), str) or "results" not in model:
        return ['"model-index" entries need "name" and "results"']
    needed = {"task": ("type",), "dataset": ("type", "name")}
    errors = [
        f'"model-index[0].results.{part}.{key}" is required'
        for result in model["results"]
        for part, keys in needed.items()
        for key in keys
        if not isinstance(result.get(part, {}).get(key), str)
    ]
    metrics = [metric for result in model["results"] for metric in result.get("metrics") or [{}]]
    if not all(isinstance(metric.get("type"), str) and metric.get("value") is not None for metric in metrics):
        errors.append('"model-index[0].results.metrics" need "type" and "value"')
    return errors


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) is not None
