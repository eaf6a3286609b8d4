"""Make a base policy: a small Gemma 2 and its tokenizer, imitating one of Almanac's imperfect demonstrators.

  python -m benchmarks.almanac_base                                  from scratch: the base that ships with swirl
  python -m benchmarks.paper cells                                   three bases of the second edition, and what they do

The model card holds the command, the seed and the commit. The demonstrators slip, so a base is wrong about as often as
it is right, and there is something left for reinforcement learning to do. A base of the second edition starts from one
that has the skills (reading a page, copying names), so that it has habits alone to learn. Such bases share their
skills, and differ in all that the seed draws afterwards.
"""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from swirl.app import command, resolve
from swirl.app.progress import progress
from swirl.errors import ConfigError
from swirl.learning import usage
from swirl.learning.optimizer import (
    clip_grad_norm,
    learning_rate_at,
    make_optimizer,
    make_optimizers_from_nothing,
    set_learning_rate,
)
from swirl.model.gemma import Gemma, GemmaConfig
from swirl.model.tokenizer import Tokenizer, train_tokenizer
from swirl.tasks import almanac, open_task
from swirl.tree.pack import pack_micro_batches


@dataclass(frozen=True)
class ImitateConfig:
    out: Path = Path("base")
    """Hugging Face folder to write; refused if it is there already."""
    seed: int = 0
    edition: Literal["first", "second"] = "first"
    """Of Almanac. Shown are its bridge, deep, mixed and arithmetic; counterfactual is left out: the base has
    not seen the world of its pages."""
    start: str | None = None
    """Weights to start from: `almanac` or a folder; default: from scratch, with a tokenizer learned here."""
    updates: int = 4200
    demonstrations_per_update: int = 16
    learning_rate: float = 3e-3
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 6
    sliding_window: int = 128
    faultless_share: float = 0.83
    """Of the updates, at first, shown without slips: skills come before habits, and come faster."""
    weight_of_observations: float = 0.1
    """Of the loss on question and result tokens, beside 1 on action tokens: it teaches to copy names early on."""

    @property
    def families(self) -> tuple[str, ...]:
        shown = ("bridge", "deep", "mixed", "arithmetic")
        return tuple(f"{name}-2" for name in shown) if self.edition == "second" else shown


def gemma_config(config: ImitateConfig) -> GemmaConfig:
    """Heads of 32, two queries to a key; the last of each pair of layers sees everything, the first a window."""
    return GemmaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.hidden_size // 32,
        num_key_value_heads=config.hidden_size // 64,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=config.sliding_window,
        max_position_embeddings=8192,
    )


def demonstrations(families: tuple[str, ...], seed: int, *, slips: bool = True):
    """(prompt, [(action, observation or None), ...]) forever, families in turn, each question demonstrated anew."""
    rng = np.random.default_rng(seed)
    first = functools.partial(almanac.demonstrate, slips=almanac.HABITS if slips else None)
    second = functools.partial(almanac.demonstrate_shared, slips=almanac.SHARED_HABITS if slips else None)
    questions = {family: almanac.questions(family, "train") for family in families}
    tasks = {family: open_task(family) for family in families}
    while True:
        for family in families:
            question = questions[family][rng.integers(len(questions[family]))]
            yield (
                tasks[family].prompt_for(question),
                (second if family in almanac.SECOND_EDITION else first)(question, rng),
            )


def learn_tokenizer(families: tuple[str, ...], vocab_size: int, seed: int, num: int = 4000) -> Tokenizer:
    source = demonstrations(families, seed)
    texts = []
    for _ in range(num):
        prompt, steps = next(source)
        texts += [f"user\n{prompt}", *(text for step in steps for text in step if text)]
    texts += ["user\nmodel\n"] * num
    return train_tokenizer(texts, vocab_size)


def as_pairs(prompt: str, steps, tokenizer: Tokenizer):
    """(state_ids, action_ids) of every action, and (first token, the rest) of the whole demonstration."""
    state, pairs = tokenizer.prompt_ids(prompt), []
    for action, observation in steps:
        action_ids = tokenizer.action_ids(action)
        pairs.append((list(state), action_ids))
        state += action_ids + (tokenizer.observation_ids(observation) if observation else [])
    return pairs, (state[:1], state[1:])


