"""Run on the machine of the origins: HTTP/1.1 of Python's own with ranges and uploads, and a repository by git.

Arguments: a directory that holds `chain.pem` and `key.pem`, where the repository is made; a port.
"""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SIZE = 100_000
_GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@a.test", "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@a.test",
}  # fmt: skip


class Origin(BaseHTTPRequestHandler):
    """`/object` is a file; what is PUT or POSTed is summed up; `/repo.git` is served by `git http-backend`."""

    protocol_version = "HTTP/1.1"
    root = Path()

    def log_message(self, format: str, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/repo.git"):
            self._git(b"")
            return
        whole = b"outgate!" * (SIZE // 8)
        span = self.headers.get("Range", "")
        if span.startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            part = whole[int(first) : int(last) + 1]
            self._reply(206, part, {"Content-Range": f"bytes {first}-{last}/{SIZE}"})
        else:
            self._reply(200, whole, {})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._body()
        if self.path.startswith("/repo.git"):
            self._git(body)
        else:
            said = {
                "length": len(body),
                "sha256": hashlib.sha256(body).hexdigest(),
                "expect": self.headers.get("Expect"),
            }
            self._reply(200, json.dumps(said).encode(), {"ETag": f'"{said["sha256"]}"'})

    do_PUT = do_POST

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline() != b"\r\n":
            pass
        return body

    def _reply(self, status: int, body: bytes, fields: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **fields}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _git(self, body: bytes) -> None:
        path, _, query = self.path.partition("?")
        environment = os.environ | _GIT | {
            "GIT_PROJECT_ROOT": str(self.root), "GIT_HTTP_EXPORT_ALL": "1", "PATH_INFO": path, "QUERY_STRING": query,
            "REQUEST_METHOD": self.command, "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)), "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }  # fmt: skip
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, check=True)
        head, _, rest = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        status = int(fields.pop("Status", "200").split(" ")[0])
        self._reply(status, rest, fields)


def make_repository(directory: Path) -> None:
    tree = directory / "tree"
    for command in (
        ["git", "init", "--quiet", "--initial-branch=main", str(tree)],
        ["git", "-C", str(tree), "add", "."],
        ["git", "-C", str(tree), "commit", "--quiet", "-m", "first"],
        ["git", "clone", "--quiet", "--bare", str(tree), str(directory / "repo.git")],
    ):
        subprocess.run(command, check=True, env=os.environ | _GIT)
        if command[1] == "init":
            (tree / "file").write_bytes(os.urandom(300_000))


def main(directory: Path, port: int) -> None:
    root = directory / "repository"
    root.mkdir()
    make_repository(root)
    Origin.root = root
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "chain.pem", directory / "key.pem")
    server = ThreadingHTTPServer(("", port), Origin)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
