"""generate and filter against a server that is not ours: `transformers serve`, offline, on the Almanac base.

The model is exported by swirl; the server reads it by transformers' own tokenizer, chat template and Gemma 2. It takes
seconds to start, in each worker that runs one of these tests: one of them is quick.
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
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from swirl import generate, pack
from swirl.app.resolve import load_model
from swirl.generate import GenerateConfig
from swirl.judging.prompts import REWARD, SEARCH_PROCESS, read_prompt
from swirl.trajectories.log import read_trajectories
from swirl.trajectories.record import Judged, Trajectory
from tests.process import run_module

MISSING = [name for name in ("transformers", "accelerate", "fastapi", "openai", "uvicorn") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}: pip install 'swirl[test]'"
)

ROOT = Path(__file__).parents[2]
HOTPOTQA = ROOT.parent / "shared" / "data" / "hotpotqa"
START_S = 90
# The command `transformers`, and a thread that ends it as its standard input closes: however the tests end, so does it.
SERVE = """
import os, sys, threading
threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
from transformers.cli.transformers import main
sys.exit(main())
"""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen
    port: int
    folder: Path  # of the model: also its name
    log: Path

    def policy(self, protocol: str) -> str:
        return f"{protocol}+http://127.0.0.1:{self.port}/v1#{self.folder}"

    def answered(self) -> int:
        """Requests that this server says it answered with success."""
        return len(re.findall(r'"POST /v1/\S+ HTTP/1.1" 200', self.log.read_text()))


def export(folder: Path) -> None:
    """The base in Hugging Face layout, by swirl."""
    model, tokenizer = load_model("almanac")
    model.save_pretrained(folder, tokenizer=tokenizer)


def start(folder: Path, log: Path) -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *flags],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(log.parent), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Server(process, port, folder, log)


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while server.process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=5) as answer:
                assert json.load(answer) == {"status": "ok"}
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"transformers serve did not start:\n{server.log.read_text()[-2000:]}")


def stop(server: Server) -> int:
    """Ask it to end, insist after a while; its exit code."""
    server.process.terminate()
    try:
        return server.process.wait(15)
    except subprocess.TimeoutExpired:
        server.process.kill()
        return server.process.wait()
    finally:
        server.process.stdin.close()


@contextmanager
def serving(folder: Path, log: Path):
    """A server of that model, ready; it is asked to end with the block."""
    server = start(folder, log)
    try:
        wait_until_healthy(server)
        yield server
    finally:
        code = stop(server)
    assert code in (0, -signal.SIGTERM), f"it had to be killed, or failed ({code})"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    export(folder / "almanac")
    with serving(folder / "almanac", folder / "server.log") as server:
        yield server


def command(name: str, *flags: object, cwd: Path) -> subprocess.CompletedProcess:
    return run_module(f"swirl.{name}", *flags, cwd=cwd, timeout=120)


def result(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def made(server: Server, protocol: str, out: Path, *flags: object) -> list[Trajectory]:
    """Trajectories of `bridge` that `python -m swirl.generate` makes with the server's policy, sorted."""
    asked = ("--policy", server.policy(protocol), "--task", "bridge", "--max-new-tokens", 48, "--out", out)
    result(command("generate", *asked, *flags, cwd=out.parent))
    return sorted(read_trajectories(out), key=lambda trajectory: trajectory.id)


def texts(trajectories: list[Trajectory]) -> list:
    return [
        (t.id, t.prompt, t.stop, t.prediction, [(step.action, step.observation) for step in t.steps])
        for t in trajectories
    ]


@pytest.fixture(scope="module")
def drawn(server, tmp_path_factory):
    """Two trajectories of each of three questions, drawn one after another by the chat protocol."""
    out = tmp_path_factory.mktemp("drawn") / "trajectories.jsonl"
    return out, made(server, "chat", out, "--num-questions", 3, "--samples", 2, "--in-flight", 1)


