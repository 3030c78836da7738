"""The whole curation on planted problems: what is found, what is lost, what is asked again after an interruption."""

import dataclasses
import functools

import pytest

from kimi_jax import tasks
from kimi_jax.curation import report
from kimi_jax.curation.asking import Ledger
from kimi_jax.curation.prompts import REASONS, Rules, curate
from kimi_jax.types import Outcome, Problem, Verdict
from tests.curation.planted import SIZES, planted, scripted


@functools.cache
def known():
    return planted()


def judge(answers):
    return [tasks.verify(problem, text) for problem, text in answers]


def run(folder, problems=None, *, generate=None, judge=judge, rules=None, **changes):
    arguments = dict(
        tags={},
        verify=tasks.verify,
        samples=Ledger(folder / "samples.jsonl"),
        guesses=Ledger(folder / "guesses.jsonl"),
        source="scripted",
        instructed=True,
        rules=rules or Rules(),
        batch=61,
    )
    problems = known().problems if problems is None else problems
    generate = generate or scripted(known())
    return curate(problems, known().evaluation, generate=generate, judge=judge, **arguments | changes)


@pytest.fixture(scope="module")
def decisions(tmp_path_factory):
    return run(tmp_path_factory.mktemp("curation"))


def test_planted_problems_are_found_and_good_ones_kept(decisions):
    kinds = known().kind
    found = {kind: 0 for kind in SIZES}
    for decision in decisions:
        expected = "" if kinds[decision.id] == "good" else kinds[decision.id]
        found[kinds[decision.id]] += decision.reason == expected
    shares = {kind: n / SIZES[kind] for kind, n in found.items()}
    assert shares.pop("good") >= 0.98, shares
    assert min(shares.values()) >= 0.95, shares


def test_decisions_say_why(decisions):
    assert [decision.id for decision in decisions] == [problem.id for problem in known().problems]
    by_id = {decision.id: decision for decision in decisions}
    assert by_id["trivial 0"].detail == "10 of 10 answers are correct" and by_id["trivial 0"].difficulty == 0
    assert "guesses are correct, 'Answer:" in by_id["hackable 0"].detail
    assert by_id["leaked 3"].detail.startswith("of 'evaluation 3', similarity")
    for decision in decisions:
        if decision.reason:
            assert decision.reason in REASONS and decision.detail
        measured = decision.reason in ("", "trivial", "hackable")
        assert (decision.pass_rate is not None) == measured == (decision.tokens is not None)


def test_difficulty_is_the_share_of_wrong_answers(decisions):
    kept = [decision for decision in decisions if not decision.reason]
    errors = [decision.pass_rate - known().right[decision.id] for decision in kept]
    assert abs(sum(errors) / len(errors)) < 0.03  # 10 samples of some 300 problems
    assert all(decision.difficulty == round(10 - 10 * decision.pass_rate) for decision in kept)


def test_an_interrupted_curation_goes_on_and_comes_out_the_same(tmp_path, decisions):
    log = []
    answers = scripted(known(), log)

    def stops(*args, **kwargs):
        if len(log) == 3:
            raise KeyboardInterrupt
        return answers(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, generate=stops)
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"key": "torn')
    before, log[:] = {id_ for batch in log for id_ in batch}, []
    assert run(tmp_path, generate=answers) == decisions
    asked = [id_ for batch in log for id_ in batch]
    assert len(before) == 3 * 61 and asked[0] not in before
    log.clear()
    assert run(tmp_path, generate=answers) == decisions and not log  # all is known


def test_a_ledger_with_a_strange_line(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"key": "a", "answers": []}\n[]\n')
    with pytest.raises(ValueError, match="samples.jsonl, line 2 is none of ours"):
        Ledger(tmp_path / "samples.jsonl")


def test_the_order_of_problems_and_the_batch_do_not_matter(tmp_path, decisions):
    chosen = [p for p in known().problems if not p.id.startswith(("duplicate", "photograph"))][:97]
    bare = lambda decision: dataclasses.replace(decision, detail="")  # rarity of words is that among all problems  # noqa: E731
    expected = {decision.id: bare(decision) for decision in decisions}
    for decision in run(tmp_path, chosen[::-1], batch=7):
        assert bare(decision) == expected[decision.id]


