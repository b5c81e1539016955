"""A stand-in for the Hugging Face hub: what of its HTTP API an upload by huggingface_hub asks.

No request leaves the machine. Repositories are dicts; large files come by LFS, as Xet is another
service, which the client leaves out under HF_HUB_DISABLE_XET. `TOKEN` may write for the owner `me`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_" + "x" * 30  # shaped like one, so that whatever prints it would be caught
_LFS = (".parquet", ".safetensors")


@dataclass
class Repository:
    """What one holds.

    Attributes:
        visibility: as it was created.
        files: path → bytes, of its last commit.
        commits: their messages.
        lfs: the paths of those that came by LFS.
    """

    visibility: str
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)


@dataclass
class HubStandIn:
    """The service.

    Attributes:
        endpoint: what HF_ENDPOINT is to be.
        repositories: (kind, owner/name) → what it holds.
        refuses: part of a path → the code with which a request to it ends.
    """

    endpoint: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    refuses: dict[str, int] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """The code and JSON of a request."""
        if refused := [code for part, code in self.refuses.items() if part in path]:
            return refused[0], {"error": "so says the stand-in"}
        if path.startswith("/lfs/"):
            self.objects[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return 200, {}
        if found := re.fullmatch(r"/(datasets/)?(.+)\.git/info/lfs/objects/batch", path):
            return 200, {"objects": [self._action(each) for each in json.loads(body)["objects"]]}
        found = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/(\w+)/main", path.split("?")[0])
        if not found:
            return 404, {"error": f"{method} {path}"}
        repository = self.repositories[found[1], found[2]]
        return 200, getattr(self, f"_{found[3]}")(repository, body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        owner, kind = asked["organization"] or "me", asked.get("type", "model")
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.endpoint}/{'datasets/' * (kind == 'dataset')}{name}"}
        if owner != "me":
            return 403, {"error": "You don't have the rights to create a model under this owner"}
        if (kind, name) in self.repositories:
            return 409, url | {"error": "You already created this repo"}
        told = asked.get("visibility") or ("private" if asked.get("private") else "public")
        self.repositories[kind, name] = Repository(told)
        return 200, url

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        action = {"upload": {"href": f"{self.endpoint}/lfs/{asked['oid']}"}}
        return asked | ({} if asked["oid"] in self.objects else {"actions": action})

    def _preupload(self, repository: Repository, body: bytes) -> Any:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(_LFS) else "regular"

        files = [each["path"] for each in json.loads(body)["files"]]
        told = [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in files]
        return {"files": told}

    def _tree(self, repository: Repository, body: bytes) -> Any:
        files = repository.files.items()
        return [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files]

    def _commit(self, repository: Repository, body: bytes) -> Any:
        for line in body.decode().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                repository.commits.append(value["summary"])
            elif key == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]
                repository.lfs.add(value["path"])
            elif key == "deletedFile":
                del repository.files[value["path"]]
        return {"commitUrl": f"{self.endpoint}/me/x/commit/1", "commitOid": "1" * 40}


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """The service, on a port of this machine."""
    hub = HubStandIn()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization")
            code, told = hub.answer(self.command, self.path, body, token)
            data = json.dumps(told).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _reply

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
