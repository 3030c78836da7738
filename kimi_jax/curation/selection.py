"""What a problem is about, and a selection in which domains and difficulties are balanced (k1.5 §2.1)."""

import collections
import hashlib
import re
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from kimi_jax.tasks import TASKS
from kimi_jax.types import Problem

T = TypeVar("T")

# For problems without tags that are of none of the tasks here. The first that matches.
_DOMAINS = {
    "coding": r"\b(?:python|java|c\+\+|program|function that returns|algorithm|stdin|array of)\b|编程|程序|算法",
    "probability": r"\b(?:probabilit\w+|dice|die|coins?|randomly|at random|expected value)\b|概率|随机|骰子|期望",
    "combinatorics": r"\b(?:how many ways|permutations?|combinations?|arrange\w*|choose)\b|排列|组合|多少种",
    "geometry": r"\b(?:triangles?|circles?|angles?|polygons?|rectangles?|radius|perimeter|area|volume|cube)\b"
    r"|三角形|圆|角度|面积|周长|体积|平行|正方形|长方形",
    "number theory": r"\b(?:primes?|divisors?|divisible|remainder|modulo|gcd|lcm|integers? solutions?)\b"
    r"|质数|素数|整除|余数|公约数|公倍数",
    "calculus": r"\b(?:derivative|integral|limit|differential)\b|\\int\b|\\lim\b|导数|积分|极限|微分",
    "physics": r"\b(?:velocity|acceleration|force|newtons?|joules?|voltage|current|wavelength|momentum)\b"
    r"|速度|加速度|牛顿|电压|电流|质量|动量",
    "chemistry": r"\b(?:molar|moles?|reaction|acid|molecul\w+|compound|titrat\w+)\b|摩尔|反应|溶液|分子|化合物",
    "biology": r"\b(?:cells?|genes?|dna|protein|species|enzymes?|chromosomes?)\b|细胞|基因|蛋白|物种|染色体",
    "algebra": r"\b(?:equations?|polynomials?|roots?|solve|matrix|matrices|sequence|function)\b"
    r"|方程|多项式|函数|数列|矩阵",
}
_RULES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _DOMAINS.items()}


def domain(problem: Problem, tags: Sequence[str] = ()) -> str:
    """The first tag; else the task, if it is one of `tasks.TASKS`; else what words of the prompt suggest."""
    if tags:
        return tags[0]
    if problem.task in TASKS:
        return problem.task
    return next((name for name, rule in _RULES.items() if rule.search(problem.prompt)), f"other {problem.task}")


def quotas(total: int, sizes: Sequence[int]) -> list[int]:
    """How many to take from each of some sets: as equally as possible, `total` in all if there are so many."""
    taken = [0] * len(sizes)
    left = min(total, sum(sizes))
    by_size = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for position, i in enumerate(by_size):  # from the smallest on, each gets its share of what is left
        taken[i] = min(sizes[i], left // (len(sizes) - position))
        left -= taken[i]
    return taken


def balanced(items: Sequence[T], total: int, *, keys: Sequence[Callable[[T], Hashable]], name: Callable[[T], str]):
    """`total` of the items, balanced by the first key, within each value of it by the second, and so on.

    Which of those that are equal in all keys is decided by a hash of their names, so that a larger total adds to a
    smaller one as far as quotas allow. Returns a list in the order of `items`.
    """
    chosen = {name(item) for item in _balanced(list(items), total, keys, name)}
    return [item for item in items if name(item) in chosen]


def _balanced(items: list, total: int, keys, name) -> list:
    if not keys:
        return sorted(items, key=lambda item: hashlib.blake2b(name(item).encode()).digest())[:total]
    cells = collections.defaultdict(list)
    for item in items:
        cells[keys[0](item)].append(item)
    shares = quotas(total, [len(members) for members in cells.values()])
    parts = zip(cells.values(), shares, strict=True)
    return [item for members, share in parts for item in _balanced(members, share, keys[1:], name)]
