import asyncio
from dataclasses import replace

import pytest
from msgspec.structs import replace as replace_in

from swirl import tasks
from swirl.app.evaluation import answer
from swirl.app.resolve import load_model
from swirl.app.scores import bootstrap_interval, good_step_share, score_trajectories
from swirl.app.training_data import Fitting
from swirl.config import TrainConfig
from swirl.rollout.concurrency import as_done
from swirl.rollout.rollout import RolloutSpec, draw_seed, rollout, rollouts, with_ids
from swirl.rollout.task import Task
from swirl.sampling.local_policy import LocalPolicy
from swirl.tasks import almanac
from swirl.tools.search import search_tool
from swirl.trajectories.record import (
    Judged,
    Question,
    Step,
    Trajectory,
    decode_trajectory,
    encode_trajectory,
    with_calls,
)


def exact(question, prediction):
    return float(prediction == question.answer)


class Script:
    """Says its lines in turn."""

    name = "script"

    def __init__(self, *lines, truncated=False):
        self.lines, self.truncated = lines, truncated

    async def act(self, state):
        return Step(action=self.lines[min(len(state.steps), len(self.lines) - 1)], truncated=self.truncated)


class CountingSearch:
    def __init__(self):
        self.asked = []

    async def __call__(self, argument):
        self.asked.append(argument)
        return f"page of {argument}"


def play(policy, search=None, **fields):
    question = Question(id="q", task="bridge", question="Where?", answer="There")
    tools = (search_tool(search or CountingSearch()),)
    task = Task(name="bridge", questions={"test": [question]}, tools=tools, score=exact)
    return asyncio.run(rollout(question, 0, RolloutSpec(**{"task": task, "policy": policy, "max_steps": 5, **fields})))


def test_an_answer_ends_the_trajectory():
    made = play(Script("<search_query>a</search_query>", "thought <answer>There</answer>"))
    assert (made.stop, made.prediction, len(made.steps)) == ("answer", "There", 2)
    assert made.steps[0].observation == "a -> page of a" and made.steps[1].observation is None


def test_the_step_limit_ends_it_and_the_last_query_is_not_asked():
    search = CountingSearch()
    made = play(Script("<search_query>a</search_query>"), search)
    assert (made.stop, made.prediction, len(made.steps)) == ("step_limit", None, 5)
    assert len(search.asked) == 4 and made.steps[-1].observation is None


@pytest.mark.parametrize("line", ["", "no tag", "<search_query>a", "<math_exp>1+1</math_exp>", "<answer></answer>"])
def test_an_action_that_is_no_action_ends_it(line):
    made = play(Script(line))
    assert (made.stop, len(made.steps)) == ("invalid_action", 1)


def test_a_truncated_action_is_no_action():
    made = play(Script("<answer>There</answer>", truncated=True))
    assert made.stop == "invalid_action" and made.steps[0].truncated and "truncated" in made.steps[0].invalid


def test_the_context_ends_it():
    class Short(Script):
        max_state_tokens = 120

    class Turns:
        fingerprint = "f"

        def prompt_ids(self, text):
            return [1] * 40

        def action_ids(self, text):
            return [2] * 10

        def observation_ids(self, text):
            return [3] * 20

    made = play(Short("<search_query>a</search_query>"), tokenizer=Turns(), max_new_tokens=30)
    assert made.stop == "context_limit" and len(made.steps) == 2 and made.retokenized
    assert len(made.state_ids(2)) == 100
    assert with_ids(replace_ids(made), Turns()).state_ids(2) == made.state_ids(2)


def test_an_action_follows_an_opened_turn_where_data_has_no_observation(tiny_folder):
    _, tokenizer = load_model(str(tiny_folder))
    question = Question(id="q", task="own", question="Where?")
    steps = tuple(Step(action=f"{k}", observation=o) for k, o in enumerate([None, "a -> b", None]))
    made = with_ids(Trajectory(id="t", question=question, prompt="Where?", steps=steps, stop="answer"), tokenizer)
    made = with_calls(made)
    assert decode_trajectory(encode_trajectory(made)) == made  # refused where a step before the last has none
    opened = tokenizer.prompt_ids("")[-3:]
    assert tokenizer.decode(opened).endswith("model\n")
    assert all(made.state_ids(k)[-3:] == opened for k in range(3))
    assert made.steps[0].observation_ids == tuple(tokenizer.observation_ids("")) and made.steps[0].observation is None
    assert made.steps[2].observation_ids is None


