"""The rules of admission at their borders, votes against a count by hand, and generators in a real sandbox."""

import collections
import json
import random

import pytest

from kimi_jax.curation import code_problems, generators, test_cases
from kimi_jax.curation.code_problems import CodeProblem, Submission
from kimi_jax.curation.generators import SandboxFailed
from kimi_jax.curation.test_cases import Case, Rules
from kimi_jax.rewards import code as code_reward
from kimi_jax.rewards.sandbox.isolation import NoIsolation
from kimi_jax.rewards.sandbox.pool import LocalSandbox
from kimi_jax.tasks.base import problem_from_record
from tests.curation.table_sandbox import TableSandbox

LANGUAGES = ("cpp", "python")


def votes(agreeing, of=10):
    return (True,) * agreeing + (False,) * (of - agreeing)


def cases(number, agreeing=10):
    return [Case(str(i), str(i), votes(agreeing)) for i in range(number)]


def submission(table, language="python", name=""):
    return Submission(language, json.dumps(table | {name: name} if name else table))


def problem(submissions, **options):
    return CodeProblem(
        **{"id": "p", "statement": "s", "time_limit_s": 2.0, "memory_limit_mb": 256} | options,
        submissions=tuple(submissions),
    )


def same_submissions(table, right=10, wrong=0):
    """Ten with different code, all but some of which give these outputs; the wrong ones each have an input of their own
    on which they fail."""
    failing = list(table)
    right_ones = [submission(table, name=f"right {i}") for i in range(right)]
    wrong_ones = [submission(table | {failing[i]: "other"}, name=f"wrong {i}") for i in range(wrong)]
    return right_ones + wrong_ones


# --- the rules


@pytest.mark.parametrize(("agreeing", "valid"), [(0, False), (6, False), (7, True), (10, True)])
def test_seven_of_ten_make_a_case(agreeing, valid):
    assert test_cases.valid_case(votes(agreeing), Rules()) is valid


@pytest.mark.parametrize(("number", "reason"), [(0, "few_cases"), (39, "few_cases"), (40, ""), (50, "")])
def test_forty_cases_are_needed(number, reason):
    assert test_cases.reason_to_drop(cases(number), Rules()) == reason


@pytest.mark.parametrize(("passing", "reason"), [(7, "few_passes"), (8, "few_passes"), (9, ""), (10, "")])
def test_nine_of_ten_must_pass_all_cases(passing, reason):
    assert test_cases.reason_to_drop(cases(43, agreeing=passing), Rules()) == reason


def test_those_who_pass_pass_every_case():
    """Ten times nine of ten agree, but each time another one does not: nobody passes."""
    found = [Case(str(i), str(i), tuple(j != i % 10 for j in range(10))) for i in range(41)]
    assert test_cases.passing(found) == 0 and test_cases.reason_to_drop(found, Rules()) == "few_passes"
    assert test_cases.passing([]) == 0


def test_one_output_for_all_is_no_test():
    found = [Case(str(i), "YES\n" if i % 2 else "YES", votes(10)) for i in range(40)]
    assert test_cases.reason_to_drop(found, Rules()) == "one_output"


@pytest.mark.parametrize(
    "wrong", [{"min_cases": 51}, {"min_cases": 0}, {"agree": 5}, {"agree": 11}, {"passes": 11}, {"passes": 0}]
)
def test_rules_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rules(**wrong)


def test_the_choice_of_submissions():
    many = [Submission("python", str(i % 20)) for i in range(40)] + [Submission("rust", "fn main() {}")]
    chosen = test_cases.choose(problem(many), languages=LANGUAGES, number=10, seed=3)
    assert len(set(chosen)) == 10 and {s.language for s in chosen} == {"python"}
    assert chosen == test_cases.choose(problem(many), languages=LANGUAGES, number=10, seed=3)
    assert chosen != test_cases.choose(problem(many), languages=LANGUAGES, number=10, seed=4)
    assert len(test_cases.choose(problem(many), languages=LANGUAGES, number=30, seed=3)) == 20


# --- votes


