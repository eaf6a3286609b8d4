"""What the commands share: flags from a frozen dataclass, results on stdout, one line and an exit code for errors.

Exit codes: 0 done, 1 a known error of data or servers, 2 wrong usage, found early or late, 130 interrupted; an error is
one line on stderr. Flags come in groups: the frozen dataclasses that a config inherits, each with a sentence, while
their names and the keys of a config file stay flat. Own fields of such a config are dataclasses: flags with a prefix.
"""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from inspect import getdoc
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import msgspec

from swirl.errors import ConfigError, SwirlError
from swirl.storage.digest import DigestError, seal, unseal
from swirl.storage.files import replace_file

Config = TypeVar("Config")


def config_from_json(path: str, kind: type[Config]) -> Config:
    """A config dataclass from a JSON object; absent keys keep their defaults. Raises ConfigError naming the key."""
    values = getattr(kind, "in_todays_words", dict)(read_object(path))
    known = asdict(kind())
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{path}: key '{key}' is unknown: expected one of {', '.join(sorted(known))}")
        if isinstance(known[key], dict) and isinstance(value, dict) and not value.keys() <= known[key].keys():
            unknown, expected = min(value.keys() - known[key].keys()), ", ".join(sorted(known[key]))
            raise ConfigError(f"{path}: key '{key}.{unknown}' is unknown: expected one of {expected}")
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
    if beside.exists() and any(out.exists() and out.stat().st_size for out in outputs):
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


def require_port(config: object) -> None:
    """Raises ConfigError on a --port that is none."""
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"--port {config.port}: expected 0 to 65535")


def require_no_folder(config: object, *flags: str) -> None:
    """Raises ConfigError on a flag for a file that names a folder; None stands for a default, and passes."""
    for flag in flags:
        path = getattr(config, flag)
        if path is not None and path.is_dir():
            raise ConfigError(f"--{flag.replace('_', '-')} {path}: is a folder, expected a file")


def parse(kind: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """Flags over defaults; `--config FILE` (JSON, such as a run's own config.json) replaces the defaults.

    Raises ConfigError where a flag cannot be read, or the values contradict one another.
    """
    import tyro

    argv, default = _take_config_file(list(sys.argv[1:] if argv is None else argv), kind)
    description += "\n\nAlso: --config FILE takes defaults from a JSON file, such as the config.json of a run."
    module = sys.modules["__main__"].__spec__  # of `python -m MODULE`
    program = f"python -m {module.name}" if module and not sys.argv[0].startswith("swirl ") else sys.argv[0]
    shown = _in_groups(default)
    boxed = io.StringIO()
    try:
        with redirect_stderr(boxed):
            made = tyro.cli(type(shown), prog=program, args=argv, default=shown, description=description)
    except SystemExit as left:
        if left.code == 0:  # --help
            raise
        raise ConfigError(_unboxed(boxed.getvalue())) from None
    groups = {_name(group) for group in _groups(kind)}
    values = {name: value for name, value in vars(made).items() if name not in groups}
    for group in groups:
        values |= vars(getattr(made, group))
    return kind(**values)


def _unboxed(text: str) -> str:
    """What tyro says of a flag in a box, as one line: the first part, and the flags that it thinks were meant."""
    lines = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")] or text.split("\n")
    ends = next((at for at, line in enumerate(lines) if line and not line.strip("─")), len(lines))
    similar = [line.split()[0] for line in lines[ends:] if line.startswith("--")]
    return " ".join(lines[:ends]) + (f"; perhaps {' or '.join(similar)} was meant" if similar else "")


def _groups(kind: type) -> list[type]:
    """The dataclasses that a config inherits, and their flags with them."""
    return [group for group in kind.__mro__[1:] if is_dataclass(group)]


def _name(group: type) -> str:
    """What a group is called in the help: TaskFlags is `task`."""
    return group.__name__.removesuffix("Flags").lower()


def _in_groups(config: object) -> object:
    """The config's values as tyro shows them, each group that it inherits as a field. No check runs in it: a config
    checks itself when it is made, and tyro boxes what it says.
    """
    from tyro.conf import OmitArgPrefixes, arg

    kind, groups = type(config), _groups(type(config))
    if not groups:
        unchecked = dataclass(frozen=True)(type(kind.__name__, (kind,), {"__post_init__": lambda self: None}))
        return unchecked(**vars(config))
    members = []
    for group in groups:
        values = {member.name: getattr(config, member.name) for member in fields(group)}
        shown = Annotated[group, OmitArgPrefixes, arg(help=getdoc(group))]  # tyro before 1.0.16 leaves the text out
        members.append((_name(group), shown, field(default=group(**values))))
    inherited = {member.name for group in groups for member in fields(group)}
    for member in fields(kind):
        if member.name not in inherited:
            kind_of = get_type_hints(kind, include_extras=True)[member.name]
            members.append((member.name, kind_of, field(default=getattr(config, member.name))))
    return make_dataclass(kind.__name__, members, frozen=True)()


def _take_config_file(argv: list[str], kind: type[Config]) -> tuple[list[str], Config]:
    """(the other flags, the defaults) of `--config FILE` or `--config=FILE`."""
    for at, flag in enumerate(argv):
        if flag == "--config" and at + 1 < len(argv):
            return argv[:at] + argv[at + 2 :], config_from_json(argv[at + 1], kind)
        if flag.startswith("--config=") and flag != "--config=":
            return argv[:at] + argv[at + 1 :], config_from_json(flag.partition("=")[2], kind)
        if flag in ("--config", "--config="):
            raise ConfigError("--config: expected the path of a JSON file")
    return argv, kind()


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


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
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that is not ours
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
