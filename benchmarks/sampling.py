"""How fast are actions drawn? Tokens a second on a comb of states, beside the floor and beside peers.

    python -m benchmarks.sampling [--before FOLDER] [--threads 2] [--no-growth] [--tiny] [--json] [--out rows.jsonl]
    python -m benchmarks.sampling --plot rows.jsonl          the picture of those rows beside them

Two parts: one comb by every provider, then swirl alone as trunk, draws and states grow. With --out the picture of the
growth is drawn too, rows.svg.

The comb: 8 states, the longest of 1,024 tokens and each 128 longer than the one before, 4 draws of 64 tokens at each;
the shape of the base that ships with swirl, and a model of 80M parameters. On a GPU also Gemma-2 2b's shapes in
bfloat16, with 32 draws at each, so 256 sequences at once; these are not grown. Weights are drawn at random. Providers:
swirl; `before`, the swirl of another checkout (built there); transformers' generate, whose rows are padded to the
longest; on a GPU `uncaptured`, swirl without CUDA graphs, and vLLM. Engines live on from repeat to repeat, as in
training, and forget all keys. The floor is the time to move, once a token step, the weights and every key and value
that some sequence sees, at the rate of a copy measured in the same run; the time beside it holds the prefill of the
states too. Every provider runs in a process of its own, since libraries' threads disturb each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
# vocabulary, hidden, intermediate, layers, query heads, key heads, and what else is not Gemma 2's default
SHAPES = {
    "base": ((1024, 128, 256, 6, 4, 2), dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=128)),
    "80m": ((32_000, 768, 3072, 8, 12, 4), dict(head_dim=64, query_pre_attn_scalar=64)),
    "gemma-2-2b": ((256_000, 2304, 9216, 26, 8, 4), {}),
}
ON_GPU = "gemma-2-2b"  # and nowhere else: its weights are 10 GB in float32
GROWTH = {"trunk": (256, 512, 1024, 2048, 4096), "draws": (1, 2, 4, 8, 16, 32), "states": (1, 2, 4, 8, 16)}
COMB = {"trunk": 1024, "states": 8, "draws": 4, "new": 64}
MANY = COMB | {"draws": 32}  # 256 sequences
TINY = {"trunk": 40, "states": 2, "draws": 2, "new": 3}
GROWTH_SECONDS = 4.0  # of repeats, a point of the growth


def config_of(shape: str):
    from swirl import GemmaConfig

    sizes, others = SHAPES[shape]
    return GemmaConfig(*sizes, **others)


def dtype_of(device: str):
    import torch

    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def floor_bytes(config, itemsize: int, *, trunk: int, states: int, draws: int, new: int) -> float:
    """What the token steps of a comb must move: each time all weights, and the keys and values that are seen."""
    of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return new * itemsize * (config.num_weights + of_token * (trunk + states * draws * new / 2))


def comb_states(trunk: int, states: int, draws: int, vocab_size: int) -> list[list[int]]:
    import numpy as np

    ids = np.random.default_rng(0).integers(5, vocab_size, trunk).tolist()
    return [ids[: trunk * (k + 1) // states] for k in range(states) for _ in range(draws)]


def work(given: argparse.Namespace) -> None:
    """One provider, in this process: prints a JSON object of what it measured."""
    import torch

    torch.set_num_threads(given.threads)
    if given.worker == "uncaptured":
        from swirl.sampling import passes

        passes.replays = lambda device: False
    config = config_of(given.shape)
    states = comb_states(given.trunk, given.states, given.draws, config.vocab_size)
    provider = {"transformers": _transformers, "vllm": _vllm}.get(given.worker, _swirl)
    run = provider(config, given.device, states, given.new)
    run()
    times = []
    while not times or (len(times) < given.repeats and sum(times) < given.seconds):
        started = time.perf_counter()
        run()
        if given.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    num_tokens = len(states) * given.new
    found = {
        "median_s": statistics.median(times),
        "fastest_s": min(times),
        "tokens_per_s": num_tokens / statistics.median(times),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(found))


def _swirl(config, device, states, new):
    import torch

    from swirl import Gemma
    from swirl.sampling.engine import Engine

    with torch.device(device):
        model = Gemma(config).to(dtype_of(device))
    for weight in model.parameters():
        if weight.ndim > 1:  # drawn where they lie: `init_weights` draws on the CPU, a minute for 2b
            torch.nn.init.normal_(weight, std=0.02)
    engine = Engine(model)

    def run():
        engine.forget()
        made = engine.sample(states, seeds=range(len(states)), max_new_tokens=new, temperature=1.0, stop_ids=())
        assert all(len(one.ids) == new for one in made)

    return run


def _transformers(config, device, states, new):
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    fields = json.loads(json.dumps(config.to_json(dtype_of(device))))  # tuples as lists
    theirs = Gemma2Config(**{name: value for name, value in fields.items() if name != "architectures"})
    theirs._attn_implementation = "eager"  # the softcap has no other
    with torch.device(device):
        model = Gemma2ForCausalLM(theirs).to(dtype_of(device)).eval()
    longest = max(map(len, states))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in states], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in states], device=device)

    def run():
        made = model.generate(
            ids, attention_mask=mask, do_sample=True, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
        )
        assert made.shape[1] == longest + new

    return run


def _vllm(config, device, states, new):
    import tempfile

    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config.to_json(dtype_of(device))))
        # weights at random need no file, and token ids no tokenizer
        llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, enable_prefix_caching=True)
    params = SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": state} for state in states]

    def run():
        llm.reset_prefix_cache()
        made = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == new for one in made)

    return run


def measure(given: argparse.Namespace, provider: str, shape: str, comb: dict, folder: Path = ROOT) -> dict:
    """A row: the worker run in `folder`'s swirl. A peer that fails or is not installed gets a note instead of times;
    where swirl itself fails, SystemExit says how.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", provider, "--shape", shape]
    for name in ("threads", "device", "seconds", "repeats"):
        command += [f"--{name}", str(getattr(given, name))]
    for name, value in comb.items():
        command += [f"--{name}", str(value)]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(given.threads)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    row = {"benchmark": "sampling", "shape": shape, **comb, "provider": provider}
    if done.returncode and provider == "swirl":
        raise SystemExit(f"sampling: {shape} failed\n{done.stderr}")
    if done.returncode:
        return row | {"note": (done.stderr.strip().splitlines() or ["failed"])[-1][:160]}
    lines = done.stdout.splitlines()  # vLLM logs there too
    return row | json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def combs(given: argparse.Namespace) -> list[tuple[str, dict]]:
    """(shape, comb), every shape's own before any grows, so that a run cut short has them."""
    own = {shape: TINY if given.tiny else MANY if shape == ON_GPU else COMB for shape in given.shapes}
    growth = {"draws": (1, 2)} if given.tiny else GROWTH
    points = [{axis: value, "axis": axis} for axis, values in growth.items() for value in values]
    grown = [(shape, own[shape] | point) for shape in own if shape != ON_GPU for point in points]
    return [*own.items(), *(grown if given.growth else [])]


