"""The tables of the READMEs, made from the rows in benchmarks/results alone.

    python -m benchmarks.tables             prints every table there are rows for
    python -m benchmarks.tables --write     puts them into README.md, benchmarks/README.md and docs/models.md, between
                                            the lines `<!-- table: NAME -->` and `<!-- end -->`
    python -m benchmarks.tables --prune     drops each row that a later one replaces

Of rows that measure the same on the same hardware the last one counts; tiny ones never do. The table `cards` has no
rows: it is what plans (swirl.plan) of all presets come to. That of `paper` is the head of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import paper_evidence
from benchmarks.harness import RESULTS, grid, read

MARKED_FILES = ("benchmarks/README.md", "README.md", "docs/models.md", "docs/memory.md")
READMES = tuple(RESULTS.parents[1] / name for name in MARKED_FILES)
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# What tells one measurement from another, by file; all else in a row is its outcome, or how it was come by.
IDENTITY = {
    "attention": ("workload", "window", "heads", "head_dim", "provider", "phase", "dtype", "hardware"),
    "crossover": ("form", "trunk", "branches", "heads", "head_dim", "provider", "dtype", "hardware"),
    "linear_log_prob": ("rows", "d", "vocabulary", "provider", "phase", "dtype", "hardware"),
    "pointwise": ("op", "provider", "phase", "dtype", "hardware"),
    "decode": ("branches", "trunk", "own", "provider", "dtype", "hardware"),
    "head_draw": ("sequences", "d", "vocabulary", "provider", "dtype", "hardware"),
    "sharded_memory": ("model", "ranks", "shard", "dtype", "hardware"),
    "folder": ("model", "layers", "dtype", "hardware"),
    "train_step": ("workload", "model", "trees", "hardware"),
    "packing": ("workload", "hardware"),
    "sampling": ("shape", "axis", "trunk", "states", "draws", "new", "provider", "threads", "hardware"),
    "threads": ("waiting", "launcher", "busy", "threads", "hardware"),
    "slow_reward": ("trajectories", "concurrency", "staleness", "latency_ms", "hardware"),
    "client": ("calls", "latency_ms", "in_flight", "faults", "hardware"),
    "retrieval": ("slice", "method", "embeddings", "hardware"),
    "plan": ("case", "shape", "hardware"),
    "first_run": ("method", "seed", "hardware"),
    "kill_drill": ("job", "trajectories", "local", "hardware"),
}


def newest(name: str, rows: Iterable[dict]) -> list[dict]:
    """The last row of each measurement, in the order in which they were first made."""
    found = {}
    for row in rows:
        if not row.get("tiny"):
            found[tuple(row.get(key) for key in IDENTITY[name])] = row
    return list(found.values())


def _ms(row: dict | None) -> str:
    if row is None or "median_ms" not in row:
        return "–"
    return f"{row['median_ms']:.{0 if row['median_ms'] >= 100 else 1 if row['median_ms'] >= 10 else 2}f}"


def _groups(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    found = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def _source(rows: list[dict]) -> str:
    """One line on where rows come from."""
    commits = ", ".join(dict.fromkeys(str(row["commit"])[:7] for row in rows if row.get("commit")))
    row = rows[-1]
    threads = {None: None, 1: "1 thread"}.get(row.get("threads"), f"{row.get('threads')} threads")
    parts = [row.get("hardware"), threads, row.get("dtype")]
    parts.append(f"torch {row['torch']}" if row.get("torch") else None)
    parts.append(f"commit {commits}" if commits else None)
    return ", ".join(part for part in parts if part)


def _pivot(rows: list[dict], label: Callable[[dict], str], first: str, phases=("both", "forward")) -> str:
    """A line a workload, a column a provider that was measured: milliseconds of `phases`, the second in brackets."""
    providers = dict.fromkeys(row["provider"] for row in rows if "median_ms" in row)
    lines = []
    for name, members in _groups([{**row, "_label": label(row)} for row in rows], "_label").items():
        found = {(row["provider"], row.get("phase")): row for row in members}
        cells = []
        for provider in providers:
            main, other = (found.get((provider, phase)) for phase in phases)
            cells.append(f"{_ms(main)} ({_ms(other)})" if other and "median_ms" in other else _ms(main))
        lines.append([*name, *cells])
    return grid([first, *providers], lines)


def attention(rows: list[dict]) -> str:
    def label(row):
        window = f", window {row['window']:,}" if row["window"] else ""
        size = f"{sizes[row['workload']]:,} tokens, {row['heads']} heads of {row['head_dim']}"
        return f"{row['workload']}: {size}{window}"

    tables = []
    for members in _groups(rows, "hardware", "dtype").values():
        sizes = {row["workload"]: row["tokens"] for row in members if row["provider"] == "swirl"}
        title = f"{_source(members)}; forward and backward (forward alone), in milliseconds"
        tables.append(f"{title}\n\n{_pivot(members, label, 'workload')}")
    return "\n\n".join(tables)


def crossover_curves(rows: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """By machine and type: by branches: {trunk, time_ratio, token_ratio} of each trunk, shortest first."""
    panels = {}
    for row in newest("crossover", rows):
        if row.get("form") == "separate":
            title = f"{row['hardware']}, {row['dtype']}, {row['heads']} heads of {row['head_dim']}"
            panels.setdefault(title, {}).setdefault(row["branches"], []).append(row)
    for curves in panels.values():
        for points in curves.values():
            points.sort(key=lambda point: point["trunk"])
    return panels


def crossover(rows: list[dict]) -> str:
    tables = []
    for title, curves in crossover_curves(rows).items():
        trunks = sorted({point["trunk"] for points in curves.values() for point in points})
        lines, pays = [], []
        for branches, points in sorted(curves.items()):
            at = {point["trunk"]: f"{point['time_ratio']:.2f} ({point['token_ratio']:.2f})" for point in points}
            lines.append([f"{branches} branches", *(at.get(trunk, "–") for trunk in trunks)])
            paying = [point["trunk"] for point in points if point["time_ratio"] >= 1.1]
            pays.append(f"{branches} branches: {f'{paying[0]:,}' if paying else 'never'}")
        words = f"The tree saves a tenth or more from a trunk of so many tokens on: {'; '.join(pays)}."
        tables.append(f"{title}\n\n{grid(['trunk', *(f'{trunk:,}' for trunk in trunks)], lines)}\n\n{words}")
    return "\n\n".join(tables)


def linear_log_prob(rows: list[dict]) -> str:
    tables = []
    for members in _groups(rows, "hardware", "dtype", "rows", "d", "vocabulary").values():
        lines = []
        for (provider,), measured in _groups(members, "provider").items():
            by_phase = {row["phase"]: row for row in measured}
            forward, both = by_phase.get("forward"), by_phase.get("both")
            if both and "median_ms" in both:
                extra = both.get("extra_bytes")
                memory = "–" if extra is None else f"{extra / 2**20:.0f}"
                share = f"{both['share_of_floor']:.0%}"
                lines.append([provider, _ms(forward), _ms(both), f"{both['tflops']:.3g}", share, memory])
        row = members[-1]
        title = f"{_source(members)}; {row['rows']:,} rows, d {row['d']:,}, {row['vocabulary']:,} words"
        headers = ["", "forward, ms", "with backward, ms", "TFLOP/s", "of a matrix product", "extra MiB"]
        tables.append(f"{title}\n\n{grid(headers, lines)}")
    return "\n\n".join(tables)


def pointwise(rows: list[dict]) -> str:
    tables = []
    for members in _groups(rows, "hardware", "dtype").values():
        lines = [
            [row["op"], row["phase"], row["provider"], _ms(row), f"{row['share_of_floor']:.0%}"]
            for row in members
            if "median_ms" in row
        ]
        tables.append(f"{_source(members)}\n\n{grid(['op', 'phase', '', 'ms', 'of copy bandwidth'], lines)}")
    return "\n\n".join(tables)


def decode(rows: list[dict]) -> str:
    tables = []
    for members in _groups(rows, "hardware", "dtype").values():
        shown = _pivot(members, lambda row: f"{row['branches']} of {row['trunk']:,}", "branches, trunk", (None, ""))
        tables.append(f"{_source(members)}; milliseconds a token\n\n{shown}")
    return "\n\n".join(tables)


def head_draw(rows: list[dict]) -> str:
    tables = []
    for members in _groups(rows, "hardware", "dtype").values():
        title = f"{_source(members)}; d {members[0]['d']:,}, {members[0]['vocabulary']:,} words; milliseconds a token"
        tables.append(f"{title}\n\n{_pivot(members, lambda row: str(row['sequences']), 'sequences', (None, ''))}")
    return "\n\n".join(tables)


def train_step(rows: list[dict]) -> str:
    def peer(row):
        return f"{1e3 * row['transformers_s']:,.0f} ms ({row['transformers_ratio']:.0f}x)"

    def update(row):
        return f"{1e3 * row['packed_update_s']:,.0f} ms ({row['update_utilization']:.0%})"

    # Column: what it shows. The last ones stand where some row has them.
    columns = {
        "workload": lambda row: row["workload"],
        "tokens, separate → packed": lambda row: f"{row['separate_tokens']:,} → {row['packed_tokens']:,}",
        "tokens of merged rows": lambda row: f"{row['merged_tokens']:,}",
        "separate": lambda row: f"{1e3 * row['separate_s']:,.0f} ms",
        "merged rows": lambda row: f"{1e3 * row['merged_s']:,.0f} ms",
        "packed": lambda row: f"{1e3 * row['packed_s']:,.0f} ms",
        "faster": lambda row: f"{row['measured_ratio']:.1f}x",
        "token ratio (ideal)": lambda row: f"{row['ideal_ratio']:.1f}x",
    }
    optional = {
        "packed_update_s": ("whole update (of the matrix rate)", update),
        "transformers_s": ("transformers, eager, padded merged rows", peer),
    }
    tables = []
    for (model, trees, _), members in _groups(rows, "model", "trees", "hardware").items():
        shown = dict(columns)
        for key, (header, cell) in optional.items():
            if any(key in row for row in members):
                shown[header] = lambda row, key=key, cell=cell: cell(row) if key in row else "–"
        lines = [[cell(row) for cell in shown.values()] for row in members]
        tables.append(f"{_source(members)}; {model}, {trees} trees\n\n{grid(list(shown), lines)}")
    return "\n\n".join(tables)


def sharded_memory(rows: list[dict]) -> str:
    lines = [
        [
            row["ranks"],
            *(f"{row[name] / 1e6:,.0f}" for name in ("split_bytes", "planned_bytes", "peak_bytes")),
            f"{row['peak_bytes'] / rows[0]['peak_bytes']:.2f}",
        ]
        for row in rows
    ]
    headers = [
        "ranks",
        "split, MB a rank",
        "planned",
        "measured peak",
        "of one rank's",
    ]
    return f"{_source(rows)}, {rows[0]['weights'] / 1e6:,.0f}M weights\n\n{grid(headers, lines)}"


def folder(rows: list[dict]) -> str:
    lines = [
        [
            f"{row['model']}, {row['layers']} layers",
            f"{row['file_bytes'] / 1e9:.2f}",
            f"{row['load_ratio']:.3f}",
            f"{row['save_ratio']:.3f}",
            "equal" if row["equal"] else "not equal",
        ]
        for row in rows
    ]
    headers = ["folder", "GB", "peak of loading, of the file", "of loading and saving", "in transformers"]
    return f"{_source(rows)}\n\n{grid(headers, lines)}"


def packing(rows: list[dict]) -> str:
    ways = ("pack", "pack_flat", "pack_micro_batches")
    lines = [
        [
            row["workload"],
            f"{row['input_tokens']:,} → {row['packed_tokens']:,}",
            f"{row['sub_trajectories']:,}",
            *(f"{row[f'{way}_tokens_per_s'] / 1e6:,.0f}" for way in ways),
        ]
        for row in rows
    ]
    headers = ["workload", "tokens", "pairs", *(f"`{way}`, M tokens/s" for way in ways)]
    return f"{_source(rows)}, one core\n\n{grid(headers, lines)}"


def sampling(rows: list[dict]) -> str:
    """The comb by hardware; how it grows is a picture, whose rows are named below."""
    names = {"base": "the base that ships", "80m": "80M", "gemma-2-2b": "Gemma-2 2b"}
    headers = ["shape", "drawn by", "tokens a second", "of the floor", "swirl is faster", "load"]
    tables = []
    for members in _groups([row for row in rows if "tokens_per_s" in row], "hardware").values():
        combs, grown = ([row for row in members if ("axis" in row) == is_grown] for is_grown in (False, True))
        lines = [
            [
                names[row["shape"]],
                {"before": "swirl at e2d659d"}.get(row["provider"], row["provider"]),
                f"{row['tokens_per_s']:,.0f}",
                f"{row['share_of_floor']:.1%}",
                f"{row['swirl_is_faster']:.1f}x",
                f"{row['load']:.1f}",
            ]
            for row in combs
        ]
        tables.append(f"{_source(combs or members)}\n\n{grid(headers, lines)}")
        said = []
        for (shape, commit), points in _groups(grown, "shape", "commit").items():
            loads = sorted(row["load"] for row in points)
            said.append(f"{names[shape]} at commit {commit}, load {loads[0]:.1f} to {loads[-1]:.1f}")
        if said:
            tables.append(f"Growth: {'; '.join(said)}.")
    return "\n\n".join(tables)


def threads(rows: list[dict]) -> str:
    def seconds(found, name):
        return " / ".join(f"{found[busy][name]:.2f}" if busy in found else "–" for busy in (False, True))

    lines = []
    for (waiting, launcher), members in _groups(rows, "waiting", "launcher").items():
        found = {row["busy"]: row for row in members}
        lines.append([waiting, launcher, seconds(found, "sample_s"), seconds(found, "update_s")])
    headers = ["waiting", "started", "sampling, s, quiet / beside a busy process", "update, s, likewise"]
    return f"{_source(rows)}\n\n{grid(headers, lines)}"


def slow_reward(rows: list[dict]) -> str:
    lines = [
        [
            f"{row['actions']:.0f}",
            row["concurrency"],
            row["staleness"],
            f"{row['latency_ms']:g} ms",
            f"{row['median_s']:.2f} s",
            f"{row['times_instant']:.2f}",
            f"{row['load']:.1f}",
        ]
        for row in rows
    ]
    headers = ["actions", "requests at a time", "staleness", "a call", "an update", "times an instant one's", "load"]
    return f"{_source(rows)}\n\n{grid(headers, lines)}"


def client(rows: list[dict]) -> str:
    lines = [
        [
            f"{row['calls']:,} of {row['latency_ms']:g} ms, {row['in_flight']} in flight",
            f"{row['faults']:.0%}",
            f"{row['wall_s']:.2f} s",
            f"{row['times_ideal']:.3f}",
            f"{row['cpu_s']:.2f} s",
            f"{row['peak_rss_bytes'] / 2**20:.0f}",
            f"{row['masked']:,}",
            row["wrong"],
            row["server"]["answered_twice"],
        ]
        for row in rows
    ]
    headers = ["calls", "faults", "time", "times ideal", "CPU", "peak MiB", "masked", "wrong", "answered twice"]
    return grid(headers, lines)


def retrieval(rows: list[dict]) -> str:
    def seconds(value):
        return "–" if value is None else f"{value:.2f}"

    lines = [
        [
            f"{row['slice']}, {row['questions']:,} questions",
            f"{row['pages']:,}",
            f"{row['method']}, {row['embeddings']}" if row["embeddings"] else row["method"],
            *(f"{row[f'recall_at_{k}']:.1%}" for k in (1, 5, 10)),
            seconds(row["build_s"]),
            seconds(row["query_ms"]),
        ]
        for row in rows
    ]
    headers = ["slice", "pages", "method", "recall@1", "recall@5", "recall@10", "index, s", "ms a query"]
    return f"{_source(rows)}\n\n{grid(headers, lines)}"


def plan(rows: list[dict]) -> str:
    lines = [
        [
            f"{row['weights'] / 1e6:,.0f}M, {row['tokens']:,} tokens",
            f"`{row['flags']}`" if row["flags"] else "recorded actions, float32",
            f"{row['planned_bytes'] / 1e9:.2f}",
            f"{row['measured_bytes'] / 1e9:.2f}",
            f"{row['ratio'] - 1:+.0%}",
        ]
        for row in rows
    ]
    return (
        f"{_source(rows)}\n\n{grid(['weights, micro-batch', 'flags', 'planned, GB', 'measured, GB', 'off by'], lines)}"
    )


CARD_CACHE_TOKENS = 32_768
# Columns of the table of cards: flags of `plan`, and how many GPUs.
CARD_MODES = {
    "all weights": ({}, 1),
    "`layers`": ({"activation_checkpointing": "layers"}, 1),
    "8-bit, `layers`": ({"activation_checkpointing": "layers", "optimizer": "adamw-8bit"}, 1),
    "`--lora 16`": ({"lora": 16}, 1),
    "LoRA, `layers`": ({"activation_checkpointing": "layers", "lora": 16}, 1),
    "all weights, 8 GPUs": ({"shard": "all"}, 8),
    "`layers`, 8 GPUs": ({"shard": "all", "activation_checkpointing": "layers"}, 8),
    "LoRA, `layers`, 8 GPUs": ({"shard": "all", "activation_checkpointing": "layers", "lora": 16}, 8),
}


def cards() -> str:
    """GB of each GPU by preset and mode, and the smallest card that holds as much."""
    from swirl.app.planning import needed_bytes
    from swirl.learning.plan import plan as planned
    from swirl.model.config import PRESETS
    from swirl.plan import PlanConfig, job_of

    def cell(name: str, flags: dict, gpus: int) -> str:
        job = job_of(PlanConfig(model=name, max_cache_tokens=CARD_CACHE_TOKENS, **flags), gpus)
        size = needed_bytes(job, planned(job)) / 1e9
        return f"{size:,.0f} ({next((card for card in (24, 80, 141) if size <= card), '–')})"

    lines = [[name, *(cell(name, *mode) for mode in CARD_MODES.values())] for name in PRESETS]
    return grid(["preset", *CARD_MODES], lines)


def kill_drill(rows: list[dict]) -> str:
    lines = [
        [
            row["job"],
            f"{row['lines']:,}",
            f"{row['hits']:,}",
            row["torn"],
            row["lines_missing"],
            row["lines_extra"],
            row["trajectories_twice"],
            row["cached_asked_again"],
        ]
        for row in rows
    ]
    headers = ["command", "lines", "kills", "left half a line", "lines missing", "changed", "twice"]
    return grid([*headers, "cached answers asked again"], lines)


def first_run(rows: list[dict]) -> str:
    families = list(rows[0]["accuracy"])
    lines = [[row["method"], *(f"{row['accuracy'][family]:.1%}" for family in families)] for row in rows]
    return f"{_source(rows)}\n\n{grid(['', *families], lines)}"


TABLES: dict[str, Callable[[list[dict]], str]] = {
    table.__name__: table
    for table in (
        attention,
        crossover,
        linear_log_prob,
        pointwise,
        decode,
        head_draw,
        train_step,
        sharded_memory,
        folder,
        packing,
        sampling,
        threads,
        slow_reward,
        client,
        retrieval,
        plan,
        first_run,
        kill_drill,
    )
}


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Every table there are rows for, by name."""
    rows = {name: newest(name, read(folder / f"{name}.jsonl")) for name in TABLES}
    found = {name: TABLES[name](measured) for name, measured in rows.items() if measured} | {"cards": cards()}
    runs = paper_evidence.read(folder / "paper.jsonl")
    return found | ({"paper": paper_evidence.headline(runs)} if runs else {})