@pytest.mark.parametrize("seed", range(30))
def test_votes_are_those_counted_by_hand(seed):
    rng = random.Random(seed)
    rules = Rules(cases=13, min_cases=1, submissions=7, agree=rng.choice([4, 5, 6, 7]), passes=1)
    inputs = [f"input {i}" for i in range(13)]
    choices = ["right"] * rng.randint(1, 12) + ["wrong", "wrong ", "<time_limit>", "<runtime_error>", ""]
    table = [[rng.choice(choices) for _ in inputs] for _ in range(7)]
    if seed % 3 == 0:
        table[seed % 7] = ["<compile_error>"] * 13
    tables = [dict(zip(inputs, row, strict=True)) for row in table]
    submissions = [submission(outputs, rng.choice(LANGUAGES), str(i)) for i, outputs in enumerate(tables)]
    sandbox = TableSandbox()
    found, _ = test_cases.vote(problem(submissions), inputs, submissions, sandbox=sandbox, rules=rules)

    expected = {}
    for i, text in enumerate(inputs):
        outputs = [row[i].strip() for row in table]
        output, number = collections.Counter(outputs).most_common(1)[0]
        if number >= rules.agree and output and not output.startswith("<"):
            expected[text] = (output, tuple(other == output for other in outputs))
    assert {case.stdin: (case.expected.strip(), case.agreeing) for case in found} == expected
    assert [case.stdin for case in found] == [text for text in inputs if text in expected]


def test_each_submission_runs_once_per_input_if_all_agree():
    inputs = [f"input {i}" for i in range(17)]
    submissions = same_submissions({text: text for text in inputs})
    sandbox = TableSandbox()
    found, runs = test_cases.vote(problem(submissions), inputs, submissions, sandbox=sandbox, rules=Rules())
    assert len(found) == 17 and runs == {"ok": 170} and collections.Counter(sandbox.runs) == dict.fromkeys(inputs, 10)
    assert sandbox.requests == 17 + 9


def test_outputs_have_a_limit():
    submissions = same_submissions({"short": "x" * 100, "long": "x" * 101})
    found, runs = test_cases.vote(
        problem(submissions), ["short", "long"], submissions, sandbox=TableSandbox(), rules=Rules(max_output_bytes=100)
    )
    assert [case.stdin for case in found] == ["short"] and runs["long_output"] == 4


@pytest.mark.parametrize("who", [0, 5])
def test_a_broken_sandbox_is_no_vote(who):
    submissions = same_submissions({"a": "b"})
    submissions[who] = submission({"a": "<sandbox_error>"})
    with pytest.raises(SandboxFailed):
        test_cases.vote(problem(submissions), ["a"], submissions, sandbox=TableSandbox(), rules=Rules())


# --- a whole problem


@pytest.fixture
def without_cyaron(monkeypatch):
    monkeypatch.setattr(generators, "library", dict)


def decide(submissions, inputs, **options):
    candidate = problem(submissions, **{"generator": json.dumps(inputs)} | options)
    return test_cases.make_tests(candidate, sandbox=TableSandbox(), languages=LANGUAGES, rules=Rules(), seed=0)


@pytest.mark.parametrize(
    ("right", "wrong", "reason", "valid"),
    [(10, 0, "", 50), (9, 1, "", 50), (8, 2, "few_passes", 50), (9, 0, "few_submissions", 0)],
)
def test_a_problem_is_admitted_or_dropped(without_cyaron, right, wrong, reason, valid):
    table = {f"{i} 5\n": f"{i * 5}\n" for i in range(50)}
    decision = decide(same_submissions(table, right, wrong), list(table))
    assert (decision.reason, decision.valid_cases, decision.record is None) == (reason, valid, reason != "")


def test_the_record_is_a_problem_of_the_task_code(without_cyaron):
    table = {f"{i} 5\n": f"{i * 5}\n" for i in range(50)}
    options = {"time_limit_s": 3.0, "memory_limit_mb": 64, "language": "cpp", "tolerance": 0.25}
    decision = decide(same_submissions(table), list(table), **options)
    admitted = problem_from_record(decision.record)
    request = code_reward.ground_truth(admitted.answer)
    assert (admitted.id, admitted.task, admitted.prompt) == ("p", "code", "s")
    assert [(test.stdin, test.expected) for test in request.tests] == list(table.items())
    assert {name: getattr(request, name) for name in options} == options


def test_other_reasons(without_cyaron):
    table = {f"{i}\n": f"{i}\n" for i in range(50)}
    assert decide(same_submissions(table), [], special_judge=True).reason == "special_judge"
    assert decide(same_submissions(table), [], generator="").reason == "no_generator"
    few = decide(same_submissions(table), list(table)[:39] + ["0\n"] * 6 + [" \n"] * 5)
    assert (few.reason, few.inputs) == ("few_inputs", {"ok": 39, "duplicate": 6, "empty": 5})
    split = same_submissions(table | {f"{i}\n": "<time_limit>" for i in range(11)})[:4] + same_submissions(table)[4:]
    assert (decide(split, list(table)).reason, decide(split, list(table)).valid_cases) == ("few_cases", 39)
    assert decide(same_submissions(dict.fromkeys(table, "NO")), list(table)).reason == "one_output"


