"""The oracle of most tests is the judge itself, called here; of the rest, the processes that the kernel lists."""

import contextlib
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kimi_jax.rewards import workers
from kimi_jax.rewards.pool import VerifierPool
from kimi_jax.types import Outcome, Problem, Verdict

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE))
from pool_judge import obey  # noqa: E402

DEADLINE = 1.0  # what no judgement takes on a busy machine, unless it was told to
MISSED = Verdict(Outcome.UNGRADABLE, "deadline of 1 s")
PROBLEM = Problem(id="p", task="t", prompt="p", answer="y")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(obey, workers=2, deadline_s=60.0) as pool:
        yield pool


@pytest.fixture(params=["here", "in workers"])
def either_pool(request, pool):
    if request.param == "in workers":
        yield pool
    else:
        with VerifierPool(obey, workers=0, deadline_s=60.0) as here:
            yield here


def judged(pool, texts):
    return pool.verdicts([pool.submit(PROBLEM, text) for text in texts])


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(holds) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("not even after ten seconds")


def wait_until_dead(pids) -> None:
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def children(pid: int) -> list[int]:
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_many_verdicts_come_in_the_order_of_the_tickets(either_pool):
    problems = [Problem(id=str(i), task="t", prompt="p", answer=str(i)) for i in range(13)]
    jobs = [(problems[i % 13], f"echo {i}") for i in range(1009)]
    tickets = [either_pool.submit(*job) for job in jobs]
    assert either_pool.verdicts(tickets[::-1]) == [obey(*job) for job in jobs[::-1]]


def test_slow_responses_do_not_change_the_order(pool):
    texts = ["sleep 0.07", "echo a", "sleep 0.01", "echo b", "echo c"]
    assert judged(pool, texts) == [obey(PROBLEM, text) for text in texts]


def test_huge_and_odd_texts_arrive(pool):
    texts = [f"echo {letter * 1_000_003}" for letter in ("a", "\udcff", "\0", "中")]
    assert judged(pool, texts) == [obey(PROBLEM, text) for text in texts]


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("raise of bad taste", "ValueError: of bad taste"),
        ("leave early", "SystemExit: early"),
        ("return 1", "TypeError: the judge returned '1', not a Verdict"),
    ],
)
def test_a_judge_that_raises_cannot_grade(either_pool, text, detail):
    before, verdict, after = judged(either_pool, ["echo a", text, "echo b"])
    assert verdict == Verdict(Outcome.UNGRADABLE, detail)
    assert (before, after) == (obey(PROBLEM, "echo a"), obey(PROBLEM, "echo b"))
    assert (either_pool.missed_deadlines, either_pool.crashes) == (0, 0)


def test_images_stay_at_home(either_pool):
    problem = Problem(id="p", task="t", prompt="p", answer="y", images=(np.zeros((5, 7, 3), np.uint8),))
    assert either_pool.submit(problem, "images").result().detail == "0 images"


def test_a_worker_has_no_jax_and_no_accelerator(pool):
    assert judged(pool, ["surroundings"])[0].detail == "jax imported: False, devices: ''"


# --- workers that are lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["loop", "backtrack", "sleep 60"])
def test_a_missed_deadline_costs_one_verdict(text):
    texts = ["echo a"] * 41
    texts[17] = texts[18] = text  # in one message, or at the same time
    with VerifierPool(obey, workers=2, deadline_s=DEADLINE) as pool:
        verdicts = judged(pool, texts)
        assert (pool.missed_deadlines, pool.crashes) == (2, 0)
    right = obey(PROBLEM, "echo a")
    assert verdicts == [MISSED if i in (17, 18) else right for i in range(41)]


@pytest.mark.parametrize(("text", "how"), [("exit 3", "exited with status 3"), ("kill 9", "died of SIGKILL")])
def test_a_crash_costs_one_verdict(text, how):
    texts = ["echo a"] * 41
    texts[0] = texts[23] = text
    with VerifierPool(obey, workers=2, deadline_s=60.0) as pool:
        verdicts = judged(pool, texts)
        assert (pool.missed_deadlines, pool.crashes) == (0, 2)
    lost, right = Verdict(Outcome.UNGRADABLE, f"the judging process {how}"), obey(PROBLEM, "echo a")
    assert verdicts == [lost if i in (0, 23) else right for i in range(41)]


def test_only_the_time_of_the_judgement_counts():
    """Neither that in the queue, nor that of others in the same message, nor that without work."""
    with VerifierPool(obey, workers=1, deadline_s=DEADLINE) as pool:
        assert judged(pool, ["sleep 0.05"] * 29) == [obey(PROBLEM, "sleep 0.05")] * 29
        time.sleep(1.1 * DEADLINE)
        assert judged(pool, ["echo a"]) == [obey(PROBLEM, "echo a")]
        assert (pool.missed_deadlines, pool.crashes) == (0, 0)


