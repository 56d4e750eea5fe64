"""A hub on this machine that speaks enough of the protocol for the real client to create, upload, list and download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writes"  # the token that may write
READER = "hf_reads"  # one that is known, and may not
LFS = (".safetensors", ".bin")


@dataclass
class Hub:
    """Repositories by name, each with its files, and which of them are private."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""


def serve(hub: Hub) -> ThreadingHTTPServer:
    """A server of `hub` on a free port; the caller runs it and shuts it down."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *about: Any) -> None:
        return

    def do_POST(self) -> None:
        path, body = self._read()
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._json({"files": files} if found[1] in self.hub.repositories else {}, 200)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json(
                {
                    "transfer": "basic",
                    "objects": [
                        one | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}}
                        for one in json.loads(body)["objects"]
                    ],
                }
            )
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._json({"error": path}, 404)

    def do_PUT(self) -> None:
        path, body = self._read()
        self.hub.objects[path.rpartition("/")[2]] = body
        self._json({})

    def do_HEAD(self) -> None:
        self._resolve(with_body=False)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path)
        if found is None:
            self._resolve(with_body=True)
            return
        self.hub.asked.append(path)
        files = self.hub.repositories.get(found[1])
        if files is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif (found[2] or "").startswith("/tree"):
            self._json(
                [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()]
            )
        else:
            siblings = [{"rfilename": n, "size": len(d), "blobId": _oid(d)} for n, d in files.items()]
            self._json(
                {"id": found[1], "sha": _sha(files), "siblings": siblings, "private": False, "tags": []}
            )

    def _create(self, asked: dict[str, Any]) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if token == READER:
            self._json({"error": "Forbidden"}, 403)
        elif token != TOKEN:
            self._json({"error": "Invalid credentials"}, 401)
        elif name in self.hub.repositories:
            self._json({"error": "exists", "url": f"{self.hub.url}/{name}", "id": name}, 409)
        else:
            self.hub.repositories[name] = {}
            self.hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self._json({"url": f"{self.hub.url}/{name}", "id": name})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self._json(
            {
                "success": True,
                "commitUrl": f"{self.hub.url}/{name}/commit/{_sha(files)}",
                "commitOid": _sha(files),
            }
        )

    def _resolve(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        data = self.hub.repositories.get(found[1], {}).get(found[2]) if found else None
        if data is None:
            self._json({"error": path}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self.hub.asked.append(path)
        self.send_response(200)
        for key, value in {
            "ETag": f'"{_oid(data)}"',
            "X-Repo-Commit": _sha(self.hub.repositories[found[1]]),
            "Content-Length": len(data),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _read(self) -> tuple[str, bytes]:
        path = urlsplit(self.path).path
        self.hub.asked.append(path)
        return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for key, text in headers.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sha(files: dict[str, bytes]) -> str:
    """The commit a repository stands at: another one for other files."""
    return _oid(b"".join(name.encode() + data for name, data in sorted(files.items())))


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
