"A stand-in for the Hub on loopback: what huggingface_hub sends to make a repository, to fill it and to read it."

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    "Keeps regular files and, as the Hub does, large ones apart; `server.files` is {repository: {path: bytes}}."

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what):
        self.answer(404, **{"Content_Length": 0, "X_Error_Code": f"{what}NotFound", "X_Error_Message": "not found"})

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        address = f"http://{self.headers['Host']}"
        if self.headers["Authorization"] != "Bearer hub":
            return self.answer(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.server.files.setdefault(repo, {})
            return self.answer(200, {"url": f"{address}/{repo}"})
        if path == "/api/validate-yaml":
            head = re.match("---\n(.*?\n)---\n", json.loads(body)["content"], re.S)
            errors = [] if head and yaml.safe_load(head[1]) else [{"message": "no metadata"}]
            return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for o in objects:
                o["actions"] = {"upload": {"href": f"{address}/lfs/{o['oid']}"}}
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch("/api/models/(.+)/preupload/main", path):
            files = json.loads(body)["files"]
            for f in files:
                f |= {"uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
            return self.answer(200, {"files": files})
        if found := re.fullmatch("/api/models/(.+)/commit/main", path):
            files = self.server.files[found[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
            return self.answer(200, {"commitUrl": f"{address}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        self.answer(501)

    def do_PUT(self):
        content = self.body()
        assert self.path == f"/lfs/{hashlib.sha256(content).hexdigest()}"
        self.server.large[self.path.split("/")[2]] = content
        self.answer(200)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch("/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if found[1] not in self.server.files:
                return self.missing("Repo")
            names = [{"rfilename": name} for name in self.server.files[found[1]]]
            return self.answer(200, {"id": found[1], "sha": COMMIT, "siblings": names})
        if found := re.fullmatch("/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = self.server.files[found[1]].items()
            return self.answer(200, [{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in files])
        if found := re.fullmatch("/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if found[1] not in self.server.files:
                return self.missing("Repo")
            content = self.server.files[found[1]].get(found[2])
            if content is None:
                return self.missing("Entry")
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(200, content, **{"ETag": tag, "X_Repo_Commit": COMMIT})
        self.answer(501)

    do_HEAD = do_GET

    def log_message(self, *_):
        self.server.asked.append(f"{self.command} {self.path}")


@contextmanager
def hub():
    "A server with `files`, `large` and `asked`, and `env`, which sends huggingface_hub to it."
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.large, server.asked = {}, {}, []
        server.env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_TOKEN": "hub",
            "HF_HUB_DISABLE_XET": "1",  # large files go as Git LFS has it
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
