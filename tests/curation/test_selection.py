import collections
import itertools

import pytest

from kimi_jax.curation.selection import balanced, domain, quotas
from kimi_jax.types import Problem


@pytest.mark.parametrize("sizes", [(3, 1, 7), (0, 2, 2), (5,), (2, 3, 3, 1)])
def test_quotas_are_as_equal_as_can_be(sizes):
    for total in range(sum(sizes) + 2):
        found = quotas(total, sizes)
        choices = itertools.product(*(range(n + 1) for n in sizes))
        best = min(sum(x * x for x in c) for c in choices if sum(c) == min(total, sum(sizes)))  # least where equal
        assert sum(found) == min(total, sum(sizes)) and all(q <= n for q, n in zip(found, sizes, strict=True))
        assert sum(q * q for q in found) == best


def test_balance_by_domain_then_difficulty():
    items = [("a", d, i) for d in range(3) for i in range(11)] + [("b", d, i) for d in range(2) for i in range(2)]
    keys, name = [lambda x: x[0], lambda x: x[1]], str
    chosen = balanced(items, 13, keys=keys, name=name)
    assert chosen == [item for item in items if item in chosen]
    assert collections.Counter(x[0] for x in chosen) == {"a": 9, "b": 4}
    assert collections.Counter(x[:2] for x in chosen if x[0] == "a") == {("a", d): 3 for d in range(3)}
    assert set(balanced(items, 7, keys=keys, name=name)) <= set(chosen) | set(items)
    assert balanced(items, 99, keys=keys, name=name) == items
    assert set(balanced(items[::-1], 13, keys=keys, name=name)) == set(chosen)


@pytest.mark.parametrize(
    ("task", "prompt", "tags", "expected"),
    [
        ("math", "A triangle has sides 3, 4 and 5.", ["Olympiad", "geometry"], "Olympiad"),
        ("chain", "3+4=?", [], "chain"),
        ("math", "A triangle has sides 3, 4 and 5. Find its area.", [], "geometry"),
        ("math", "三角形的面积是多少？", [], "geometry"),
        ("math", "Find the largest prime below 100.", [], "number theory"),
        ("math", "Solve the equation x+3=5.", [], "algebra"),
        ("exact", "Who wrote this?", [], "other exact"),
    ],
)
def test_domains(task, prompt, tags, expected):
    assert domain(Problem("p", task, prompt, "7"), tags) == expected
