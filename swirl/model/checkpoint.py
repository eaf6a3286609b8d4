"""Hugging Face folders: config.json, safetensors in one file or in shards, and the tokenizer's files.

Reading checks every name before the first byte of weights; writing never leaves half a folder behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError

from swirl.errors import CheckpointError, ConfigError
from swirl.model.config import GemmaConfig
from swirl.model.tensor_file import Deferred, open_tensors, own_rows, pieces_of, read_tensor, write_tensors
from swirl.storage.digest import DigestError, check_digests, digests_of, write_manifest
from swirl.storage.files import sync_files, sync_folder

SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What stands before a text model's names: in a checkpoint of its own, and in those of a Gemma 3 that sees.
PREFIXES = ("model.", "language_model.model.", "model.language_model.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
VISION_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Origin:
    """The folder that a model was read from, and what a save has to keep of it.

    config: the content of its config.json. prefix: what stands there for `model.` before the text model's names.
    others: the names of tensors that are not the text model's. generation: its generation_config.json, {} without one.
    hub_name: `owner/name[@revision]` where the folder is a hub's cache.
    """

    folder: Path
    config: dict
    prefix: str = PREFIXES[0]
    others: tuple[str, ...] = ()
    generation: dict = field(default_factory=dict)
    hub_name: str | None = None


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object from a file of a model folder. Raises CheckpointError naming the file."""
    path = Path(path)
    if not path.parent.is_dir():
        aside = _aside(path.parent, "old")
        hint = f"; an interrupted save left {aside}" if aside.is_dir() else ""
        raise CheckpointError(path.parent, f"no such model folder{hint}")
    if path.exists() and not path.is_file():
        raise CheckpointError(path, "expected a file")
    require_digests(path.parent, path.name)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"expected JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(path, "expected a JSON object")
    return content


def read_config(folder: str | os.PathLike) -> tuple[dict, GemmaConfig]:
    """(the content of a folder's config.json, the shape it says). Raises CheckpointError."""
    path = os.path.join(folder, "config.json")
    content = read_json(path)
    try:
        return content, GemmaConfig.from_json(content)
    except ConfigError as error:
        raise CheckpointError(path, str(error)) from None


def require_digests(folder: Path, *names: str) -> None:
    """Raises CheckpointError where a file of that name, written by swirl, is damaged. Others' files pass."""
    try:
        check_digests(folder, names)
    except DigestError as error:
        raise CheckpointError(folder, str(error)) from None
    except OSError as error:
        raise CheckpointError(folder, f"cannot be read ({error})") from None


def check_tokenizer_fits(tokenizer, vocab_size: int, path: str | os.PathLike) -> None:
    """Raises CheckpointError where text can become ids that the model has no embedding for."""
    if tokenizer.num_text_ids > vocab_size:
        raise CheckpointError(
            path,
            f"the tokenizer's ids go to {tokenizer.num_text_ids - 1}, the model's vocabulary is {vocab_size}",
        )


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, by the headers of the files themselves."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(folder / INDEX, "field 'weight_map': expected tensor names and their files")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:  # a path could lead out of the folder
                raise CheckpointError(folder / INDEX, f"field 'weight_map': expected names of files, got '{name}'")
        files = [folder / name for name in names]
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    else:
        raise CheckpointError(folder, f"expected {SINGLE} or {INDEX}")
    where = {}
    for file in files:
        if not file.is_file():  # a pipe would keep its reader waiting for ever
            raise CheckpointError(file, "expected a file" if file.exists() else "no such file")
    require_digests(folder, *(file.name for file in files))
    for file in files:
        with open_tensors(file) as tensors:
            where.update(dict.fromkeys(tensors.keys(), file))
    return where


