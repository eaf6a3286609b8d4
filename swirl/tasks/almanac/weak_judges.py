"""Judges that are wrong in a known way, to filter and to reward by. RuleJudge, the oracle, is for evaluation.

rule         the oracle: a sound reasoner could take the step (judge.py)
lenient      the step is grounded: it asks about, or answers with, something of the right kind that the question or the
             results name, and repeats nothing; whether it is what was asked for is not looked at
noisy:SHARE  the oracle's verdict, flipped in that share of all steps; the same step is always judged alike
"""

from __future__ import annotations

from hashlib import blake2b

from swirl.errors import CalculatorError, ConfigError
from swirl.judging.judges import Judgement, StepToJudge
from swirl.tasks.almanac.arithmetic import Problem, parse_problem, readings
from swirl.tasks.almanac.judge import (
    NUMBER,
    RuleJudge,
    asks_for,
    bad,
    earlier,
    good,
    no_verdict,
    read_call,
    words_of,
)
from swirl.tasks.almanac.questions import Chain, parse_question
from swirl.tasks.almanac.world import RELATIONS, read_facts
from swirl.tasks.scoring import normalize_answer, read_number
from swirl.tools.calculator.calculate import calculate


class LenientJudge:
    """Judges whether a step is grounded. Reads what RuleJudge reads, and no more."""

    name = "lenient"

    async def judge(self, item: StepToJudge) -> Judgement:
        return self.judge_now(item)

    def judge_now(self, item: StepToJudge) -> Judgement:
        if item.tools == ("calculator",):
            problem = parse_problem(item.question.question)
            return no_verdict() if problem is None else _judge_calculation(problem, item)
        chain = parse_question(item.question.question)
        return no_verdict() if chain is None else _judge_search(chain, item)


def _judge_search(chain: Chain, item: StepToJudge) -> Judgement:
    call, invalid = read_call(item.step)
    if call is None or call.tool not in ("search", "answer"):
        return bad(f"not an action of this task: {invalid or 'a calculation'}")
    facts = [fact for step in item.steps for fact in read_facts(step.observation or "")]
    if call.tool == "answer":
        kind = RELATIONS[chain.relations[-1]][1]
        values = {normalize_answer(value) for _, relation, value in facts if RELATIONS[relation][1] == kind}
        is_grounded = normalize_answer(call.argument) in values
        return good(f"the results name this {kind}") if is_grounded else bad(f"no {kind} of this name in the results")
    query = words_of(call.argument)
    if any(words_of(asked) == query for asked, _ in earlier(item.steps, "search")):
        return bad("the query repeats an earlier one")
    named = {chain.start, *(value for _, _, value in facts)}
    if any(asks_for(query, words_of(name)) for name in named):
        return good("the query asks about what the question or the results name")
    return bad("the query asks about something that nothing names")


def _judge_calculation(problem: Problem, item: StepToJudge) -> Judgement:
    call, invalid = read_call(item.step)
    if call is None or call.tool not in ("calculator", "answer"):
        return bad(f"not an action of this task: {invalid or 'a search'}")
    done = list(earlier(item.steps, "calculator"))
    results = {read_number(observation.rpartition(" -> ")[2]) for _, observation in done}
    if call.tool == "answer":
        value = read_number(call.argument)
        is_grounded = value is not None and value in results
        return good("the results name this number") if is_grounded else bad("no such number in the results")
    expression = "".join(call.argument.split())
    if any("".join(asked.split()) == expression for asked, _ in done):
        return bad("the calculation repeats an earlier one")
    named = results | {problem.first, *(operand for read in readings(problem) for _, operand in read.operations)}
    numbers = [read_number(number) for number in NUMBER.findall(expression)]
    try:
        calculate(expression)
    except CalculatorError as error:
        return bad(f"no calculation: {error}")
    if len(numbers) < 2 or not named.issuperset(numbers):
        return bad("the calculation is of numbers that nothing names")
    return good("the calculation is of numbers that the question or the results name")


class NoisyJudge:
    """The oracle, wrong about a share of all steps: which ones is decided by the state, the action and the seed."""

    def __init__(self, share: float, seed: int = 0):
        if not 0 <= share <= 1:
            raise ConfigError(f"judge noisy:{share}: expected a share between 0 and 1")
        self.share, self.seed, self.name = share, seed, f"noisy:{share:g}"
        self._oracle = RuleJudge()

    async def judge(self, item: StepToJudge) -> Judgement:
        return self.judge_now(item)

    def judge_now(self, item: StepToJudge) -> Judgement:
        judgement = self._oracle.judge_now(item)
        if judgement.verdict is None or not self._is_wrong_about(item):
            return judgement
        return good("taken for sound") if judgement.verdict == "BAD" else bad("taken for unsound")

    def _is_wrong_about(self, item: StepToJudge) -> bool:
        actions = [step.action for step in (*item.steps, item.step)]
        named = "\0".join((str(self.seed), item.question.question, *actions))
        draw = int.from_bytes(blake2b(named.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
        return draw < self.share * 2**64


def open_judge(name: str) -> RuleJudge | LenientJudge | NoisyJudge:
    """`rule`, `lenient` or `noisy:SHARE`. Raises ConfigError for any other name."""
    if name == "rule":
        return RuleJudge()
    if name == "lenient":
        return LenientJudge()
    kind, _, share = name.partition(":")
    try:
        if kind == "noisy":
            return NoisyJudge(float(share))
    except ValueError:
        pass
    raise ConfigError(f"judge '{name}' is unknown: expected rule, lenient or noisy:SHARE, such as noisy:0.2")
