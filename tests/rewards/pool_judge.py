"""A judge that does what the response says. It has a file of its own, so that no worker imports pytest."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

from kimi_jax.types import Outcome, Problem, Verdict

IMPORTED = os.getpid()  # where


def obey(problem: Problem, text: str) -> Verdict:
    command, _, argument = text.partition(" ")
    match command:
        case "echo":
            return Verdict(Outcome.CORRECT, f"{problem.answer} {argument}")
        case "images":
            return Verdict(Outcome.CORRECT, f"{len(problem.images)} images")
        case "pid":
            time.sleep(0.01)  # so that one worker does not get all of them
            return Verdict(Outcome.CORRECT, f"pid {os.getpid()}")
        case "surroundings":
            from kimi_jax.tasks import verify

            unknown = verify(problem, text).detail.startswith("ValueError: no task is called")
            assert unknown and os.environ["JAX_PLATFORMS"] == "cpu"
            devices = os.environ["CUDA_VISIBLE_DEVICES"]
            return Verdict(Outcome.CORRECT, f"jax imported: {'jax' in sys.modules}, devices: {devices!r}")
        case "raise":
            raise ValueError(argument)
        case "leave":
            sys.exit(argument)
        case "return":
            return argument
        case "sleep":
            time.sleep(float(argument))
        case "loop":  # deaf to all but SIGKILL
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                pass
        case "backtrack":  # one call of C that lets no other thread of the process run
            re.match("(a+)+$", "a" * 60 + "b")
        case "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            pathlib.Path(argument).write_text(str(child.pid))
            child.wait()
        case "await":  # hang until the file is there
            while not pathlib.Path(argument).exists():
                time.sleep(0.01)
            return Verdict(Outcome.CORRECT, "it came")
        case "origin":
            return Verdict(Outcome.CORRECT, f"imported {IMPORTED}, in {os.getpid()}, of {os.getppid()}")
        case "orphan":  # itself: the process that made it dies
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        case "stop":  # itself, when it has answered and waits
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGSTOP)).start()
            return Verdict(Outcome.CORRECT, str(os.getpid()))
        case "exit":
            os._exit(int(argument))
        case "kill":
            os.kill(os.getpid(), int(argument))
    return Verdict(Outcome.WRONG, text)
