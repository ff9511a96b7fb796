"""A Hugging Face hub on this machine: uploads (repository, branch, LFS, commit) and downloads by huggingface_hub."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

_KIND = re.compile(r"^/(api/models|api/datasets|datasets)/")


@dataclass
class Hub:
    """`commits`: the files of each commit, by its id; `branches`: their latest commits; `private` as asked for."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    lfs_paths: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)  # repositories whose files are refused
    endpoint: str = ""

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        """A commit that adds `files` to what the branch has."""
        files = self.commits[self.branches[f"{repo}@{branch}"]] | files
        sha = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()  # noqa: S324
        self.commits[sha] = files
        self.branches[f"{repo}@{branch}"] = sha
        return sha

    def create(self, repo: str, branch: str = "main") -> None:
        """Make a repository, or a branch of it, with an empty commit."""
        self.commits["0" * 40] = {}
        self.branches.setdefault(f"{repo}@{branch}", "0" * 40)

    def post(self, path: str, body: bytes) -> dict[str, Any]:
        """The answer to a POST."""
        if path == "/api/repos/create":
            return self._create_repo(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for lfs_object in objects:
                lfs_object["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{lfs_object['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        org, name, verb, branch = _KIND.sub("", path).split("/", 3)
        repo, branch = f"{org}/{name}", unquote(branch)
        if verb == "branch":
            self.create(repo, branch)
            return {}
        if verb == "preupload":
            return {"files": [_upload_mode(file["path"]) for file in json.loads(body)["files"]]}
        return self._commit_lines(repo, branch, body)

    def _create_repo(self, request: dict[str, Any]) -> dict[str, Any]:
        repo = f"{request['organization']}/{request['name']}"
        self.create(repo)
        self.private.setdefault(repo, request.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{repo}", "name": repo, "id": repo}

    def _commit_lines(self, repo: str, branch: str, body: bytes) -> dict[str, Any]:
        """A commit that comes as a JSON line a file, large ones by the id of what was uploaded before."""
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
                self.lfs_paths.append(value["path"])
        sha = self.commit(repo, branch, files)
        return {"commitUrl": f"{self.endpoint}/{repo}/commit/{sha}", "commitOid": sha}

    def sha_of(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; None where there is none."""
        return revision if revision in self.commits else self.branches.get(f"{repo}@{revision}")


def _upload_mode(path: str) -> dict[str, Any]:
    is_large = path.endswith((".safetensors", ".parquet"))
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers at `Hub.endpoint` while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def body(self) -> bytes:
            hub.tokens.add(self.headers.get("Authorization", ""))
            return self.rfile.read(int(self.headers["Content-Length"]))

        def do_POST(self) -> None:
            reply = hub.post(self.path.partition("?")[0], self.body())
            self.answer(json.dumps(reply).encode(), Content_Type="application/json")

        def do_PUT(self) -> None:
            hub.blobs[self.path.rpartition("/")[2]] = self.body()
            self.answer(b"")

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            org, name, *parts = _KIND.sub("", path).strip("/").split("/")
            verb, revision, *file_parts = parts or ["revision", "main"]
            sha = hub.sha_of(f"{org}/{name}", revision)
            if sha is None:
                is_repo = any(branch.startswith(f"{org}/{name}@") for branch in hub.branches)
                self.answer(b"", 404, X_Error_Code="RevisionNotFound" if is_repo else "RepoNotFound")
            elif verb in ("revision", "tree"):
                files = hub.commits[sha]
                listed = [{"type": "file", "path": f, "size": len(c), "oid": f} for f, c in files.items()]
                info = {"id": f"{org}/{name}", "sha": sha, "siblings": [{"rfilename": f} for f in files]}
                reply = json.dumps(info if verb == "revision" else listed)
                self.answer(reply.encode(), Content_Type="application/json")
            elif f"{org}/{name}" in hub.gated:
                self.answer(b"", 403, X_Error_Code="GatedRepo")
            elif (file := "/".join(file_parts)) not in hub.commits[sha]:
                self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            else:
                content = hub.commits[sha][file]
                self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=sha)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
