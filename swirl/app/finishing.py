"""What `train` does when learning is done: merge, evaluate, compare, and write down what came out."""

from __future__ import annotations

import time

import torch

from swirl.app import command, resolve, stages
from swirl.app.background import BackgroundLoop
from swirl.app.model_card import CARD, model_card
from swirl.app.other_log_probs import other_log_probs
from swirl.app.report.build import write_report
from swirl.app.run_folder import RunFolder
from swirl.app.run_records import EVALUATED, LOG_PROBS, compared_answers
from swirl.app.scores import Score, compared
from swirl.app.signals import deferred
from swirl.app.stages import Setup
from swirl.app.tables import print_comparison
from swirl.config import TrainConfig
from swirl.errors import SwirlError
from swirl.learning import distributed, usage
from swirl.model.lora import merge_lora
from swirl.storage.files import replace_file
from swirl.trajectories.log import read_trajectories, write_trajectories


def evaluate_and_write(setup: Setup, run: RunFolder, loop: BackgroundLoop, when: str) -> list[Score]:
    """The scores on the test questions `when` (before, after); the answers are written down."""
    scores, answers = loop.run(stages.evaluate(setup, setup.config.evaluate_on, "test", f"evaluate {when}"))
    if scores and distributed.is_main():
        write_trajectories(run.path / EVALUATED[when], answers)
    return scores


def compare_policies(setup: Setup, run: RunFolder) -> None:
    """Write down what the base policy makes of the trained one's answers, and the other way round, of some questions.

    For the report alone, on the main rank: where it cannot be done the run ends without it, and says so.
    """
    config, files = setup.config, {when: run.path / name for when, name in EVALUATED.items()}
    if not (distributed.is_main() and all(file.exists() for file in files.values())):
        return
    try:
        pairs = compared_answers(*map(read_trajectories, files.values()))
        base, _ = resolve.load_model(
            config.model, device=setup.model.device, dtype=getattr(torch, config.dtype),
            attention=config.attention,
        )  # fmt: skip
        of_base, of_trained = ([pair[i] for pair in pairs] for i in (0, 1))
        trained = setup.policy.engine.model
        run.append_records(LOG_PROBS, other_log_probs(trained, "trained", files["before"].name, of_base, config))
        run.append_records(LOG_PROBS, other_log_probs(base, "base", files["after"].name, of_trained, config))
    except (SwirlError, OSError, torch.OutOfMemoryError) as error:
        command.warn(f"answers are not compared token by token ({error})")


def save_merged(setup: Setup, run: RunFolder) -> None:
    """Merge the adapters into the weights, in place and on every rank, and write those as the run's `checkpoint`.

    So what is evaluated from here on is what was written. Raises CheckpointError.
    """
    sampler = setup.policy.engine.model
    merge_lora(setup.model)
    if sampler is not setup.model:
        merge_lora(sampler)  # it holds nothing now
    with setup.sampling():
        if distributed.is_main():
            with deferred():
                sampler.save_pretrained(run.path / "checkpoint", setup.tokenizer)


def finish(
    config: TrainConfig, run: RunFolder, before: list[Score], after: list[Score], history, started, num_trajectories,
    held: dict[str, float],
) -> dict:  # fmt: skip
    """Write the summary, with its plan `held` against what was measured, the model card and the report; show both."""
    summary = _summary(config, before, after, history, started) | held
    run.write("summary.json", summary)
    card = model_card(config, update=len(history), commit=summary["commit"], summary=summary, kept=num_trajectories)
    replace_file(run.path / "checkpoint" / CARD, card.encode())
    write_report([config.out])
    masked, actions = (sum(metrics[name] for metrics in history) for name in ("masked", "actions"))
    if masked:
        command.warn(f"{masked} of {actions} actions had no reward: they were masked, and taught nothing")
    if after:
        print_comparison(before, after)
    print(
        f"{len(history)} update{'s' * (len(history) != 1)} in {summary['wall_s']:.0f} s; everything is in "
        f"{config.out}/, the picture in {config.out}/report.html"
    )
    return summary


def _summary(config: TrainConfig, before: list[Score], after: list[Score], history: list[dict], started: float) -> dict:
    busy_s = sum(metrics["update_s"] for metrics in history)
    return {
        **compared(before, after),
        "updates": len(history),
        "tokens_per_s": sum(metrics["tokens"] for metrics in history) / busy_s if busy_s else 0.0,
        "wall_s": time.perf_counter() - started,
        "peak_rss_bytes": usage.peak_rss_bytes(),
        "seed": config.seed,
        "commit": usage.commit(),
        "world_size": distributed.world_size(),
    }
