"""Models by their name on the Hugging Face hub: downloaded once, then found in the cache, also without a network.

`google/gemma-3-270m-it`, or `google/gemma-3-270m-it@REVISION`. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are
the library's own, and do what they do elsewhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from swirl.errors import CheckpointError

_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
# What a model folder is made of, and nothing that runs code or repeats the weights in another form.
FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md")


def is_hub_name(spec: str) -> bool:
    """Whether a spec can be the name of a model on the hub; a folder of that name comes first."""
    return _NAME.fullmatch(spec) is not None and not os.path.exists(spec)


def hub_folder(spec: str) -> Path:
    """The folder in the cache that holds the model of that name, downloaded where it is not there yet.

    Raises CheckpointError, in one line, where it is not to be had.
    """
    import huggingface_hub

    named = _NAME.fullmatch(spec)
    try:
        return Path(
            huggingface_hub.snapshot_download(named["name"], revision=named["revision"], allow_patterns=list(FILES))
        )
    except Exception as error:  # the library's, its HTTP client's, the disk's
        reason = " ".join(str(error).split()).split(". ")[0] or "no reason given"
        raise CheckpointError(
            spec, f"no such folder, and not to be had from the Hugging Face hub ({type(error).__name__}: {reason})"
        ) from None
