"""Recipes on stand-ins: the base that ships for a Gemma of billions, `swirl serve` for vLLM, a function for a judge.

The quick tests record what each recipe would run, and read its flags as the commands do. The slow ones run it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swirl.app import command, planning
from swirl.config import TrainConfig, settled, sized
from swirl.filter import FilterConfig
from swirl.generate import GenerateConfig
from swirl.learning import plan
from swirl.model.config import PRESETS

ROOT = Path(__file__).parents[2]
RECIPES, FIXTURES = ROOT / "recipes", ROOT / "tests" / "fixtures"
KINDS = {"generate": GenerateConfig, "filter": FilterConfig, "train": TrainConfig}
JUDGE = '''
def judge(question, steps, step):
    """More than half for what is longer: a judge that can be read, and means nothing."""
    return 0.5 + min(0.5, len(step.action) / 400)
'''
SMALL = ["--trajectories-per-update", "2", "--samples-per-state", "2"]


@pytest.fixture
def folder(tmp_path):
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (tmp_path / "cities.py").write_text(re.search(r"^```python\n(# cities\.py.+?)^```", page, re.M | re.S)[1])
    (tmp_path / "any.py").write_text(JUDGE)
    return tmp_path


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def environment(folder, **variables):
    path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MODEL": "almanac", "UPDATES": "1"}
    return {**os.environ, **given, "SWIRL": f"{sys.executable} -m swirl", "TOKENS": "16", **variables}


def run(name, *words, folder, **variables):
    return subprocess.run(
        ["bash", RECIPES / name, *words], cwd=folder, env=environment(folder, **variables), capture_output=True,
        text=True, timeout=500,
    )  # fmt: skip


ALL = {
    "one_gpu.sh hotpotqa": {"SERVER": "http://127.0.0.1:9/v1#m"},
    "one_gpu.sh gsm8k": {"SERVER": "http://127.0.0.1:9/v1#m", "JUDGE": "http://127.0.0.1:9/v1#j"},
    "eight_gpus.sh 9b": {"JUDGE": "http://127.0.0.1:9/v1#j"},
    "eight_gpus.sh 27b": {"JUDGE": "http://127.0.0.1:9/v1#j"},
    "two_nodes.sh": {"HEAD": "node1"},
    "own_task.sh": {"TASK": "cities.py:task", "REWARD": "cities.py:reward"},
}


def commands(line, *extra, folder, **variables):
    """(command, its flags) of each that the recipe runs, in order; nothing is run."""
    recorder = program(folder / "bin" / "record", 'printf "%s\\t" "$@" >>commands; echo >>commands')
    variables = {"SWIRL": recorder, "TORCHRUN": recorder, **ALL[line], **variables}
    done = run(*line.split(), *extra, folder=folder, **variables)
    assert done.returncode == 0, done.stderr
    lines = [line.rstrip("\t").split("\t") for line in (folder / "commands").read_text().splitlines()]
    lines = [words[1:] if words[0] == "-m" else words for words in lines]
    return [(what.removeprefix("swirl."), flags) for what, *flags in lines]


@pytest.mark.parametrize("line", ALL)
def test_every_flag_of_a_recipe_is_one(line, folder):
    extra = [] if " " in line else ["--seed", "7"]
    lines = commands(line, *extra, folder=folder)
    for what, flags in lines:
        config = command.parse(KINDS[what], "", flags)
        assert not extra or what != "train" or config.seed == 7
    assert lines[-1][1][-2:] == (extra or ["--resume", "auto"])


@pytest.mark.parametrize("line", [line for line in ALL if not line.startswith("own_task")])
def test_training_fits_the_card_a_recipe_promises_beside_its_server(line, folder):
    recipe = (RECIPES / line.split()[0]).read_text()
    card_gb, share = int(re.search(r"GPUs? of (\d+) GB", recipe)[1]), 0.0
    if "server.sh" in recipe:
        share = float(re.search(r"--gpu-memory-utilization ([\d.]+)", (RECIPES / "server.sh").read_text())[1])
    what, flags = commands(line, folder=folder, MODEL="", TOKENS="")[-1]  # its own: an empty one is not set
    config = command.parse(KINDS[what], "", flags)
    shape = PRESETS[config.model.removeprefix("google/").removesuffix("-it")]
    config = sized(settled(config, {"bridge"} if config.data else None, "cuda"), shape.num_weights)
    ranks = {"one_gpu.sh": 1, "eight_gpus.sh": 8, "two_nodes.sh": 16}[line.split()[0]]
    job = planning.job_of(shape, config, on_gpu=True, ranks=ranks, ranks_of_host=min(ranks, 8))
    needed = planning.needed_bytes(job, plan.plan(job))
    assert needed <= (1 - share) * card_gb * 1e9, planning.advice(job, (1 - share) * card_gb * 1e9)


@pytest.mark.parametrize("name", ["eight_gpus.sh", "two_nodes.sh", "own_task.sh", "one_gpu.sh"])
def test_what_a_recipe_lacks_is_one_line(name, folder):
    done = run(name, folder=folder)
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1


def test_a_server_that_cannot_start_ends_the_recipe(folder):
    done = run("one_gpu.sh", "gsm8k", folder=folder, SERVE="false", PORT="9")
    assert done.returncode == 1 and done.stderr == "the server ended: see gsm8k/server.log\n"


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def finished(run_folder):
    assert json.loads((run_folder / "summary.json").read_text())["updates"] == 1
    assert (run_folder / "checkpoint" / "model.safetensors").is_file() and (run_folder / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("task, file", [("hotpotqa", "hotpotqa.json"), ("gsm8k", "gsm8k.jsonl")])
def test_one_gpu(task, file, folder):
    port = free_port()
    serve = f"{sys.executable} -m swirl.serve --model almanac --port {port}"
    files = {"TRAIN": str(FIXTURES / file), "TEST": str(FIXTURES / file), "EASY": ""}
    small = {"QUESTIONS": "2", "SAMPLES": "1", "TEST_QUESTIONS": "1", "JUDGE": "any.py:judge", "PORT": port}
    words = [task, *SMALL, "--votes", "1"]
    done = run("one_gpu.sh", *words, folder=folder, SERVE=serve, **files, **small)
    assert done.returncode == 0, done.stderr
    finished(folder / task / "run")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["9b", "27b"])
def test_eight_gpus(size, folder):
    files = {"TRAIN": str(FIXTURES / "hotpotqa.json"), "TEST": str(FIXTURES / "hotpotqa.json"), "EASY": ""}
    small = {"QUESTIONS": "2", "SAMPLES": "1", "TEST_QUESTIONS": "1", "JUDGE": "any.py:judge", "GPUS": "2"}
    done = run("eight_gpus.sh", size, *SMALL, folder=folder, **files, **small)
    assert done.returncode == 0, done.stderr
    finished(folder / f"hotpotqa-{size}")


def kept(folder):
    words = [sys.executable, "-m", "swirl.generate", "--num-questions", "4", "--samples", "2"]
    where = {"cwd": folder, "env": environment(folder), "check": True, "timeout": 300}
    subprocess.run(words, **where)
    subprocess.run([sys.executable, "-m", "swirl.filter"], **where)


@pytest.mark.slow
def test_two_nodes_as_two_jobs_on_one_machine(folder):
    kept(folder)
    variables = environment(folder, HEAD="127.0.0.1", PORT=free_port(), GPUS="1")
    words = ["bash", RECIPES / "two_nodes.sh", *SMALL, "--evaluate-on"]
    jobs = [subprocess.Popen(words, cwd=folder, env=variables, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    finished(folder / "run")


@pytest.mark.slow
def test_slurm_saves_is_queued_again_and_goes_on(folder):
    kept(folder)
    program(folder / "bin" / "srun", 'exec "$@"')
    program(folder / "bin" / "scontrol", '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >>requeued')
    variables = environment(
        folder, SLURM_JOB_NODELIST="n", SLURM_NNODES="1", SLURM_JOB_ID="42", SLURM_SUBMIT_DIR=str(ROOT), GPUS="1",
        PORT=free_port(), UPDATES="400",
    )  # fmt: skip
    words = ["bash", RECIPES / "slurm.sbatch", *SMALL, "--evaluate-on"]
    with open(folder / "log", "w") as log:
        job = subprocess.Popen(words, cwd=folder, env=variables, stdout=log, stderr=log)
        metrics, until = folder / "run" / "metrics.jsonl", time.monotonic() + 200
        while not metrics.exists() and time.monotonic() < until:
            time.sleep(0.5)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=200) == 0, (folder / "log").read_text()
    assert (folder / "requeued").read_text() == "requeue 42\n"
    (saved,) = (int(path.name.partition("-")[2]) for path in (folder / "run").glob("checkpoint-*"))
    assert saved == len(metrics.read_text().splitlines()) >= 1


@pytest.mark.slow
def test_own_task(folder):
    small = {"TASK": "cities.py:task", "REWARD": "cities.py:reward", "FILTER": "none", "SAMPLES": "1"}
    done = run("own_task.sh", *SMALL, folder=folder, **small)
    assert done.returncode == 0, done.stderr
    finished(folder / "own" / "run")
