"""A verifier that fails, for drills: it hangs in 2% of judgements and crashes in 1%, and else says what is true.

Which ones depends on the response alone, so that a drill can be repeated. `scripts/controls.py faulty` is one.
"""

import os
import signal
import time
import zlib

from kimi_jax.tasks import verify as verify_task
from kimi_jax.types import Problem, Verdict


def fate(problem: Problem, text: str) -> str:
    """What happens when this response is judged: "hang", "exit", "crash", or "" in 97 of 100 cases."""
    fates = {0: "hang", 1: "hang", 2: "hang", 3: "hang", 4: "exit", 5: "crash"}
    return fates.get(zlib.crc32(f"{problem.id}: {text}".encode("utf-8", "surrogatepass")) % 200, "")


def verify(problem: Problem, text: str) -> Verdict:
    match fate(problem, text):
        case "hang":
            while True:
                time.sleep(60)
        case "exit":
            os._exit(3)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
    return verify_task(problem, text)
