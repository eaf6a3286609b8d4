"""Does a run that is stopped at random moments end as the undisturbed one, to the bit, and is its last update saved?

    python -m tests.drills resume_drill

Runs train in processes forked from this one, since most of a start is imports. `kill -9` falls on one process, or on
one of two ranks, at any moment of its life; `--resume auto` goes on, until it ends: with recorded actions, and with
sampled ones and a reward model on loopback, of which nothing may be asked again that lay in answers.sqlite at a kill.
SIGTERM, and Ctrl-C twice within 50 ms, fall at any moment, the final save included: the newest checkpoint must be that
of metrics.jsonl's last line. Flips and cuts fall on the files of a run's newest checkpoint: the one before it is taken,
or what is read is the same.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from swirl import train
from swirl.config import TrainConfig
from swirl.errors import SwirlError
from swirl.learning.checkpoints import newest_checkpoint
from swirl.storage.digest import file_digest, unseal
from swirl.trajectories.log import write_trajectories
from tests.drills.kill_drill import kept_answers
from tests.drills.reward_server import RewardServer
from tests.drills.table import Row

LONGEST_S = 120.0


def row(name: str, attempts: int, failures: list[str], note: str = "") -> Row:
    """What did not hold stands in the note, the first of it."""
    return Row(name, attempts, len(failures), "; ".join([note, *failures[:3]]))


def config_in(folder: Path, updates: int, **changed) -> TrainConfig:
    """A small run on recorded actions in a folder that holds `data.jsonl` and `model`."""
    inputs = {"data": folder / "data.jsonl", "model": str(folder / "model"), "out": folder / "run", "device": "cpu"}
    learning = {"mode": "recorded", "reward": "recorded", "trajectories_per_update": 4, "evaluate_on": ()}
    settings = {"updates": updates, "save_every": 2, "resume": "auto", "rank_timeout_s": 30.0}
    return TrainConfig(**inputs | learning | settings | changed)


def make_inputs(folder: Path, model: Path, trajectories: list) -> None:
    shutil.copytree(model, folder / "model")
    write_trajectories(folder / "data.jsonl", trajectories)


def started(config: TrainConfig, ranks: int = 1, prepare: Callable[[], object] = lambda: None) -> list[int]:
    """Process ids of a run, one a rank; `prepare` is called first in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    return [_forked(config, rank, ranks, port, prepare) for rank in range(ranks)]


def _forked(config: TrainConfig, rank: int, ranks: int, port: int, prepare: Callable[[], object]) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        said = os.open(config.out.parent / f"stderr-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # a test's is somewhere else
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in where.items()}
        prepare()
        train.main(config)
        code = 0
    except (SwirlError, OSError) as error:  # as command.run does
        os.write(2, f"error: {error}\n".encode())
    except (KeyboardInterrupt, SystemExit) as error:
        code = error.code if isinstance(error, SystemExit) else 130
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode())
        code = 99
    finally:
        os._exit(code)


def ended(processes: list[int], longest_s: float = LONGEST_S) -> list[int]:
    """Exit codes, as negative numbers those of signals; what lives too long is killed, and counts as -9."""
    end, codes = time.monotonic() + longest_s, {}
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[process] for process in processes]


