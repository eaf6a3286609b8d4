"""What many tests need: a tiny model on disk, and policies that play a script through the real tools.

Nothing is imported here but pytest: the GPU tests also run on machines that have torch and triton alone.
"""

from __future__ import annotations

import random
import sys

import pytest


@pytest.fixture(autouse=True)
def the_same_draws_whatever_ran_before():
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Hugging Face folder: a random Gemma 2 of a few thousand weights, with a tokenizer for Almanac's texts."""
    import torch

    from benchmarks.almanac_base import learn_tokenizer
    from swirl.model.gemma import Gemma, GemmaConfig

    tokenizer = learn_tokenizer(("bridge", "arithmetic"), 512, seed=0, num=100)
    config = GemmaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=24,
        max_position_embeddings=4096,
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    with torch.no_grad():
        Gemma(config).init_weights(0).save_pretrained(folder, tokenizer=tokenizer)
    return folder


class DemonstratingPolicy:
    """Plays Almanac's demonstrator, whose slips depend on the question and the seed alone."""

    name = "demonstrator"

    def __init__(self, questions, *, slips: bool):
        self._questions = {question.question: question for question in questions}
        self._slips = slips

    async def act(self, state):
        import numpy as np

        from swirl.rollout.rollout import draw_seed
        from swirl.tasks import almanac
        from swirl.trajectories.record import Step

        question = self._questions[state.prompt.partition("Question: ")[2]]
        habits = almanac.HABITS if self._slips else None
        script = almanac.demonstrate(question, np.random.default_rng(draw_seed(question.id)), slips=habits)
        return Step(action=script[len(state.steps)][0])


@pytest.fixture
def demonstrating_policy():
    return DemonstratingPolicy