def replace_ids(made):
    steps = tuple(Step(action=s.action, observation=s.observation) for s in made.steps)
    return Trajectory(id=made.id, question=made.question, prompt=made.prompt, steps=steps, stop=made.stop)


def test_an_action_that_ends_at_its_tag_has_its_end_of_turn_in_the_next_state():
    model, tokenizer = load_model("almanac")
    (question,) = almanac.questions("bridge", "test", 1)
    task = Task(name="bridge", questions={"test": [question]}, tools=(search_tool(),), score=exact)
    spec = RolloutSpec(
        task=task, policy=LocalPolicy(model, tokenizer), tokenizer=tokenizer, max_steps=5, temperature=0.0
    )
    whole, cut = (asyncio.run(rollout(question, 0, replace(spec, stop_at_tag=at_tag))) for at_tag in (False, True))
    assert [step.action for step in cut.steps] == [step.action for step in whole.steps] and len(whole.steps) > 1
    for k, (step, of_whole) in enumerate(zip(cut.steps, whole.steps)):
        assert step.stop_text in ("</search_query>", "</answer>") and of_whole.stop_text is None
        assert (*step.action_ids, tokenizer.end_of_turn_id) == of_whole.action_ids
        assert len(step.log_probs) == len(step.action_ids)
        assert cut.state_ids(k) == whole.state_ids(k)  # the same states, but the end of turn is context
    assert decode_trajectory(encode_trajectory(cut)) == cut
    again = with_ids(cut, tokenizer)
    assert [step.action_ids[-1] for step in again.steps].count(tokenizer.end_of_turn_id) == 0
    assert again.state_ids(1) == cut.state_ids(1)
    assert Fitting(None, TrainConfig(), model.config, tokenizer)(0, cut) == cut


def test_a_truncated_thought_that_is_gone_on_from_can_be_trained_on():
    model, tokenizer = load_model("almanac")
    made = play(Script("well", truncated=True), tokenizer=tokenizer, malformed="continue", max_steps=2)
    made = replace_in(made, retokenized=False)
    assert made.steps[0].observation_ids[0] == tokenizer.end_of_turn_id
    assert Fitting(None, TrainConfig(), model.config, tokenizer)(0, made) == made


def test_seeds_are_the_same_everywhere_and_differ_by_name():
    assert draw_seed(0, "bridge/train/1", 2, 3) == draw_seed(0, "bridge/train/1", 2, 3) < 2**63
    assert len({draw_seed(0, "q", s, k) for s in range(50) for k in range(50)}) == 2500


def test_a_failing_coroutine_is_raised_and_the_others_are_cancelled():
    ended = []

    async def sleeper(n):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(n)

    async def failing():
        await asyncio.sleep(0.01)
        raise KeyError("x")

    async def main():
        async for _ in as_done([sleeper(1), sleeper(2), failing(), sleeper(3)], 3):
            pass

    with pytest.raises(KeyError):
        asyncio.run(main())
    assert sorted(ended) == [1, 2]


def test_local_rollouts_do_not_depend_on_how_many_are_in_flight(tiny_folder):
    model, tokenizer = load_model(str(tiny_folder))
    task = tasks.open_task("bridge")
    asked = [(question, sample) for question in task.take("train", 3) for sample in range(2)]

    def all_of(in_flight):
        async def collect():
            spec = RolloutSpec(
                task=task,
                policy=LocalPolicy(model, tokenizer),
                tokenizer=tokenizer,
                max_steps=5,
                max_new_tokens=6,
                seed=3,
                in_flight=in_flight,
            )
            return sorted([t async for t in rollouts(asked, spec)], key=lambda t: t.id)

        return asyncio.run(collect())

    one, many = all_of(1), all_of(100)
    assert [t.steps[0].action_ids for t in one] == [t.steps[0].action_ids for t in many]
    assert all(len(step.log_probs) == len(step.action_ids) for t in many for step in t.steps)
    for t in many:
        assert decode_trajectory(encode_trajectory(t)) == t
        assert tokenizer.fingerprint == t.tokenizer and not t.retokenized


