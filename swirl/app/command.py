"""What the commands share: flags from a frozen dataclass, results on stdout, one line and an exit code for errors.

Exit codes: 0 done, 1 a known error (one line on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from swirl.errors import ConfigError, SwirlError
from swirl.storage.digest import DigestError, seal, unseal
from swirl.storage.files import replace_file

Config = TypeVar("Config")


def config_from_json(path: str, kind: type[Config]) -> Config:
    """A config dataclass from a JSON object; absent keys keep their defaults. Raises ConfigError naming the key."""
    values = read_object(path)
    _refuse_unknown_keys(values, kind, path)
    try:
        return msgspec.convert(values, kind, strict=True, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        key = f"key '{where.rstrip('`')}': " if where else ""  # a config's own check names its flag
        raise ConfigError(f"{path}: {key}{message}") from None


def read_object(path: str | os.PathLike) -> dict:
    """A JSON object, held to its digest where it has one. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            values = msgspec.json.decode(unseal(file.read()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except DigestError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a JSON object ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return values


def _refuse_unknown_keys(values: dict, kind: type, path: str, inside: str = "") -> None:
    known = {field.name: field.default for field in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{path}: key '{inside}{key}' is unknown: expected one of {', '.join(sorted(known))}")
        if is_dataclass(known[key]) and isinstance(value, dict):
            _refuse_unknown_keys(value, type(known[key]), path, f"{inside}{key}.")


def config_to_json(config: object) -> bytes:
    """Indented, with a digest, as `config_from_json` reads it."""
    return seal(msgspec.json.format(msgspec.json.encode(asdict(config), enc_hook=os.fspath), indent=2) + b"\n")


def refuse_other_settings(
    config: object, outputs: Sequence[Path], *, may_change: Collection[str], known_as: Mapping[str, str]
) -> None:
    """Files are resumed only with the settings that began them, which lie beside the first. Raises ConfigError.

    Call it with the outputs' logs open: their locks keep a second command from replacing the settings of one at work.
    `known_as` says more than a flag does: which weights lie in a folder, which template in a file.
    """
    settings = {name: str(value) for name, value in asdict(config).items() if name not in may_change}
    settings |= known_as
    beside = outputs[0].with_name(outputs[0].name + ".settings.json")
    if beside.exists() and beside.stat().st_size and any(out.exists() and out.stat().st_size for out in outputs):
        for name, value in read_object(beside).items():
            if settings.get(name) != value:
                raise ConfigError(
                    f"{outputs[0]} was begun with --{name.replace('_', '-')} {value}, not {settings.get(name)}: "
                    "take another file, or the same settings"
                )
    beside.parent.mkdir(parents=True, exist_ok=True)
    replace_file(beside, seal(msgspec.json.encode(settings)))


def require_at_least(least: float, config: object, *flags: str) -> None:
    """Raises ConfigError on a flag below `least`; None stands for a default, and passes."""
    for flag in flags:
        value = getattr(config, flag)
        if value is not None and not value >= least:
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: expected at least {least}")


def parse(kind: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """Flags over defaults; `--config FILE` (JSON, such as a run's own config.json) replaces the defaults."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    default = kind()
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ConfigError("--config: expected the path of a JSON file")
        default = config_from_json(argv[at + 1], kind)
        del argv[at : at + 2]
    description += "\n\nAlso: --config FILE takes defaults from a JSON file, such as the config.json of a run."
    name = sys.argv[0] if sys.argv[0].startswith("swirl ") else f"python -m swirl.{Path(sys.argv[0]).stem}"
    return tyro.cli(kind, prog=name, args=argv, default=default, description=description)


def warn(text: str) -> None:
    """One line on stderr, for what a user should know and nothing stops at."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def first_reasons(reasons: Iterable[str]) -> str:
    """The three most frequent in one line, each with its count."""
    counted = Counter(reasons)
    shown = [f"{count} x {reason}" for reason, count in counted.most_common(3)]
    return "; ".join([*shown, *(["…"] if len(counted) > 3 else [])])


def run(command: Callable[[Config], None], kind: type[Config], description: str) -> None:
    """Parse, run, and leave with the right exit code. The body of every `python -m swirl.<command>`."""
    try:
        command(parse(kind, description))
        sys.stdout.flush()
    except SwirlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that is not ours
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