def _optimizers(config: ImitateConfig, model: Gemma) -> list[torch.optim.Optimizer]:
    """Muon from scratch, where it learns faster; AdamW from a start, where an update of it costs half as much."""
    if config.start is not None:
        return [make_optimizer(model, learning_rate=config.learning_rate, weight_decay=0.0)]
    return make_optimizers_from_nothing(
        model,
        embedding=model.model.embed_tokens.weight,
        learning_rate=config.learning_rate,
        weight_decay=0.1,
    )


def imitate(config: ImitateConfig) -> tuple[Gemma, Tokenizer]:
    """Cross-entropy on the demonstrator's actions (and a little on all tokens), by the same packed pass as RL."""
    if config.start is None:
        tokenizer = learn_tokenizer(config.families, config.vocab_size, config.seed)
        model = Gemma(gemma_config(config)).init_weights(config.seed)
    else:
        model, tokenizer = resolve.load_model(config.start)
    optimizers = _optimizers(config, model)
    faultless = demonstrations(config.families, config.seed + 1, slips=False)
    imperfect = demonstrations(config.families, config.seed + 2)
    started = time.perf_counter()
    with progress("imitate", config.updates) as advance:
        for update in range(config.updates):
            source = faultless if update < config.faultless_share * config.updates else imperfect
            shown = islice(source, config.demonstrations_per_update)
            drawn = [as_pairs(*one, tokenizer) for one in shown]
            actions = [pair for pairs, _ in drawn for pair in pairs]
            whole = [pair for _, pair in drawn]
            num_actions, num_whole = (sum(len(ids) for _, ids in part) for part in (actions, whole))
            weights = np.repeat(
                [1 / num_actions, config.weight_of_observations / num_whole], [len(actions), len(whole)]
            )
            action_loss = 0.0
            for batch, members in pack_micro_batches(actions + whole, 16384):
                weight = torch.tensor(weights[members], dtype=torch.float32)[batch.sub_trajectory]
                log_probs = model.token_log_probs(batch)
                batch_loss = -(log_probs * weight).sum()
                batch_loss.backward()
                of_actions = torch.tensor(members < len(actions))[batch.sub_trajectory]
                action_loss -= log_probs.detach()[of_actions].sum().item() / num_actions
            clip_grad_norm(model, 1.0)
            rate = learning_rate_at(update, config.updates, config.learning_rate, warmup=50, floor=0.02)
            for optimizer in optimizers:
                set_learning_rate(optimizer, rate)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            advance(note=f"loss {action_loss:.3f}  {(update + 1) / (time.perf_counter() - started):.2f} updates/s")
            if (update + 1) % 100 == 0 and not sys.stderr.isatty():
                print(f"{update + 1} loss {action_loss:.3f} {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return model, tokenizer


def _card(config: ImitateConfig, commit: str) -> str:
    default = ImitateConfig()
    given = (field.name for field in fields(config) if getattr(config, field.name) != getattr(default, field.name))
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in given if name != "out")
    return f"""# Almanac base

A Gemma-2-shaped policy with its own byte-level BPE tokenizer, trained from {config.start or "scratch"} to imitate
Almanac's imperfect demonstrator on {", ".join(config.families)}. `python -m swirl.train` starts here; it knows nothing
else.

- command: `python -m benchmarks.almanac_base {flags}`
- seed: {config.seed}
- commit: {commit}
- weights: rounded to bfloat16 at the end, half the bytes
- licence: Apache-2.0; every person, place and work in its world is invented
"""


def main(config: ImitateConfig) -> None:
    if config.out.exists():
        raise ConfigError(f"--out {config.out}: is there already; name another folder")
    commit = usage.commit()
    model, tokenizer = imitate(config)
    model.to(torch.bfloat16).save_pretrained(config.out, tokenizer=tokenizer)
    (config.out / "README.md").write_text(_card(config, commit))
    print(config.out)


if __name__ == "__main__":
    command.run(main, ImitateConfig, __doc__)
