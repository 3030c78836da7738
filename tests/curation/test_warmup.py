"""Which answers become examples to learn from, and what is kept about where they come from."""

import pytest

from kimi_jax import tasks
from kimi_jax.curation import warmup
from kimi_jax.curation.asking import Answer, Judged, Ledger
from kimi_jax.curation.warmup import Candidate, acceptable, choose, examples, marks, merit
from kimi_jax.tasks.base import problem_from_record
from kimi_jax.types import Problem, StopReason


def candidate(text="", tokens=5, outcome="correct", stop="end", detail="7", template="all", serial=3):
    return Candidate(template, Judged(serial, outcome, detail, tokens, stop, text))


def test_marks_are_counted():
    text = (
        "First, I make a plan. Let me check: does it make sense? Wait, that is wrong. Alternatively, try another way."
    )
    assert marks(text) == {"planning": 2, "evaluation": 2, "reflection": 2, "exploration": 2}
    assert not any(marks("3+4=7;7-2=5;Answer:5").values())
    assert marks("首先列出思路。检查一下。不对，重新算。换一种方法。") == {
        "planning": 2,
        "evaluation": 1,
        "reflection": 2,
        "exploration": 1,
    }


def test_each_template_asks_for_what_it_is_called():
    assert set(warmup.BEHAVIOURS) < set(warmup.TEMPLATES)
    for name, template in warmup.TEMPLATES.items():
        assert template.count("{question}") == 1 and (name == "plain" or "Answer:" in template)


def test_wrong_cut_and_equal_answers_go():
    good = candidate("a", serial=1)
    bad = [candidate("b", outcome="wrong"), candidate("c", outcome="ungradable"), candidate("d", stop="length")]
    assert acceptable([*bad, good, candidate("a", serial=2), candidate("e", stop="repetition")]) == [good]


def test_choices():
    texts = ["Answer: 7", "Wait. Let me check. Answer: 7", "Wait. Answer: 7", "A plan: try another way. Answer: 7"]
    found = [candidate(text, tokens=n) for text, n in zip(texts, (3, 11, 7, 13), strict=True)]
    assert choose(found, 2, "behaviours") == [found[3], found[1]]
    assert choose(found, 2, "shortest") == [found[0], found[2]]
    assert choose(found, 2, "lengths") == [found[0], found[3]]
    assert choose(found, 3, "lengths") == [found[0], found[1], found[3]]
    assert len(choose(found, 1, "lengths")) == 1 and len(choose(found, 5, "lengths")) == 4
    judged = [candidate(detail=d, tokens=n) for d, n in (("score 0.31", 5), ("score 2.50", 7), ("score 2.50", 3))]
    assert choose(judged, 2, "merit") == [judged[2], judged[1]]
    assert [merit(candidate(detail=d).answer) for d in ("3 of 4 votes for correct, 1 for wrong", "7")] == [0.75, 0.0]
    assert merit(candidate(detail="score -1.25").answer) == -1.25


PROBLEMS = [Problem(f"p{i}", "exact", f"Compute {i}+{{x}}.", str(i), difficulty=i) for i in (5, 3, 7)]


def scripted(asked):
    def generate(problems, serials, *, temperature, prefix, budget):
        asked.extend(problem.prompt for problem in problems)
        text = lambda p, n: f"try {n}. Answer: {p.answer if n % 3 else 'no'}"  # noqa: E731
        return [[Answer(text(p, n), n % 97, StopReason.END) for n in s] for p, s in zip(problems, serials, strict=True)]

    return generate


def collect(folder, asked, **changes):
    arguments = dict(templates=("planning", "plain"), samples=5, seed=0, source="m", temperature=1.0, batch=2)
    judge = lambda answers: [tasks.verify(problem, text) for problem, text in answers]  # noqa: E731
    ledger = Ledger(folder / "samples.jsonl")
    return warmup.collect(PROBLEMS, generate=scripted(asked), judge=judge, ledger=ledger, **arguments | changes)


def test_answers_are_collected_once(tmp_path):
    asked = []
    found = collect(tmp_path, asked)
    assert len(asked) == 6 and asked[0].startswith("Compute 5+{x}.\n\nThink aloud") and asked[1] == "Compute 5+{x}."
    for problem, own in zip(PROBLEMS, found, strict=True):
        assert [c.template for c in own] == ["planning"] * 5 + ["plain"] * 5
        assert len({c.answer.serial for c in own}) == 10
        assert all((c.answer.outcome == "correct") == c.answer.text.endswith(problem.answer) for c in own)
    assert collect(tmp_path, asked) == found and len(asked) == 6
    assert collect(tmp_path, asked, seed=1) != found and len(asked) == 12


def test_examples_can_be_read_as_problems_and_name_their_origin(tmp_path):
    for problem, candidates in zip(PROBLEMS, collect(tmp_path, []), strict=True):
        chosen = choose(acceptable(candidates), 3, "lengths")
        for number, (record, provenance) in enumerate(examples(problem, chosen, origin={"model": "m"}), start=1):
            read = problem_from_record(record)
            assert (read.prompt, read.answer, read.difficulty) == (problem.prompt, problem.answer, problem.difficulty)
            assert tasks.verify(problem, read.solution).outcome == "correct"
            answer = chosen[number - 1].answer
            assert record["id"] == provenance["id"] == f"{problem.id}#{number}" and provenance["model"] == "m"
            assert (provenance["serial"], provenance["tokens"]) == (answer.serial, answer.tokens)
            assert provenance["template"] in ("plain", "planning") and provenance["verdict"] == "correct"


def test_a_judge_that_fails_stops_it(tmp_path):
    broken = [Problem("p", "no such task", "3+4", "7")]
    with pytest.raises(ValueError, match="could grade no answer to 1 problems, 'p'.*no task is called"):
        warmup.collect(
            broken,
            templates=("plain",),
            samples=3,
            seed=0,
            generate=scripted([]),
            judge=lambda answers: [tasks.verify(*answer) for answer in answers],
            ledger=Ledger(tmp_path / "samples.jsonl"),
            source="m",
            temperature=1.0,
            batch=2,
        )
