"""Commands over HTTP as tests run them, and what the models of the server on loopback say."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from hashlib import blake2b
from pathlib import Path

import numpy as np

from benchmarks.fault_server import verdict_of
from swirl.tasks import almanac
from tests.process import run_module_beside

ROOT = Path(__file__).parents[2]
QUESTIONS = {q.question: q for split in ("train", "test") for q in almanac.questions("bridge", split, 12)}
TRANSIENT = ("429", "500", "reset", "truncated")
FAST = ("--endpoint.timeout-s", 1)


def model(path, payload):
    """What each model of the server says; each answer is a function of its request alone."""
    if path.endswith("/embeddings"):
        return {"data": [{"index": k, "embedding": embedding(text)} for k, text in enumerate(payload["input"])]}
    if path.endswith("/retrieve"):
        return {"result": [[{"contents": f"{query}\nIt is Vik."}] for query in payload["queries"]]}
    messages = [message["content"] for message in payload["messages"]]
    match payload["model"]:
        case "policy":
            said = play(messages)
        case "judge":
            said = verdict_of(messages[0])
        case "answers":
            said = {"GOOD": "YES", "BAD": "NO"}[verdict_of(messages[0])]
        case "reward":
            said = f"SCORE: {payload['seed'] % 10}"
        case "echo":
            said = messages[0]
        case "mumbling":
            said = "I cannot tell."
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return {"choices": [{"index": 0, "message": {"content": said}, "finish_reason": "stop"}], "usage": usage}


def play(messages):
    """Almanac's demonstrator on its questions, one search and an answer on any other."""
    question, step = messages[0].partition("Question: ")[2], len(messages) // 2
    if question in QUESTIONS:
        return almanac.demonstrate(QUESTIONS[question], np.random.default_rng(0), slips=None)[step][0]
    return "<answer>Vik</answer>" if step else f"<search_query>{question}</search_query>"


def embedding(text):
    """Words as directions of their own, near enough."""
    vector = np.zeros(64)
    for word in re.findall(r"\w+", text.lower()):
        vector[blake2b(word.encode()).digest()[0] % 64] += 1.0
    return vector.tolist()


class Run:
    """A command that has ended."""

    def __init__(self, code, out, err):
        self.code, self.err = code, err
        self.results = [json.loads(line) for line in out.splitlines()] if code == 0 else out
        self.errors = [line for line in err.splitlines() if line.startswith("error: ")]
        self.warnings = [line for line in err.splitlines() if line.startswith("warning: ")]

    @property
    def result(self):
        (result,) = self.results
        return result


async def run(folder, name, *flags, code=0, **environment):
    """`python -m swirl.name`; no key and no proxy but those given."""
    clean = [key for key in os.environ if re.search("API_KEY|SWIRL|proxy", key, re.IGNORECASE)]
    done = await run_module_beside(f"swirl.{name}", *flags, cwd=folder, without=clean, **environment)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert code == 0 or done.stderr.count("error: ") == 1, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


def generate(folder, url, *flags, **rest):
    flags = ("--policy", f"{url}/v1#policy", "--num-questions", 6, "--samples", 2, *flags)
    return run(folder, "generate", *flags, **rest)


def lines(path):
    return sorted(path.read_bytes().splitlines())


def kept_answers(path):
    with sqlite3.connect(path) as database:
        return database.execute("SELECT count(*) FROM answers").fetchone()[0]
