"""Equations in one unknown for the calculator: ratios of polynomials, and their real roots.

Linear and quadratic equations, and a*x**n = b, are solved exactly; rational roots of higher degrees too.
What is left of a higher degree is solved numerically to 15 digits.
"""

from __future__ import annotations

import decimal
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import lcm

from swirl.errors import CalculatorError
from swirl.tools.calculator.surds import APPROXIMATE, Arithmetic, Number, number, value_of

MAX_DEGREE = 6

Polynomial = tuple[Number, ...]  # coefficients from x**0 up, the last one not zero; () is zero

_ONE: Polynomial = (number(1),)


def _trim(coefficients: list[Number]) -> Polynomial:
    while coefficients and coefficients[-1].is_zero:
        coefficients.pop()
    if len(coefficients) > MAX_DEGREE + 1:
        raise CalculatorError(f"an equation of a degree above {MAX_DEGREE}")
    return tuple(coefficients)


def _plus(a: Polynomial, b: Polynomial, ops: Arithmetic) -> Polynomial:
    if len(a) < len(b):
        a, b = b, a
    return _trim([ops.add(c, b[i]) if i < len(b) else c for i, c in enumerate(a)])


def _times(a: Polynomial, b: Polynomial, ops: Arithmetic) -> Polynomial:
    if not a or not b:
        return ()
    product = [number(0)] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] = ops.add(product[i + j], ops.multiply(x, y))
    return _trim(product)


@dataclass(frozen=True, slots=True)
class Ratio:
    """over / under, both polynomials in the unknown; `kind` survives where over is zero."""

    over: Polynomial
    under: Polynomial = _ONE
    kind: int = 0

    @classmethod
    def of(cls, value: Number) -> Ratio:
        return cls(() if value.is_zero else (value,), kind=value.kind)

    @classmethod
    def unknown(cls) -> Ratio:
        return cls((number(0), number(1)))

    @property
    def is_constant(self) -> bool:
        return len(self.over) <= 1 and self.under is _ONE

    def constant(self, where: str) -> Number:
        """Its value. Raises CalculatorError where it holds the unknown."""
        if not self.is_constant:
            raise CalculatorError(f"the unknown may not stand in {where}")
        return self.over[0] if self.over else number(0, self.kind)

    def add(self, other: Ratio, ops: Arithmetic) -> Ratio:
        if self.is_constant and other.is_constant:
            return Ratio.of(ops.add(self.constant(""), other.constant("")))
        kind = max(self.kind, other.kind)
        if self.under == other.under:
            return Ratio(_plus(self.over, other.over, ops), self.under, kind)
        over = _plus(_times(self.over, other.under, ops), _times(other.over, self.under, ops), ops)
        return Ratio(over, _times(self.under, other.under, ops), kind)

    def negate(self, ops: Arithmetic) -> Ratio:
        return Ratio(tuple(ops.negate(c) for c in self.over), self.under, self.kind)

    def subtract(self, other: Ratio, ops: Arithmetic) -> Ratio:
        return self.add(other.negate(ops), ops)

    def multiply(self, other: Ratio, ops: Arithmetic) -> Ratio:
        if self.is_constant and other.is_constant:
            return Ratio.of(ops.multiply(self.constant(""), other.constant("")))
        under = self.under if other.under is _ONE else _times(self.under, other.under, ops)
        return Ratio(_times(self.over, other.over, ops), under, max(self.kind, other.kind))

    def divide(self, other: Ratio, ops: Arithmetic) -> Ratio:
        if not other.over:
            raise CalculatorError("division by zero")
        if other.is_constant:
            inverse = ops.divide(number(1), other.constant(""))
            return self.multiply(Ratio.of(inverse), ops)
        return self.multiply(Ratio(other.under, other.over, other.kind), ops)

    def power(self, exponent: Number, ops: Arithmetic) -> Ratio:
        if self.is_constant:
            return Ratio.of(ops.power(self.constant(""), exponent))
        power = exponent.rational
        if power is None or power.denominator != 1:
            raise CalculatorError("the unknown may not stand under a root")
        if abs(power) > MAX_DEGREE:
            raise CalculatorError(f"an equation of a degree above {MAX_DEGREE}")
        base = self if power >= 0 else Ratio.of(number(1)).divide(self, ops)
        result = Ratio.of(number(1))
        for _ in range(abs(power.numerator)):
            result = result.multiply(base, ops)
        return result


def real_roots(equation: Ratio, ops: Arithmetic) -> list[Number] | None:
    """Where `equation` is zero, ascending; None where it is zero everywhere."""
    if not equation.over:
        return None
    roots = _roots(equation.over, ops)
    kind = max([equation.kind, *(c.kind for c in equation.over + equation.under)])
    zero = number(0, kind)
    roots = [ops.add(root, zero) for root in roots]
    roots = [root for root in roots if not _value_at(equation.under, root, ops).is_zero]
    return sorted(roots, key=value_of)


def _value_at(polynomial: Polynomial, x: Number, ops: Arithmetic) -> Number:
    value = number(0)
    for coefficient in reversed(polynomial):
        value = ops.add(ops.multiply(value, x), coefficient)
    return value


