"""RuleJudge: Almanac's stand-in for a generative judge.

It labels a step GOOD where a sound reasoner could take it given what is in the context, and BAD otherwise.
It reads the question's wording and the results seen so far, never the golden answer, never the facts of the
world: on edited pages it goes by what the results say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from swirl.errors import CalculatorError
from swirl.judging.judges import Judgement, StepToJudge
from swirl.tasks.almanac.arithmetic import PHRASE_OF, Problem, parse_problem, readings
from swirl.tasks.almanac.questions import Chain, parse_question
from swirl.tasks.almanac.world import RELATIONS, names, read_facts
from swirl.tasks.scoring import normalize_answer, read_number
from swirl.tools.calculator.calculate import calculate
from swirl.trajectories.record import Call, Step

MAX_CHARACTERS = 2000  # of an action; a longer one is BAD unread

# Words a query may hold beside the name it asks for.
_FREE_WORDS = frozenset(
    "a an the of for about is was are who whom what which where in by page article person work city country "
    "town kingdom book name named find search information on s born married wrote written taught translated "
    "set founded rules governs".split()
) | frozenset(RELATIONS)
_WORD = re.compile(r"\w+")
_EXPRESSION = re.compile(r"[\d.,()+*/x×÷·−\s-]+")
NUMBER = re.compile(r"\d[\d,]*\.?\d*|\.\d+")
_SIGNS = str.maketrans({"x": "*", "×": "*", "·": "*", "÷": "/", "−": "-"})


class RuleJudge:
    """Judges the steps of Almanac's questions; any other question gets no verdict."""

    name = "rule"

    async def judge(self, item: StepToJudge) -> Judgement:
        return self.judge_now(item)

    def judge_now(self, item: StepToJudge) -> Judgement:
        """The same without waiting. Reads `question.question`, `steps`, `step` and `tools`, nothing else."""
        if item.tools == ("calculator",):
            problem = parse_problem(item.question.question)
            return no_verdict() if problem is None else _judge_readings(problem, item)
        chain = parse_question(item.question.question)
        return no_verdict() if chain is None else _judge_search(chain, item)


def no_verdict() -> Judgement:
    return Judgement(verdict=None, reason="the question is not worded as Almanac words them")


def good(reason: str) -> Judgement:
    return Judgement(verdict="GOOD", reason=reason)


def bad(reason: str) -> Judgement:
    return Judgement(verdict="BAD", reason=reason)


def read_call(step: Step) -> tuple[Call | None, str]:
    """(what the step does, "") or (None, why it is no action)."""
    if len(step.action) > MAX_CHARACTERS:
        return None, f"an action of more than {MAX_CHARACTERS} characters"
    return step.call, step.invalid or ""


def earlier(steps: tuple[Step, ...], tool: str) -> Iterator[tuple[str, str]]:
    """(argument, observation) of the tool calls so far."""
    for step in steps:
        call, _ = read_call(step)
        if call is not None and call.tool == tool and step.observation is not None:
            yield call.argument, step.observation


# Search


def _judge_search(chain: Chain, item: StepToJudge) -> Judgement:
    call, invalid = read_call(item.step)
    if call is None:
        return bad(f"not an action: {invalid}")
    if call.tool == "calculator":
        return bad("there is nothing to calculate in this question")
    needed, num_known = _resolve(chain, item.steps)
    is_resolved = num_known == chain.hops
    if call.tool == "answer":
        if not is_resolved:
            return bad(f"the results do not say yet what the {chain.relations[num_known]} of {needed} is")
        if normalize_answer(call.argument) == normalize_answer(needed):
            return good(f"the results lead to {needed}")
        return bad(f"the results lead to {needed}")
    if is_resolved:
        return bad(f"the results already lead to {needed}")
    words = words_of(call.argument)
    if any(words_of(query) == words for query, _ in earlier(item.steps, "search")):
        return bad("the query repeats an earlier one")
    if not asks_for(words, words_of(needed)):
        return bad(f"the next page needed is that of {needed}")
    return good(f"the page of {needed} is needed next")


def _resolve(chain: Chain, steps: tuple[Step, ...]) -> tuple[str, int]:
    """Follow the chain through the results seen: where it stands, and how many relations are behind it."""
    facts: dict[tuple[str, str], str] = {}
    for step in steps:
        for subject, relation, value in read_facts(step.observation or ""):
            facts[subject, relation] = value
    at = chain.start
    for depth, relation in enumerate(chain.relations):
        if (value := facts.get((names(at), relation))) is None:
            return at, depth
        at = value
    return at, chain.hops