@pytest.fixture(scope="module")
def greedy_here(server, tmp_path_factory):
    out = tmp_path_factory.mktemp("here") / "trajectories.jsonl"
    generate.main(
        GenerateConfig(
            out=out,
            samples=1,
            task=("bridge",),
            num_questions=34,
            policy=str(server.folder),
            temperature=0,
        )
    )
    return sorted(read_trajectories(out), key=lambda trajectory: trajectory.id)


@pytest.mark.parametrize("protocol", ["chat", pytest.param("completions", marks=pytest.mark.slow)])
def test_greedy_trajectories_are_those_of_our_own_policy(server, greedy_here, tmp_path, protocol):
    there = made(server, protocol, tmp_path / "t.jsonl", "--num-questions", 34, "--samples", 1, "--temperature", 0)
    assert len(there) == 34 and {t.stop for t in there} == {"answer"}
    assert texts(there) == texts(greedy_here)


@pytest.mark.slow
def test_draws_go_by_their_seed_in_both_protocols(server, drawn, tmp_path):
    """One after another: this server keeps one generator for all requests, so those in flight disturb each other."""
    _, by_chat = drawn
    again = made(server, "completions", tmp_path / "t.jsonl", "--num-questions", 3, "--samples", 2, "--in-flight", 1)
    assert texts(again) == texts(by_chat)
    samples = [[t for t in by_chat if t.sample == sample] for sample in (0, 1)]
    assert [[s.action for s in t.steps] for t in samples[0]] != [[s.action for s in t.steps] for t in samples[1]]


@pytest.mark.slow
def test_an_action_that_was_cut_off_is_none(server, tmp_path):
    cut = made(server, "chat", tmp_path / "t.jsonl", "--num-questions", 2, "--samples", 1, "--max-new-tokens", 3)
    assert [(t.stop, len(t.steps), t.prediction) for t in cut] == [("invalid_action", 1, None)] * 2


@pytest.mark.slow
def test_the_rule_judge_keeps_and_drops_what_the_server_made(drawn, tmp_path):
    out, trajectories = drawn
    flags = ("--data", out, "--kept", "kept.jsonl", "--dropped", "dropped.jsonl", "--judge", "rule")
    counts = result(command("filter", *flags, cwd=tmp_path))
    kept = list(read_trajectories(tmp_path / "kept.jsonl")) if counts["kept"] else []
    assert counts["kept"] + counts["dropped"] == len(trajectories) == 6
    assert all(step.verdict == "GOOD" for t in kept for step in t.steps)


@pytest.mark.slow
def test_a_judge_that_talks_nonsense_scores_nothing_and_is_not_paid_twice(server, drawn, tmp_path):
    out, _ = drawn
    one = tmp_path / "one.jsonl"  # a step takes this judge two long answers
    one.write_bytes(out.read_bytes().splitlines(keepends=True)[0])

    def judged(name: str) -> tuple[dict, list[Trajectory]]:
        files = ("--data", one, "--kept", f"{name}.kept", "--dropped", f"{name}.dropped", "--cache", "answers.sqlite")
        judges = ("--judge", server.policy("chat"), "--outcome-judge", server.policy("completions"))
        counts = result(command("filter", *files, *judges, "--mode", "both", cwd=tmp_path))
        return counts, list(read_trajectories(tmp_path / f"{name}.dropped"))

    before = server.answered()
    counts, dropped = judged("first")
    paid = server.answered()
    assert (counts["kept"], counts["dropped"], counts["dropped_now"]) == (0, 1, {"unjudged": 1})
    steps = [step for t in dropped for step in t.steps]
    assert all(step.verdict is None and step.reward is None for step in steps)
    assert all(step.judged is Judged.UNREADABLE for step in steps), [step.reason for step in steps]
    assert all(t.outcome is None and t.dropped.startswith("unjudged: ") for t in dropped)
    assert paid > before
    assert judged("second") == (counts, dropped) and server.answered() == paid