def filled(text: str, found: dict[str, str]) -> str:
    """`text` with its marked tables replaced; one without rows says how to make them. Raises ValueError on a name that
    is none of a table.
    """

    def table(match):
        name = match[2]
        if name not in TABLES and name not in found:
            raise ValueError(f"no table {name}; there are {', '.join(TABLES)}")
        return found.get(name, f"Not measured: `python -m benchmarks.{name} --out benchmarks/results/{name}.jsonl`.")

    return MARKED.sub(lambda match: f"{match[1]}{table(match)}\n{match[3]}", text)


def prune(folder: Path = RESULTS) -> None:
    """Keep of each file the rows that tables are made from."""
    for name in IDENTITY:
        file = folder / f"{name}.jsonl"
        if file.exists():
            file.write_text("".join(json.dumps(row) + "\n" for row in newest(name, read(file))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="fill the marked tables of the READMEs")
    parser.add_argument("--prune", action="store_true", help="drop rows that later ones replace")
    given = parser.parse_args()
    if given.prune:
        prune()
    found = tables()
    if given.write:
        try:
            texts = [filled(readme.read_text(), found) for readme in READMES]
        except ValueError as error:
            raise SystemExit(str(error)) from None
        for readme, text in zip(READMES, texts):
            readme.write_text(text)
    else:
        print("\n\n".join(f"## {name}\n\n{table}" for name, table in found.items()))


if __name__ == "__main__":
    main()
