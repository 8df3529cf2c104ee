"""A proxy on loopback before the real storage server: notes what is asked, and harms chosen answers."""

from __future__ import annotations

import http.client
import http.server
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal
from urllib.parse import unquote, urlsplit

Fault = int | Literal["reset", "lost", "cut", "flip", "slow"] | None
"""A status instead of the answer, a connection reset before or after the server did what was asked, a body cut short,
with one bit flipped or in pieces with pauses, or no fault."""


class Proxy:
    """Answers as the server at `target` would, except where `choose_fault` decides otherwise.

    Attributes:
        url: of the proxy.
        asked: paths of the requests, in order.
        met: faults done so far, in order.
        choose_fault: called with a request's path, one request at a time.
    """

    def __init__(self, target: str) -> None:
        proxy, address = self, urlsplit(target).netloc
        self.asked: list[str] = []
        self.met: list[Fault] = []
        self.choose_fault: Callable[[str], Fault] = lambda path: None
        self._lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def forward(self) -> None:
                self.close_connection = True
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy.note(self.path)
                if fault == "reset":
                    self.reset()
                    return
                if isinstance(fault, int):
                    self.answer(fault, {}, b"harmed")
                    return
                onward = http.client.HTTPConnection(address, timeout=20)
                onward.request(self.command, self.path, sent, headers=proxy.pass_on(self.headers))
                answer = onward.getresponse()
                body = answer.read()
                onward.close()
                if fault == "lost":
                    self.reset()
                    return
                if fault == "flip" and body:
                    body = body[:-1] + bytes([body[-1] ^ 1])
                kept = body[: len(body) // 2] if fault == "cut" else body
                self.answer(answer.status, dict(answer.getheaders()), kept, len(body), slow=fault == "slow")

            do_GET = do_POST = do_PUT = do_DELETE = forward

            def answer(
                self,
                status: int,
                headers: dict[str, str],
                body: bytes,
                length: int | None = None,
                *,
                slow: bool = False,
            ) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                for start in range(0, len(body), max(1, len(body) // 3)) if slow else ():
                    self.wfile.write(body[start : start + max(1, len(body) // 3)])
                    time.sleep(0.05)
                if not slow:
                    self.wfile.write(body)

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.shutdown(socket.SHUT_RD)
                self.connection.close()

            def finish(self) -> None:
                with suppress(OSError, ValueError):  # the connection was reset on purpose
                    super().finish()

            def log_message(self, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 128  # of 5, more readers at a time are let in a second later

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def note(self, path: str) -> Fault:
        with self._lock:
            self.asked.append(path)
            fault = self.choose_fault(path)
            if fault is not None:
                self.met.append(fault)
            return fault

    @staticmethod
    def pass_on(headers: Mapping[str, str]) -> dict[str, str]:
        """Headers for the server; it answers object paths only under its own name, which http.client sets."""
        return {name: value for name, value in headers.items() if name.lower() != "host"}

    @staticmethod
    def reads(path: str, name: str) -> bool:
        """Whether a request is for the bytes of an object, not for a listing that mentions it."""
        return unquote(urlsplit(path).path).endswith(name)

    @contextmanager
    def serve(self) -> Iterator[Proxy]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield self
        self._server.shutdown()
        thread.join()
        self._server.server_close()
