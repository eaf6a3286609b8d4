"""Questions, steps and trajectories, and their JSONL form: one trajectory a line.

Token ids travel with the text, so nothing is tokenised again between turns:
state s_k = prompt_ids + (action_ids + observation_ids of every step before k).
`observation_ids` holds the whole turn around the result, as the next state continues with it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from swirl.errors import InputError

SCHEMA_VERSION = 1
Verdict = Literal["GOOD", "BAD"]


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is asked. `answer` is the golden answer, None where there is none; `hops` the known number of steps."""

    id: str
    task: str
    question: str
    answer: str | None = None
    aliases: tuple[str, ...] = ()
    hops: int | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One action and what came back.

    `log_probs` are the behaviour policy's, one natural log per action id, under the distribution the action was drawn
    from (its temperature within); greedy actions have those of temperature 1. A server's are kept as it gives them:
    where those are of temperature 1 whatever it draws at, the importance ratio corrects for the model alone.
    """

    action: str
    observation: str | None = None
    action_ids: tuple[int, ...] | None = None
    observation_ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    verdict: Verdict | None = None
    reason: str | None = None
    reward: float | None = None


class Trajectory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """K steps answering one question. `stop` says why it ended; `prediction` is the answer given, if any.

    `tokenizer` is the fingerprint of the tokenizer that made the ids (None: no ids).
    `outcome` says whether the final answer is correct, `dropped` why a filter let the trajectory go.
    `retokenized` says the ids were made from text once, because the policy's endpoint gave none.
    """

    id: str
    question: Question
    prompt: str
    steps: tuple[Step, ...]
    stop: Literal["answer", "step_limit", "invalid_action", "context_limit"]
    sample: int = 0
    prediction: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    tokenizer: str | None = None
    retokenized: bool = False
    policy: str | None = None
    outcome: bool | None = None
    dropped: str | None = None
    schema: int = SCHEMA_VERSION

    def state_ids(self, k: int) -> list[int]:
        """Token ids of state k (from 0), all before action k. Raises ValueError where ids are absent."""
        if self.prompt_ids is None:
            raise ValueError(f"trajectory {self.id} carries no token ids")
        ids = list(self.prompt_ids)
        for step in self.steps[:k]:
            ids += (step.action_ids or ()) + (step.observation_ids or ())
        return ids

    def sub_trajectories(self) -> list[tuple[list[int], list[int]]]:
        """The k (state_ids, action_ids) pairs of a trajectory of k actions."""
        return [(self.state_ids(k), list(step.action_ids or ())) for k, step in enumerate(self.steps)]


_decoder = msgspec.json.Decoder(Trajectory)
_encoder = msgspec.json.Encoder()


def decode_trajectory(
    text: bytes | str, file: str | os.PathLike = "<memory>", line: int | None = None
) -> Trajectory:
    """Parse and validate one line. Raises InputError naming file, line and field."""
    try:
        trajectory = _decoder.decode(text)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise InputError(file, message, line=line, field=path.strip("`.") or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(file, f"expected one JSON object a line, in UTF-8 ({error})", line=line) from None
    _validate(trajectory, file, line)
    return trajectory


def _validate(trajectory: Trajectory, file, line) -> None:
    def refuse(field, expected):
        raise InputError(file, expected, line=line, field=field)

    if trajectory.schema != SCHEMA_VERSION:
        refuse("schema", f"expected {SCHEMA_VERSION}, got {trajectory.schema}")
    if not trajectory.steps:
        refuse("steps", "expected at least one step")
    has_ids = trajectory.prompt_ids is not None
    if has_ids and not trajectory.prompt_ids:
        refuse("prompt_ids", "expected at least one token id")
    if has_ids and min(trajectory.prompt_ids) < 0:
        refuse("prompt_ids", "expected token ids >= 0")
    last = len(trajectory.steps) - 1
    for k, step in enumerate(trajectory.steps):
        if has_ids != (step.action_ids is not None):
            refuse(f"steps[{k}].action_ids", "expected ids on the prompt and on every action, or on none")
        if has_ids and not step.action_ids:
            refuse(f"steps[{k}].action_ids", "expected at least one token id")
        if has_ids and k < last and not step.observation_ids:
            refuse(f"steps[{k}].observation_ids", "expected token ids of what follows the action")
        for name in ("action_ids", "observation_ids"):
            if getattr(step, name) and min(getattr(step, name)) < 0:
                refuse(f"steps[{k}].{name}", "expected token ids >= 0")
        if step.log_probs is not None and len(step.log_probs) != len(step.action_ids or ()):
            refuse(
                f"steps[{k}].log_probs", f"expected {len(step.action_ids or ())} values, one per action id"
            )


def encode_trajectory(trajectory: Trajectory) -> bytes:
    """One line of JSON, newline included."""
    return _encoder.encode(trajectory) + b"\n"


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of every non-blank line. Raises InputError if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None


def iter_trajectories(path: str | os.PathLike) -> Iterator[Trajectory]:
    """Stream a JSONL file. Raises InputError naming file, line and field."""
    for number, line in read_lines(path):
        yield decode_trajectory(line, path, number)


def read_trajectories(path: str | os.PathLike) -> list[Trajectory]:
    """All trajectories of a JSONL file; an empty file is an InputError."""
    trajectories = list(iter_trajectories(path))
    if not trajectories:
        raise InputError(path, "expected at least one trajectory, the file is empty")
    return trajectories


def write_trajectories(path: str | os.PathLike, trajectories: Iterable[Trajectory]) -> int:
    """Write aside, then rename, so that no reader sees half a file. Returns the number written."""
    aside = f"{os.fspath(path)}.partial"
    count = 0
    with open(aside, "wb") as file:
        for trajectory in trajectories:
            file.write(encode_trajectory(trajectory))
            count += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return count


class _Asked(msgspec.Struct, frozen=True):
    question: str = ""


class _Name(msgspec.Struct):
    id: str
    question: _Asked = _Asked()


def take_lock(file) -> bool:
    """Lock an open file, or the descriptor of a folder, until it is closed. False where another has it locked.

    True on a file system without locks, too: there nothing tells.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class TrajectoryLog:
    """An append-only JSONL file that survives being killed: half a trajectory at its end is cut off on reopening.

    `done` holds the ids already there; `answers_another` tells whether one is of another question. Lines are flushed
    to disk in groups of `group`; use it as a context manager. Raises InputError where an existing line is neither a
    trajectory nor the first half of one (the file is left as it is), and where another process has the file open as a
    log: a second run of a command that is still at work.
    """

    def __init__(self, path: str | os.PathLike, *, group: int = 64):
        self.path, self._group, self._unsynced = os.fspath(path), group, 0
        self.done: set[str] = set()
        self._asked: dict[str, int] = {}  # id: hash of the question's text
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        self._file = open(self.path, "a+b")
        try:
            self._lock()
            self._recover()
        except InputError:
            self._file.close()
            raise

    def _lock(self) -> None:
        """Ends with the process, however that ends."""
        if not take_lock(self._file):
            raise InputError(self.path, "another command is writing to it: wait for its end, or stop it")

    def _recover(self) -> None:
        self._file.seek(0)
        end, decoder = 0, msgspec.json.Decoder(_Name)
        for number, line in enumerate(self._file, 1):
            if line.strip():
                try:
                    found = decoder.decode(line)
                    self.done.add(found.id)
                    self._asked[found.id] = hash(found.question.question)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    if _is_half(line, error):
                        self._file.truncate(end)
                        return
                    raise InputError(self.path, f"expected a trajectory ({error})", line=number) from None
            end += len(line)
        if end and not line.endswith(b"\n"):
            self._file.write(b"\n")  # killed, or edited by hand, just before it

    def answers_another(self, trajectory_id: str, question: Question) -> bool:
        """Whether the trajectory of that id, found when the log was opened, answers another question's text."""
        return self._asked.get(trajectory_id, hash(question.question)) != hash(question.question)

    def append(self, trajectory: Trajectory) -> None:
        self.done.add(trajectory.id)
        self._file.write(encode_trajectory(trajectory))
        self._unsynced += 1
        if self._unsynced >= self._group:
            self.sync()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def __enter__(self) -> TrajectoryLog:
        return self

    def __exit__(self, *exc) -> None:
        self.sync()
        self._file.close()


def _is_half(line: bytes, error: Exception) -> bool:
    """Whether a line that cannot be read is what a kill, or a power cut (zeros), leaves of one that was being written.

    Anything else is somebody's, and not ours to cut.
    """
    whole = line.endswith(b"\n") or isinstance(error, msgspec.ValidationError)
    return not whole and (line.startswith(b"{") or not line.strip(b"\0"))
