"""The report in headless Chromium: views, filters, keys, links, both themes, hostile text. Skipped without one."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from benchmarks.chromium import chromium, open_tab
from benchmarks.report import READY, make_run
from swirl.app.report.build import write_report
from swirl.app.report.live import LiveReport, app_of
from swirl.app.run_records import EVALUATED
from swirl.trajectories.log import read_trajectories, write_trajectories

pytestmark = [pytest.mark.slow, pytest.mark.skipif(chromium() is None, reason="no chromium on this machine")]

HOSTILE = "</script><script>window.stolen=1</script><img src=x onerror=window.stolen=1><b>bold</b>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a run of 400 trajectories, whose first answer would run scripts if it could."""
    folder = tmp_path_factory.mktemp("run") / "run"
    make_run(folder, 400)
    for name in EVALUATED.values():
        first, *rest = read_trajectories(folder / name)
        steps = (replace(first.steps[0], action=HOSTILE, log_probs=None, reason=HOSTILE), *first.steps[1:])
        question = replace(first.question, question=HOSTILE)
        write_trajectories(folder / name, [replace(first, question=question, prompt=HOSTILE, steps=steps), *rest])
    return write_report([folder])


def browse(page, visit, **look):
    """`visit(tab)` with the page open; whatever the console complains of fails the test."""

    async def opened():
        async with open_tab() as tab:
            await tab.look(**{"width": 1440, "height": 900, **look})
            await tab.open(page.resolve().as_uri())
            await tab.wait_for(READY)
            await visit(tab)
            assert tab.complaints == []

    asyncio.run(opened())


def test_questions_that_a_bound_leaves_out_are_counted(page, tmp_path):
    bound = write_report([page.parent], tmp_path / "bound.html", max_entries=0)

    async def visit(tab):
        text = await tab.run("document.getElementById('changed').textContent")
        assert re.fullmatch(r"(?:(Mended|Broken) by training \((\d+)\)\2 are left out of this page [^)]*\)){2}", text)

    browse(bound, visit)


def test_it_opens_on_what_training_mended_and_broke(page):
    async def visit(tab):
        titles = await tab.run("[...document.querySelectorAll('#changed h2')].map((h) => h.textContent)")
        assert titles[0].startswith("Mended by training (") and titles[1].startswith("Broken by training (")
        assert await tab.run("document.querySelectorAll('#changed ol')[0].children.length") == 10
        assert await tab.run("document.querySelectorAll('#table tbody tr').length") == 4
        await tab.run("document.getElementById('h-curves').scrollIntoView()")
        await tab.wait_for("document.querySelectorAll('#curves canvas').length >= 3")
        assert "Reward of an action" in await tab.run("document.querySelector('#curves .plot').ariaLabel")
        assert "not measured" in await tab.run("document.querySelector('#curves > .note').textContent")
        await tab.run("document.querySelector('#changed a').click()")
        await tab.wait_for("document.querySelectorAll('#detail .column').length === 2")

    browse(page, visit)


def test_filters_search_keys_and_links(page):
    async def visit(tab):
        await tab.key("t")
        await tab.wait_for("document.querySelectorAll('.row').length > 5")
        count = "document.getElementById('count').textContent"
        assert await tab.run(count) == "350 of 350"  # 50 questions with two answers, 300 of the training data
        assert await tab.run("document.querySelectorAll('.row').length") < 40  # only what is in sight
        choose = "((s) => { s.value = 'mended'; s.dispatchEvent(new Event('change')); })"
        await tab.run(f"{choose}(document.querySelector('[name=change]'))")
        mended = int((await tab.run(count)).split()[0])
        assert 0 < mended < 50
        await tab.run("document.getElementById('show-all').click()")
        await tab.wait_for(f"{count} === '350 of 350'")

        await tab.key("j")
        await tab.wait_for("document.querySelector('.row[aria-selected=true]')?.id === 'row-0'")
        await tab.key("j")
        await tab.wait_for("document.querySelector('.row[aria-selected=true]')?.id === 'row-1'")
        await tab.wait_for("document.querySelectorAll('.step').length > 1")
        await tab.run("document.querySelectorAll('.step')[1].querySelector('a').click()")
        await tab.wait_for("document.querySelector('.step.here')?.id === 'step-0-1'")
        linked = await tab.run("location.href")
        await tab.key("Escape")
        await tab.wait_for("location.hash === '#/trajectories'")

        await tab.key("/")
        await tab.wait_for("document.activeElement.id === 'search'")
        await tab.wait_for("document.documentElement.dataset.searchable === 'yes'")
        for letter in "needed":  # which only a judge's reason says
            await tab.key(letter)
        await tab.wait_for(f"{count} !== '350 of 350' && !{count}.startsWith('0 ')")
        await tab.key("Escape")
        await tab.key("?")
        await tab.wait_for("document.getElementById('keys').open")
        await tab.key("Escape")

        await tab.open("about:blank")
        await tab.open(linked)
        await tab.wait_for("document.querySelector('.step.here')?.id === 'step-0-1'")

    browse(page, visit)


