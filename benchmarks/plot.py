"""Where does the tree pay? results/crossover.svg, drawn from the rows of `benchmarks.attention --crossover` alone.

    python -m benchmarks.plot [--rows benchmarks/results/crossover.jsonl] [--out benchmarks/results/crossover.svg]

A panel for each machine and type. Solid: the time of separate passes over that of the tree, forward and backward;
dashed: their tokens, which is what a whole update saves where its time goes by tokens.
"""

from __future__ import annotations

import argparse
import math
from html import escape
from pathlib import Path

from benchmarks.harness import RESULTS, read
from benchmarks.tables import crossover_curves

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 380, 60, 110, 56, 48
COLOURS = ("#1b6ca8", "#c4571b", "#2d7d46", "#7a4fa3")


def _panel(title: str, curves: dict[int, list[dict]], offset: int) -> list[str]:
    """One plot as SVG elements; `curves` are the points of each number of branches, by trunk."""
    trunks = sorted({point["trunk"] for points in curves.values() for point in points})
    ratios = [point[key] for points in curves.values() for point in points for key in ("time_ratio", "token_ratio")]
    low, high = math.floor(math.log2(min(1, *ratios))), math.ceil(math.log2(max(2, *ratios)))
    bottom = offset + HEIGHT - BOTTOM

    def x(trunk):  # one step of the axis from each trunk to the next: but for the first they grow by a factor
        return LEFT + (WIDTH - LEFT - RIGHT) * trunks.index(trunk) / max(1, len(trunks) - 1)

    def y(ratio):
        return bottom - (HEIGHT - TOP - BOTTOM) * (math.log2(ratio) - low) / (high - low)

    def text(at_x, at_y, words, anchor="middle", more=""):
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'

    found = [text(LEFT, offset + 22, title, "start", ' font-weight="bold"')]
    found.append(text(LEFT, offset + 40, "separate passes / tree: time (solid), tokens (dashed)", "start"))
    for tick in (2.0**power for power in range(low, high + 1)):
        weight = 'stroke="#555"' if tick == 1 else 'stroke="#ddd"'
        found.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" {weight}/>')
        found.append(text(LEFT - 8, y(tick) + 4, f"{tick:g}x", "end"))
    found += [text(x(trunk), bottom + 18, f"{trunk:,}") for trunk in trunks]
    found.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 38, "tokens of the trunk"))
    for number, (branches, points) in enumerate(sorted(curves.items())):
        colour = COLOURS[number % len(COLOURS)]
        for key, dash in (("token_ratio", ' stroke-dasharray="5 4"'), ("time_ratio", "")):
            line = " ".join(f"{x(point['trunk']):.1f},{y(point[key]):.1f}" for point in points)
            found.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        end = points[-1]
        label = f"{branches} branches"
        found.append(text(WIDTH - RIGHT + 8, y(end["time_ratio"]) + 4, label, "start", f' fill="{colour}"'))
    return found


def svg(rows: list[dict]) -> str:
    """The whole picture, of rows that are not tiny."""
    panels = crossover_curves(rows)
    if not panels:
        raise ValueError("no rows of `python -m benchmarks.attention --crossover`")
    height = HEIGHT * len(panels)
    size = f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', '<rect width="100%" height="100%" fill="white"/>']
    for number, (title, curves) in enumerate(panels.items()):
        lines += _panel(title, curves, number * HEIGHT)
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS / "crossover.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "crossover.svg")
    given = parser.parse_args()
    try:
        given.out.write_text(svg(read(given.rows)))
    except ValueError as error:
        raise SystemExit(f"{given.rows}: {error}") from None
    print(given.out)


if __name__ == "__main__":
    main()