def rows_of(given: argparse.Namespace):
    """All rows, each with the hardware, its share of the floor, and how many times faster swirl is."""
    import torch

    from benchmarks.harness import copy_bandwidth, machine, settings_of

    torch.set_num_threads(given.threads)
    how = settings_of(argparse.Namespace(**vars(given) | {"dtype": None, "compile": False}))
    bandwidth, facts = copy_bandwidth(how), machine(how.device)
    dtype = dtype_of(given.device)
    peers = ["before"] if given.before else []
    peers += ["uncaptured", "transformers", "vllm"] if how.device.type == "cuda" else ["transformers"]
    for shape, comb in combs(given):
        axis = {"axis": comb["axis"]} if "axis" in comb else {}
        comb = {name: value for name, value in comb.items() if name != "axis"}
        seconds = min(given.seconds, GROWTH_SECONDS) if axis else given.seconds
        how_long = argparse.Namespace(**vars(given) | {"seconds": seconds})
        floor_s = floor_bytes(config_of(shape), dtype.itemsize, **comb) / bandwidth
        ours = None
        for provider in ("swirl",) if axis else ("swirl", *peers):
            folder = given.before.resolve() if provider == "before" else ROOT
            row = measure(how_long, provider, shape, comb, folder)
            ours = ours or row
            if "tokens_per_s" in row:
                row["floor_s"], row["share_of_floor"] = floor_s, floor_s / row["median_s"]
                row["swirl_is_faster"] = ours["tokens_per_s"] / row["tokens_per_s"]
            yield {**facts, **axis, **row, "dtype": str(dtype)[6:], "tiny": given.tiny}


