"""Where the tokens of an action begin and end in its text, for shading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swirl.errors import CheckpointError
from swirl.model.tokenizer import Tokenizer


def find_tokenizer(folders: Sequence[Path]) -> Tokenizer | None:
    """That of the first folder which holds one; None where none does."""
    for folder in folders:
        try:
            return Tokenizer.from_pretrained(folder)
        except CheckpointError:
            continue
    return None


class Pieces:
    """Cuts actions into the texts of their tokens, by the tokenizer that made the ids."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self.fingerprint = tokenizer and tokenizer.fingerprint
        self._piece: dict[int, str] = {}

    def lengths(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """The length of each token in `text`, in UTF-16 units as browsers count; 0 for a token without text, such as
        the end of the turn. They sum to that of the text, or the ids are not the text's: then None.
        """
        if self._tokenizer is None:
            return None
        try:
            pieces = [self._piece_of(id) for id in ids]
            if "".join(pieces) != text:
                pieces = self._by_prefixes(text, ids)
        except ValueError:  # a negative id
            return None
        return None if pieces is None else [len(piece.encode("utf-16-le", "surrogatepass")) // 2 for piece in pieces]

    def _piece_of(self, id: int) -> str:
        if id not in self._piece:
            self._piece[id] = self._tokenizer.decode([id])
        return self._piece[id]

    def _by_prefixes(self, text: str, ids: Sequence[int]) -> list[str] | None:
        """Pieces where a character takes several tokens, or a token reads otherwise at the beginning: a character
        belongs to the token that completes it.
        """
        pieces, at = [], 0
        for end in range(1, len(ids) + 1):
            so_far = self._tokenizer.decode(ids[:end])
            whole = so_far if text.startswith(so_far) else so_far.rstrip("\ufffd")
            if not text.startswith(whole) or len(whole) < at:
                return None
            pieces.append(whole[at:])
            at = len(whole)
        return pieces if at == len(text) else None