def test_controls(without_cyaron):
    table = {f"{i}\n": f"{i}\n" for i in range(50)}
    candidate = problem(same_submissions(table), generator=json.dumps(list(table)))
    controls = [
        code_problems.Control(submission(table), True),
        code_problems.Control(submission(table | {"49\n": "50"}), False),
        code_problems.Control(submission(table | {"7\n": "<time_limit>"}), False),
    ]
    sandbox = TableSandbox()
    decision = test_cases.make_tests(candidate, sandbox=sandbox, languages=LANGUAGES, rules=Rules(), seed=0)
    passes = test_cases.check_controls(candidate, controls, decision.record, sandbox=sandbox)
    assert passes == [True, False, False]


# --- records


def record(**changes):
    return {"id": "a", "statement": "s", "submissions": [{"language": "python", "code": "print()"}]} | changes


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: a record must be an object"),
        (record(tests=[]), "unknown field 'tests'"),
        ({"id": "a", "statement": "s"}, "field 'submissions' is missing"),
        (record(statement=" "), "field 'statement' is empty"),
        (record(id=7), "field 'id' must be of type str"),
        (record(special_judge=1), "field 'special_judge' must be of type bool"),
        (record(time_limit_s=True), "field 'time_limit_s' must be of type float"),
        (record(time_limit_s=1000), "time_limit_s is 1000; give a number from"),
        (record(tolerance=-1), "tolerance is -1"),
        (record(language="cobol"), "language is 'cobol'"),
        (record(submissions=["print()"]), r"submissions\[0\] must be an object"),
        (record(submissions=[{"language": "pascal", "code": "x"}]), r"submissions\[0\]: language is 'pascal'"),
        (record(submissions=[{"language": "python", "code": ""}]), r"submissions\[0\]: field 'code' is empty"),
        (record(controls=[{"language": "python", "code": "x"}]), r"controls\[0\]: field 'right' is missing"),
        (record(id="first"), "an earlier line has this id"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, line, complaint):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(record(id="first")) + "\n" + (line if isinstance(line, str) else json.dumps(line)))
    with pytest.raises(ValueError, match=complaint):
        code_problems.read(path, time_limit_s=2.0, memory_limit_mb=256)


def test_a_record_has_defaults(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(record()) + "\n\n" + json.dumps(record(id="b", time_limit_s=1, controls=[])))
    first, second = code_problems.read(path, time_limit_s=2.5, memory_limit_mb=300)
    assert (first.time_limit_s, first.memory_limit_mb, second.time_limit_s) == (2.5, 300, 1)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no records"):
        code_problems.read(path, time_limit_s=2.5, memory_limit_mb=300)


# --- generators


def test_the_code_of_a_response():
    first, last = "def generate(io, index):\n    pass\n", "import x\ndef generate(io, index):\n    io\n"
    text = f"So:\n```python\n{first}```\nor better\n```\n{last}```\nUse it:\n```python\ngenerate(io, 1)\n```\n"
    assert generators.extract_code(text) == last
    assert generators.extract_code(first) == generators.extract_code("```python\nprint(1)\n```") == ""
    assert generators.extract_code(f"```python\n{first}") == ""  # cut off


@pytest.fixture(scope="module")
def sandbox():
    pytest.importorskip("cyaron")
    try:
        with LocalSandbox(workers=2) as sandbox:
            yield sandbox
    except NoIsolation as error:
        pytest.skip(str(error))


def generate(sandbox, code, number=6, needed=1, **changes):
    options = {"max_bytes": 1000, "time_limit_s": 0.7, "memory_limit_mb": 128} | changes
    return generators.generate_inputs(code, sandbox=sandbox, cases=number, needed=needed, **options)


def test_inputs_are_written_with_cyaron_and_depend_on_the_index_alone(sandbox):
    code = """\
from cyaron import *
def generate(io, index):
    io.input_writeln(index, String.random_regular("[a-z]{9}"), Vector.random(3, [(1, 10**9)]), randint(1, 10**9))
"""
    inputs, counts, failure = generate(sandbox, code)
    assert counts == {"ok": 6} and failure == "" and len(set(inputs)) == 6
    assert inputs[3].split()[0] == "4" and len(inputs[3].split()) == 6 and inputs[3].endswith("\n")
    skipping = code.replace("    io.", "    if index < 4: return\n    io.")
    assert generate(sandbox, skipping)[0] == inputs[3:]


