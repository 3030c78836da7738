"""The sandbox service as an object with the interface `api.Sandbox`."""

import dataclasses
import http.client
import json
import random
import threading
import time
import urllib.parse
import uuid
from typing import Any

from kimi_jax.rewards.sandbox import api

_ANSWER_S = 600.0  # a connection on which no answer comes for so long is given up
_MAX_PAUSE_S = 2.0


class SandboxUnreachable(RuntimeError):
    """The service has not answered for as long as the client was told to try. Says nothing about any program."""


class SandboxClient:
    """Asks a service, from any thread, each with its own connection.

    A request is sent again when the service is busy, gone, or restarted in the middle. It carries an id, so that the
    service, if it is still the same, does not execute it twice; and verdicts are deterministic, so that another one
    gives the same.

    Args:
        url: http://host:port
        patience_s: how long to try before SandboxUnreachable is raised.
    """

    def __init__(self, url: str, *, patience_s: float = 300.0):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"url is {url!r}; give http://host:port")
        self._host, self._port, self._patience_s = parts.hostname, parts.port or 80, patience_s
        self._own = threading.local()

    def run(self, request: api.RunRequest) -> api.RunResult:
        """Raises ValueError if the service refuses the request, SandboxUnreachable if it does not answer."""
        return api.run_result(self._ask("POST", "/run", self._with_id(request)))

    def judge(self, request: api.JudgeRequest) -> api.Judgement:
        """Raises as `run` does."""
        return api.judgement(self._ask("POST", "/judge", self._with_id(request)))

    def health(self) -> dict:
        return self._ask("GET", "/health", b"")

    def close(self) -> None:
        """Closes the connection of this thread."""
        if connection := getattr(self._own, "connection", None):
            connection.close()

    def __enter__(self) -> "SandboxClient":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @staticmethod
    def _with_id(request: Any) -> bytes:
        api.check(request)
        return api.to_json(request if request.id else dataclasses.replace(request, id=uuid.uuid4().hex))

    def _ask(self, method: str, path: str, body: bytes) -> Any:
        deadline, pause = time.monotonic() + self._patience_s, 0.02
        while True:
            try:
                status, text = self._once(method, path, body)
                if status == 200:
                    return json.loads(text)
                reason = f"{status}: {json.loads(text)['error']}"
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.close()
                self._own.connection = None
                status, reason = 0, f"{type(error).__name__}: {error}"
            if 400 <= status < 500:
                raise ValueError(f"the sandbox refuses the request: {reason}")
            if time.monotonic() + pause > deadline:
                raise SandboxUnreachable(
                    f"http://{self._host}:{self._port} gave no answer in {self._patience_s:g} s ({reason}); "
                    f"start the service with python -m kimi_jax.rewards.sandbox --port={self._port}"
                )
            time.sleep(pause * random.uniform(0.5, 1.5))  # so that clients do not all come back together
            pause = min(2 * pause, _MAX_PAUSE_S)

    def _once(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if getattr(self._own, "connection", None) is None:
            self._own.connection = http.client.HTTPConnection(self._host, self._port, timeout=_ANSWER_S)
        connection = self._own.connection
        connection.request(method, path, body=body, headers={"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        return response.status, response.read()
