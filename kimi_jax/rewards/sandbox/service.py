"""The pool as an HTTP service, with the standard library.

    POST /run      a RunRequest as JSON    -> a RunResult          (api.py)
    POST /judge    a JudgeRequest as JSON  -> a Judgement
    GET  /health   which walls stand, which languages there are
    GET  /metrics  counters, in the text format of Prometheus

400 says what is wrong with a request, 413 that it is too large, 503 that too much is waiting. Answers are kept for a
while by the id of their request, so that a client who lost one can ask again; the service has no other state, and any
number of them may stand behind a load balancer.
"""

import collections
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kimi_jax.rewards.sandbox import api
from kimi_jax.rewards.sandbox.pool import Busy, LocalSandbox

_CHUNK = 1 << 16
_IDLE_S = 120.0  # a connection on which nothing comes for so long is closed
_log = logging.getLogger(__name__)


class Service:
    """Serves `sandbox` on a port until `close`.

    Args:
        port: 0 takes any; see the attribute of that name.
        max_request_mb: of one request.
        kept_answers, kept_mb: how many answers are remembered, and their size together.
    """

    def __init__(
        self,
        sandbox: LocalSandbox,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_request_mb: int = 64,
        kept_answers: int = 4096,
        kept_mb: int = 64,
    ):
        self.sandbox = sandbox
        self.max_request = max_request_mb << 20
        self._reading_bytes, self._lock = 0, threading.Lock()
        self.answers = _Answers(kept_answers, kept_mb << 20)
        self._server = _Server((host, port), _Handler)
        self._server.service = self
        self.port: int = self._server.server_address[1]

    def serve(self) -> None:
        """Answers requests until another thread calls `close`."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def reading(self, size: int) -> Iterator[bool]:
        """While a request of this size is read. False: all those that are just being read are too large already."""
        with self._lock:
            has_room = self._reading_bytes + size <= 2 * self.max_request
            self._reading_bytes += size if has_room else 0
        try:
            yield has_room
        finally:
            with self._lock:
                self._reading_bytes -= size if has_room else 0

    def answer(self, kind: str, body: bytes) -> bytes:
        """Raises ValueError for what is not a request, Busy if too much is waiting."""
        parse: Callable = api.run_request if kind == "run" else api.judge_request
        request = parse(json.loads(body))
        if not request.id:
            return api.to_json(self.sandbox.submit(request).result())
        return self.answers.get(f"{kind} {request.id}", lambda: self.sandbox.submit(request))

    def metrics(self) -> str:
        lines: list[str] = []
        for name, value in self.sandbox.metrics().items():
            family = name.split("{")[0]
            kind = "counter" if family.endswith("_total") else "gauge"
            if not any(line.startswith(f"# TYPE sandbox_{family} ") for line in lines):
                lines.append(f"# TYPE sandbox_{family} {kind}")
            lines.append(f"sandbox_{name} {value:g}")
        return "\n".join(lines) + "\n"


class _Answers:
    """The last answers by id, and the futures of those that are not given yet."""

    def __init__(self, max_number: int, max_bytes: int):
        self._max_number, self._max_bytes = max_number, max_bytes
        self._lock = threading.Lock()
        self._open: dict[str, Future] = {}
        self._given: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._bytes = 0

    def get(self, key: str, ask: Callable[[], Future]) -> bytes:
        """Asks unless the same was asked before."""
        with self._lock:
            if key in self._given:
                return self._given[key]
            future = self._open.get(key)
            asked = future is None
            if asked:
                future = self._open[key] = ask()
        try:
            answer = api.to_json(future.result())
        except Exception:
            with self._lock:
                self._open.pop(key, None)
            raise
        if asked:
            with self._lock:
                del self._open[key]
                if not _failed(answer):  # the next attempt may do better
                    self._given[key] = answer
                    self._bytes += len(answer)
                while self._bytes > self._max_bytes or len(self._given) > self._max_number:
                    self._bytes -= len(self._given.popitem(last=False)[1])
        return answer


def _failed(answer: bytes) -> bool:
    data = json.loads(answer)
    return "sandbox_error" in data.get("status", "") or data.get("outcome") == "ungradable"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    service: Service

    def handle_error(self, request: object, client_address: object) -> None:
        _log.debug("connection of %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_S
    server: _Server
    wbufsize = -1  # headers and body in one piece

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def do_GET(self) -> None:
        service = self.server.service
        if self.path == "/health":
            self._reply(200, json.dumps(service.sandbox.health()).encode())
        elif self.path == "/metrics":
            self._reply(200, service.metrics().encode(), "text/plain; version=0.0.4")
        else:
            self._error(404, f"there is no {self.path[:60]}; GET /health and /metrics, POST /run and /judge")

    def do_POST(self) -> None:
        service, kind = self.server.service, self.path.removeprefix("/")
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            self.close_connection = True
            return self._error(411, "the request has no Content-Length")
        if not 0 <= size <= service.max_request:
            self.close_connection = True
            left = size if size <= 2 * service.max_request else 0
            while left > 0:  # a client that is still sending would not see the answer
                left -= len(self.rfile.read(min(left, _CHUNK))) or left
            return self._error(413, f"the request has {size} bytes; at most {service.max_request} are taken")
        with service.reading(size) as has_room:
            if not has_room:
                self.close_connection = True
                return self._error(503, "too much is being sent; try again", ("Retry-After", "1"))
            body = self.rfile.read(size)
        if kind not in ("run", "judge"):
            return self._error(404, f"there is no {self.path[:60]}; POST /run and /judge, GET /health and /metrics")
        try:
            self._reply(200, service.answer(kind, body))
        except Busy as error:
            self._error(503, str(error), ("Retry-After", "1"))
        except (ValueError, TypeError, RecursionError) as error:
            self._error(400, str(error) or type(error).__name__)
        except RuntimeError as error:  # it is closing
            self._error(503, str(error), ("Retry-After", "1"))

    def _error(self, status: int, text: str, *headers: tuple[str, str]) -> None:
        self._reply(status, json.dumps({"error": text}).encode(), "application/json", *headers)

    def _reply(self, status: int, body: bytes, kind: str = "application/json", *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        _log.debug(format, *args)