def test_tokens_are_shaded_and_draws_stand_as_a_tree(page):
    async def visit(tab):
        await tab.run("location.hash = document.querySelectorAll('#changed a')[1].getAttribute('href')")
        await tab.wait_for("document.querySelector('.token')")
        assert "log-prob" in await tab.run("document.querySelector('.token').title")
        assert await tab.run("document.querySelectorAll('.p1, .p2, .p3, .p4').length") > 0
        await tab.key("s")
        await tab.wait_for("document.querySelector('[name=shading][value=change]').checked")
        text = "[...document.querySelectorAll('.step .text')].map((one) => one.textContent).join()"
        assert "<search_query>" in await tab.run(text)
        await tab.run("location.hash = '#/trajectories'")
        choose = "((s) => { s.value = 'with sampled actions'; s.dispatchEvent(new Event('change')); })"
        await tab.wait_for("document.querySelector('[name=branches]')")
        await tab.run(f"{choose}(document.querySelector('[name=branches]'))")
        await tab.key("j")
        await tab.wait_for("document.querySelectorAll('.tree li').length >= 2")
        assert "reward" in await tab.run("document.querySelector('.tree .chip').textContent")

    browse(page, visit)


def test_hostile_text_is_text(page):
    async def visit(tab):
        await tab.run("location.hash = '#/trajectories'")
        await tab.key("j")
        await tab.wait_for("document.querySelectorAll('.step').length > 1")
        await tab.run("document.querySelectorAll('#detail details').forEach((one) => { one.open = true; })")
        assert await tab.run("document.querySelector('#detail h2').textContent") == HOSTILE
        assert HOSTILE in await tab.run("document.querySelector('.step .text').textContent")
        assert await tab.run("window.stolen === undefined && !document.querySelector('main img, main b, main script')")

    browse(page, visit)


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_and_a_dark_room(page, dark):
    async def visit(tab):
        for address in ("#/", "#/trajectories", "entry"):
            if address == "entry":
                await tab.key("j")
                await tab.key("Enter")
                await tab.wait_for("document.querySelector('.step')")
            else:
                await tab.run(f"location.hash = '{address}'")
            assert await tab.run("document.documentElement.scrollWidth") <= 390, address
        dark_now = "getComputedStyle(document.body).backgroundColor === 'rgb(17, 22, 28)'"
        assert await tab.run(dark_now) is dark
        await tab.key("d")
        assert await tab.run(dark_now) is not dark
        await tab.run("document.querySelector('.back').click()")
        await tab.wait_for("getComputedStyle(document.getElementById('finder')).display !== 'none'")

    browse(page, visit, width=390, height=844, dark=dark)


def test_a_run_that_goes_on_is_seen_to(tmp_path):
    update = {"reward": 0.5, "loss": 0.0, "grad_norm": 1.0, "tokens_per_s": 100}
    (tmp_path / "config.json").write_text('{"updates": 9}')

    async def watch():
        def write(number):
            with open(tmp_path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"update": number, **update}) + "\n")

        write(1)
        report = LiveReport([tmp_path], 10)
        report.refresh()
        async with TestServer(app_of(report), host="127.0.0.1") as server, open_tab() as tab:
            await tab.open(str(server.make_url("/")))
            await tab.wait_for("document.querySelector('.run .chip')?.textContent.includes('1 of 9 updates')")
            write(2)
            await tab.wait_for("document.querySelector('.run .chip').textContent.includes('2 of 9 updates')")
            assert "live, " in await tab.run("document.getElementById('live').textContent")
            await tab.run("document.getElementById('h-curves').scrollIntoView()")
            await tab.wait_for("document.querySelector('#curves .plot canvas')")
            assert tab.complaints == []

    asyncio.run(watch())
