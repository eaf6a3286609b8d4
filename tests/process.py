"""`python -m MODULE` as tests run it: a process of its own, forked from one that has imported torch and swirl's rooms.

A start from nothing costs seconds of imports, and the tests start hundreds of commands. What is tested is all that
follows the imports; that commands start from nothing is tested where those of the README are run.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
# All that the commands import, but not the commands: they are to be run as __main__.
_FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.optim", "bm25s", "swirl.app.stages", "swirl.app.attempts", "swirl.app.evaluation"]
)


def run_module(
    module: str, *words: object, cwd: Path, timeout: float = 300, without: Iterable[str] = (), **environment: str
) -> subprocess.CompletedProcess:
    """Run it to its end, in the tests' environment `without` some keys and with `environment` on top.

    module: its name, or a script's path. Raises TimeoutExpired after `timeout` seconds.
    """
    environment = {key: value for key, value in os.environ.items() if key not in set(without)} | environment
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # By path, which a process that shares nothing with this one can open.
        files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
        process = begin_module(module, *words, cwd=cwd, out=files[0], err=files[1], environment=environment)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *words], timeout)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
        return subprocess.CompletedProcess([module, *words], process.exitcode, *said)


def begin_module(
    module: str,
    *words: object,
    cwd: Path,
    out: str | Path = os.devnull,
    err: str | Path = os.devnull,
    environment: Mapping[str, str] = os.environ,
) -> multiprocessing.Process:
    """`run_module`, begun: to be signalled, killed, joined. What it says goes to the files `out` and `err`."""
    words = [str(word) for word in words]
    process = _FORKS.Process(target=_as_main, args=(module, words, str(cwd), dict(environment), str(out), str(err)))
    process.start()
    return process


def run_ranks(num: int, module: str, *words: object, **how) -> list[subprocess.CompletedProcess]:
    """`run_module` as each of `num` ranks, told what torchrun would tell them."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num}
    told = [{key: str(value) for key, value in (job | {"RANK": k, "LOCAL_RANK": k}).items()} for k in range(num)]
    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(lambda one: run_module(module, *words, **how, **one), told))


async def run_module_beside(module: str, *words: object, **how) -> subprocess.CompletedProcess:
    """`run_module` while this event loop goes on, which may be serving it."""
    return await asyncio.to_thread(run_module, module, *words, **how)


def _as_main(module: str, words: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (err, os.O_WRONLY)]):
        os.dup2(os.open(path, flags | os.O_CREAT), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.argv = [module, *words]
    sys.path.insert(0, cwd)
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing's own way out skips them
