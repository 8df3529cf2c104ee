"""The hub, answered by a real HTTP server on loopback."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Answer = tuple[int, dict[str, str], bytes]
HUB_ID = "facebook/dinov3-vitl16-pretrain-sat493m"


class Hub:
    """Answers as the hub does, with a model's public pages and whatever `answer_file` says to a request for a file."""

    def __init__(self, checkpoint: Path) -> None:
        hub, files = self, sorted(path for path in checkpoint.iterdir())
        self.answer_api: Answer | None = None
        self.answer_file: Answer | None = None
        tree = [
            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"{i:040x}"} for i, f in enumerate(files)
        ]
        info = {"_id": "1", "id": HUB_ID, "sha": "a" * 40, "siblings": [{"rfilename": path.name} for path in files]}
        info |= {"private": False, "gated": "manual", "tags": [], "downloads": 0, "likes": 0}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/api/"):
                    page = json.dumps(tree if "/tree/" in self.path else info).encode()
                    answer = hub.answer_api or (200, {"Content-Type": "application/json"}, page)
                else:
                    path = checkpoint / self.path.rpartition("/")[2]
                    identity = {"ETag": f'"{path.name}"', "X-Repo-Commit": "a" * 40}
                    answer = hub.answer_file or (200, identity, path.read_bytes())
                if answer[0] == 0:
                    return  # the connection breaks
                self.send_response_only(answer[0])
                for name, value in (answer[1] | {"Content-Length": str(len(answer[2]))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(answer[2])

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextmanager
    def serve(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield self
        self.server.shutdown()
        self.server.server_close()
        thread.join()


def refuse(status: int, code: str = "", message: str = "") -> Answer:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, json.dumps({"error": message}).encode()
