"""Does any expression escape, hang or crash the calculator, and does it answer as SymPy does?

    python -m tests.drills.calculator_fuzz [--num 1000000] [--sympy 10000] [--seed 0] [--json]

Half of the expressions come from a grammar (valid, equations among them), half are hostile: the same with
characters changed, random characters, code, towers of powers, deep brackets, huge and foreign digits.
Whatever is not an answer or a CalculatorError is an escape, and so is what takes more than 50 ms of CPU time three
times in a row. A sample of the valid ones is compared with SymPy's value to 12 digits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from contextlib import suppress

from swirl.app.progress import progress
from swirl.errors import CalculatorError
from swirl.tools.calculator.calculate import calculate
from tests.drills.table import Row

LONGEST_S = 0.05
_HOSTILE = (
    "9**9**9",
    "9**9**9**9**9",
    "2^(2^(2^(2^(2^(2^2)))))",
    "10^-1000^1000",
    "(" * 10_000 + "1" + ")" * 10_000,
    "(" * 250 + "1" + ")" * 249,
    "-" * 499 + "1",
    "√" * 499 + "2",
    "sqrt " * 99 + "2",
    "2^" * 249 + "2",
    "1/" * 249 + "0",
    "%" * 400,
    "5" + "%" * 400,
    "=" * 100,
    "x" * 500,
    "x x x x x x",
    "(1+sqrt(2)+sqrt(3)+sqrt(5)+sqrt(7))^64",
    "*".join(["(1+√2+√3+√5+√7)^9"] * 25),
    "(x+1)^6*(x-1)^6=0",
    "x^6-x^5+3x^4-7x^3+x^2-9x+1=0",
    "x^999999999999999999999=1",
    "+".join(["√999999999999999989"] * 24),
    "9" * 499,
    "√" + "9" * 498,
    "1e999999999",
    "1e-1000*1e-1000",
    "0.1^-999^9",
    "2^0.000000000000000000001",
    "2^99999.99999999",
    "pi^pi^pi^pi^pi",
    "__import__('os').system('true')",
    "().__class__.__bases__[0]",
    "lambda: 1",
    "open('/etc/passwd').read()",
    "٣+٤",
    "１２+３",
    "²³",
    "1\u0000+1",
    "\ud800",
    "1\n+\n1",
    "‮1+1",
    "∞-∞",
    "nan",
    "1_000",
    "0x10",
    "1j*1j",
    "",
    " ",
)
_CHARACTERS = "0123456789.,+-*/^%()=xX√π×÷−$€ eE[]{}abspiqrtof\t\n_'\"\\|!&;:?@#~`<>٣Ωé\u200b"


def grammar(rng: random.Random, depth: int = 3) -> str:
    """A valid expression, which SymPy reads too once `sympy_text` has put it in its spelling."""
    if depth == 0 or rng.random() < 0.25:
        kind = rng.random()
        if kind < 0.62:
            return str(rng.randrange(0, rng.choice((10, 100, 100_000))))
        if kind < 0.8:
            return f"{rng.randrange(0, 1000)}.{rng.randrange(0, 1000):0{rng.randrange(1, 4)}d}"
        if kind < 0.9:
            return f"{rng.randrange(1, 100)}%"
        return "pi"
    kind = rng.random()
    if kind < 0.72:
        left, right = grammar(rng, depth - 1), grammar(rng, depth - 1)
        return f"{left}{rng.choice(('+', '-', '*', '/', ' + ', ' - ', ' * ', ' / '))}{right}"
    if kind < 0.82:
        return f"({grammar(rng, depth - 1)})"
    if kind < 0.9:
        return f"sqrt({grammar(rng, depth - 1)})"
    if kind < 0.97:
        power = rng.choice(("2", "3", "-1", "-2", "(1/2)", "(1/3)", "(2/3)", "0", "0.5", "1.5"))
        return f"({grammar(rng, depth - 1)})^{power}"
    return f"-({grammar(rng, depth - 1)})"


def equation(rng: random.Random) -> str:
    """A polynomial equation in x of degree 1 to 3, often with whole roots."""
    if rng.random() < 0.5:
        factors = [f"(x{rng.choice('+-')}{rng.randrange(0, 12)})" for _ in range(rng.randrange(1, 4))]
        return f"{rng.randrange(1, 9)}*{'*'.join(factors)}={rng.choice((0, 0, rng.randrange(-20, 20)))}"
    left = "+".join(f"{rng.randrange(-9, 9)}*x^{i}" for i in range(rng.randrange(2, 5)))
    return f"{left}={rng.randrange(-9, 9)}*x{rng.choice('+-')}{rng.randrange(0, 50)}/{rng.randrange(1, 9)}"


def hostile(rng: random.Random) -> str:
    """What nobody should write: fixed attacks, noise, and valid expressions with a few characters changed."""
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(_HOSTILE)
    if kind < 0.3:
        return "".join(rng.choices(_CHARACTERS, k=rng.randrange(1, 40)))
    if kind < 0.35:
        return "".join(chr(rng.randrange(1, 0x2FFF)) for _ in range(rng.randrange(1, 20)))
    if kind < 0.4:
        return rng.choice(("^", "**")).join(str(rng.randrange(0, 99)) for _ in range(rng.randrange(2, 9)))
    if kind < 0.42:
        return rng.choice(("+", "*", "/", "^", "-", " of ")).join(grammar(rng, 2) for _ in range(rng.randrange(2, 30)))
    text = list(grammar(rng) if kind < 0.9 else equation(rng))
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) + 1)
        text[at : at + rng.randrange(2)] = rng.choice(_CHARACTERS) if rng.random() < 0.8 else ""
    return "".join(text)


def answer(text: str) -> str:
    """The answer, or `refused: ` and the reason. Anything but CalculatorError gets through."""
    try:
        result = calculate(text)
    except CalculatorError as error:
        reason = str(error)
        assert reason and "\n" not in reason, f"a refusal must be one line: {reason!r}"
        return f"refused: {reason}"
    assert isinstance(result, str) and result, f"expected text, got {result!r}"
    return result


def cpu_s(text: str) -> float:
    """CPU seconds of one answer."""
    start = time.thread_time()
    with suppress(Exception):
        answer(text)
    return time.thread_time() - start


def sympy_text(text: str) -> str:
    return text.replace("^", "**").replace("%", "/100")


def agrees(text: str, ours: str) -> bool:
    """Is `ours` what SymPy yields? Refusals agree where SymPy has no finite real number."""
    import sympy

    if "=" in text:
        return _same_roots(text, ours)
    theirs = sympy.sympify(_percent_in_brackets(text), rational=True)
    if ours.startswith("refused: "):
        if any(word in ours for word in ("digits", "work", "different roots")):
            return True
        if not theirs.is_finite or not theirs.is_real:
            return True
        return _has_no_value(sympy.sympify(_percent_in_brackets(text), rational=True, evaluate=False))
    if not theirs.is_finite or sympy.im(theirs.evalf(30)) != 0:
        return False
    return _close(sympy.sympify(ours, rational=True), theirs)


def _has_no_value(expression) -> bool:
    """Is there a division by zero or a root of a negative number anywhere in it?

    SymPy goes on with infinity and complex numbers, so that 7/(65/0) is 0 and sqrt(-1)^2 is -1.
    """
    import sympy

    for power in (node for node in sympy.preorder_traversal(expression) if node.is_Pow):
        base, exponent = power.base.doit(), power.exp.doit()
        if exponent.is_negative and base.is_zero is not False:
            return True
        if exponent.is_integer is not True and (base.is_negative or base.is_real is False):
            return True
    return False


def _percent_in_brackets(text: str) -> str:
    import re

    return sympy_text(re.sub(r"(\d+)%", r"(\1/100)", text))


def _close(a, b) -> bool:
    import sympy

    difference, size = abs(sympy.N(a - b, 30)), abs(sympy.N(b, 30))
    return bool(difference <= 1e-12 * size or difference < 1e-25)


def _same_roots(text: str, ours: str) -> bool:
    import sympy

    x = sympy.Symbol("x")
    left, right = (sympy.sympify(sympy_text(side), rational=True) for side in text.split("="))
    polynomial = sympy.Poly(sympy.expand(left - right), x)
    if polynomial.is_zero:
        return ours == "true for every x"
    theirs = sorted(set(sympy.real_roots(polynomial)), key=lambda root: root.evalf(30)) if polynomial.degree() else []
    if not theirs:
        return ours == "no real solution"
    roots = [sympy.sympify(root.removeprefix("x = "), rational=True) for root in ours.split(" or ")]
    return len(roots) == len(theirs) and all(_close(a, b) for a, b in zip(roots, theirs, strict=True))


def fuzz(num: int, num_sympy: int, seed: int) -> dict:
    """Counts, the slowest in CPU time, and the expressions that escaped or disagreed (100 at most)."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    faults, slowest, valid = [], (0.0, ""), []
    with progress("calculate", num) as advance:
        for i in range(num):
            is_valid = i % 2 == 0
            text = (equation(rng) if rng.random() < 0.1 else grammar(rng)) if is_valid else hostile(rng)
            start = time.thread_time()
            try:
                ours = answer(text)
            except Exception as error:
                counts["escaped"] += 1
                faults.append((text[:200], repr(error)))
                continue
            finally:
                spent_s = time.thread_time() - start
                if spent_s > LONGEST_S:  # three times in a row, or it was the machine
                    spent_s = min(spent_s, cpu_s(text), cpu_s(text))
                    counts["slow"] += spent_s > LONGEST_S
                slowest = max(slowest, (spent_s, text[:200]))
                if i % 1000 == 999:
                    advance(1000)
            counts["refused" if ours.startswith("refused: ") else "answered"] += 1
            if is_valid and len(valid) < num_sympy:
                valid.append((text, ours))
    with progress("compare with sympy", len(valid)) as advance:
        for text, ours in valid:
            same = agrees(text, ours)
            counts["agree with sympy" if same else "disagree with sympy"] += 1
            if not same:
                faults.append((text, ours))
            advance()
    return {
        "num": num,
        "seed": seed,
        **counts,
        "slowest_ms": round(slowest[0] * 1e3, 2),
        "slowest": slowest[1],
        "faults": faults[:100],
    }


def drill(seed: int, num: int = 200_000, num_sympy: int = 500) -> list[Row]:
    result = fuzz(num, num_sympy, seed)
    escaped = result.get("escaped", 0) + result.get("slow", 0)
    compared = result.get("agree with sympy", 0) + result.get("disagree with sympy", 0)
    faults = "".join(f"; {text!r}: {what}" for text, what in result["faults"][:3])
    return [
        Row(
            "calculator: an answer or a refusal, within 50 ms",
            num,
            escaped,
            f"slowest {result['slowest_ms']} ms{faults}",
        ),
        Row("calculator: agrees with SymPy", compared, result.get("disagree with sympy", 0)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drills.calculator_fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=1_000_000, help="expressions")
    parser.add_argument("--sympy", type=int, default=10_000, help="valid ones compared with SymPy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = fuzz(arguments.num, arguments.sympy, arguments.seed)
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:20} {value}")
    return 1 if result["faults"] or result.get("slow") else 0


if __name__ == "__main__":
    sys.exit(main())
