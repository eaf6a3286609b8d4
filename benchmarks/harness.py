"""What the kernel benchmarks share: timing, peak memory, ceilings measured in the same run, rows and
tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Settings:
    """How to measure: where, how long each, how large, and where the rows go."""

    device: torch.device
    dtype: torch.dtype
    seconds: float  # of repeats, a measurement
    tiny: bool  # sizes that only show that all runs
    compile_only: bool  # swirl's kernels are called once, nothing is measured
    as_json: bool
    out: Path | None


def command_line(description: str) -> argparse.ArgumentParser:
    """The flags that all kernel benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="bfloat16 on CUDA, else float32")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each measurement repeats")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument(
        "--compile", action="store_true", help="measure nothing: fill Triton's cache with swirl's kernels"
    )
    parser.add_argument("--json", action="store_true", help="one JSON row a line on stdout, no table")
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    return parser


def settings_of(given: argparse.Namespace) -> Settings:
    """What `command_line` read."""
    dtype = given.dtype or ("bfloat16" if given.device.startswith("cuda") else "float32")
    device = torch.device(given.device)
    return Settings(device, getattr(torch, dtype), given.seconds, given.tiny, given.compile, given.json, given.out)


def settings(description: str, arguments: list[str] | None = None) -> Settings:
    """Command line of a benchmark that has no flags of its own."""
    return settings_of(command_line(description).parse_args(arguments))


def machine(device: torch.device) -> dict:
    """Hardware, driver, versions and commit: what a row means nothing without."""
    hardware, driver = platform.processor() or platform.machine(), None
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = _output_of(query).splitlines()[0] if _output_of(query) else None
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        hardware = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), hardware)
    from swirl.kernels import _triton

    return {
        "hardware": hardware,
        "driver": driver,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "load": round(os.getloadavg()[0], 1),  # of the last minute: a busy machine's CPU rows say little
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton.triton.__version__ if _triton.triton else None,
        "commit": _output_of(["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]) or None,
    }


def _output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@dataclass(frozen=True)
class Timing:
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_bytes: int | None  # beyond what was allocated before; None on CPU


def measure(run: Callable[[], object], how: Settings) -> Timing:
    """Time of one call: warmed up, then repeated for about `how.seconds`; on CUDA by events, L2 flushed
    between."""
    cuda = how.device.type == "cuda"
    peak = None
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
    once = time.perf_counter() - start
    fewest = 1 if how.tiny or once > 4 else 3
    repeats = 1 if how.tiny else max(fewest, min(200, int(how.seconds / max(once, 1e-6))))
    times = []
    if cuda:
        flush = torch.empty(256 << 20, dtype=torch.int8, device=how.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for first, last in events:
            flush.zero_()
            first.record()
            run()
            last.record()
        torch.cuda.synchronize()
        times = [first.elapsed_time(last) for first, last in events]
    else:
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return Timing(statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5], peak)


def gemm_flops(how: Settings) -> float:
    """FLOP/s of a large matrix product on random data, in this run: the ceiling of arithmetic."""
    n = 8192 if how.device.type == "cuda" else 1024
    n = 256 if how.tiny else n
    a, b = (torch.randn(n, n, device=how.device).to(how.dtype) for _ in range(2))
    return 2 * n**3 / (1e-3 * measure(lambda: a @ b, how).median_ms)


def copy_bandwidth(how: Settings) -> float:
    """Bytes/s, read and written, of a large copy in this run: the ceiling of memory."""
    n = (1 << 30) if how.device.type == "cuda" else (1 << 28)
    a = torch.empty((1 << 20) if how.tiny else n, dtype=torch.int8, device=how.device).zero_()
    b = torch.empty_like(a)
    return 2 * a.numel() / (1e-3 * measure(lambda: b.copy_(a), how).median_ms)


def reason(error: Exception) -> str:
    """An error as a note in a row."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def difference(results: Iterable[torch.Tensor], truth: Iterable[torch.Tensor]) -> float:
    """The largest of |x - truth| / |truth|; NaN if any is."""
    pairs = zip(results, truth, strict=True)
    return float(torch.stack([(x.float() - y.float()).norm() / y.float().norm() for x, y in pairs]).max())


def append(file: Path | None, rows: list[dict]) -> None:
    """Rows at the end of a JSONL file, where there is one to write to."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)


def read(file: Path) -> list[dict]:
    """The rows of a JSONL file; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def grid(headers: list[str], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    cells = [headers, ["---"] * len(headers), *([str(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


class Report:
    """Measures, and keeps the rows: printed as a table, or as JSON lines, and appended to a file.

    A row is written when the next one begins, so that a run which is cut short leaves what it has measured.
    """

    def __init__(self, name: str, how: Settings):
        self.name, self.how, self.rows, self.machine = name, how, [], machine(how.device)
        self._num_written = 0

    def add(
        self,
        provider: str,
        run: Callable[[], object] | None,
        *,
        floor_s: float = 0.0,
        note: str = "",
        **facts,
    ) -> dict:
        """Time one provider, and return its row, which may be added to until the next one begins.

        run None: not importable, or not for this input (the note says which). With --compile swirl runs once, others do
        not, and there is no row.
        """
        if self.how.compile_only:
            if provider == "swirl":
                run()
            return {}
        self._write()
        row = {"benchmark": self.name, **facts, "provider": provider}
        if run is not None:
            try:
                timing = measure(run, self.how)
                row |= {
                    "median_ms": round(timing.median_ms, 4),
                    "p20_ms": round(timing.p20_ms, 4),
                    "p80_ms": round(timing.p80_ms, 4),
                    "peak_bytes": timing.peak_bytes,
                    "share_of_floor": round(1e3 * floor_s / timing.median_ms, 4) if floor_s else None,
                }
            except Exception as error:  # a baseline that fails here is a finding, not the end of the run
                if provider == "swirl":
                    raise
                note = reason(error)
        row |= {"note": note or None, "dtype": str(self.how.dtype)[6:], "tiny": self.how.tiny, **self.machine}
        self.rows.append(row)
        return row

    def _write(self) -> None:
        for row in self.rows[self._num_written :]:
            append(self.how.out, [row])
            if self.how.as_json:
                print(json.dumps(row), flush=True)
            else:
                print(f"{self.name}: {row['provider']} done", file=sys.stderr, flush=True)
        self._num_written = len(self.rows)

    def finish(self) -> None:
        """Write the last row, and print the table."""
        self._write()
        if self.how.as_json or self.how.compile_only:
            return
        hidden = {"benchmark", "dtype", "tiny", *self.machine}
        columns = [key for key in dict.fromkeys(key for row in self.rows for key in row) if key not in hidden]
        cells = [columns] + [["" if row.get(key) is None else str(row[key]) for key in columns] for row in self.rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        print(f"{self.machine['hardware']}, torch {self.machine['torch']}, commit {self.machine['commit']}")
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def importable(name: str):
    """The module, or None: baselines are measured where they are installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except Exception:  # a broken installation of a peer is as good as none
        return None