def load_weights(
    module: torch.nn.Module, folder: str | os.PathLike, *, device: str | torch.device, tied: dict[str, str]
) -> tuple[str, tuple[str, ...]]:
    """Give `module`, built on the meta device, the weights of a folder, in the dtypes of its parameters.

    Of a sharded module each rank reads its own rows alone. Beside the module no more than PIECE_BYTES are held.
    `tied` maps names that some writers repeat to the parameter they must equal. Returns the prefix that stands for
    `model.` in the folder, and the names of the vision tower's tensors, which are not read.
    Raises CheckpointError naming the file: missing, truncated, or a tensor missing, unknown or misshaped.
    """
    folder = Path(folder)
    files = _files_of_tensors(folder)
    prefix, theirs, others = _names(files)
    where = {name: files[their_name] for name, their_name in theirs.items()}
    expected = dict(module.named_parameters())
    missing = [name for name in expected if name not in where]
    unknown = [name for name in where if name not in expected and name not in tied]
    for names, what in ((missing, "is missing"), (unknown, "is not part of this model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(where.get(names[0], folder), f"tensor '{names[0]}'{more} {what}")
    for file in sorted(set(where.values())):
        with open_tensors(file) as tensors:
            for name in sorted(name for name in where if where[name] == file):
                rows, shape = tensors.get_slice(theirs[name]), tuple(expected[tied.get(name, name)].shape)
                if tuple(rows.get_shape()) != shape:
                    got = tuple(rows.get_shape())
                    raise CheckpointError(file, f"tensor '{name}': expected shape {shape}, got {got}")
                if not (dtype := rows[:0].dtype).is_floating_point:
                    raise CheckpointError(file, f"tensor '{name}': expected floats, got {dtype}")
    module.to_empty(device=device)
    own = {name: own_rows(parameter) for name, parameter in module.named_parameters()}
    for name in sorted(expected, key=lambda name: (where[name], name)):
        for rows, piece in pieces_of(where[name], theirs[name], *own[name]):
            rows.copy_(piece)
    for name, same in tied.items():
        if name in where:
            pieces = pieces_of(where[name], theirs[name], *own[same])
            if not all(torch.equal(rows, piece.to(rows)) for rows, piece in pieces):
                raise CheckpointError(
                    where[name], f"tensor '{name}' differs from '{same}': an untied head is not supported"
                )
    return prefix, others


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The text model's tensors of a folder as they are, by the model's names, one at a time. Raises CheckpointError."""
    files = _files_of_tensors(folder)
    for name, their_name in _names(files)[1].items():
        yield name, read_tensor(files[their_name], their_name)


def _names(files: Mapping[str, Path]) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Of the tensors in `files`: what stands for `model.`, their name by our name, and the vision tower's names."""
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in files), PREFIXES[0])
    others = tuple(name for name in files if name.startswith(VISION))
    return prefix, {_our_name(name, prefix): name for name in files if name not in others}, others


def _our_name(name: str, prefix: str) -> str:
    if name in HEADS:
        return HEADS[0]
    return PREFIXES[0] + name.removeprefix(prefix) if name.startswith(prefix) else name


def save(
    state: dict[str, torch.Tensor],
    config: dict,
    path: str | os.PathLike,
    tokenizer=None,
    origin: Origin | None = None,
) -> None:
    """Write a model folder aside, sync, rename it into place; a model card beside older weights is kept.

    With an `origin`, names get its prefix, and its other tensors are copied from its folder. Raises CheckpointError
    where the folder cannot be written, where `path` holds something that is no checkpoint, or where those tensors are
    gone.
    """
    replace_folder(path, lambda folder: write(folder, state, config, tokenizer, origin))


