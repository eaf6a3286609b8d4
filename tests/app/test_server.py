"""The server in this process: what it holds back, refuses, and lets go of."""

from __future__ import annotations

from swirl.app.resolve import load_model
from swirl.app.server import Piecewise
from swirl.sampling.draw import SamplingParams
from swirl.sampling.in_flight import InFlight


def test_no_piece_holds_a_beginning_of_the_stop_text():
    tokenizer = load_model("almanac")[1]
    for text, stop in (("abcdef", "abcdef"), ("ab, abcdef", "abcdef"), ("é, é", "é, é"), ("ab", "b")):
        pieces, ids = Piecewise(tokenizer, (stop,)), tokenizer.encode(text)
        sent = [pieces.text_of(tuple(ids[:count])) for count in range(1, len(ids))]
        before = text[: text.index(stop)]
        assert before.startswith("".join(sent)) and "".join(sent) + pieces.rest_of(before) == before


def test_the_text_is_decoded_once_however_many_stop_texts_are_looked_for():
    calls = []
    params = SamplingParams(9, stop_texts=tuple("bcdef"))
    sequence = InFlight(state=None, seed=0, params=params, on_end=print, ids=[1, 2], log_probs=[-1.0, -1.0])
    assert sequence.cut_at_stop_text(0, lambda ids: calls.append(ids) or "a") is None
    assert len(calls) == 1