@on_linux
def test_what_the_judge_started_goes_with_it(tmp_path):
    with VerifierPool(obey, workers=1, deadline_s=DEADLINE) as pool:
        assert judged(pool, [f"child {tmp_path / 'pid'}"]) == [MISSED]
    wait_until_dead([int((tmp_path / "pid").read_text())])


def test_those_that_hang_take_no_time_from_the_others(tmp_path):
    """With a deadline that never comes and two workers, eleven hang; the others are judged all the same."""
    with VerifierPool(obey, workers=2, deadline_s=60.0) as pool:
        judged(pool, ["echo a"] * 101)  # so that it knows what is usual
        hung = [pool.submit(PROBLEM, f"await {tmp_path / 'go'}") for _ in range(11)]
        assert judged(pool, ["echo a"] * 41) == [obey(PROBLEM, "echo a")] * 41
        those = {judged(pool, ["origin"])[0].detail for _ in range(41)}  # one after the other
        assert len(those) <= 2 and not any(ticket.done() for ticket in hung)
        (tmp_path / "go").touch()
        assert {verdict.detail for verdict in pool.verdicts(hung)} == {"it came"}
        assert (pool.missed_deadlines, pool.crashes) == (0, 0)


@on_linux
def test_there_are_only_so_many_spares_and_they_go_when_they_are_not_needed(tmp_path):
    with VerifierPool(obey, workers=1, deadline_s=60.0) as pool:
        judged(pool, ["echo a"] * 101)
        template = int(judged(pool, ["origin"])[0].detail.split()[-1])
        tickets = [pool.submit(PROBLEM, f"await {tmp_path / 'go'}") for _ in range(30)]
        wait_until(lambda: len(children(template)) == 9)
        time.sleep(0.2)
        assert len(children(template)) == 9 and not any(ticket.done() for ticket in tickets)
        (tmp_path / "go").touch()
        pool.verdicts(tickets)
        wait_until(lambda: len(children(template)) == 1)


def test_slow_is_what_takes_much_longer_than_usual():
    """Where all judgements take long, none of them is stood in for: the processor is not given to more of them."""
    with VerifierPool(obey, workers=2, deadline_s=60.0) as pool:
        judged(pool, ["sleep 0.06"] * 5)
        verdicts = judged(pool, ["origin"] * 3 + ["sleep 0.09", "sleep 0.12", "origin"] * 7)
        assert len({v.detail for v in verdicts if "imported" in v.detail}) <= 2


def test_a_new_worker_is_a_copy_and_imports_nothing():
    with VerifierPool(obey, workers=2, deadline_s=60.0) as pool:
        texts = ["origin", "exit 3", "kill 11"] * 7 + ["origin"]
        origins = [verdict.detail.split()[1::2] for verdict in judged(pool, texts) if "imported" in verdict.detail]
        assert pool.crashes == 14
    imported, _, parents = zip(*[[word.strip(",") for word in words] for words in origins], strict=True)
    assert len(origins) == 8 and len({*imported, *parents}) == 1


def test_when_the_template_is_lost_there_is_another():
    with VerifierPool(obey, workers=1, deadline_s=60.0) as pool:
        before, lost, after = judged(pool, ["origin", "orphan", "origin"])
        assert lost.outcome == Outcome.UNGRADABLE and pool.crashes == 1
    assert before.outcome == after.outcome == Outcome.CORRECT
    assert before.detail.split()[-1] != after.detail.split()[-1]


