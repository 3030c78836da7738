"""Prompts that are excluded, and prompts that look like them and are not."""

import pytest

from kimi_jax.curation.exclusion import exclusion
from kimi_jax.types import Problem

EXCLUDED = {
    "multiple_choice": [
        "What is 3+4?\n(A) 5\n(B) 6\n(C) 7\n(D) 8",
        "What is 3+4? A. 5 B. 6 C. 7 D. 8",
        "What is 3+4? A: 5, B: 6, C: 7",
        "Which of the following is a prime: 4, 7 or 9?",
        "Choose the correct option for 3+4.",
        "Select all correct statements.",
        "下列说法正确的是（　　）",
        "下列函数中，在定义域内单调递增的是",
        "以下哪一项是正确的？",
        "3+4 等于（ ） A、5 B、6 C、7 D、8",
        "（单选）3+4 是多少？",
    ],
    "true_false": [
        "True or false: 7 is prime.",
        "7 is prime (T/F).",
        "Answer yes or no: is 7 prime?",
        "Is it true that 7 divides 49?",
        "判断题：7 是质数。",
        "判断7是否为质数。",
        "这个结论是否正确？",
    ],
    "proof": [
        "Prove that there are infinitely many primes.",
        "Let n > 2. Show that n^2 > 2n.",
        "Let n be even. Please prove or disprove: n^2 is even.",
        "Give a short proof of the inequality.",
        "In this exercise you are asked to prove the lemma.",
        "证明：根号2是无理数。",
        "已知 a>b，求证 a+c>b+c。",
        "请证明勾股定理。",
    ],
}
GOOD = [
    "In triangle ABC, AB = 3 and AC = 4. Find BC if angle A is 90 degrees.",
    "Points A, B, C and D lie on a line. How many segments are there?",
    "Let A = {1, 2}. Let B = {2, 3}. How many elements has their union?",
    "(a) Find x. (b) Find y. (c) Give x + y.",
    "Solve the following equation: x + 3 = 5.",
    "In how many ways can one choose 3 of 7 books?",
    "It can be proved that the series converges. Find its sum.",
    "Euler proved this theorem in 1750. How many years ago was that in 2025?",
    "The table shows that 7 of 10 pupils passed. What share is that?",
    "Ben has a proof of purchase for 3 items. How much did he pay if each costs 4 dollars?",
    "Waterproof jackets cost 30 dollars. What do 7 of them cost?",
    "解下列方程：x+3=5。",
    "可以证明该数列收敛，求它的极限。",
    "小明带着身份证明去了3次银行，每次取40元，一共取了多少元？",
    "以下程序输出什么数？ print(3+4)",
    "How many of the roots are real?",
    "What is the probability that the second coin shows heads?",
]


@pytest.mark.parametrize(
    ("reason", "prompt"), [(reason, prompt) for reason, all_ in EXCLUDED.items() for prompt in all_]
)
def test_excluded(reason, prompt):
    found = exclusion(Problem("p", "exact", prompt, "7"))
    assert found and found[0] == reason and found[1]


@pytest.mark.parametrize("prompt", GOOD)
def test_not_excluded(prompt):
    assert exclusion(Problem("p", "exact", prompt, "7")) is None


@pytest.mark.parametrize(
    ("prompt", "answer", "reason"),
    [
        ("Is 7 prime?", "Yes", "true_false"),
        ("7是质数吗？", "是", "true_false"),
        ("Is 7 prime?", "yes.", "true_false"),
        ("What is 3+4? (A) 7 (B) 8", "(A)", "multiple_choice"),
        ("What is 3+4? (A) 7 (B) 8", "7", None),
        ("Which vitamin do lemons have?", "C", None),
        ("How do you say no in French?", "non", None),
    ],
)
def test_answers_also_tell(prompt, answer, reason):
    found = exclusion(Problem("p", "exact", prompt, answer))
    assert (found and found[0]) == reason


def test_a_long_table_of_two_letters_is_read_once():
    """Not each A with each B, which would take hours."""
    assert exclusion(Problem("p", "exact", "(A) 1 (B) 2\n" * 5_000, "7")) is None
    assert exclusion(Problem("p", "exact", "(A) 1 (B) 2\n" * 5_000 + "(C) 3", "7"))[0] == "multiple_choice"