@pytest.mark.slow
def test_a_model_that_is_not_served_is_one_line(server, tmp_path):
    flags = ("--policy", f"http://127.0.0.1:{server.port}/v1#other", "--num-questions", 1, "--out", "t.jsonl")
    done = command("generate", *flags, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "other" in errors[0] and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_server_ends_with_its_tests(server, tmp_path):
    another = start(server.folder, tmp_path / "server.log")
    try:
        another.process.stdin.close()  # as it does when this process is killed
        another.process.wait(60)
    finally:
        another.process.kill()
        another.process.wait()


# Templates that a small model can be taught to answer: what is asked stands last.
ASK_VERDICT = "{question}\n{context}\n{action}\nGOOD or BAD?"
ASK_SCORE = "{question}\n{context}\n{action}\nSCORE?"


def teach_to_judge(folder: Path, questions: Path) -> None:
    """A copy of the base that answers those templates in the form that is asked for, though it cannot judge: GOOD, or
    `SCORE: d` with a digit that is drawn.
    """
    model, tokenizer = load_model("almanac")
    prompts = {ASK_VERDICT: read_prompt(ASK_VERDICT, SEARCH_PROCESS), ASK_SCORE: read_prompt(ASK_SCORE, REWARD)}
    pages = [" ".join(sentences) for row in json.loads(questions.read_text()) for _, sentences in row["context"]]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(30):
        taught = []
        for k, (template, answer) in enumerate([(ASK_VERDICT, "GOOD"), *((ASK_SCORE, f"SCORE: {d}") for d in (2, 8))]):
            text = pages[(3 * i + k) % len(pages)]
            context, action = text[: 20 * (i % 12)], text[-60:]
            prompt = prompts[template].fill(question=text[:80], context=context, action=action)
            taught.append((tokenizer.prompt_ids(prompt), tokenizer.action_ids(answer)))
        (-model.token_log_probs(pack(taught)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(folder, tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(not HOTPOTQA.is_dir(), reason="the slice of HotPotQA is not here")
def test_hotpotqa_goes_the_whole_way_in_one_command(tmp_path):
    """Evaluate, generate, filter, train on sampled actions, evaluate and compare, as a user types it.

    Real are the command, the questions and pages, the policy (the base that ships), the server that is not ours, its
    HTTP, chat template and draws. The judge's word is not: the served model of a million weights was fitted for some
    seconds to say GOOD, and SCORE: 2 or SCORE: 8 at random, so rewards differ but mean nothing, and nothing is asserted
    about accuracy.
    """
    teach_to_judge(tmp_path / "judge", HOTPOTQA / "train.slice.json")
    export(tmp_path / "base")
    for name, text in (("verdict.txt", ASK_VERDICT), ("score.txt", ASK_SCORE)):
        (tmp_path / name).write_text(text)
    with serving(tmp_path / "judge", tmp_path / "server.log") as server:
        files = ("--questions", HOTPOTQA / "train.slice.json", "--evaluate-questions", HOTPOTQA / "dev.slice.json")
        judges = ("--judge", server.policy("chat"), "--reward", server.policy("chat"))
        templates = ("--judge-prompt", "verdict.txt", "--reward-prompt", "score.txt", "--votes", 2)
        small = ("--num-questions", 3, "--samples", 1, "--updates", 1, "--evaluate-num-questions", 3)
        small += ("--trajectories-per-update", 1, "--samples-per-state", 2, "--device", "cpu")
        flags = ("--task", "hotpotqa", *files, "--model", "base", *judges, *templates, *small)
        done = command("train", *flags, cwd=tmp_path)
        answered = server.answered()
    assert done.returncode == 0, done.stderr
    assert "hotpotqa" in done.stdout and "mode sampled" in done.stderr
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["accuracy_before"]) == set(summary["accuracy_after"]) == {"hotpotqa"} and summary["updates"] == 1
    kept = read_trajectories(run / "kept.jsonl")
    assert 1 <= len(kept) <= len(read_trajectories(run / "trajectories.jsonl")) == 3
    assert all(step.verdict == "GOOD" for t in kept for step in t.steps)
    (metrics,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert metrics["actions"] > metrics["masked"] and answered >= sum(len(t.steps) for t in kept)
    assert (run / "checkpoint" / "model.safetensors").is_file()
