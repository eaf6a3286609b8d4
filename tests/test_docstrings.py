"""Public names and flags say what they are: a docstring each, and the errors that they raise."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re

import pytest

import swirl
from swirl.__main__ import COMMANDS

# What a docstring of these must speak of: shapes, dtypes, units.
SAYS = {
    "Gemma.token_log_probs": "(M,)",
    "Gemma.sub_trajectory_log_probs": "(S,)",
    "PackedBatch": "(T,)",
    "pack": "Raises",
    "Tool": "_s",
}


def public():
    """(name, object) of what `swirl` hands on, and of the public methods and properties that are its own."""
    for name in swirl.__all__:
        thing = getattr(swirl, name)
        yield name, thing
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                value = value.fget if isinstance(value, property) else value
                if not member.startswith("_") and inspect.isfunction(value):
                    yield f"{name}.{member}", value


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_says_what_it_is(name):
    text = inspect.getdoc(PUBLIC[name])
    assert text and not text.startswith(f"{name}("), f"{name} has no docstring of its own"
    assert SAYS.get(name, "") in text, f"{name}: expected '{SAYS[name]}' in\n{text}"


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isfunction(thing)])
def test_what_it_raises_is_said(name):
    """Errors of swirl's own that stand in its body; those of what it calls are the docstring's to know."""
    function = PUBLIC[name]
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(function))))
    raised = {
        node.exc.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    owner = PUBLIC[name.partition(".")[0]]
    said = f"{inspect.getdoc(function)} {inspect.getdoc(owner)}"
    for error in raised:
        assert re.search(rf"\b{error}\b", said), f"{name} raises {error} and does not say so"


def configs():
    for command in COMMANDS:
        module = importlib.import_module(f"swirl.{command}")
        for name, kind in vars(module).items():
            if dataclasses.is_dataclass(kind) and name.endswith("Config"):
                for group in kind.__mro__:
                    if dataclasses.is_dataclass(group):
                        yield group


@pytest.mark.parametrize("group", sorted(set(configs()), key=lambda kind: kind.__qualname__), ids=lambda k: k.__name__)
def test_every_flag_has_a_sentence(group):
    body = ast.parse(inspect.cleandoc(inspect.getsource(group))).body[0].body
    own = {field.name for field in dataclasses.fields(group)} - {
        field.name for base in group.__mro__[1:] if dataclasses.is_dataclass(base) for field in dataclasses.fields(base)
    }
    for at, node in enumerate(body):
        if isinstance(node, ast.AnnAssign) and node.target.id in own - {"endpoint"}:
            after = body[at + 1] if at + 1 < len(body) else None
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert said, f"{group.__name__}.{node.target.id} has no sentence"
