"""Who may import whom: docs/structure.md, read from the source. Imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import swirl

ROOT = Path(__file__).parents[1]
COMMANDS = {"__main__", "generate", "filter", "train", "evaluate", "report", "serve", "plan", "export"}
SHARED = {"errors", "storage", "trajectories"}

# What each room may import besides itself. The commands and `app`, not named here, sit on top; commands do not import
# one another.
MAY_IMPORT = {
    "errors": set(),
    "storage": {"errors"},
    "trajectories": {"errors", "storage"},
    "kernels": set(),
    "tree": {"errors", "kernels"},
    "model": {"errors", "storage", "kernels", "tree"},
    "rollout": SHARED,
    "tools": SHARED | {"rollout", "endpoints"},
    "endpoints": SHARED | {"rollout"},
    "judging": SHARED | {"rollout", "endpoints"},
    "sampling": SHARED | {"kernels", "tree", "model", "rollout"},
    "learning": SHARED | {"config", "kernels", "tree", "model"},
    "tasks": SHARED | {"rollout", "tools", "judging"},
    "config": {"errors", "tasks", "endpoints"},  # the names of the tasks are its defaults, limits of endpoints a part
}
WITHOUT_TORCH = ("errors", "storage", "trajectories", "config", "rollout", "tools", "endpoints", "judging", "tasks")
# Other libraries for the same job, to be compared with and never leant on.
PEERS = {"transformers", "trl", "peft", "vllm", "liger_kernel", "cut_cross_entropy", "verl", "torchtune"}


def sources():
    """(module name, path) of every file of the package, the linked kernels included."""
    for path in sorted((ROOT / "swirl").rglob("*.py")):
        if "kernels" not in path.parts[len(ROOT.parts) :]:
            yield module_name(path.relative_to(ROOT)), path
    for path in sorted((ROOT / "kernels").glob("*.py")):
        yield module_name(Path("swirl") / path.relative_to(ROOT)), path


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = dict(sources())


@cache
def imports(name):
    """(module, whether at load time) for each import of one module; relative names resolved."""
    path = MODULES[name]
    found = set()

    def walk(node, at_load):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update((alias.name, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                    parents = package[: len(package) - child.level + 1]
                    base = ".".join([*parents, base]) if base else ".".join(parents)
                for alias in child.names:
                    found.add((target(base, alias.name), at_load))
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                walk(child, at_load and not inside and not types_only)

    walk(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def target(base, name):
    """The module that `from base import name` reaches: a submodule, the home of a lazy name, or base."""
    if base == "swirl" and name in swirl._HOMES:
        return swirl._HOMES[name]
    return f"{base}.{name}" if f"{base}.{name}" in MODULES or base == "swirl.kernels" else base


def room(module):
    return module.split(".")[1] if module.startswith("swirl.") else None


def test_the_reader_sees_every_kind_of_import():
    assert {"swirl.errors", "swirl.tree.pack", "swirl.kernels.tree_attention"} <= set(MODULES)
    assert ("numba", True) in imports("swirl.tree.radix")
    assert ("swirl.kernels.cpu", True) in imports("swirl.kernels.tree_attention")
    assert ("swirl.kernels._cpu", False) in imports("swirl.kernels.cpu")
    assert target("swirl", "pack") == "swirl.tree.pack" and target("swirl", "__version__") == "swirl"


def test_rooms_import_only_what_they_may():
    wrong = {}
    for name in MODULES:
        if room(name) in MAY_IMPORT:  # else on top
            allowed = MAY_IMPORT[room(name)] | {room(name), None}
            wrong[name] = sorted(module for module, _ in imports(name) if room(module) not in allowed)
    assert not {name: modules for name, modules in wrong.items() if modules}


def test_no_room_is_missing():
    assert set(MAY_IMPORT) <= {room(name) for name in MODULES}


def test_kernels_know_only_their_siblings():
    """They are reached by a link, so they name neither end of it."""
    for name, path in MODULES.items():
        if room(name) == "kernels":
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            named = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
            named += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            assert not {module.split(".")[0] for module in named} & {"swirl", "kernels"}, name


def test_peers_are_for_tests_and_benchmarks():
    assert not [name for name in MODULES if {module.split(".")[0] for module, _ in imports(name)} & PEERS]


def test_light_rooms_never_import_torch():
    for name in MODULES:
        if room(name) in WITHOUT_TORCH:
            assert "torch" not in {module.split(".")[0] for module, _ in imports(name)}, name


def test_learning_reaches_no_rollout_while_it_loads():
    for name in MODULES:
        if room(name) == "learning":
            assert not {"rollout", "tools", "endpoints"} & {room(module) for module in reached(name, packages=True)}, (
                name
            )


def reached(name, packages):
    """All of swirl's modules that importing `name` imports; with `packages`, those above each of them too."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        found = {other for other, at_load in imports(module) if at_load and other in MODULES}
        if packages and module != "swirl":
            found.add(module.rpartition(".")[0])
        waiting += (found & MODULES.keys()) - seen
        seen |= found
    return seen


def test_no_module_waits_for_itself():
    assert not [name for name in MODULES if name in reached(name, packages=False)]


def test_commands_import_no_other_and_app_has_no_circle():
    """Inside functions either."""
    on_top = {name for name in MODULES if room(name) not in MAY_IMPORT and name != "swirl"}
    assert {"swirl.report", "swirl.evaluate", "swirl.app.scores", "swirl.app.command"} <= on_top
    commands = {f"swirl.{name}" for name in COMMANDS} & on_top
    for name in commands:
        assert not {module for module, _ in imports(name)} & commands, name
    left = {name: {module for module, _ in imports(name)} & on_top for name in on_top}
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


def test_light_modules_load_no_torch():
    """What `python -m swirl.filter --help` and the users of an endpoint wait for."""
    light = ["swirl", "swirl.filter", "swirl.generate", "swirl.evaluate", "swirl.report", "swirl.app.scores"]
    light += [name for name in MODULES if room(name) in WITHOUT_TORCH]
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code, *light], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lazy_names_are_where_they_are_said_to_be():
    for name, home in swirl._HOMES.items():
        assert getattr(swirl, name).__module__ == home
    assert set(swirl._HOMES) <= set(dir(swirl))
    with pytest.raises(AttributeError, match="module 'swirl' has no attribute 'packs'"):
        _ = swirl.packs
