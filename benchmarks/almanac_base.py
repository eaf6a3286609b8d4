"""Make a base policy from nothing: a small Gemma 2 and its tokenizer, imitating Almanac's imperfect demonstrator.

This is how the base that ships with swirl was made; its model card holds the command, the seed and the commit.
The demonstrator slips (it skips hops, repeats queries, answers too early, takes the wrong operation), so the base is
wrong about as often as it is right, and there is something left for reinforcement learning to do.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from swirl.app import command
from swirl.app.progress import progress
from swirl.errors import ConfigError
from swirl.learning import usage
from swirl.learning.optimizer import (
    clip_grad_norm,
    learning_rate_at,
    make_optimizers_from_nothing,
    set_learning_rate,
)
from swirl.model.gemma import Gemma, GemmaConfig
from swirl.model.tokenizer import Tokenizer, train_tokenizer
from swirl.rollout.prompts import question_prompt
from swirl.tasks import ALMANAC_FAMILIES, almanac
from swirl.tree.pack import pack_micro_batches


@dataclass(frozen=True)
class ImitateConfig:
    out: Path = Path("base")
    """Hugging Face folder to write; refused if it is there already."""
    seed: int = 0
    updates: int = 4200
    demonstrations_per_update: int = 16
    families: tuple[str, ...] = ("bridge", "deep", "mixed", "arithmetic")
    """Families to show. counterfactual is left out: its edited pages are the world the base has not seen."""
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


def demonstrations(families: tuple[str, ...], seed: int, slips: almanac.Habits | None = almanac.HABITS):
    """(prompt, [(action, observation or None), ...]) forever, families in turn, each question demonstrated anew."""
    rng = np.random.default_rng(seed)
    questions = {family: almanac.questions(family, "train") for family in families}
    while True:
        for family in families:
            question = questions[family][rng.integers(len(questions[family]))]
            prompt = question_prompt(question.question, almanac.tool(family).name, almanac.max_queries(family))
            yield prompt, almanac.demonstrate(question, rng, slips=slips)


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


def imitate(config: ImitateConfig) -> tuple[Gemma, Tokenizer]:
    """Cross-entropy on the demonstrator's actions (and a little on all tokens), by the same packed pass as RL."""
    tokenizer = learn_tokenizer(config.families, config.vocab_size, config.seed)
    model = Gemma(gemma_config(config)).init_weights(config.seed)
    optimizers = make_optimizers_from_nothing(
        model,
        embedding=model.model.embed_tokens.weight,
        learning_rate=config.learning_rate,
        weight_decay=0.1,
    )
    faultless = demonstrations(config.families, config.seed + 1, slips=None)
    imperfect = demonstrations(config.families, config.seed + 2)
    started = time.perf_counter()
    with progress("imitate", config.updates) as advance:
        for update in range(config.updates):
            source = faultless if update < config.faultless_share * config.updates else imperfect
            drawn = [as_pairs(*next(source), tokenizer) for _ in range(config.demonstrations_per_update)]
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
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in (
        ("seed", config.seed), ("updates", config.updates),
    ))  # fmt: skip
    return f"""# Almanac base

A Gemma-2-shaped policy with its own byte-level BPE tokenizer, trained from nothing to imitate Almanac's imperfect
demonstrator on {", ".join(config.families)}. It is where `python -m swirl.train` starts, and knows nothing else.

- command: `python -m benchmarks.almanac_base {flags}`
- seed: {config.seed}
- commit: {commit}
- weights: rounded to bfloat16 at the end, half the bytes
- licence: Apache-2.0; every person, place and work in its world is invented
"""


def main(config: ImitateConfig) -> None:
    if config.out.exists():
        raise ConfigError(f"--out {config.out}: is there already; name another folder")
    for family in config.families:
        if family not in ALMANAC_FAMILIES:
            raise ConfigError(f"--families {family}: expected of {', '.join(ALMANAC_FAMILIES)}")
    commit = usage.commit()
    model, tokenizer = imitate(config)
    model.to(torch.bfloat16).save_pretrained(config.out, tokenizer=tokenizer)
    (config.out / "README.md").write_text(_card(config, commit))
    print(config.out)


if __name__ == "__main__":
    command.run(main, ImitateConfig, __doc__)
