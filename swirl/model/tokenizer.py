"""Text to token ids and back, with Gemma's turns.

    <bos><start_of_turn>user\\n{prompt}<end_of_turn>\\n<start_of_turn>model\\n{action}<end_of_turn>\\n<start_of_turn>user\\n...

The turns of Gemma 2 and of Gemma 3 alike. A prompt or an observation loses the white space around it where the chat
template of the folder trims it; an action never does: what was sampled is what is learnt.
Text is text: a control token spelled out in a prompt, page or action becomes ordinary pieces, never its id.
So no tool result can close a turn, and `decode(encode(text)) == text` with a tokenizer of `train_tokenizer`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from swirl.errors import CheckpointError, ConfigError
from swirl.storage.digest import DigestError, check_digests

CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
ACTION_TAGS = ("<search_query>", "</search_query>", "<math_exp>", "</math_exp>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


class Tokenizer:
    """A tokenizer.json that knows Gemma's control tokens, and the files that lie beside it.

    `vocab_size` is one past the largest id, `num_text_ids` one past the largest that text or a turn can become (a
    Gemma 3 without a vision tower has no embedding for its tokenizer's image token). `stop_ids` end an action:
    <end_of_turn>, <eos>, and those given. `fingerprint` is the SHA-256 of tokenizer.json.
    """

    def __init__(self, files: dict[str, bytes], source: str | os.PathLike = "<memory>", stop_ids: Iterable[int] = ()):
        self._files = files
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
            if any(_is_control(token.content) and not token.special for token in self._added_tokens()):
                content = _with_special_control_tokens(files["tokenizer.json"])
                self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # noqa: BLE001, the library raises nothing narrower
            raise CheckpointError(source, f"not a tokenizer.json ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        ids = set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.vocab_size = 1 + max(ids)
        for token in CONTROL_TOKENS:
            if self.token_id(token) is None and token != "<unk>":
                raise CheckpointError(source, f"expected a token {token}, as Gemma's turns are made of")
        self.pad_id, self.eos_id, self.bos_id = map(self.token_id, ("<pad>", "<eos>", "<bos>"))
        self.start_of_turn_id, self.end_of_turn_id = map(self.token_id, ("<start_of_turn>", "<end_of_turn>"))
        never = {id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.num_text_ids = 1 + max(ids - never | {self.token_id(token) or 0 for token in CONTROL_TOKENS})
        self.stop_ids = tuple(dict.fromkeys((self.end_of_turn_id, self.eos_id, *stop_ids)))
        if not all(0 <= id < self.vocab_size for id in self.stop_ids):
            raise CheckpointError(source, f"expected stop ids below {self.vocab_size}, got {self.stop_ids}")
        self._trims = _trims(files)
        for token in self._added_tokens():
            if _is_control(token.content) and self.token_id(token.content) in self.encode(token.content):
                raise CheckpointError(source, f"text that spells {token.content} becomes that control token")
        self._to_model = [
            self.end_of_turn_id,
            *self.encode("\n"),
            self.start_of_turn_id,
            *self.encode("model\n"),
        ]

    def _added_tokens(self) -> list[tokenizers.AddedToken]:
        return list(self._tokenizer.get_added_tokens_decoder().values())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Tokenizer:
        """From a Hugging Face folder, the stop ids of its generation_config.json included.

        Raises CheckpointError where there is none with Gemma's turns.
        """
        folder = Path(folder)
        try:
            files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
            check_digests(folder, files)
        except OSError as error:
            raise CheckpointError(folder, f"cannot be read ({error.strerror})") from None
        except DigestError as error:
            raise CheckpointError(folder, str(error)) from None
        if "tokenizer.json" not in files:
            raise CheckpointError(folder / "tokenizer.json", "no such file")
        return cls(files, folder / "tokenizer.json", _stop_ids(folder / "generation_config.json"))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, byte for byte as it was read, and the files beside it."""
        os.makedirs(folder, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact spelling, control tokens included; None where there is none."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is added, and no control token comes out of it."""
        # the library's `encode` keeps all other threads waiting (it holds the GIL); this, of the same ids, does not
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Control tokens have none, nor have ids past the vocabulary, which a model may have rows
        for (Gemma 3 has 63) and draw. Raises ValueError on a negative id.
        """
        ids = list(ids)
        if ids and min(ids) < 0:
            raise ValueError(f"expected token ids of at least 0, got {min(ids)}")
        return self._tokenizer.decode([id for id in ids if id < self.vocab_size], skip_special_tokens=True)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of `<bos><start_of_turn>user\\n{prompt}<end_of_turn>\\n<start_of_turn>model\\n`."""
        return [self.bos_id, *self._user_turn(prompt)]

    def action_ids(self, action: str) -> list[int]:
        """Ids of `{action}<end_of_turn>`."""
        return [*self.encode(action), self.end_of_turn_id]

    def observation_ids(self, observation: str) -> list[int]:
        """Ids of `\\n<start_of_turn>user\\n{observation}<end_of_turn>\\n<start_of_turn>model\\n`."""
        return [*self.encode("\n"), *self._user_turn(observation)]

    def _user_turn(self, text: str) -> list[int]:
        text = text.strip() if self._trims else text
        return [self.start_of_turn_id, *self.encode(f"user\n{text}"), *self._to_model]


def _stop_ids(path: Path) -> list[int]:
    """`eos_token_id` of a generation_config.json: none, one or many; none where there is no such file."""
    if not path.is_file():
        return []
    try:
        ids = json.loads(path.read_bytes()).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(path, f"expected a JSON object ({error})") from None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(id) is int for id in ids):
        raise CheckpointError(path, f"field 'eos_token_id': expected token ids, got {ids}")
    return ids


def _trims(files: dict[str, bytes]) -> bool:
    """Whether the chat template strips the text of a turn."""
    return any(b"| trim" in files.get(name, b"") for name in ("chat_template.jinja", "tokenizer_config.json"))


_MORE_CONTROL_TOKENS = re.compile(r"<(start_of_image|end_of_image|image_soft_token)>|<\|[^<>|]+\|?>|<[^<>|]+\|>")


def _is_control(token: str) -> bool:
    """Whether a spelling is a control token of Gemma 2 or 3, or has the form of another model's."""
    return token in CONTROL_TOKENS or _MORE_CONTROL_TOKENS.fullmatch(token) is not None


def _with_special_control_tokens(content: bytes) -> bytes:
    """A tokenizer.json in which control tokens are special: what is not is found in plain text too, and a page could
    close a turn.
    """
    tokenizer = json.loads(content)
    for token in tokenizer.get("added_tokens") or ():
        if _is_control(token["content"]):
            token["special"] = True
    return json.dumps(tokenizer).encode()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` ids, the control tokens first, the action tags next.

    Newlines and digits stand alone, so that turns split where their pieces do and numbers are read by digit.
    Raises ConfigError where `vocab_size` has no room for the 256 bytes and the fixed tokens.
    """
    least = len(CONTROL_TOKENS) + len(ACTION_TAGS) + 256
    if vocab_size < least:
        raise ConfigError(f"expected a vocab_size of at least {least}, got {vocab_size}")
    pre, models = tokenizers.pre_tokenizers, tokenizers.models
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Split(tokenizers.Regex(r"\n|\p{N}"), "isolated"), pre.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    # The trainer puts its special tokens first, tags included, which gives them the ids they are known by.
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(token, special=True) for token in CONTROL_TOKENS + ACTION_TAGS],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # As Gemma's own: who tokenises a plain text, as /completions servers do, gets <bos> before it; `encode` does not.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    return Tokenizer(
        {
            "tokenizer.json": json.dumps(content, ensure_ascii=False, indent=1).encode(),
            "tokenizer_config.json": json.dumps(config, indent=1).encode(),
        }
    )
