"""What is trained on: ids that are those of their text."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from swirl.app.resolve import ALMANAC_BASE
from swirl.app.training_data import Fitting
from swirl.config import TrainConfig
from swirl.errors import InputError
from swirl.model.gemma import GemmaConfig
from swirl.model.tokenizer import Tokenizer
from swirl.rollout.rollout import with_ids
from swirl.trajectories.record import Question, Step, Trajectory

QUESTION = Question(id="q", task="bridge", question="Where?", answer="There")
STEPS = (
    Step(action="<search_query>a</search_query>", observation="a -> b"),
    Step(action="<answer>b</answer>"),
)
TEXT = Trajectory(id="q#0", question=QUESTION, prompt="Where?", steps=STEPS, stop="answer")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(ALMANAC_BASE)


class Files:
    def where(self, place):
        return "t.jsonl", place + 1


def fit(trajectory, tokenizer):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), 1)
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": tokenizer.vocab_size}
    return Fitting(Files(), TrainConfig(), GemmaConfig(**sizes), tokenizer)(0, trajectory)


def test_ids_of_their_text_are_kept(tokenizer):
    made = with_ids(TEXT, tokenizer)
    assert fit(made, tokenizer) == made
    drawn = replace(made, retokenized=False)
    spelled = tuple(i for c in STEPS[1].action for i in tokenizer.encode(c)) + (tokenizer.end_of_turn_id,)
    drawn = replace(drawn, steps=(drawn.steps[0], replace(drawn.steps[1], action_ids=spelled)))
    assert fit(drawn, tokenizer) == drawn  # as no encoder would spell it, but its text


@pytest.mark.parametrize("retokenized", [True, False])
@pytest.mark.parametrize("field", ["prompt", "action", "observation"])
def test_ids_of_another_text_are_named(tokenizer, field, retokenized):
    made = replace(with_ids(TEXT, tokenizer), retokenized=retokenized)
    if field == "prompt":
        other, named = replace(made, prompt="Who?"), "prompt_ids"
    else:
        other = replace(made, steps=(replace(made.steps[0], **{field: "other"}), made.steps[1]))
        named = rf"steps\[0\]\.{field}_ids"
    with pytest.raises(InputError, match=f"^t.jsonl:1: field '{named}'.*'q#0'"):
        fit(other, tokenizer)
