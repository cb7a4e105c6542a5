"""Texts as token numbers, all of them: what a tokenizer has no token for is an error, not a gap."""

from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from infformer.data.errors import DataError

_REMEDY = "choose a tokenizer that was made for such text, or give this one an unknown token"


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest number of a token; `len(tokenizer)` counts them, and there may be holes.

    Raises:
        DataError: no model could have so many.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= 2**31:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, and numbers up to {largest}: give its tokens the numbers from "
            "0 on, without holes"
        )
    return largest + 1


class Encoder:
    """Turns texts into token numbers; it remembers which characters it has found to have tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        # Byte pair encoding without an unknown token leaves out what it does not know; all others refuse it.
        model = getattr(self._backend, "model", None)
        self._may_leave_out = isinstance(model, BPE) and model.unk_token is None
        self._known = set("".join(tokenizer.get_added_vocab()))

    def __call__(self, names: list[str], texts: list[str]) -> list[list[int]]:
        """The token numbers of texts, without tokens that are not in the text.

        Args:
            names: of the texts, for the error.

        Raises:
            DataError: the tokenizer has no token for something in a text.
        """
        try:
            encoded: list[list[int]] = self._encode(texts)
        except Exception as error:  # the library below has no narrower ones
            raise self._refusal(names, texts, error) from error
        for name, text, tokens in zip(names, texts, encoded, strict=True):
            if self._may_leave_out:
                self._check_characters(name, text)
            if None in tokens:
                raise DataError(f"document {name!r}: the tokenizer has no number for some of its text; {_REMEDY}.")
        return encoded

    def _encode(self, texts: list[str]) -> Any:
        # Not verbose: it would warn that a book is longer than the model's context.
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _check_characters(self, name: str, text: str) -> None:
        for character in sorted(set(text) - self._known):
            # A character that the normaliser or the pre-tokeniser takes out, such as white space, has no pieces.
            for piece in self._pieces(character):
                tokens = self._backend.model.tokenize(piece)
                if sum(stop - start for start, stop in (token.offsets for token in tokens)) < len(piece.encode()):
                    raise DataError(
                        f"document {name!r}: the tokenizer has no token for {character!r} (character "
                        f"{text.index(character)}), and no unknown token; {_REMEDY}."
                    )
            self._known.add(character)

    def _pieces(self, text: str) -> list[str]:
        """The pieces of a text that become tokens each by itself."""
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        if self._backend.pre_tokenizer is None:
            return [text] if text else []
        return [piece for piece, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]

    def _refusal(self, names: list[str], texts: list[str], error: Exception) -> DataError:
        """The error for the first text that cannot be encoded, and for the piece of it where that can be found."""
        for name, text in zip(names, texts, strict=True):
            try:
                self._encode([text])
            except Exception:
                piece = self._bad_piece(text) or "it"
                return DataError(f"document {name!r}: the tokenizer cannot encode {piece} ({error}); {_REMEDY}.")
        return DataError(f"the tokenizer cannot encode the documents {names[0]!r} to {names[-1]!r} ({error}).")

    def _bad_piece(self, text: str) -> str | None:
        if self._backend is None:
            return None
        for piece in self._pieces(text):
            try:
                self._backend.model.tokenize(piece)
            except Exception:
                return f"{piece!r} (character {text.find(piece)})"
        return None