def result(run: Path) -> tuple[str, list[dict]]:
    """The digest of the weights a run ended with, and its metrics less times and memory."""
    lines = [json.loads(unseal(line)) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    measured = {"update_s", "sample_s", "tokens_per_s", "computed_tokens_per_s", "utilization", "peak_bytes"}
    metrics = [{name: value for name, value in line.items() if name not in measured} for line in lines]
    return file_digest(run / "checkpoint" / "model.safetensors"), metrics


class Asked:
    """What a reward model was asked again although its answer lay in the cache of the run at an earlier kill."""

    def __init__(self, server: RewardServer | None):
        self._server, self._kept, self._seen = server, set(), 0
        self.again = self.total = 0

    def new_run(self) -> None:
        self._kept = set()

    def look(self, run: Path) -> None:
        """After the processes of a run have ended, and before the next begin."""
        if self._server is None:
            return
        asked = self._server.asked()
        self.again += sum(name in self._kept for name in asked[self._seen :])
        self.total, self._seen = len(asked), len(asked)
        self._kept = kept_answers(run / "answers.sqlite")


def drill_kills(
    folder: Path,
    config: TrainConfig,
    kills: int,
    rng: random.Random,
    ranks: int = 1,
    server: RewardServer | None = None,
) -> Row:
    """Runs killed again and again, half of the times in one rank alone, until `kills` kills hit living processes.

    A kill that comes too late hits nobody: another run follows, and where that was a run's first, an earlier kill.
    """
    failures, hits, lives, asked = [], 0, 0, Asked(server)
    name = f"kill -9, {config.mode}, {ranks} rank{'s' * (ranks > 1)}"
    began = time.monotonic()
    if any(ended(started(replace(config, out=folder / "undisturbed"), ranks))):
        return row(name, 0, ["the undisturbed run failed"])
    life_s = time.monotonic() - began
    asked.look(folder / "undisturbed")
    wanted = result(folder / "undisturbed")
    while hits < kills and lives < 10 * kills:
        out = folder / f"killed-{lives}"
        asked.new_run()
        for start in range(min(5, kills)):
            processes = started(replace(config, out=out), ranks)
            moment_s = rng.random() * life_s
            time.sleep(moment_s)
            for process in rng.sample(processes, rng.randint(1, ranks)):
                os.kill(process, signal.SIGKILL)
            codes = ended(processes)
            asked.look(out)
            if 99 in codes:
                failures.append(f"run {lives}: a traceback")
            if -signal.SIGKILL not in codes:
                life_s = life_s if start else moment_s
                break
            hits += 1
        codes = ended(started(replace(config, out=out), ranks))
        asked.look(out)
        if any(codes):
            failures.append(f"run {lives}: exit codes {codes} of the last call")
        elif result(out) != wanted:
            failures.append(f"run {lives}: {'weights' if result(out)[0] != wanted[0] else 'metrics'} differ")
        lives += 1
        shutil.rmtree(out)
    if hits < kills:
        failures.append(f"{hits} of {kills} kills hit in {lives} runs")
    failures += [f"{asked.again} kept answers asked again"] if asked.again else []
    note = f"{lives} runs of {config.updates} updates" + (f", {asked.total} requests" if server else "")
    return row(name, hits, failures, note)


def drill_world_sizes(folder: Path, config: TrainConfig) -> Row:
    """World size 2, then 1, then 2 again, by two kills: the weights of an undisturbed run to 1e-6."""
    undisturbed, out = folder / "undisturbed-2", folder / "2-1-2"
    codes = ended(started(replace(config, out=undisturbed), 2))
    for ranks, updates in ((2, config.updates // 3), (1, 2 * config.updates // 3)):
        processes = started(replace(config, out=out), ranks)
        end = time.monotonic() + LONGEST_S
        while num_lines(out / "metrics.jsonl") < updates and time.monotonic() < end:
            time.sleep(0.01)
        for process in processes:
            os.kill(process, signal.SIGKILL)
        ended(processes)
    codes += ended(started(replace(config, out=out), 2))
    if any(codes):
        return row("world size 2, 1, 2", 1, [f"exit codes {codes}"])
    one, other = (load_file(run / "checkpoint" / "model.safetensors") for run in (undisturbed, out))
    apart = max((one[name] - other[name]).abs().max().item() for name in one)
    failures = [] if apart <= 1e-6 and len(result(out)[1]) == config.updates else ["more than 1e-6 apart"]
    return row("world size 2, 1, 2", 1, failures, f"weights at most {apart:.1e} apart")


def num_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def drill_signals(folder: Path, config: TrainConfig, count: int, rng: random.Random, kind: str) -> Row:
    """One SIGTERM, or Ctrl-C twice within 50 ms, at any moment of a run: its last update must be there, whole."""
    config = replace(config, save_every=0, save_minutes=0.0)
    began = time.monotonic()
    if any(ended(started(replace(config, out=folder / "whole")))):
        return row(kind, 0, ["the undisturbed run failed"])
    life_s = time.monotonic() - began
    failures, saved, early = [], 0, 0
    for number in range(count):
        out = folder / f"{kind.split()[0]}-{number}"
        (process,) = started(replace(config, out=out))
        # a third of them in the last tenth, where the final save is
        time.sleep(life_s * (rng.uniform(0.85, 1.05) if number % 3 == 0 else rng.random()))
        for nth in range(2 if kind == "double Ctrl-C" else 1):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGINT if kind == "double Ctrl-C" else signal.SIGTERM)
            time.sleep(rng.random() * 0.05 if nth == 0 else 0)
        (code,) = ended([process], 30.0)
        lines = num_lines(out / "metrics.jsonl")
        said: list[str] = []
        found = newest_checkpoint(out, said.append)
        if code in (99, -signal.SIGKILL):
            said_last = (folder / "stderr-0.txt").read_text(errors="replace").splitlines()[-1:]
            failures.append(f"{out.name}: exit code {code} {said_last}")
        elif said or (found.update if found else 0) != lines:
            failures.append(f"{out.name}: checkpoint of {found and found.update}, {lines} updates done {said}")
        saved, early = saved + (lines > 0), early + (lines == 0)
        shutil.rmtree(out, ignore_errors=True)
    return row(kind, count, failures, f"{saved} after the first update, {early} before")


def drill_flips(run: Path, count: int, rng: random.Random) -> Row:
    """Flips and cuts of any file of the newest of two checkpoints, each undone before the next."""
    newest = newest_checkpoint(run, print)
    wanted, failures, told = dict(newest.weights()), [], 0
    paths = sorted(newest.folder.iterdir())
    for number in range(count):
        path = rng.choice(paths)
        content = path.read_bytes()
        at = rng.randrange(len(content))
        flipped = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        path.write_bytes(flipped if number % 4 else content[:at])
        said: list[str] = []
        try:
            found = newest_checkpoint(run, said.append)
            if found is None or (found.update == newest.update) == bool(said):
                failures.append(f"{path.name}: {said}")
            elif not said and not all(torch.equal(a, wanted[name]) for name, a in found.weights()):
                failures.append(f"{path.name}: changed unseen at {at}")
            told += bool(said)
        except Exception as error:
            failures.append(f"{path.name}: {type(error).__name__}: {error}")
        path.write_bytes(content)
    return row(
        "flips and cuts of a checkpoint", count, failures, f"{told} told and left out, the others change nothing"
    )


def trajectories_of(num: int) -> list:
    """Demonstrated trajectories with rewards."""
    from tests.commands.test_train import told

    return list(told(num))


def tiny_model(folder: Path) -> Path:
    from benchmarks.almanac_base import learn_tokenizer
    from swirl.model.gemma import Gemma, GemmaConfig

    config = GemmaConfig(512, 32, 64, 2, 2, 1, head_dim=16, query_pre_attn_scalar=16, sliding_window=24)
    tokenizer = learn_tokenizer(("bridge", "arithmetic"), 512, seed=0, num=100)
    Gemma(config).init_weights(0).save_pretrained(folder, tokenizer=tokenizer)
    return folder


def sampled(folder: Path, server: RewardServer, updates: int = 6, **changed) -> TrainConfig:
    """A small run on actions that the policy that ships draws, each rewarded by the server's model."""
    drawn = {"model": "almanac", "mode": "sampled", "reward": server.url, "votes": 1, "samples_per_state": 2}
    return config_in(folder, updates, **drawn | {"trajectories_per_update": 2, "learning_rate": 1e-3} | changed)


def drill(seed: int, kills: int = 25, signals: int = 50, flips: int = 1000) -> Iterator[Row]:
    """All of it, in a temporary folder; a third of the kills again with sampled actions."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, tiny_model(folder / "made"), trajectories_of(12))
        config = config_in(folder, 12)
        train.train(replace(config, out=folder / "warm-up"))  # what is compiled here is not compiled in each process
        yield drill_flips(folder / "warm-up", flips, rng)
        yield drill_kills(folder, config, kills, rng)
        yield drill_kills(_fresh(folder), config, kills, rng, ranks=2)
        yield drill_world_sizes(folder, config)
        with RewardServer(folder) as server:
            for ranks in (1, 2):
                drawn = sampled(folder, server)
                yield drill_kills(_fresh(folder), drawn, max(1, kills // 3), rng, ranks, server)
        yield drill_signals(_fresh(folder), config, signals, rng, "SIGTERM")
        yield drill_signals(_fresh(folder), config, signals, rng, "double Ctrl-C")


def _fresh(folder: Path) -> Path:
    for left in ("undisturbed", "whole"):
        shutil.rmtree(folder / left, ignore_errors=True)
    return folder