def plot(rows: list[dict]) -> str:
    """Tokens a second by trunk, draws and states, as SVG; a line a shape, each as a share of its best."""
    width, height = 360, 240
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(GROWTH)} {height + 60}" '
             'font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for panel, axis in enumerate(GROWTH):
        left = panel * width + 40
        lines.append(f'<text x="{left}" y="20" font-weight="bold">tokens a second by {escape(axis)}</text>')
        for number, shape in enumerate(dict.fromkeys(row["shape"] for row in rows)):
            points = [(row[axis], row["tokens_per_s"]) for row in rows
                      if row.get("axis") == axis and row["shape"] == shape and "tokens_per_s" in row]  # fmt: skip
            if not points:
                continue
            best, colour = max(y for _, y in points), ("#1b6ca8", "#c4571b")[number % 2]
            places = [(left + i * (width - 80) / max(1, len(points) - 1), 40 + height * (1 - y / best) * 0.9)
                      for i, (_, y) in enumerate(points)]  # fmt: skip
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for (x, y), (value, rate) in zip(places, points):
                lines.append(
                    f'<text x="{x:.1f}" y="{y - 5:.1f}" fill="{colour}" text-anchor="middle">{rate:,.0f}</text>'
                )
                lines.append(f'<text x="{x:.1f}" y="{height + 50}" text-anchor="middle">{value:,}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout of swirl, built, to compare with")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help=f"default: all, on a CPU all but {ON_GPU}")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of repeats, a provider")
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="the comb alone")
    parser.add_argument("--plot", type=Path, help="draw the rows of this file")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--json", action="store_true", help="one JSON row a line on stdout, no table")
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    for hidden in ("--worker", "--shape"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for name in COMB:
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        return work(given)
    if given.plot:
        return print(draw_picture(given.plot))
    on_gpu = given.device.startswith("cuda")
    given.shapes = given.shapes or [shape for shape in SHAPES if on_gpu or shape != ON_GPU]
    if ON_GPU in given.shapes and not on_gpu:
        parser.error(f"--shapes {ON_GPU}: expected --device cuda, not '{given.device}': 10 GB of weights in float32")
    from benchmarks.harness import append

    for row in rows_of(given):
        append(given.out, [row])
        if given.json:
            print(json.dumps(row), flush=True)
        elif "tokens_per_s" in row:
            print(f"{row['shape']:10} {row['trunk']:5} x {row['states']:2} x {row['draws']:2} {row['provider']:13}"
                  f"{row['tokens_per_s']:10,.0f} tok/s  {row['share_of_floor']:6.1%} of the floor  "
                  f"swirl is {row['swirl_is_faster']:.1f} times as fast", flush=True)  # fmt: skip
        else:
            print(f"{row['shape']:10} {row['provider']:13} {row['note']}", flush=True)
    if given.out and given.growth and not given.tiny:
        print(draw_picture(given.out), file=sys.stderr)


def draw_picture(file: Path) -> Path:
    """The plot of the newest rows of a file, beside it."""
    from benchmarks.harness import read
    from benchmarks.tables import newest

    picture = file.with_suffix(".svg")
    picture.write_text(plot(newest("sampling", read(file))))
    return picture


if __name__ == "__main__":
    main()
