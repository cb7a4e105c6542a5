"""Documents become token arrays, once; afterwards they are read from disk without being loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Self, TypedDict

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from infformer.data.cache import find_or_make, key_of
from infformer.data.options import DataConfig
from infformer.data.sources import Document, describe_source, read_documents
from infformer.errors import DataError
from infformer.progress import follow

_LAYOUT = 2  # of a folder of tokenised documents; raised when an older one can no longer be read
_SUMMARY = "summary.json"
_DOCUMENTS_AT_A_TIME = 16  # a document may be a whole book
_NAMED = 5  # documents named in a message

log = logging.getLogger(__name__)


def tokenize_documents(
    config: DataConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    main_process_first: AbstractContextManager[None] | None = None,
) -> TokenizedDocuments:
    """The documents of one split as tokens, from the cache or made now.

    What is in the cache is used only if the content of the files (or the revision on the hub), the options that matter
    and the tokenizer are the same, and if it is as it was written; what is damaged is made anew, with a warning.
    Several processes may call this at the same time: a folder of the cache appears whole or not at all.

    Args:
        config: where the documents are and how they are cut.
        split: `train`, `validation` or `test`.
        tokenizer: turns text into tokens.
        main_process_first: held during the work, such as `accelerator.main_process_first()`, so that one process does
            it and the others find it done.

    Raises:
        DataError: the documents cannot be read, one is too short to be learnt from, or their tokens cannot be kept.
    """
    with main_process_first or nullcontext():
        folder = config.cache_folder / f"{split}-{_key(config, split, tokenizer)}"
        find_or_make(folder, lambda place: _make(place, folder.name, config, split, tokenizer))
        return TokenizedDocuments.open(folder)


@dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """Documents as tokens; `len()` is how many there are."""

    ids: list[str]
    """[documents]"""

    token_counts: NDArray[np.int64]
    """[documents]; with the token that begins a document, if there is one."""

    word_counts: NDArray[np.int64]
    """[documents]; words of the text, separated by white space."""

    byte_counts: NDArray[np.int64]
    """[documents]; bytes of the text in UTF-8."""

    fingerprint: str
    """Changes with the ids, the order and the tokens of the documents, and with nothing else."""

    largest_token: int
    """The largest token that occurs."""

    _chunks: list[NDArray[Any]]
    """The tokens of some documents each, one after another: of files, views that are read when they are needed."""

    _chunk_of: NDArray[np.int64]
    """[documents]; the chunk a document is in."""

    _start_in_chunk: NDArray[np.int64]
    """[documents]; where in its chunk a document begins."""

    digests: list[str] = field(default_factory=list)
    """[documents]; alike for equal texts, however they were cut. Empty where they are not known."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The documents that were written into a folder of the cache."""
        table = datasets.load_from_disk(str(folder)).data
        summary: _Summary = json.loads((folder / _SUMMARY).read_text())
        lists = [chunk for chunk in table.column("tokens").chunks if len(chunk)]
        offsets = [chunk.offsets.to_numpy().astype(np.int64) for chunk in lists]
        return cls(
            ids=table.column("id").to_pylist(),
            token_counts=np.concatenate([np.diff(offset) for offset in offsets]),
            word_counts=table.column("words").to_numpy(),
            byte_counts=table.column("bytes").to_numpy(),
            fingerprint=summary["fingerprint"],
            largest_token=summary["largest_token"],
            _chunks=[chunk.values.to_numpy(zero_copy_only=True) for chunk in lists],
            _chunk_of=np.repeat(np.arange(len(lists)), [len(chunk) for chunk in lists]),
            _start_in_chunk=np.concatenate([offset[:-1] for offset in offsets]),
            digests=table.column("digest").to_pylist(),
        )

    @classmethod
    def from_texts(
        cls, texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase, first: int | None, skip_short: bool = False
    ) -> Self:
        """Documents that are at hand, tokenised now and kept in memory, without the cache.

        Args:
            first: the token that each document begins with; None for none.
            skip_short: leave out documents of fewer than 2 tokens, in which there is nothing to predict.

        Raises:
            DataError: a document has fewer than 2 tokens, and such are not to be left out.
        """
        texts = list(texts)
        batch = {name: [getattr(document, name) for document in texts] for name in ("id", "text", "digest")}
        columns = _tokenize(batch, Encoder(tokenizer), first, skip_short)
        tokens = [np.array(row, dtype=np.int64) for row in columns["tokens"]]
        return cls(
            ids=columns["id"],
            token_counts=np.array([len(row) for row in tokens], dtype=np.int64),
            word_counts=np.array(columns["words"], dtype=np.int64),
            byte_counts=np.array(columns["bytes"], dtype=np.int64),
            **_summarize(zip(columns["id"], tokens, strict=True)),
            _chunks=tokens,
            _chunk_of=np.arange(len(tokens)),
            _start_in_chunk=np.zeros(len(tokens), dtype=np.int64),
            digests=columns["digest"],
        )

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start` to `stop` (not included) of a document: [stop - start].

        Raises:
            IndexError: the document does not have these tokens.
        """
        if not 0 <= start <= stop <= self.token_counts[document]:
            raise IndexError(f"document {document} has {self.token_counts[document]} tokens, not {start} to {stop}")
        begin = self._start_in_chunk[document]
        tokens: NDArray[np.int64] = self._chunks[self._chunk_of[document]][begin + start : begin + stop].astype(
            np.int64
        )
        return tokens

    def beginnings(self, tokens: int) -> Self:
        """At most this many tokens in all: the beginning of each document, all equally long where they can be.

        Their words and bytes are not counted anew, so only figures per token mean anything.
        """
        counts = self.token_counts
        # The largest limit that keeps the sum within bounds: fill the shortest documents first.
        ascending = np.sort(counts)
        taken = np.concatenate([[0], np.cumsum(ascending)[:-1]])
        limits = (tokens - taken) // np.arange(len(counts), 0, -1)
        limit = max(2, int(limits[np.argmax(ascending >= limits)])) if counts.sum() > tokens else int(counts.max())
        return replace(self, token_counts=np.minimum(counts, limit))

    def check_vocabulary(self, size: int) -> None:
        """Make sure that a model with a vocabulary of this size knows every token.

        Raises:
            DataError: it does not.
        """
        if self.largest_token >= size:
            raise DataError(
                f"the documents hold token {self.largest_token}, and the model knows tokens 0 to {size - 1} only: the "
                "tokenizer is not the model's; choose the tokenizer that belongs to it."
            )


def beginning_of_documents(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before the text of every document, in words: a chat model's token may surprise there.

    Raises:
        DataError: the tokenizer has no such token, and one is asked for.
    """
    if not config.beginning_of_document:
        return "no token stands before a document (data.beginning_of_document=false)"
    token = tokenizer.convert_ids_to_tokens(first_token(tokenizer))
    return f"every document begins with the token {token} (data.beginning_of_document=false: with its text)"


def _key(config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase) -> str:
    parts = {
        "layout": _LAYOUT,
        "source": describe_source(config, split),
        "options": {
            option: getattr(config, option)
            for option in (
                "text_field",
                "id_field",
                "articles",
                "max_documents",
                "beginning_of_document",
                "skip_short_documents",
            )
        },
        "most_characters": config.most_characters(split),
        "tokenizer": describe_tokenizer(tokenizer),
    }
    return key_of(parts)


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Everything that decides which tokens a text becomes, as JSON."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    # Truncation and padding are left behind by earlier calls, and are not used here.
    content = json.loads(fast.to_str()) | {"truncation": None, "padding": None} if fast else Hasher.hash(tokenizer)
    return {
        "class": type(tokenizer).__name__,
        "splits_special_tokens": tokenizer.split_special_tokens,
        "first": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "content": content,
    }


def warn_of_shared_documents(documents: Mapping[str, TokenizedDocuments]) -> None:
    """Say by name which documents are in two splits: what was trained on measures nothing but learning by heart."""
    for first, second in combinations(documents, 2):
        names = dict(zip(documents[first].digests, documents[first].ids, strict=False))
        shared = [
            name if names[digest] == name else f"{name} (in {first}: {names[digest]})"
            for name, digest in zip(documents[second].ids, documents[second].digests, strict=False)
            if digest and digest in names
        ]
        if shared:
            log.warning(
                "%d of %d documents of %s are in %s too: %s; figures on them do not show what a model makes of new "
                "text: take them out of one of data.%s= and data.%s=",
                len(shared),
                len(documents[second]),
                second,
                first,
                ", ".join(shared[:_NAMED]) + (", ..." if len(shared) > _NAMED else ""),
                first,
                second,
            )


def _make(place: Path, fingerprint: str, config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Tokenise a split; returns the folder in `place` in which the tokens are."""
    first = first_token(tokenizer) if config.beginning_of_document else None
    texts = place / "texts.arrow"
    found = _write_texts(texts, follow(read_documents(config, split), f"reading {split}", "documents"))
    if not found:
        raise DataError(f"data.{split}={', '.join(config.places(split))}: there is no document in it; name another.")
    tokens = np.dtype(np.uint16) if vocabulary_size(tokenizer) <= 2**16 else np.dtype(np.int32)
    documents = datasets.Dataset.from_file(str(texts)).map(
        partial(_tokenize, encode=Encoder(tokenizer), first=first, skip_short=config.skip_short_documents),
        batched=True,
        batch_size=_DOCUMENTS_AT_A_TIME,
        writer_batch_size=_DOCUMENTS_AT_A_TIME,
        num_proc=config.workers if config.workers > 1 else None,
        remove_columns=["text"],
        features=datasets.Features(
            id=datasets.Value("string"),
            digest=datasets.Value("string"),
            tokens=datasets.List(datasets.Value(tokens.name)),
            words=datasets.Value("int64"),
            bytes=datasets.Value("int64"),
        ),
        cache_file_name=str(place / "tokens.arrow"),
        load_from_cache_file=False,
        new_fingerprint=fingerprint,
        desc=f"tokenising {split}",
    )
    skipped = found - len(documents)
    if skipped == found:
        raise DataError(f"data.{split}: every one of its {found} document(s) has fewer than 2 tokens; name others.")
    if skipped:
        log.warning("%d of %d documents of %s have fewer than 2 tokens and are left out", skipped, found, split)
    whole = place / "whole"
    documents.save_to_disk(str(whole))
    rows = documents.with_format("numpy", columns=["id", "tokens"])
    summary = _summarize((str(row["id"]), row["tokens"]) for row in rows)
    (whole / _SUMMARY).write_text(json.dumps(summary))
    return whole


def first_token(tokenizer: PreTrainedTokenizerBase, option: str = "data.beginning_of_document") -> int:
    """The token that stands before a document: the tokenizer's first of a sequence, or if it has none the last.

    Args:
        option: that asks for it, for the message.

    Raises:
        DataError: there is neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError(
        f"{option}=true: the tokenizer has neither a beginning-of-sequence nor an end-of-sequence token to put before "
        f"a document; set {option}=false, or give the tokenizer a bos_token."
    )


def _write_texts(path: Path, documents: Iterable[Document]) -> int:
    """Put documents into a file that processes can share, a few at a time; returns how many there were."""
    schema = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("digest", pa.string())])
    count = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for document in documents:
            stream.write_batch(pa.record_batch([[document.id], [document.text], [document.digest]], schema=schema))
            count += 1
    return count


class _Columns(TypedDict):
    """Tokenised documents, each list [documents]."""

    id: list[str]
    digest: list[str]
    tokens: list[list[int]]
    words: list[int]
    bytes: list[int]


def _tokenize(batch: dict[str, list[str]], encode: Encoder, first: int | None, skip_short: bool) -> _Columns:
    start = [] if first is None else [first]
    result: _Columns = {"id": [], "digest": [], "tokens": [], "words": [], "bytes": []}
    encoded = encode(batch["id"], batch["text"])
    for name, text, digest, following in zip(batch["id"], batch["text"], batch["digest"], encoded, strict=True):
        tokens = start + following
        if len(tokens) < 2:
            if skip_short:
                continue
            raise DataError(
                f"document {name!r} has {len(tokens)} token(s), and it takes 2 for one to be predicted; remove it, or "
                "set data.skip_short_documents=true."
            )
        result["id"].append(name)
        result["digest"].append(digest)
        result["tokens"].append(tokens)
        result["words"].append(len(text.split()))
        result["bytes"].append(len(text.encode()))
    return result


class _Summary(TypedDict):
    """What is known of documents as a whole."""

    fingerprint: str
    largest_token: int


def _summarize(rows: Iterable[tuple[str, NDArray[Any]]]) -> _Summary:
    """What is known of documents as a whole, from the name and the tokens of each."""
    content = hashlib.sha256()
    largest = 0
    for name, tokens in rows:
        # The lengths keep one document's end apart from the next one's beginning.
        content.update(f"{len(name)} {name} {len(tokens)} ".encode())
        content.update(tokens.astype("<i4").tobytes())
        largest = max(largest, int(tokens.max()))
    return {"fingerprint": content.hexdigest(), "largest_token": largest}


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
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added)))
        self._known: set[str] = set()

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
            if not self._is_left_out(character):
                self._known.add(character)
                continue
            place = self._added.sub(lambda found: "\0" * len(found[0]), text).find(character)
            if place >= 0:  # not only within added tokens
                raise DataError(
                    f"document {name!r}: the tokenizer has no token for {character!r} (character {place}), and no "
                    f"unknown token; {_REMEDY}."
                )

    def _is_left_out(self, character: str) -> bool:
        """Whether some of a character would become no token."""
        # A character that the normaliser or the pre-tokeniser takes out, such as white space, has no pieces.
        return any(
            sum(stop - start for start, stop in (token.offsets for token in self._backend.model.tokenize(piece)))
            < len(piece.encode())
            for piece in self._pieces(character)
        )

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