def test_scores_of_a_faultless_demonstrator_are_full(demonstrating_policy):
    for family in tasks.FIRST_EDITION:
        task = tasks.open_task(family)
        questions = task.take("test", 12)
        policy = demonstrating_policy(questions, slips=False)
        spec = RolloutSpec(task=task, policy=policy, max_steps=task.max_queries, in_flight=5)
        score = score_trajectories(task, asyncio.run(answer(questions, spec, judge=almanac.RuleJudge())))
        assert (score.accuracy, score.f1, score.good_steps, score.unjudged_steps) == (1.0, 1.0, 1.0, 0)
        assert score.interval == (1.0, 1.0)


def test_good_steps_are_averaged_within_then_across_and_masks_are_counted_apart():
    def of(*verdicts):
        steps = tuple(Step(action="x", verdict=verdict) for verdict in verdicts)
        question = Question(id="q", task="bridge", question="?")
        return Trajectory(id="t", question=question, prompt="?", steps=steps, stop="answer")

    assert good_step_share([of("GOOD", "GOOD", "BAD", "BAD"), of("GOOD", None)]) == (0.75, 1)
    assert good_step_share([of(None)]) == (None, 1)


def test_the_bootstrap_interval_is_that_of_a_proportion():
    values = [1.0] * 60 + [0.0] * 140
    low, high = bootstrap_interval(values)
    assert abs(low - (0.3 - 1.96 * 0.0324)) < 0.01 and abs(high - (0.3 + 1.96 * 0.0324)) < 0.01
    assert bootstrap_interval(values) == (low, high)


def test_a_checkpoint_judges_and_what_it_fails_to_say_is_masked(tiny_folder):
    from swirl.app.resolve import open_judge
    from swirl.judging.judges import StepToJudge

    judge = open_judge(str(tiny_folder))
    judge.max_new_tokens = 8
    question = Question(id="q", task="bridge", question="Where was Kelmor born?")
    item = StepToJudge(question=question, steps=(), step=Step(action="<answer>Kelmor</answer>"), tools=("search",))
    judgement = asyncio.run(judge.judge(item))
    assert judgement.verdict is None and judgement.judged is Judged.UNREADABLE


def test_a_state_that_comes_as_text_is_the_state_that_comes_as_ids(tiny_folder):
    from swirl.rollout.policy import PolicyState

    model, tokenizer = load_model(str(tiny_folder))
    policy = LocalPolicy(model, tokenizer)
    steps = (Step(action="<search_query>a</search_query>", observation="a -> b"),)
    ids = tokenizer.prompt_ids("Where?") + tokenizer.action_ids(steps[0].action)
    ids += tokenizer.observation_ids(steps[0].observation)

    def act(state_ids):
        state = PolicyState(prompt="Where?", steps=steps, ids=state_ids, seed=5, max_new_tokens=6)
        return asyncio.run(policy.act(state))

    assert act(None) == act(tuple(ids))


def test_the_judged_accuracy_of_answers_without_a_verdict_is_none_and_never_0():
    task = tasks.open_task("bridge")

    def scored(*answers):
        made = [
            Trajectory(
                id=str(n), question=Question(id=str(n), task="bridge", question="?", answer="a"), prompt="?",
                steps=(Step(action="x"),), stop="answer", prediction=prediction, outcome=outcome,
            )
            for n, (prediction, outcome) in enumerate(answers)
        ]  # fmt: skip
        score = score_trajectories(task, made, answers_judged=True)
        return score.judged_accuracy, score.judged_interval and tuple(score.judged_interval), score.unjudged_answers

    # No answer is wrong unasked; the two that were given have no verdict that could be read.
    assert scored(("a", None), ("b", None), (None, False)) == (None, None, 2)
    assert scored(("a", None)) == (None, None, 1)
    assert scored(("a", True), ("b", None), (None, False))[::2] == (0.5, 1)
    assert scored((None, False))[0] == 0.0  # nothing was given, so nothing is missing