def test_what_is_changed_is_asked_again(tmp_path):
    good = [problem for problem in known().problems if known().kind[problem.id] == "good"][:5]
    log = []
    run(tmp_path, good, generate=scripted(known(), log))
    changed = [dataclasses.replace(good[0], answer="5"), *good[1:]]
    for problems, changes, asked in (
        (changed, {}, {good[0].id}),
        (good, {"source": "another model"}, {p.id for p in good}),
        (good, {"rules": Rules(temperature=0.7)}, {p.id for p in good}),
        (good, {"rules": Rules(count=2, max_pass_rate=0.95)}, set()),
    ):
        log.clear()
        run(tmp_path, problems, generate=scripted(known(), log), **changes)
        assert {id_ for batch in log for id_ in batch} == asked


@pytest.mark.parametrize("broken", [lambda id_: True, lambda id_: id_ == "good 2"])
def test_a_judge_that_fails_is_an_error_and_no_reason_to_drop(tmp_path, broken):
    good = [problem for problem in known().problems if problem.id in ("good 1", "good 2", "good 3")]

    def fails(answers):
        failure = Verdict(Outcome.UNGRADABLE, "no connection")
        return [failure if broken(problem.id) else tasks.verify(problem, text) for problem, text in answers]

    with pytest.raises(ValueError, match="could grade no answer to . problems.*no connection.*run the same command"):
        run(tmp_path, good, judge=fails)
    kept = {line.split('"')[7] for line in (tmp_path / "samples.jsonl").read_text().splitlines()}
    assert kept == {problem.id for problem in good if not broken(problem.id)}
    assert len(run(tmp_path, good)) == 3


def test_single_ungradable_answers_are_left_out(tmp_path):
    problem = Problem("good 1", "exact", "Compute 12345+67890.", "80235")

    def fails_sometimes(answers):
        verdicts = judge(answers)
        return [Verdict(Outcome.UNGRADABLE, "late") if i % 3 == 0 else v for i, v in enumerate(verdicts)]

    whole, partly = (run(tmp_path / name, [problem], judge=j)[0] for name, j in (("a", judge), ("b", fails_sometimes)))
    assert whole.pass_rate in {n / 10 for n in range(11)} and partly.pass_rate in {n / 6 for n in range(7)}


def test_a_balanced_selection(tmp_path, decisions):
    rules = Rules(count=89)
    tags = {problem.id: ["easy" if problem.images else "hard"] for problem in known().problems}
    chosen = [d for d in run(tmp_path, rules=rules, tags=tags) if not d.reason]
    assert len(chosen) == 89
    domains = [decision.domain for decision in chosen]
    assert abs(domains.count("easy") - domains.count("hard")) <= 1
    unchosen = {d.id for d in decisions if not d.reason} - {d.id for d in chosen}
    assert unchosen and all(d.reason == "surplus" for d in run(tmp_path, rules=rules, tags=tags) if d.id in unchosen)


@pytest.mark.parametrize(
    "rules",
    [
        {"samples": 0},
        {"guesses": -1},
        {"temperature": 0.0},
        {"min_pass_rate": 0.8, "max_pass_rate": 0.4},
        {"similarity": 0.0},
        {"count": 0},
    ],
)
def test_rules_that_cannot_work(rules):
    with pytest.raises(ValueError, match=next(iter(rules))):
        Rules(**rules)


def test_the_report_adds_up(decisions):
    summary = report.summarize(known().problems, decisions, {"seed": 3})
    assert summary["problems"] == sum(SIZES.values()) == summary["kept"] + sum(summary["dropped"].values())
    assert sum(summary["pass_rate"]["kept"].values()) == summary["kept"] == sum(summary["domains"]["kept"].values())
    assert sum(n for row in summary["domain_by_difficulty"].values() for n in row.values()) == summary["kept"]
    assert summary["pass_rate"]["measured"]["1.0"] == summary["dropped"]["trivial"]
    assert all(1 <= len(examples) <= 3 for examples in summary["examples"].values())
    page = report.markdown(summary)
    assert f"{summary['kept']} of {sum(SIZES.values())} problems kept" in page and "| contaminated | 41 |" in page
