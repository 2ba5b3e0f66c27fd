"""A small server that speaks the protocol of the Hugging Face Hub, as far as huggingface_hub 2.4.0 uses it.

    with serving() as hub:
        hub.add("gen-robot/openvla-7b-rlvla-warmup", {"config.json": b"...", "model.safetensors": b"..."})
        env = hub.environment(tmp_path)  # HF_ENDPOINT, HF_HOME and others, for a process that downloads

It does not offer Xet. Files above 1 kB are in LFS: another path of the same server, where a redirect leads.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
LARGEST_IN_GIT = 1000  # bytes


class Hub:
    """What the server holds, and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.clear()

    def clear(self) -> None:
        """Forget everything but the address."""
        self.repos: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}  # (kind, id) -> {commit: {path: content}}
        self.refs: dict[tuple[str, str], dict[str, str]] = {}  # (kind, id) -> {branch or tag: commit}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.pages: dict[str, bytes] = {}  # other paths, such as GitHub's
        self.cuts: dict[str, list[int]] = {}  # end of a path -> bytes after which its next connections break
        self.answers: dict[str, int] = {}  # beginning of a path -> status of every answer below it
        self.private: set[str] = set()  # ids that need the token
        self.gated: set[str] = set()
        self.commits: list[dict] = []  # headers of the commits that were pushed
        self.on_request = lambda method, path: None  # called before each answer

    def add(self, repo: str, files: dict[str, bytes], kind: str = "model", refs: tuple[str, ...] = ("main",)) -> str:
        """Make a commit of these files. Returns its hash."""
        names = b"".join(name.encode() + hashlib.sha256(data).digest() for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{kind} {repo}".encode() + names).hexdigest()
        self.repos.setdefault((kind, repo), {})[commit] = dict(files)
        self.refs.setdefault((kind, repo), {}).update(dict.fromkeys(refs, commit))
        self.objects |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        return commit

    def files(self, repo: str, kind: str = "model", revision: str = "main") -> dict[str, bytes] | None:
        """{path: content} of a revision, or None."""
        commit = self.refs.get((kind, repo), {}).get(revision, revision)
        return self.repos.get((kind, repo), {}).get(commit)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables for a process that uses this server, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1,localhost",
            **more,
        }

    def bodies(self) -> Counter:
        """How often each file's content was asked for."""
        return Counter(path for method, path, _ in self.requests if method == "GET" and "/api/" not in path)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    # ------------------------------------------------------------------ answers
    def send(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_object(self, content, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(content).encode(), status, Content_Type="application/json", **headers)

    def refuse(self, status: int, code: str) -> None:
        self.send_object({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    # ------------------------------------------------------------------ requests
    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.hub.on_request(self.command, path)
        for beginning, status in self.hub.answers.items():
            if path.startswith(beginning):
                self.body()
                self.send(status=status)
                return
        words = path.strip("/").split("/")
        if path in self.hub.pages:
            self.content(path, self.hub.pages[path])
        elif words[0] == "lfs":
            self.content(words[1], self.hub.objects[words[1]])
        elif words[0] == "api":
            self.api(words[1:])
        elif self.command == "POST":
            self.lfs_batch()
        else:
            kind = "dataset" if words[0] == "datasets" else "model"
            words = words[1:] if kind == "dataset" else words
            if len(words) < 5 or words[2] != "resolve":
                self.refuse(404, "NotFound")
            else:
                self.resolve(kind, "/".join(words[:2]), words[3], "/".join(words[4:]))

    do_GET = do_HEAD = do_POST = answer

    def do_PUT(self) -> None:
        data = self.body()
        self.hub.requests.append(("PUT", urlsplit(self.path).path, None))
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self.send()

    def may_see(self, kind: str, repo: str) -> bool:
        """Whether the caller sees the repository, or was refused."""
        signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if (kind, repo) not in self.hub.repos or (repo in self.hub.private and not signed):
            self.refuse(404 if signed else 401, "RepoNotFound")
            return False
        return True

    def commit_of(self, kind: str, repo: str, revision: str) -> str | None:
        commit = self.hub.refs[kind, repo].get(revision, revision)
        if commit not in self.hub.repos[kind, repo]:
            self.refuse(404, "RevisionNotFound")
            return None
        return commit

    def api(self, words: list[str]) -> None:
        if words == ["repos", "create"]:
            self.create(json.loads(self.body()))
        elif words == ["validate-yaml"]:
            self.body()
            self.send_object({"errors": [], "warnings": []})
        elif words[0] in ("models", "datasets") and len(words) >= 3:
            kind, repo = words[0][:-1], "/".join(words[1:3])
            if self.may_see(kind, repo):
                self.of_repo(kind, repo, words[3] if len(words) > 3 else "revision", "/".join(words[4:]) or "main")
        else:
            self.refuse(404, "NotFound")

    def of_repo(self, kind: str, repo: str, what: str, revision: str) -> None:
        if what == "preupload":
            files = json.loads(self.body())["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LARGEST_IN_GIT else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self.send_object({"files": modes})
            return
        if what == "commit":
            self.commit(kind, repo, revision)
            return
        commit = self.commit_of(kind, repo, revision.split("/")[0] if what == "tree" else revision)
        if commit is None:
            return
        if what == "tree":
            below = revision.partition("/")[2]
            files = sorted(self.hub.repos[kind, repo][commit].items())
            self.send_object([self.entry(*file) for file in files if not below or file[0].startswith(f"{below}/")])
        else:
            names = [{"rfilename": name} for name in self.hub.repos[kind, repo][commit]]
            self.send_object({"id": repo, "sha": commit, "siblings": names, "private": repo in self.hub.private})

    def entry(self, path: str, data: bytes) -> dict:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found = {"type": "file", "path": path, "size": len(data), "oid": git}
        if len(data) > LARGEST_IN_GIT:
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        if not self.may_see(kind, repo):
            return
        if repo in self.hub.gated:
            self.refuse(403, "GatedRepo")
            return
        commit = self.commit_of(kind, repo, revision)
        if commit is None:
            return
        data = self.hub.repos[kind, repo][commit].get(path)
        if data is None:
            self.refuse(404, "EntryNotFound")
        elif len(data) > LARGEST_IN_GIT:
            sha = hashlib.sha256(data).hexdigest()
            headers = {"X_Repo_Commit": commit, "X_Linked_Etag": f'"{sha}"', "X_Linked_Size": str(len(data))}
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # another host, as the Hub's is
            self.send(status=302, Location=f"{elsewhere}/lfs/{sha}?signed=1", **headers)
        else:
            self.content(path, data, ETag=f'"{self.entry(path, data)["oid"]}"', X_Repo_Commit=commit)

    def content(self, name: str, data: bytes, **headers: str) -> None:
        """A file, from the place that Range names. Its connection may break."""
        begin, status = 0, 200
        if asked := self.headers.get("Range"):
            begin, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content_Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cuts.get(name, []) if self.command == "GET" else []
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[begin : cut.pop(0)] if cut else data[begin:])
            self.close_connection = self.close_connection or name in self.hub.cuts

    # ------------------------------------------------------------------ uploads
    def create(self, wanted: dict) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "Unauthorized")
            return
        repo = f"{wanted['organization']}/{wanted['name']}"
        if ("model", repo) in self.hub.repos:
            self.send_object({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
            return
        self.hub.add(repo, {})
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.hub.private.add(repo)
        self.send_object({"url": f"{self.hub.url}/{repo}", "name": repo, "id": "0"})

    def lfs_batch(self) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(self.body())["objects"]
        ]
        self.send_object({"transfer": "basic", "objects": objects})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line]
        files = dict(self.hub.files(repo, kind, revision) or {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.add(repo, files, kind, (revision,))
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self.send_object({"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": None})


class Server(http.server.ThreadingHTTPServer):
    """Each connection has a thread, whose errors go to the test's standard error."""

    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may go away at any time
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    with Server(("127.0.0.1", 0), Handler) as server:
        server.hub = hub
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(timeout=10)