def replace_folder(
    path: str | os.PathLike,
    fill: Callable[[Path], None],
    *,
    config: str = "config.json",
    weights: tuple[str, ...] = (SINGLE, INDEX),
) -> None:
    """What `fill` writes into an empty folder takes the place of a model folder, whole and with digests, or not at all.

    `config` and one of `weights` are the files by which such a folder is known. Raises CheckpointError where it cannot
    be written, or where `path` holds something that is no checkpoint.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise CheckpointError(path, "is a file, expected a folder")
    if target.is_dir() and any(target.iterdir()):
        if not (target / config).is_file():
            raise CheckpointError(path, f"holds files but no {config}: not a checkpoint, so it is left as it is")
        if not any((target / name).is_file() for name in weights):  # a run's folder has a config.json, too
            raise CheckpointError(path, "holds files but no weights: not a checkpoint, so it is left as it is")
    partial, old = _aside(target, "partial"), _aside(target, "old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        write_manifest(partial, digests_of(partial.iterdir()))
        sync_files(partial)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
        sync_folder(target.parent)
        if old.exists():
            _keep_other_files(old, target)
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, f"cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _aside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}"


def _keep_other_files(old: Path, new: Path) -> None:
    """A model card or a log beside the weights survives; weights, index and whatever was rewritten do not."""
    for entry in old.iterdir():
        if entry.suffix != ".safetensors" and entry.name != INDEX and not (new / entry.name).exists():
            entry.rename(new / entry.name)


def write(
    folder: Path,
    state: Mapping[str, torch.Tensor | Deferred],
    config: dict,
    tokenizer=None,
    origin: Origin | None = None,
) -> None:
    """The files of a model folder into an empty one, without digests or fsync; tensors are written in their order.

    Raises OSError, SafetensorError.
    """
    from swirl.model.tokenizer import FILES  # here, so that a machine without `tokenizers` reads weights all the same

    text = config.get("text_config", config)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif origin is not None:
        _copy_files(FILES, origin.folder, folder)
    generation = _generation(text, tokenizer, origin.generation if origin is not None else {})
    if origin is not None:
        state = {origin.prefix + name.removeprefix(PREFIXES[0]): tensor for name, tensor in state.items()}
    shards = [{name: state[name] for name in names} for names in _shards(state)]
    others = _others(origin) if origin is not None and origin.others else {}
    num_shards = len(shards) + len(others)
    names = [SINGLE] if num_shards == 1 else []
    names = names or [f"model-{i:05}-of-{num_shards:05}.safetensors" for i in range(1, num_shards + 1)]
    total, weight_map = 0, {}
    for name, shard in zip(names, chain(shards, map(_read, others.items())), strict=True):
        write_tensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    if num_shards > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if others:
        _copy_files(VISION_FILES, origin.folder, folder)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", config)


def _copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Those of them that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _generation(text: dict, tokenizer, base: dict) -> dict:
    """The content of generation_config.json: what the base's says, and every id that ends an action."""
    # transformers' server draws only where this file says so, and then from 50 words unless told otherwise.
    ours = {"do_sample": True, "top_k": text["vocab_size"]} if base.get("do_sample") is not False else {}
    ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    content = ours | ids | base
    ends = [ids["eos_token_id"], base.get("eos_token_id"), tokenizer and tokenizer.stop_ids]
    found = {end for one in ends for end in (one if isinstance(one, list | tuple) else [one]) if end is not None}
    content["eos_token_id"] = sorted(found) if tokenizer is not None or len(found) > 1 else ids["eos_token_id"]
    return content


def _shards(state) -> list[list[str]]:
    """Names in order, cut where the next tensor would pass SHARD_BYTES."""
    shards, size = [[]], 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _others(origin: Origin) -> dict[Path, list[str]]:
    """Files of the origin and the tensors to copy from each."""
    files = _files_of_tensors(origin.folder)
    gone = [name for name in origin.others if name not in files]
    if gone:
        raise CheckpointError(
            origin.folder, f"tensor '{gone[0]}' is gone, which a save has to keep beside the text model read from here"
        )
    return {file: [name for name in origin.others if files[name] == file] for file in {files[n] for n in origin.others}}


def _read(entry: tuple[Path, list[str]]) -> dict[str, torch.Tensor]:
    file, names = entry
    with open_tensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in names}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
