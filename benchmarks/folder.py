"""How much memory does it take to load a model folder, and to save it again? Is it then the same to transformers?

    python -m benchmarks.folder --model gemma-2-9b --folder /big/disk              18.5 GB, of which two copies on disk
    python -m benchmarks.folder --model gemma-2-9b --layers 1 --folder /tmp/9b     the same with one of its layers

Writes a folder of random bfloat16 weights in shards, tensor by tensor; loads it in a process of its own, and saves it
beside; loads that in transformers in a third, and compares every tensor with the first folder's. Peaks are resident
memory less what the process held before, over the bytes of the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import append, machine
from benchmarks.sharded_memory import resident_bytes
from swirl.model import checkpoint
from swirl.model.config import PRESETS
from swirl.model.gemma import Gemma
from swirl.model.tensor_file import Deferred

DTYPE = torch.bfloat16


def write_random(folder: Path, name: str, layers: int | None) -> dict[str, int]:
    """A preset's shapes, or the first `layers` of them; returns {layers, file_bytes}."""
    config = PRESETS[name]
    if layers:
        config = dataclasses.replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Gemma(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def drawn(shape):
        weight, part = torch.empty(shape, dtype=DTYPE), 0.02 * torch.randn(1 << 20, generator=generator)
        for rows in weight.view(-1).split(part.numel()):
            rows.copy_(part[: rows.numel()])
        return weight

    state = {name: Deferred(shape, DTYPE, lambda shape=shape: drawn(shape)) for name, shape in shapes.items()}
    checkpoint.save(state, config.to_json(DTYPE), folder)
    return {"layers": config.num_hidden_layers, "file_bytes": sum(one.nbytes for one in state.values())}


def load_and_save(source: Path, target: Path) -> dict[str, int]:
    """Peaks in bytes, less what the process held before."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before

    before = resident_bytes()
    model = Gemma.from_pretrained(source, dtype=DTYPE)
    loaded = peak()
    model.save_pretrained(target)
    return {"load_bytes": loaded, "save_bytes": peak()}


def is_equal_in_transformers(source: Path, saved: Path) -> bool:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(saved, dtype=DTYPE, output_loading_info=True)
    theirs, count = dict(model.named_parameters()), 0
    for name, weight in checkpoint.read_weights(source):
        if not torch.equal(theirs[name], weight):
            return False
        count += 1
    return count == len(theirs) and not report["missing_keys"] and not report["unexpected_keys"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-2-9b", choices=PRESETS)
    parser.add_argument("--layers", type=int, help="so many of its layers; default: all")
    parser.add_argument("--folder", type=Path, required=True, help="a new one; removed at the end")
    parser.add_argument("--out", type=Path, help="append the row to this file (.jsonl)")
    parser.add_argument("--part", choices=("load", "compare"), help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    source, saved = args.folder / "random", args.folder / "saved"
    if args.part == "load":
        print(json.dumps(load_and_save(source, saved)))
        return
    if args.part == "compare":
        print(json.dumps({"equal": is_equal_in_transformers(source, saved)}))
        return
    args.folder.mkdir()
    try:
        row = {"benchmark": "folder", "model": args.model, **write_random(source, args.model, args.layers)}
        for part in ("load", "compare"):
            command = [sys.executable, "-m", "benchmarks.folder", "--folder", args.folder, "--part", part]
            row |= json.loads(subprocess.check_output(command).splitlines()[-1])
    finally:
        shutil.rmtree(args.folder)
    row |= {f"{what}_ratio": round(row[f"{what}_bytes"] / row["file_bytes"], 4) for what in ("load", "save")}
    row |= {"dtype": str(DTYPE)[6:], **machine(torch.device("cpu"))}
    append(args.out, [row])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
