"""Ranks as forked processes: most of a rank's start would be imports."""

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from swirl.learning import distributed
from tests.drills.resume_drill import ended


def in_ranks(number: int, work: Callable[[], object], *, per_node: int | None = None, longest_s: float = 60.0) -> list:
    """What `work()` returns on each of `number` ranks, as torch saves it; hosts of `per_node` ranks, if not all on one.

    Raises AssertionError with the traceback of the first rank that fails.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        where["LOCAL_WORLD_SIZE"] = per_node or number
        free.close()
        torch.set_num_threads(1)
        processes = [_forked(work, where | {"RANK": rank, "LOCAL_RANK": rank}, Path(folder)) for rank in range(number)]
        codes = ended(processes, longest_s)
        for rank, code in enumerate(codes):
            said = Path(folder) / f"{rank}.txt"
            assert code == 0 or not said.exists(), f"rank {rank}: {said.read_text()}"
        assert codes == [0] * number, codes
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(number)]


def _forked(work, where: dict, folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    try:
        os.environ |= {name: str(value) for name, value in where.items()}
        with distributed.process_group(torch.device("cpu"), timeout_s=30.0):
            torch.save(work(), folder / f"{where['RANK']}.pt")
    except BaseException:
        (folder / f"{where['RANK']}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
