"""`module:object` and `file.py:object`: other people's tasks, tools, judges and rewards, loaded by name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from swirl.errors import ConfigError
from swirl.storage.digest import digest_of

_REFERENCE = re.compile(r"(?P<where>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def is_reference(spec: str) -> bool:
    """Whether a spec is of the form module:object or file.py:object."""
    return "://" not in spec and _REFERENCE.fullmatch(spec) is not None


def load_object(spec: str, flag: str) -> Any:
    """The object that a reference names. The same file is loaded once. Raises ConfigError, which names the flag."""
    match = _REFERENCE.fullmatch(spec)
    if match is None:
        raise ConfigError(f"{flag} {spec}: expected module:object or file.py:object")
    module = _load_module(match["where"], f"{flag} {spec}")
    try:
        return getattr(module, match["name"])
    except AttributeError:
        raise ConfigError(f"{flag} {spec}: {match['where']} has no '{match['name']}'") from None


def name_of(spec: str, flag: str) -> str:
    """The reference with the digest of its source: what is resumed must have been begun with the same code."""
    module = _load_module(_REFERENCE.fullmatch(spec)["where"], f"{flag} {spec}")
    file = getattr(module, "__file__", None)
    return f"{spec} ({digest_of(Path(file).read_bytes())[:12]})" if file else spec


def _load_module(where: str, what: str) -> ModuleType:
    if where.endswith(".py") and not os.path.isfile(where):
        raise ConfigError(f"{what}: no such file")
    try:
        return _module_of_file(os.path.abspath(where)) if where.endswith(".py") else _module_of_name(where)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what}: {error}") from None
    except Exception as error:
        raise ConfigError(f"{what}: cannot be loaded ({explained(error)})") from None


def explained(error: BaseException) -> str:
    """An error of somebody's own code in one line, with the place it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())}"


def _module_of_name(name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:  # the `swirl` script has the folder of scripts there
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


@cache
def _module_of_file(path: str) -> ModuleType:
    name = f"swirl_file_{digest_of(path.encode())[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    if (folder := os.path.dirname(path)) not in sys.path:
        sys.path.append(folder)  # what lies beside the file can be imported from it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