def test_what_goes_wrong_is_counted_and_does_not_spoil_the_rest(sandbox):
    code = """\
import os, sys
def generate(io, index):
    if index == 2: os._exit(0)
    if index == 3: raise KeyError("three")
    if index == 5: sys.exit(1)
    if index == 6:
        while True: pass
    if index == 7: return
    if index == 8: io.input_write("x" * 1001)
    if index == 9: x = [0] * 10**9
    if index == 10: print("unheard", flush=True)
    io.input_writeln("twice" if index in (4, 11) else index)
"""
    inputs, counts, failure = generate(sandbox, code, number=12)
    assert inputs == ["1\n", "twice\n", "10\n", "12\n"]
    expected = {"ok": 4, "duplicate": 1, "runtime_error": 1, "exception": 3, "time_limit": 1, "empty": 1, "too_long": 1}
    assert counts == expected and failure.startswith("input 2: runtime_error")


def test_a_generator_that_cannot_succeed_is_given_up(sandbox):
    inputs, counts, failure = generate(sandbox, "def generate(io, index: return", number=50, needed=48)
    assert inputs == [] and counts == {"runtime_error": 3} and "SyntaxError" in failure


def test_a_generator_that_writes_in_place_of_its_runner_gains_nothing(sandbox):
    code = """\
import os
os.write(1, b'{"error": "ok"}\\n[1]\\n')
def generate(io, index): io.input_writeln(index)
"""
    inputs, counts, _ = generate(sandbox, code)
    assert inputs == [] and counts == {"runtime_error": 6}


def test_what_the_prompt_says_of_cyaron_is_so(sandbox):
    prompt = generators.generator_prompt("Add {a} and {b}.", cases=50, max_bytes=64_000)
    assert "Add {a} and {b}." in prompt and "64 kB" in prompt and generators.extract_code(prompt) in prompt
    inputs, counts, failure = generate(sandbox, generators.extract_code(prompt), 50, max_bytes=256_000, time_limit_s=9)
    assert counts["ok"] >= 45 and set(counts) <= {"ok", "duplicate"}, failure
    code = """\
from cyaron import *
def generate(io, index):
    n, m = 5, 7
    trees = [Graph.tree(n), Graph.chain(n), Graph.flower(n), Graph.binary_tree(n)]
    weighted = Graph.graph(n, m, directed=False, self_loop=False, repeated_edges=False, weight_limit=(1, 9))
    simple = {"repeated_edges": False}
    graphs = [*trees, Graph.UDAG(n, m, self_loop=False, **simple), Graph.DAG(n, m, **simple), weighted]
    for graph in graphs:
        for line in graph.to_str(output=Edge.unweighted_edge).split("\\n"):
            u, v = map(int, line.split())
            assert 1 <= u <= n and 1 <= v <= n and u != v
        assert len({frozenset(line.split()[:2]) for line in graph.to_str().split("\\n")}) == graph.edge_count()
    assert [graph.to_str().count("\\n") for graph in graphs] == [3, 3, 3, 3, 6, 6, 6]
    assert all(1 <= int(line.split()[2]) <= 9 for line in weighted.to_str(shuffle=True).split("\\n"))
    assert len({tuple(v) for v in Vector.random(9, [(1, 3), (1, 3)], 0)}) == 9
    assert all(-2 <= v[0] <= 2 and isinstance(v[0], kind) for mode, kind in ((1, int), (2, float))
               for v in Vector.random(9, [(-2, 2)], mode))
    assert len(String.random(7, charset="abc")) == 7 and String.random_sentence(4).count(" ") == 3
    assert 3 <= len(String.random_regular("[a-c]{3,9}")) <= 9
    assert Sequence(lambda i, f: 2 * f(i - 1), {0: 1}).get(1, 3) == [2, 4, 8]
    points = Polygon.convex_hull(9, fx=lambda x: int(1000 * x), fy=lambda y: int(1000 * y)).points
    assert len(points) == 9 and all(0 <= z <= 1000 and isinstance(z, int) for point in points for z in point)
    io.input_writeln(randint(1, 3), uniform(1, 2), choice([1]), points, trees[0])
"""
    inputs, counts, failure = generate(sandbox, code)
    assert counts == {"ok": 6}, failure
