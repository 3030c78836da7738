"""Starts the sandbox service.

    python -m kimi_jax.rewards.sandbox --port=8123
    python -m kimi_jax.rewards.sandbox --host=0.0.0.0 --port=8123 --workers=16 --profile=go=/images/go

It has no password: let only those reach it who may run programs on it. Exit status: 0 stopped by a signal; 2 what was
given cannot work, or the machine has no isolation.
"""

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Sequence

from kimi_jax.rewards.sandbox.isolation import NoIsolation
from kimi_jax.rewards.sandbox.pool import UNSAFE, LocalSandbox
from kimi_jax.rewards.sandbox.service import Service


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kimi_jax.rewards.sandbox",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, required=True, help="0: any, which the first line of output names")
    parser.add_argument("--workers", type=int, help="programs at the same time (as many as there are processors)")
    parser.add_argument("--sandbox", choices=("isolated", "unsafe"), default="isolated", help="unsafe: no walls at all")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="NAME=ROOT", help="a root file system; may be repeated"
    )
    parser.add_argument("--max_waiting", type=int, default=4096, help="requests (4096)")
    parser.add_argument("--max_waiting_mb", type=int, default=512, help="their size together (512)")
    parser.add_argument("--max_request_mb", type=int, default=64, help="size of one request (64)")
    parser.add_argument("--output_mb", type=int, default=16, help="output of one run (16)")
    parser.add_argument("--compile_time_s", type=float, default=30.0, help="time for a compiler (30)")
    parser.add_argument("--compile_memory_mb", type=int, default=1024, help="memory for a compiler (1024)")
    arguments = parser.parse_args(argv)
    for profile in arguments.profile:
        if not all(profile.partition("=")):
            parser.error(f"--profile={profile}: give NAME=ROOT, a directory with a root file system")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    unsafe = arguments.sandbox == "unsafe"
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s {f'{UNSAFE}: ' if unsafe else ''}%(message)s"
    )
    try:
        sandbox = LocalSandbox(
            workers=arguments.workers,
            profiles=dict(profile.split("=", 1) for profile in arguments.profile),
            mode=arguments.sandbox,
            max_waiting=arguments.max_waiting,
            max_waiting_mb=arguments.max_waiting_mb,
            output_mb=arguments.output_mb,
            compile_time_s=arguments.compile_time_s,
            compile_memory_mb=arguments.compile_memory_mb,
        )
    except (NoIsolation, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with sandbox:
        try:
            service = Service(
                sandbox, host=arguments.host, port=arguments.port, max_request_mb=arguments.max_request_mb
            )
        except OSError as error:
            print(f"error: cannot listen on {arguments.host}:{arguments.port}: {error}", file=sys.stderr)
            return 2
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        threading.Thread(target=service.serve, daemon=True).start()
        print(f"listening on http://{arguments.host}:{service.port}", flush=True)
        for name, profile in sandbox.health()["profiles"].items():
            logging.info("profile %s: %s; missing %s", name, " ".join(profile["languages"]), profile["missing"])
        stop.wait()
        service.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
