"""The calculator: what SymPy would answer for what people write in word problems, without `eval`.

    expression := product (("+" | "-") product)*
    product    := unary (("*" | "x" | "×" | "·" | "/" | "÷" | "of" | nothing at all) unary)*
    unary      := ("-" | "+")* power
    power      := postfix (("^" | "**") unary)?       -2^2 is -4, 2^3^2 is 512
    postfix    := atom ("%" | "percent")*             5% is 1/20
    atom       := number | pi | π | unknown | "(" expression ")" | "√" atom
                | sqrt(a) | cbrt(a) | root(a, n) | abs(a)

Numbers may carry "$" and thousands commas. Whole numbers and fractions stay exact and print as SymPy prints
them (`1/3`, `3*sqrt(2)/2`, `2*pi`); a decimal point anywhere in the input, or a value without a closed
form, gives a decimal of at most 15 significant digits. `a = b` with one unknown is solved over the reals
(`x = -2 or x = 2`, `no real solution`, `true for every x`); without an unknown it is `True` or `False`; an
"=" with nothing after it is left out. Refused, with a reason: complex numbers, other functions, several
unknowns, unknowns without an equation.

Limits: 500 characters, 50 levels, 1000 digits, and a count of operations that keeps any input below 50 ms.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from swirl.errors import CalculatorError
from swirl.rollout.tool import Tool
from swirl.tools.calculator.polynomials import Ratio, real_roots
from swirl.tools.calculator.show import show
from swirl.tools.calculator.surds import DECIMAL, EXACT, MAX_DIGITS, PI, Arithmetic, Number, number
from swirl.trajectories.actions import TAGS

MAX_CHARACTERS = 500
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z]+|π)|(?P<sign>\*\*|==|//|[-+*/^%()=,√]))",
    re.ASCII,
)
_SPELLINGS = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "∕": "/", "⁄": "/"}
    | {"[": "(", "]": ")", "{": "(", "}": ")", "\u00a0": " "}
)
_CURRENCY = re.compile(r"[$£€](?=\s*[\d.(-])")
_FUNCTIONS = {"sqrt": 1, "cbrt": 1, "root": 2, "abs": 1}
_PI_NAMES = ("pi", "π")
_KNOWN_NAMES = {*_FUNCTIONS, *_PI_NAMES, "of", "percent"}


class _Token(NamedTuple):
    kind: str  # number, name, sign or end
    text: str


def _tokens(text: str) -> list[_Token]:
    text = _CURRENCY.sub("", text.translate(_SPELLINGS)).rstrip()
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise CalculatorError(f"cannot read {text[at:].lstrip()[0]!r}")
        tokens.append(_Token(match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return [*tokens, _Token("end", "")]


def _literal(text: str) -> Number:
    text = text.replace(",", "").lower()
    mantissa, _, exponent = text.partition("e")
    if len(mantissa) > MAX_DIGITS or (exponent and (len(exponent) > 5 or abs(int(exponent)) > MAX_DIGITS)):
        raise CalculatorError(f"a number with more than {MAX_DIGITS} digits")
    return number(Fraction(text), DECIMAL if "." in text or exponent else EXACT)


class _Parser:
    """Evaluates while it reads: no tree is kept, so nothing but brackets and powers can nest."""

    def __init__(self, tokens: list[_Token]):
        self.tokens = _times_signs(tokens)
        self.at = 0
        self.depth = 0
        self.unknown: str | None = None
        self.ops = Arithmetic()

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def take(self, *texts: str) -> str | None:
        """The next token's text, taken, if it is one of these signs or names."""
        token = self.next
        if token.kind in ("sign", "name") and token.text in texts:
            self.at += 1
            return token.text
        return None

    def expect(self, text: str) -> None:
        if self.take(text) is None:
            found = f", found {self.next.text!r}" if self.next.text else ""
            raise CalculatorError(f"expected {text!r}{found}")

    def expression(self) -> Ratio:
        value = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            value = value.add(other, self.ops) if sign == "+" else value.subtract(other, self.ops)
        return value

    def product(self) -> Ratio:
        value = self.unary()
        while True:
            after_number = self.tokens[self.at - 1].kind == "number"
            if self.take("/"):
                value = value.divide(self.unary(), self.ops)
            elif self.take("*", "of"):
                value = value.multiply(self.unary(), self.ops)
            elif self.next.kind == "name" or self.next.text in ("(", "√"):
                value = value.multiply(self.unary(), self.ops)
            elif self.next.kind == "number":
                what = "two numbers" if after_number else f"{self.tokens[self.at - 1].text!r} and a number"
                raise CalculatorError(f"{what} with no operation between them")
            else:
                return value

    def unary(self) -> Ratio:
        is_negative = False
        while sign := self.take("-", "+"):
            is_negative ^= sign == "-"
        value = self.power()
        return value.negate(self.ops) if is_negative else value

    def power(self) -> Ratio:
        base = self.postfix()
        if self.take("^", "**"):
            self.descend()
            exponent = self.unary().constant("an exponent")
            self.depth -= 1
            return base.power(exponent, self.ops)
        return base

    def descend(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise CalculatorError(f"nested more than {MAX_DEPTH} levels deep")

    def postfix(self) -> Ratio:
        value = self.atom()
        while self.take("%", "percent"):
            value = value.divide(Ratio.of(number(100)), self.ops)
        return value

    def atom(self) -> Ratio:
        token = self.next
        self.at += 1
        if token.kind == "number":
            return Ratio.of(_literal(token.text))
        if token.text == "(":
            self.at -= 1
            return self.arguments(1)[0]
        if token.kind == "name":
            return self.named(token.text)
        if token.text == "√":
            return self.root_of_atom()
        self.at -= 1
        where = f"at {token.text!r}" if token.text else "at the end"
        raise CalculatorError(f"expected a number {where}")

    def root_of_atom(self) -> Ratio:
        self.descend()
        value = self.atom().power(number(Fraction(1, 2)), self.ops)
        self.depth -= 1
        return value

    def arguments(self, count: int) -> list[Ratio]:
        self.expect("(")
        self.descend()
        values = [self.expression()]
        while len(values) < count:
            self.expect(",")
            values.append(self.expression())
        self.expect(")")
        self.depth -= 1
        return values

    def named(self, name: str) -> Ratio:
        if name in _PI_NAMES or name.lower() == "pi":
            return Ratio.of(PI)
        if name.lower() in _FUNCTIONS:
            return self.function(name.lower())
        if self.next.text == "(" and len(name) > 1:
            raise CalculatorError(f"unknown function {name!r}")
        if self.unknown not in (None, name):
            raise CalculatorError(f"more than one unknown: {self.unknown!r} and {name!r}")
        self.unknown = name
        return Ratio.unknown()

    def function(self, name: str) -> Ratio:
        if name == "sqrt" and self.next.text != "(":
            return self.root_of_atom()
        value, *rest = self.arguments(_FUNCTIONS[name])
        if name == "abs":
            inside = value.constant("abs")
            return Ratio.of(self.ops.negate(inside) if self.ops.sign(inside) < 0 else inside)
        degree = {"sqrt": number(2), "cbrt": number(3)}.get(name) or rest[0].constant("a root's degree")
        return value.power(self.ops.divide(number(1), degree), self.ops)


def _times_signs(tokens: list[_Token]) -> list[_Token]:
    """Read "12 x 3" and "3x(4)" as products: an x between a value and a number, or any value if x is no
    unknown.
    """
    names = {token.text for token in tokens if token.kind == "name"} - _KNOWN_NAMES
    is_equation = names <= {"x", "X"} and any(token.text in ("=", "==") for token in tokens[:-2])
    read = list(tokens)
    for i in range(1, len(tokens) - 1):
        before, after = read[i - 1], tokens[i + 1]
        if tokens[i].text not in ("x", "X") or not (before.kind != "sign" or before.text in (")", "%")):
            continue
        value_follows = after.text in ("(", "√", "-") or (after.kind == "name" and after.text not in ("of", "percent"))
        if after.kind == "number" or (value_follows and not is_equation):
            read[i] = _Token("sign", "*")
    return read


def calculate(text: str) -> str:
    """The value of an expression, or the solution of an equation.

    Raises CalculatorError with a one-line reason, and nothing else, whatever `text` is.
    """
    if not isinstance(text, str):
        raise CalculatorError("expected text")
    if not text.strip():
        raise CalculatorError("nothing to calculate")
    if len(text) > MAX_CHARACTERS:
        raise CalculatorError(f"longer than {MAX_CHARACTERS} characters")
    try:
        return _calculate(text)
    except RecursionError:  # the caller's own stack is nearly full: 50 levels take 250 frames
        raise CalculatorError("nested too deep") from None


def _calculate(text: str) -> str:
    tokens = _tokens(text)
    if tokens[-2].text in ("=", "=="):
        del tokens[-2]
    elif tokens[0].text == "=":
        del tokens[0]
    parser = _Parser(tokens)
    left = parser.expression()
    right = parser.expression() if parser.take("=", "==") else None
    if parser.next.kind != "end":
        raise CalculatorError(f"cannot read on at {parser.next.text!r}")
    if parser.unknown is None:
        value = left.constant("")
        if right is None:
            return show(value)
        difference = parser.ops.subtract(value, right.constant(""))
        return str(difference.is_zero)
    if right is None:
        raise CalculatorError(f"unknown name {parser.unknown!r}: an unknown needs an equation")
    roots = real_roots(left.subtract(right, parser.ops), parser.ops)
    if roots is None:
        return f"true for every {parser.unknown}"
    return " or ".join(f"{parser.unknown} = {show(root)}" for root in roots) or "no real solution"


class CalculatorTool:
    """Exact arithmetic; a refusal is a result that the policy can read."""

    name = "calculator"

    async def __call__(self, expression: str) -> str:
        try:
            return calculate(expression)
        except CalculatorError as error:
            return f"error: {error}"


def calculator_tool() -> Tool:
    """The policy's `calculator`."""
    return Tool(
        name="calculator",
        tag=TAGS["calculator"],
        run=CalculatorTool(),
        description="Calculate an expression.",
        argument="expression",
        verb="calculate",
        timeout_s=None,
    )