@lru_cache(maxsize=1 << 14)
def words_of(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def asks_for(query: tuple[str, ...], name: tuple[str, ...]) -> bool:
    """Whether a query names the thing, whole and once, with nothing beside it but free words."""
    if name[:1] == ("the",):
        name = name[1:]
    width = len(name)
    for start in range(len(query) - width + 1):
        if query[start : start + width] == name:
            rest = query[:start] + query[start + width :]
            return len(rest) <= 12 and _FREE_WORDS.issuperset(rest)
    return False


# Arithmetic


def _judge_readings(problem: Problem, item: StepToJudge) -> Judgement:
    """GOOD where a reading that the calculations so far have followed furthest makes it so."""
    progress = {read: _progress(read, item.steps) for read in readings(problem)}
    furthest = max(progress.values())
    judgements = [_judge_calculation(read, item) for read, num_done in progress.items() if num_done == furthest]
    return next((judgement for judgement in judgements if judgement.verdict == "GOOD"), judgements[0])


def _judge_calculation(problem: Problem, item: StepToJudge) -> Judgement:
    call, invalid = read_call(item.step)
    if call is None:
        return bad(f"not an action: {invalid}")
    if call.tool == "search":
        return bad("there is nothing to search for in this problem")
    values = problem.values
    num_done = _progress(problem, item.steps)
    is_done = num_done == len(problem.operations)
    if call.tool == "answer":
        if not is_done:
            return bad(f"the results do not go beyond {values[num_done]} yet")
        if read_number(call.argument) == values[-1]:
            return good(f"the results lead to {values[-1]}")
        return bad(f"the results lead to {values[-1]}")
    if is_done:
        return bad(f"the results already lead to {values[-1]}")
    spans = _fit(problem, call.argument)
    if ends := [j for i, j in spans if i <= num_done < j]:
        return good(f"the numbers and operations fit, up to {values[max(ends)]}")
    if any(j <= num_done for _, j in spans):
        return bad("the calculation repeats what is known")
    operator, operand = _operation(problem, num_done)
    return bad(f"the next step is {values[num_done]} {operator} {operand}")


def _operation(problem: Problem, index: int) -> tuple[str, int]:
    name, operand = problem.operations[index]
    return PHRASE_OF[name].operator, operand


def _progress(problem: Problem, steps: tuple[Step, ...]) -> int:
    """How many operations are behind the furthest result that sound calculations have led to."""
    num_done = 0
    for expression, observation in earlier(steps, "calculator"):
        result = read_number(observation.rpartition(" -> ")[2])
        ends = (j for i, j in _fit(problem, expression) if i <= num_done < j and problem.values[j] == result)
        num_done = max(ends, default=num_done)
    return num_done


@lru_cache(maxsize=1 << 14)
def _fit(problem: Problem, expression: str) -> tuple[tuple[int, int], ...]:
    """Every (i, j) where the expression takes running number i to number j by operations i to j - 1.

    Any order and grouping of these numbers will do if the value is right: 7 + 12 for 12 + 7, (12 + 7) * 2 for
    two steps at once, and 12 + 12 for 12 * 2.
    """
    expression = expression.strip().removesuffix("=")
    if len(expression) > 100 or not _EXPRESSION.fullmatch(expression):
        return ()
    numbers = Counter(read_number(number) for number in NUMBER.findall(expression))
    if None in numbers:
        return ()
    try:
        value = Fraction(calculate(expression))
    except (CalculatorError, ValueError, ZeroDivisionError):
        return ()
    signs = expression.translate(_SIGNS)
    if "**" in signs or "//" in signs:
        return ()
    num_times, num_over = signs.count("*"), signs.count("/")
    values, spans = problem.values, []
    for i in range(len(problem.operations)):
        for j in range(i + 1, len(problem.operations) + 1):
            if value != values[j]:
                continue
            operations = [_operation(problem, index) for index in range(i, j)]
            operators = Counter(operator for operator, _ in operations)
            expected = Counter([Fraction(values[i]), *(Fraction(operand) for _, operand in operations)])
            if numbers == expected and (num_times, num_over) == (operators["*"], operators["/"]):
                spans.append((i, j))
            operator, operand = operations[0]
            added_up = operator == "*" and numbers == Counter({Fraction(values[i]): operand})
            if j == i + 1 and added_up and num_times == num_over == 0:
                spans.append((i, j))
    return tuple(spans)
