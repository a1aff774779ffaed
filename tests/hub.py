"""A Hugging Face Hub of local folders on 127.0.0.1, as far as `datasets` and `transformers` need one to download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


@contextmanager
def local_hub(root: Path) -> Iterator[str]:
    """Serve `<root>/<models or datasets>/<owner>/<name>/<revision>/`, and return the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, root))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _hash(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:40]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, *arguments: object) -> None:
        self.root = root
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            self._about(*parts[1:])
        elif parts[0] == "datasets":
            self._file(*parts)
        else:
            self._file("models", *parts)

    def _about(self, kind: str, owner: str = "", name: str = "", what: str = "revision", *rest: str) -> None:
        folder, commit = self._find(kind, owner, name, rest[0] if rest else "main")
        if folder is None:
            self._absent("RepoNotFound")
        elif what == "revision":
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            self._json({"id": f"{owner}/{name}", "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        elif what == "tree" and folder.joinpath(*rest[1:]).is_dir():
            self._json([_entry(path, folder) for path in folder.joinpath(*rest[1:]).iterdir()])
        else:
            self._absent("EntryNotFound")

    def _file(self, kind: str, owner: str, name: str = "", what: str = "", revision: str = "", *rest: str) -> None:
        folder, commit = self._find(kind, owner, name, revision)
        if folder is None:
            self._absent("RepoNotFound")
        elif what != "resolve" or not folder.joinpath(*rest).is_file():
            self._absent("EntryNotFound")
        else:
            content = folder.joinpath(*rest).read_bytes()
            self._send(200, content, {"ETag": f'"{_hash(content)}"', "X-Repo-Commit": commit})

    def _find(self, kind: str, owner: str, name: str, revision: str) -> tuple[Path | None, str]:
        """Find the folder and the commit of a revision, which is a name or a commit."""
        repository = self.root / kind / owner / name
        for known in ("main", "refs/convert/parquet"):
            if revision in (known, _hash(known)) and name and (repository / known).is_dir():
                return repository / known, _hash(known)
        return None, ""

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _absent(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: Path, folder: Path) -> dict[str, object]:
    entry = {"path": path.relative_to(folder).as_posix(), "oid": _hash(path.as_posix()), "size": path.stat().st_size}
    return {"type": "directory" if path.is_dir() else "file", **entry}
