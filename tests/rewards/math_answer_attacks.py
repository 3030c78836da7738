"""Answers that try to crash, hang or fool a judge of mathematics; and a judge for the workers, without pytest."""

import random

from kimi_jax.rewards.math_answer import verify_math
from kimi_jax.types import Problem, Verdict


def judge(problem: Problem, text: str) -> Verdict:
    return verify_math(problem.answer, text)


_PIECES = (
    r"\frac{1}{2} \sqrt{ 10^{10^{10}} 9^{9^{9^{9}}} x_{1} \boxed{ } { \{ \} [ ] ( ) | \left( \right] 1e9999 1e999999 "
    r"100000! 99999999! \binom{10^9}{5} \int_0^1 \sum_{k=1}^{10^9} \lim_{x\to0} \begin{pmatrix} \end{pmatrix} & \\ "
    r"\text{ cm } % \% $ $$ \$ ° ± \pm = < > \le \in \cup or and 或 ，（） ½ ² π √ 0.\overline{3} sin \sin \log_2 ln x "
    r"\infty oo answer Answer: #### the answer is \mathrm{ \x \ ' \" ~ ^ _ ^^ __ ! !! * / + - -- 0 1 2 10 0.1 . .. "
    r"\0 nan z e i 1,000 y , ; :"
).split()


def _families(rng: random.Random, n: int) -> list[str]:
    """One of each kind of attack, of size n."""
    rows = "\\\\".join("&".join(["1"] * min(n, 200)) for _ in range(min(n, 200)))
    return [
        "(" * n + "1" + ")" * n,
        "{" * n + "1" + "}" * n,
        "(" * n,
        "\\frac{1}{" * n + "1" + "}" * n,
        "\\frac" * n + "1",
        "\\sqrt" * n + "2",
        "√" * n + "2",
        "-" * n + "1",
        "|" * n + "x" + "|" * n,
        "^".join(["10"] * min(n, 400)),
        "^{".join(["9"] * n) + "}" * (n - 1),
        "9" * n + "^" + "9" * n,
        "9" * n + "!",
        "1" + "!" * n,
        "x" + "%" * n,
        "+".join(["x"] * n),
        "*".join(["(x+1)"] * n),
        "x" * n,
        " ".join(["x"] * n),
        "(x+y+z+w)^{" + "9" * min(n, 30) + "}",
        "\\sin(" * n + "x" + ")" * n,
        "\\sin(10^{10^{" + "9" * min(n, 12) + "}})",
        "\\exp(\\exp(\\exp(\\exp(" + "9" * min(n, 9) + "))))",
        "\\binom{" + "9" * n + "}{" + "8" * n + "}",
        "1e" + "9" * n,
        "0." + "0" * n + "1",
        "0.\\overline{" + "3" * n + "}",
        "\\begin{pmatrix}" + rows + "\\end{pmatrix}",
        "\\begin{vmatrix}" + rows + "\\end{vmatrix}",
        "\\begin{pmatrix}" * n,
        "[" * n + "1,2" + "]" * n,
        "\\{" + ",".join(map(str, range(n))) + "\\}",
        ",".join(f"\\sqrt{{{i}}}" for i in range(n)),
        "\\pm" * n + "1",
        "\\cup".join(["(1,2)"] * n),
        "<".join(["x"] * n),
        "=".join(["1"] * n),
        ":".join(["1"] * n),
        "5 " + "m " * n,
        "5 " + "/".join(["m"] * n),
        "5 m^" + "9" * n,
        "\\text{" * n + "a" + "}" * n,
        "\\mathrm" * n,
        "a" * n + "!",
        "₁" * n + "²" * n,
        "1,000" * n,
        "1 000 " * n,
        "\\log_" * n + "2",
        "x_" * n + "1",
        "\\int_0^1 " * n + "x",
        "\\sum_{k=1}^{10^{" + "9" * min(n, 8) + "}} k^k",
        "0^{0^{0}} 1/0 0/0",
        "".join(chr(rng.randrange(0x20, 0x3000)) for _ in range(n)),
        " ".join(rng.choice(_PIECES) for _ in range(min(n, 300))),
        "".join(rng.choice(_PIECES) for _ in range(min(n, 60))),
    ]


def attacks(seed: int) -> list[tuple[str, str]]:
    """1,000 pairs of a reference and a response, of bare attacks, boxed ones and unclosed ones; some are references."""
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < 1000:
        for text in _families(rng, rng.choice((2, 5, 17, 60, 230, 900, 5000))):
            wrapped = rng.choice(
                ("\\boxed{%s}", "\\boxed{%s", "Answer: %s", "the answer is %s", "%s", '{"answer": "%s"}')
            )
            reference = rng.choice(
                ("42", r"x^2+\frac{1}{x}", r"\int_0^1 x\,dx", r"\{1, 2\}", "5 cm", "3<x", text[:3000])
            )
            pairs.append((reference, wrapped.replace("%s", text)))
    return pairs[:1000]