@on_linux
def test_a_worker_that_stops_does_not_stop_the_pool(monkeypatch):
    monkeypatch.setattr(workers, "_STUCK_S", 0.2)
    with VerifierPool(obey, workers=1, deadline_s=DEADLINE) as pool:
        pid = int(judged(pool, ["stop soon"])[0].detail)
        wait_until(lambda: pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        text = "echo " + "a" * 10_000_019  # more than fits into the connection
        assert judged(pool, [text, "echo b"]) == [MISSED, obey(PROBLEM, "echo b")]
        assert (pool.missed_deadlines, pool.crashes) == (1, 0)


@on_linux
def test_a_template_that_stops_is_replaced(monkeypatch):
    monkeypatch.setattr(workers, "_LOST_S", 0.2)
    with VerifierPool(obey, workers=1, deadline_s=60.0) as pool:
        template = int(judged(pool, ["origin"])[0].detail.split()[-1])
        os.kill(template, signal.SIGSTOP)
        lost, after = judged(pool, ["exit 3", "origin"])  # it should bury one and make another
        assert lost.outcome == Outcome.UNGRADABLE and after.outcome == Outcome.CORRECT
    assert not is_alive(template)


# --- the end ----------------------------------------------------------------------------------------------------------


@on_linux
def test_closing_waits_for_nobody():
    with VerifierPool(obey, workers=2, deadline_s=60.0) as pool:
        pid = int(judged(pool, ["pid"])[0].detail.removeprefix("pid "))
        tickets = [pool.submit(PROBLEM, text) for text in ("loop", "sleep 60", "echo a", "echo b")]
    assert not is_alive(pid)
    for ticket in tickets:
        with pytest.raises(RuntimeError, match="closed; submit and collect within"):
            pool.verdicts([ticket])
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(PROBLEM, "echo a")
    pool.close()  # once more does no harm


PROGRAM = """
import signal, sys, time
from pool_judge import obey
from kimi_jax.rewards.pool import VerifierPool
from kimi_jax.types import Problem

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
pool = VerifierPool(obey, workers=2, deadline_s=60.0)
problem = Problem(id="p", task="t", prompt="p", answer="y")
pids = set()
while len(pids) < 2:
    pids |= {v.detail.split()[1] for v in pool.verdicts([pool.submit(problem, "pid") for _ in range(8)])}
tickets = [pool.submit(problem, sys.argv[1])]
print(*pids, flush=True)
if sys.argv[2] == "with":
    with pool:
        pool.verdicts(tickets)
elif sys.argv[2] == "wait":
    pool.verdicts(tickets)
"""


@on_linux
@pytest.mark.parametrize(
    ("text", "form", "sent"),
    [
        ("backtrack", "with", signal.SIGINT),
        ("loop", "wait", signal.SIGINT),
        ("backtrack", "wait", signal.SIGKILL),
        ("loop", "wait", signal.SIGTERM),
        ("sleep 60", "leave", None),  # the end of the program, without closing the pool
    ],
)
def test_no_worker_outlives_its_program(text, form, sent):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    command = [sys.executable, "-c", PROGRAM, text, form]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 2
        if sent:
            time.sleep(0.1)  # so that the judge has begun
            assert all(is_alive(pid) for pid in pids)
            program.send_signal(sent)
        assert (program.wait(timeout=10) == 0) == (sent is None)
    wait_until_dead(pids)


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"workers": -1, "deadline_s": 1.0}, "workers is -1; give"),
        ({"workers": 2, "deadline_s": 0.0}, "deadline_s is 0.0; give"),
        ({"workers": 2, "deadline_s": float("inf")}, "deadline_s is inf; give"),
        ({"workers": 2, "deadline_s": float("nan")}, "deadline_s is nan; give"),
    ],
)
def test_a_number_out_of_range_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        VerifierPool(obey, **arguments)


def test_a_judge_without_a_module_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="define it at the top level of a module"):
        VerifierPool(lambda problem, text: Verdict(Outcome.CORRECT), workers=1, deadline_s=1.0)
    monkeypatch.setattr(sys.modules["__main__"], "mine", obey_in_main, raising=False)
    with pytest.raises(ValueError, match="from the running script or notebook"):
        VerifierPool(obey_in_main, workers=1, deadline_s=1.0)


def obey_in_main(problem, text):
    return obey(problem, text)


obey_in_main.__module__, obey_in_main.__qualname__ = "__main__", "mine"


def test_a_machine_that_starts_no_process_is_reported(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no memory left")

    monkeypatch.setattr(workers.subprocess, "Popen", refuse)
    with VerifierPool(obey, workers=1, deadline_s=1.0) as pool, pytest.raises(RuntimeError, match="no memory left"):
        judged(pool, ["echo a"])


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("raise ImportError('no such luck')", "cannot import the judge: ImportError: no such luck"),
        ("os._exit(7)", "3 workers in a row did not start; the last one exited with status 7"),
    ],
)
def test_a_judge_that_only_this_process_can_import_is_reported(body, complaint, tmp_path, monkeypatch):
    name = f"stay_at_home_{len(body)}"
    (tmp_path / f"{name}.py").write_text(f"import os\nif os.getpid() != {os.getpid()}: {body}\ndef judge(p, t): ...")
    monkeypatch.syspath_prepend(tmp_path)
    judge = importlib.import_module(name).judge
    with VerifierPool(judge, workers=1, deadline_s=1.0) as pool:
        with pytest.raises(RuntimeError, match=complaint):
            judged(pool, ["echo a"])
        with pytest.raises(RuntimeError, match=complaint):
            pool.submit(PROBLEM, "echo a")
