"""Comparing outputs, drivers and requests: everything that needs no sandbox."""

import json
import random

import pytest

from kimi_jax.rewards.sandbox import api, drivers, judge, languages
from kimi_jax.rewards.sandbox.api import JudgeRequest, RunRequest, Status, Test, TestVerdict


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "feedback"),
    [
        ("1 2\n3", "1 2 3\n", 0.0, ""),
        ("", "  \n", 0.0, ""),
        ("a  b", "a b", 0.0, ""),
        ("A b", "a b", 0.0, "token 1 is 'A', expected 'a'"),
        ("1 2", "1 2 3", 0.0, "2 tokens, expected 3"),
        ("1 2 3", "1 2", 0.0, "3 tokens or more, expected 2"),
        ("1.0", "1", 0.0, "token 1 is '1.0', expected '1'"),
        ("1.0", "1", 1e-9, ""),
        ("0.3333333", "0.33333334", 1e-6, ""),
        ("0.3332", "0.3333", 1e-6, "token 1 is '0.3332', expected '0.3333'"),
        ("1000000.4", "1000000", 1e-6, ""),
        ("1e-9", "0", 1e-6, ""),
        ("nan", "1", 1e-6, "token 1 is 'nan', expected '1'"),
        ("inf", "1e9", 1e-6, "token 1 is 'inf', expected '1e9'"),
        ("1_0", "10", 1e-6, "token 1 is '1_0', expected '10'"),
        ("x 1.0000001", "x 1", 1e-6, ""),
        ("y 1", "x 1", 1e-6, "token 1 is 'y', expected 'x'"),
        ("１", "1", 0.0, "token 1 is '１', expected '1'"),
    ],
)
def test_outputs_are_compared_token_by_token(output, expected, tolerance, feedback):
    assert judge.compare(output, expected, tolerance=tolerance) == feedback


def test_a_near_number_is_near_by_the_definition():
    rng = random.Random(7)
    for _ in range(997):
        want, error, tolerance = rng.uniform(-50, 50), rng.choice([0, 1e-7, 1e-5, 1e-3]), 1e-4
        got = want + error * rng.choice([-1, 1]) * max(1, abs(want))
        near = abs(got - want) <= tolerance * max(1, abs(got), abs(want))
        assert (judge.compare(repr(got), repr(want), tolerance=tolerance) == "") == near


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "equal"),
    [
        (1, 1.0, 0.0, True),
        (True, 1, 0.0, False),
        (0, False, 0.0, False),
        ([1, [2, "x"]], [1, [2, "x"]], 0.0, True),
        ([1, 2], [2, 1], 0.0, False),
        ([1], [1, 1], 0.0, False),
        ({"a": 1.00001}, {"a": 1}, 1e-3, True),
        ({"a": 1.00001}, {"a": 1}, 0.0, False),
        ("1", 1, 1e-3, False),
        (None, None, 0.0, True),
        (None, 0, 0.0, False),
        (float("nan"), float("nan"), 0.0, False),
        (10**30, 10**30 + 1, 0.0, False),
        (10**400, 1, 1e-3, False),
        (10**400, 10**400, 1e-3, True),
    ],
)
def test_values_are_compared_as_json(a, b, tolerance, equal):
    assert judge._equal(a, b, tolerance) is judge._equal(b, a, tolerance) is equal


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (RunRequest(language="python", code="", time_limit_s=0.0), "time_limit_s is 0.0; give a number from"),
        (RunRequest(language="python", code="", time_limit_s=float("nan")), "time_limit_s is nan"),
        (RunRequest(language="python", code="", time_limit_s="1"), "time_limit_s is '1'"),
        (RunRequest(language="python", code="", memory_limit_mb=1 << 20), "memory_limit_mb is 1048576; give"),
        (RunRequest(language="python", code=None), "code is None; give a str"),
        (RunRequest(language="python", code="", files={"../x": ""}), "relative paths without"),
        (RunRequest(language="python", code="", files={"/x": ""}), "relative paths without"),
        (RunRequest(language="python", code="", files={"x" * 300: ""}), "relative paths without"),
        (RunRequest(language="python", code="", files={"x": 1}), "is not a text"),
        (JudgeRequest(language="python", code="", tests=[]), "a list of 1 to 1000 tests"),
        (JudgeRequest(language="python", code="", tests=[Test(stdin="1")]), r"tests\[0\] has no expected output"),
        (JudgeRequest(language="python", code="", tests=[Test(expected=1)]), r"tests\[0\].expected is 1; give a str"),
        (JudgeRequest(language="python", code="", tests=[Test(expected="", arguments=[])]), "name the function"),
        (JudgeRequest(language="python", code="", tests=[Test(expected="")], function="f"), "no list of arguments"),
        (JudgeRequest(language="python", code="", tests=[Test()], checker={"code": ""}), "checker must be"),
    ],
)
def test_a_request_without_sense_is_refused(request_, complaint):
    with pytest.raises(ValueError, match=complaint):
        api.check(request_)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ([], "is not a JSON object"),
        ({"language": "python"}, "has no 'code'"),
        ({"language": "python", "code": "", "cod": ""}, "has 'cod'; known are language, code"),
    ],
)
def test_a_request_that_is_none_is_refused(data, complaint):
    for parse in (api.run_request, api.judge_request):
        with pytest.raises(ValueError, match=complaint):
            parse(data)
    with pytest.raises(ValueError, match=r"tests\[0\] has 'input'"):
        api.judge_request({"language": "python", "code": "", "tests": [{"input": ""}]})


def test_messages_survive_the_journey():
    request = JudgeRequest(language="go", code="é\0", tests=[Test(stdin="1", expected="2"), Test(arguments=[[None]])])
    assert api.judge_request(json.loads(api.to_json(request))) == request
    run = RunRequest(language="go", code="x", files={"a/b": "\udcff"})
    assert api.run_request(json.loads(api.to_json(run))) == run
    verdict = TestVerdict(status=Status.TIME_LIMIT, seconds=1.5, peak_memory_mb=2.5, feedback="slow")
    judgement = api.Judgement(outcome="wrong", verdicts=[verdict], feedback="slow")
    assert api.judgement(json.loads(api.to_json(judgement))) == judgement


def test_long_submissions_take_no_time():
    """Hours, if the price of finding the name of a class grew with the square of the length."""
    assert languages.LANGUAGES["java"].name_of("\n" * 1_000_003) == "Main"
    assert languages.LANGUAGES["java"].name_of("\n  public final class Twice {}") == "Twice"


def test_a_function_needs_a_name():
    with pytest.raises(ValueError, match="is not a name"):
        drivers.wrap("python", "", "f(); print")
