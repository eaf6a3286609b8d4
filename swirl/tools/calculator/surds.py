"""Exact arithmetic for the calculator: sums of rationals times roots and powers of pi.

    Number = sum over keys of coefficient * product of base ** exponent
A key is a sorted tuple of (base, exponent): base 0 stands for pi with any exponent but 0; every other base
is an integer > 1, prime or without factors below 1000, with an exponent in (0, 1). The empty key is
the rational part.

Sums, differences and products are exact, division by one term is, and by `a + b*sqrt(n)`; so are rational
powers of one term. What has no such form (2**pi, sqrt(1 + sqrt(2))) becomes APPROXIMATE: a rational good to
40 digits. Everything is bounded: digits, terms, and the work of one calculation, counted in operations
rather than in time so that an expression is refused on every machine or on none.
"""

from __future__ import annotations

import decimal
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache
from math import isqrt

from swirl.errors import CalculatorError

EXACT, DECIMAL, APPROXIMATE = 0, 1, 2

MAX_DIGITS = 1000
MAX_TERMS = 32
MAX_ROOT = 10**6  # the degree of a root that is kept exact
MAX_WORK = 4_000
_MAX_BITS = int(MAX_DIGITS * 3.3219281)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")

Key = tuple[tuple[int, Fraction], ...]


@dataclass(frozen=True, slots=True)
class Number:
    """`terms` never holds a zero; `kind` is the least exact of all that went into it, APPROXIMATE is
    rational.
    """

    terms: dict[Key, Fraction]
    kind: int = EXACT

    @property
    def is_zero(self) -> bool:
        if self.kind == APPROXIMATE:
            return abs(self.rational) < Fraction(1, 10**30)
        return not self.terms

    @property
    def rational(self) -> Fraction | None:
        """Its value where it is rational, else None."""
        if not self.terms:
            return Fraction(0)
        return self.terms.get(()) if len(self.terms) == 1 else None


def number(value: Fraction | int, kind: int = EXACT) -> Number:
    value = Fraction(value)
    return Number({(): value} if value else {}, kind)


PI = Number({((0, Fraction(1)),): Fraction(1)})


def _refuse_digits():
    raise CalculatorError(f"a number with more than {MAX_DIGITS} digits")


