"""A hub on loopback: the part of the Hugging Face hub's HTTP interface that its own client uses to
make a repository, upload to it and download from it. The bytes that arrive are kept."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


class Repo:
    def __init__(self, private: bool) -> None:
        self.private = private
        self.branches: dict[str, dict[str, bytes]] = {"main": {".gitattributes": b"* lfs\n"}}
        self.commits: list[str] = []


class Hub(ThreadingHTTPServer):
    """Serves until `close`; `repos` holds what was uploaded, `requests` every method and path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail_uploads = 0
        """How many uploads of large files to answer with an error that no retry mends."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, content: object = None, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/objects/"):
            self._object(path.removeprefix("/objects/"), body)
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "Invalid username or password.")
            return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            self._answer(200, {"name": "me", "type": "user", "orgs": []})
        elif parts[:3] == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[:2] == ["api", "validate-yaml"]:
            self._validate(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs(json.loads(body))
        elif parts[:2] == ["api", "models"]:
            self._model("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, f"the stand-in has no {self.command} {path}")

    do_GET = do_POST = do_PUT = do_HEAD = _route

    def _create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name.startswith("others/"):
            self._refuse(403, f"you may not create a model under others ({name})")
            return
        url = f"{self.server.url}/{name}"
        status = 409 if name in self.server.repos else 200
        if status == 200:
            self.server.repos[name] = Repo(bool(asked.get("private")))
        self._answer(status, {"url": url, "name": name})

    def _validate(self, asked: dict) -> None:
        """As the hub does it: the front matter has to be YAML with a known kind of values."""
        import yaml

        front = yaml.safe_load(asked["content"].split("---")[1])
        errors = [
            {"message": f'"{key}" must be {kind.__name__}'}
            for key, kind in (("license", str), ("tags", list), ("library_name", str))
            if not isinstance(front.get(key), kind)
        ]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _lfs(self, asked: dict) -> None:
        objects = []
        for each in asked["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server.objects:
                href = f"{self.server.url}/objects/{each['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _object(self, oid: str, body: bytes) -> None:
        if self.server.fail_uploads:
            self.server.fail_uploads -= 1
            self._refuse(403, "the storage refused")
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer(200)

    def _model(self, name: str, rest: list[str], body: bytes) -> None:
        repo = self.server.repos.get(name)
        if repo is None:
            self._refuse(404, "Repository not found", "RepoNotFound")
        elif rest[:1] == ["branch"]:
            repo.branches.setdefault(rest[1], dict(repo.branches["main"]))
            self._answer(200)
        elif rest[:1] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "regular" if f["size"] < 10_000 else "lfs",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self._answer(200, {"files": files})
        elif rest[:1] == ["commit"]:
            self._commit(name, repo, rest[1], body)
        elif rest[:1] == ["tree"]:
            files = repo.branches[rest[1]]
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                for path, content in files.items()
            ]
            self._answer(200, json.dumps(listed).encode())
        elif rest[:1] == ["revision"] or not rest:
            branch = repo.branches[rest[1] if rest else "main"]
            siblings = [{"rfilename": path} for path in branch]
            info = {"id": name, "private": repo.private, "sha": "1" * 40, "siblings": siblings}
            self._answer(200, info)
        else:
            self._refuse(404, f"the stand-in has no model route {rest}")

    def _commit(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        files = repo.branches[revision]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repo.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        url = f"{self.server.url}/{name}/commit/{len(repo.commits)}"
        self._answer(
            200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""}
        )

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.server.repos.get(name)
        files = {} if repo is None else repo.branches.get(revision, repo.branches["main"])
        if path not in files:
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        etag = hashlib.sha256(files[path]).hexdigest()
        self._answer(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": "1" * 40})
