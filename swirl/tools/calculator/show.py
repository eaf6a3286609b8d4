"""How the calculator writes a number down: as SymPy prints it."""

from __future__ import annotations

import decimal
from fractions import Fraction

from swirl.tools.calculator.surds import EXACT, Key, Number, value_of

_SIGNIFICANT = 15  # digits of a decimal result, as SymPy shows a Float


def show(a: Number) -> str:
    """As SymPy prints it: 24, 1/3, 3*sqrt(2)/4, 1 + pi; plain decimals where the input had some.

    A decimal is exact where 15 significant digits (or a whole number) say it all, else rounded to 15.
    """
    if a.kind != EXACT:
        return _show_decimal(a)
    if not a.terms:
        return "0"
    text = ""
    for key, value in sorted(a.terms.items(), key=lambda item: (len(item[0]), item[0])):
        term = _show_term(key, abs(value))
        text += (" - " if value < 0 else " + ") + term if text else ("-" if value < 0 else "") + term
    return text


def _show_term(key: Key, value: Fraction) -> str:
    over: dict[Fraction, int] = {}
    powers, under = [], []
    for base, exponent in key:
        if base:
            over[exponent] = over.get(exponent, 1) * base
        elif exponent > 0:
            powers.append(_show_power("pi", exponent))
        else:
            under.append(_show_power("pi", -exponent))
    powers = [_show_power(str(base), exponent) for exponent, base in sorted(over.items())] + powers
    if value.numerator != 1 or not powers:
        powers.insert(0, str(value.numerator))
    if value.denominator != 1:
        under.insert(0, str(value.denominator))
    if not under:
        return "*".join(powers)
    return "*".join(powers) + "/" + (under[0] if len(under) == 1 else f"({'*'.join(under)})")


def _show_power(base: str, exponent: Fraction) -> str:
    if exponent == 1:
        return base
    if exponent == Fraction(1, 2):
        return f"sqrt({base})"
    return f"{base}**{exponent}" if exponent.denominator == 1 else f"{base}**({exponent})"


def _show_decimal(a: Number) -> str:
    exact = a.rational
    if exact is not None and exact.denominator == 1 and abs(exact) < 10**30:
        return str(exact.numerator)
    with decimal.localcontext(prec=_SIGNIFICANT, Emax=10**6, Emin=-(10**6)):
        rounded = (+value_of(a)).normalize()
    if rounded == rounded.to_integral_value() and abs(rounded) < 10**30:
        return str(int(rounded))
    text = format(rounded, "f") if -10 < rounded.adjusted() < 30 else format(rounded, "e")
    return text.replace("e+", "e")