class Arithmetic:
    """The operations of one calculation; `work` is what it has spent. Each raises CalculatorError beyond a
    limit.
    """

    def __init__(self):
        self.work = 0
        self._keys: list[Key] = []
        self._places: dict[Key, int] = {}
        self._products: dict[tuple[int, int], tuple[int, Fraction | int]] = {}

    def spend(self, work: int) -> None:
        """Called before the work is done; a unit takes about 5 microseconds."""
        self.work += work
        if self.work > MAX_WORK:
            raise CalculatorError("too much work for one calculation")

    def _made(self, terms: dict[Key, Fraction], kind: int) -> Number:
        self.spend(1 + len(terms))
        if len(terms) > MAX_TERMS:
            raise CalculatorError(f"a sum of more than {MAX_TERMS} different roots")
        if kind == APPROXIMATE:
            self.spend(4 * len(terms))
            with decimal.localcontext(prec=50, Emax=10**6, Emin=-(10**6)):
                value = +value_of(Number(terms))
            terms = {(): Fraction(value)} if value else {}
        for value in terms.values():
            bits = value.numerator.bit_length(), value.denominator.bit_length()
            if max(bits) > _MAX_BITS:
                _refuse_digits()
            self.spend(sum(bits) // 500)
        return Number(terms, kind)

    def add(self, a: Number, b: Number) -> Number:
        terms = dict(a.terms)
        for key, value in b.terms.items():
            total = terms.get(key, 0) + value
            if total:
                terms[key] = total
            else:
                del terms[key]
        return self._made(terms, max(a.kind, b.kind))

    def negate(self, a: Number) -> Number:
        return self._made({key: -value for key, value in a.terms.items()}, a.kind)

    def subtract(self, a: Number, b: Number) -> Number:
        return self.add(a, self.negate(b))

    def multiply(self, a: Number, b: Number) -> Number:
        pairs = len(a.terms) * len(b.terms)
        self.spend(2 * pairs + pairs * (_bits(a) + _bits(b)) // 1000)
        left = [(self._place(key), value) for key, value in a.terms.items()]
        right = [(self._place(key), value) for key, value in b.terms.items()]
        sums: dict[int, Fraction] = {}
        for i, x in left:
            for j, y in right:
                place, factor = self._product(i, j)
                value = x * y if factor == 1 else x * y * factor
                sums[place] = sums[place] + value if place in sums else value
        return self._made({self._keys[at]: value for at, value in sums.items() if value}, max(a.kind, b.kind))

    def _place(self, key: Key) -> int:
        """The key's number in this calculation: to hash fractions takes longer than to multiply them."""
        if key not in self._places:
            self._places[key] = len(self._keys)
            self._keys.append(key)
        return self._places[key]

    def _product(self, i: int, j: int) -> tuple[int, Fraction | int]:
        """The place of the product of two keys, and the factor that goes into the coefficient."""
        if (i, j) not in self._products:
            a, b = self._keys[i], self._keys[j]
            self.spend(3 if a and b else 0)
            key, factor = _join(a, b) if a and b else (a or b, 1)
            self._products[i, j] = self._place(key), factor
        return self._products[i, j]

    def divide(self, a: Number, b: Number) -> Number:
        if b.is_zero:
            raise CalculatorError("division by zero")
        if len(b.terms) == 1:
            ((key, value),) = b.terms.items()
            key, factor = _normal({base: -exponent for base, exponent in key})
            return self.multiply(a, Number({key: factor / value}, b.kind))
        conjugate = _conjugate(b)
        if conjugate is None:
            return self.divide(a, self.approximate(b))
        return self.divide(self.multiply(a, conjugate), self.multiply(b, conjugate))

    def power(self, a: Number, b: Number) -> Number:
        exponent = b.rational
        if exponent is None:
            exponent, b = self.approximate(b).rational, self.approximate(b)
        kind = max(a.kind, b.kind)
        if exponent == 0:
            return number(1, kind)
        if a.is_zero:
            if exponent < 0:
                raise CalculatorError("division by zero")
            return number(0, kind)
        if exponent.denominator != 1 and self.sign(a) < 0:
            raise CalculatorError("a root of a negative number is not real")
        if abs(exponent) * _bits(a) > 2 * _MAX_BITS:
            _refuse_digits()
        if len(a.terms) == 1:
            if exponent.denominator == 1 or (kind != APPROXIMATE and exponent.denominator <= MAX_ROOT):
                ((key, value),) = a.terms.items()
                return self._power_of_term(key, value, exponent, kind)
        elif exponent.denominator == 1 and abs(exponent) <= 64:
            result, square, left = number(1), a, abs(exponent.numerator)
            while left:
                if left & 1:
                    result = self.multiply(result, square)
                left >>= 1
                if left:
                    square = self.multiply(square, square)
            return self.divide(number(1, kind), result) if exponent < 0 else self._made(result.terms, kind)
        self.spend(100)
        with decimal.localcontext(prec=60, Emax=10**6, Emin=-(10**6)):
            base = value_of(a)
            if abs(exponent) * (abs(base.adjusted()) + 1) > 2 * MAX_DIGITS:
                _refuse_digits()
            value = base ** _decimal(exponent)
        return self._made({(): Fraction(value)}, APPROXIMATE)

    def _power_of_term(self, key: Key, value: Fraction, exponent: Fraction, kind: int) -> Number:
        if exponent.denominator == 1:
            key, factor = _normal({base: power * exponent for base, power in key})
            return self._made({key: value**exponent.numerator * factor}, kind)
        self.spend(100 + _bits(number(value)) // 8)
        exponents = {base: power * exponent for base, power in key}
        sides = ((value.numerator, 1), (value.denominator, -1))
        for base, power in [(b, p * side) for n, side in sides for b, p in _factors(n)]:
            exponents[base] = exponents.get(base, 0) + power * exponent
        key, factor = _normal(exponents)
        return self._made({key: factor}, kind)

    def approximate(self, a: Number) -> Number:
        """The same value as one rational of 50 digits."""
        return self._made(a.terms, APPROXIMATE)

    def sign(self, a: Number) -> int:
        if a.is_zero:
            return 0
        self.spend(20 * len(a.terms))
        return 1 if value_of(a) > 0 else -1


def _bits(a: Number) -> int:
    """About log2 of the largest or smallest number in it, at least 0."""
    return max((max(v.numerator.bit_length(), v.denominator.bit_length()) - 1 for v in a.terms.values()), default=0)


def _normal(exponents: dict[int, Fraction]) -> tuple[Key, Fraction]:
    """Whole powers of the bases go into the factor; what stays is the key."""
    factor, key = Fraction(1), []
    for base, exponent in exponents.items():
        if abs(exponent) > MAX_DIGITS or exponent.denominator > MAX_ROOT**2:
            _refuse_digits()
        if base:
            whole = exponent.numerator // exponent.denominator
            if abs(whole) * base.bit_length() > 2 * _MAX_BITS:
                _refuse_digits()
            factor *= Fraction(base) ** whole
            exponent -= whole
        if exponent:
            key.append((base, exponent))
    return tuple(sorted(key)), factor


def _join(a: Key, b: Key) -> tuple[Key, Fraction]:
    exponents = dict(a)
    for base, exponent in b:
        exponents[base] = exponents.get(base, 0) + exponent
    return _normal(exponents)


def _conjugate(b: Number) -> Number | None:
    """What makes `a + b*sqrt(n)` rational, None for any other sum."""
    if len(b.terms) != 2 or any(base == 0 or power != Fraction(1, 2) for key in b.terms for base, power in key):
        return None
    first = next(iter(b.terms))
    return Number({key: value if key == first else -value for key, value in b.terms.items()}, b.kind)


@cache
def _primes() -> tuple[int, ...]:
    sieve = bytearray([1]) * 1000
    for i in range(2, 32):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(sieve[i * i :: i]))
    return tuple(i for i in range(2, 1000) if sieve[i])


def _factors(n: int) -> list[tuple[int, int]]:
    """(base, power) pairs whose product is n; every base is prime, or has no factor below 1000."""
    found = []
    for prime in _primes():
        if prime * prime > n:
            break
        power = 0
        while n % prime == 0:
            n //= prime
            power += 1
        if power:
            found.append((prime, power))
    if n > 1:
        found.append(_perfect_power(n))
    return found


def _perfect_power(n: int) -> tuple[int, int]:
    """(root, power) with root ** power == n, for powers whose prime factors are below 20."""
    power = 1
    for prime in (2, 3, 5, 7, 11, 13, 17, 19):
        if 10 * prime > n.bit_length():
            break
        while (root := integer_root(n, prime)) ** prime == n:
            n, power = root, power * prime
    return n, power


def integer_root(n: int, degree: int) -> int:
    """The greatest r with r ** degree <= n, for n > 0."""
    if degree == 2:
        return isqrt(n)
    root = 1 << -(-n.bit_length() // degree)
    while True:
        better = ((degree - 1) * root + n // root ** (degree - 1)) // degree
        if better >= root:
            return root
        root = better


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def value_of(a: Number) -> Decimal:
    """Its value, good to 40 digits. Raises CalculatorError where its terms cancel beyond 50 digits."""
    for precision in (60, 100):
        with decimal.localcontext(prec=precision, Emax=10**6, Emin=-(10**6)):
            terms = [_value_of_term(key, value) for key, value in a.terms.items()]
            total = sum(terms, Decimal(0))
        if len(terms) < 2 or total and max(t.adjusted() for t in terms) - total.adjusted() < precision - 50:
            return total
    raise CalculatorError("a difference too small to tell from zero")


def _value_of_term(key: Key, value: Fraction) -> Decimal:
    term = _decimal(value)
    for base, exponent in key:
        term *= (Decimal(base) if base else _PI) ** _decimal(exponent)
    return term
