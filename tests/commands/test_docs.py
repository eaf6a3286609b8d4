"""The docs: every page is on the site, every link leads somewhere, every block of code is run or says why it is not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*SITE, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"))]
RUN = {"README.md": {"sh"}, "extending.md": {"sh", "python"}}  # by test_readme.py and test_extending.py
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_blocks_are_run_or_say_why_not(page):
    lines, inside = page.read_text(encoding="utf-8").splitlines(), False
    for number, line in enumerate(lines):
        if line.startswith("```"):
            inside = not inside
            language = line[3:].strip()
            marked = language == "text" or lines[number - 1].startswith("<!-- not run: ")
            known = marked or language in RUN.get(page.name, ())
            assert known or not inside, f"{page.name}:{number + 1}: ```{language}: is neither run nor marked"
        elif not inside and line.startswith("    "):
            assert lines[number - 1], f"{page.name}:{number + 1}: an indented block, which nothing here reads: fence it"
    assert not inside, page.name


def test_what_pages_say_holds_is_a_test():
    """`test_…` and `case_…` in backticks are functions; an ellipsis stands for the rest of a name, or its beginning."""
    defined = [
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def ((?:test|case)_\w+)", path.read_text(encoding="utf-8"), re.M)
    ]
    for page in PAGES:
        text = page.read_text(encoding="utf-8") if page.name != "log.md" else ""  # it tells of tests as they were
        for name in re.findall(r"`((?:test_|case_|…_)\w+…?)`", text):
            pattern = re.compile(name.replace("…", r"\w*"))
            assert any(map(pattern.fullmatch, defined)), f"{page.name}: {name}"


def test_every_page_is_on_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2].partition("\nnav:")[2]
    assert sorted(re.findall(r"[\w-]+\.md", navigation)) == [page.name for page in SITE]


@pytest.mark.slow  # mkdocs takes its time to start
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert {f"{page.stem}.html" for page in SITE} <= {path.name for path in tmp_path.iterdir()}
    page = (tmp_path / "structure.html").read_text(encoding="utf-8")
    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\" >]+)", page)
    assert loaded == []  # nothing comes from elsewhere
