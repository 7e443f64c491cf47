"""A local HTTP server with the part of the Hugging Face hub's API that `huggingface_hub` needs for downloads."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Serves `files[repo_id, commit, filename]`. `aliases` maps branches and tags to commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.aliases: dict[str, str] = {}
        self.requests: list[str] = []
        self.break_off_after: int | None = None  # close the connection after this many bytes of weights
        self.redirects: dict[tuple[str, str, str], str] = {}  # the URL of another hub for a file
        self.length_error = 0  # added to the Content-Length of weights

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        repo_id, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, filename = rest.partition("/")
        commit = self.server.aliases.get(revision, revision)
        commits = {key[:2] for key in self.server.files}
        body = self.server.files.get((repo_id, commit, filename))
        if body is None:
            missing = "RepoNotFound" if repo_id not in {r for r, _ in commits} else "RevisionNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if (repo_id, commit) in commits else missing)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if other_url := self.server.redirects.get((repo_id, commit, filename)):
            self.send_response(302)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("Location", other_url + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        error = 0 if filename == "config.json" else self.server.length_error
        self.send_header("Content-Length", str(len(body) - start + error))
        self.end_headers()
        if with_body and self.server.break_off_after is not None and filename != "config.json":
            self.wfile.write(body[start : start + self.server.break_off_after])
            self.close_connection = True
        elif with_body:
            self.wfile.write(body[start:])


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """Run a hub in a thread."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