def _roots(polynomial: Polynomial, ops: Arithmetic) -> list[Number]:
    """The distinct real roots of a polynomial that is not zero."""
    zeros = next(i for i, c in enumerate(polynomial) if not c.is_zero)
    if zeros:
        return [number(0), *_roots(polynomial[zeros:], ops)]
    degree = len(polynomial) - 1
    if degree == 0:
        return []
    if all(c.is_zero for c in polynomial[1:-1]):
        return _pure_roots(ops.negate(ops.divide(polynomial[0], polynomial[-1])), degree, ops)
    if degree == 2:
        return _quadratic_roots(polynomial, ops)
    rational = [c.rational if c.rational is not None else ops.approximate(c).rational for c in polynomial]
    exact = all(c.rational is not None and c.kind != APPROXIMATE for c in polynomial)
    return _higher_roots(rational, exact, ops)


def _pure_roots(value: Number, degree: int, ops: Arithmetic) -> list[Number]:
    """x ** degree = value."""
    sign = ops.sign(value)
    if sign < 0 and degree % 2 == 0:
        return []
    size = ops.power(value if sign > 0 else ops.negate(value), number(Fraction(1, degree)))
    if degree % 2 == 0:
        return [ops.negate(size), size]
    return [size if sign > 0 else ops.negate(size)]


def _quadratic_roots(polynomial: Polynomial, ops: Arithmetic) -> list[Number]:
    c, b, a = polynomial
    half = ops.divide(b, ops.multiply(number(-2), a))
    discriminant = ops.subtract(ops.multiply(half, half), ops.divide(c, a))
    sign = ops.sign(discriminant)
    if sign < 0:
        return []
    if sign == 0:
        return [half]
    size = ops.power(discriminant, number(Fraction(1, 2)))
    return [ops.subtract(half, size), ops.add(half, size)]


def _higher_roots(coefficients: list[Fraction], exact: bool, ops: Arithmetic) -> list[Number]:
    """Degree 3 and above over the rationals: exact rational roots, then what is left."""
    scale = lcm(*(c.denominator for c in coefficients))
    whole = _square_free([c * scale for c in coefficients])
    ops.spend(500 * len(coefficients))
    found = []
    for near in _numeric_roots(whole):
        lead = abs(int(whole[-1] * lcm(*(c.denominator for c in whole))))
        guess = Fraction(near).limit_denominator(max(1, lead))
        if exact and not _horner(whole, guess):
            found.append(number(guess))
        else:
            found.append(number(Fraction(near), APPROXIMATE))
    left = whole
    for root in found:
        if root.kind != APPROXIMATE:
            left = _divide_by_root(left, root.rational)
    if exact and len(left) <= 3 and len(left) < len(whole):
        found = [root for root in found if root.kind != APPROXIMATE]
        return found + (_roots(tuple(number(c) for c in left), ops) if len(left) > 1 else [])
    return found


def _horner(coefficients: list, x):
    value = 0 * x
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value


def _divide_by_root(coefficients: list[Fraction], root: Fraction) -> list[Fraction]:
    quotient, carry = [], Fraction(0)
    for coefficient in reversed(coefficients):
        carry = carry * root + coefficient
        quotient.append(carry)
    return quotient[-2::-1]


def _remainder(a: list[Fraction], b: list[Fraction]) -> tuple[list[Fraction], list[Fraction]]:
    """(quotient, remainder) of a / b."""
    a, quotient = list(a), []
    while len(a) >= len(b):
        factor = a[-1] / b[-1]
        quotient.append(factor)
        shift = len(a) - len(b)
        for i, c in enumerate(b):
            a[shift + i] -= factor * c
        a.pop()
    while a and not a[-1]:
        a.pop()
    return quotient[::-1], a


def _square_free(coefficients: list[Fraction]) -> list[Fraction]:
    """The polynomial with every root once: divided by its greatest common divisor with its derivative."""
    divisor, other = coefficients, _derivative(coefficients)
    while other:
        divisor, other = other, _remainder(divisor, other)[1]
    return _remainder(coefficients, divisor)[0]


def _derivative(coefficients: list) -> list:
    return [i * c for i, c in enumerate(coefficients)][1:]


def _numeric_roots(coefficients: list[Fraction]) -> list[Decimal]:
    """Real roots of a square-free polynomial by bisection between the turning points."""
    with decimal.localcontext(prec=60, Emax=10**6, Emin=-(10**6)):
        values = [Decimal(c.numerator) / Decimal(c.denominator) for c in coefficients]
        return _bisect(values)


def _bisect(values: list[Decimal]) -> list[Decimal]:
    if len(values) == 2:
        return [-values[0] / values[1]]
    bound = 1 + max(abs(c / values[-1]) for c in values[:-1])
    ends = [-bound, *_bisect(_derivative(values)), bound]
    roots = []
    for low, high in zip(ends, ends[1:], strict=False):
        at_low, at_high = _horner(values, low), _horner(values, high)
        if (at_low > 0) == (at_high > 0):
            continue
        for _ in range(180):
            middle = (low + high) / 2
            if middle in (low, high):
                break
            if (_horner(values, middle) > 0) == (at_low > 0):
                low = middle
            else:
                high = middle
        roots.append((low + high) / 2)
    return roots
