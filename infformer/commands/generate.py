"""Read a document, then write: `python generate.py checkpoint=FOLDER document=book.txt prompt='And so'`.

What was read can be kept (`save_state=FILE`) and asked again (`state=FILE`): a book is read once.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import logging
import re
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from infformer.config import CONF, GenerationRunConfig
from infformer.data.files import holds_records, read_lines
from infformer.data.tokenization import Encoder, first_token
from infformer.durable import check_place
from infformer.errors import DataError, ModelError
from infformer.models.base import MemoryModel
from infformer.models.document_classifier import DocumentClassifier
from infformer.models.encoder import TextClassifier
from infformer.models.generation import ReadText, read_text, sample_tokens
from infformer.models.loading import check_vocabulary, load_tokenizer, load_trained
from infformer.models.read_files import load_read_text, save_read_text
from infformer.models.sizes import in_bytes
from infformer.models.streaming import reading
from infformer.training.command_line import start

logger = logging.getLogger(__name__)

QUOTED = r"""null|"([^"\\]|\\.)*"|'([^'\\]|\\.)*'"""
"""A value that Hydra reads as one; a text that begins and ends with quotations is none."""


def main() -> None:
    """Compose the configuration, check it, read and write."""
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    start("generate", GenerationRunConfig, CONF, run)


def run(config: GenerationRunConfig) -> None:
    """Read what is to be read; stream what the model writes after it to the standard output."""
    tokenizer = load_tokenizer(config.tokenizer or config.checkpoint, "tokenizer" if config.tokenizer else "checkpoint")
    if config.save_state is not None:
        check_place("save_state", Path(config.save_state).parent)
    begins = config.beginning_of_document and config.state is None
    first = [first_token(tokenizer, "beginning_of_document")] if begins else []
    document = prompt = None
    if config.document is not None:
        document, first = _encode(tokenizer, "document", _text(Path(config.document)), first), []
    if config.prompt is not None:
        prompt = _encode(tokenizer, "prompt", config.prompt, first)
    model = load_trained(config.checkpoint, config.segment_length, config.short_term_length)
    if isinstance(model, TextClassifier | DocumentClassifier):
        raise ModelError(
            f"checkpoint={config.checkpoint}: a classifier writes no text; give the language model that it was made of"
        )
    check_vocabulary(model, tokenizer, "tokenizer")
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type] # whose decorator hides its own self
    length = model.choose_segment_length(config.segment_length)
    with reading(model, getattr(torch, config.precision)):
        read = None if config.state is None else load_read_text(model, Path(config.state))
        if document is not None:
            read = _read(model, document, length, read)
        if config.save_state is not None and read is not None:
            save_read_text(read, model, Path(config.save_state))
        if prompt is not None:
            read = read_text(model, prompt, length, read)
        if read is not None and config.tokens:
            _write(model, tokenizer, read, length, config)


def quoted(argument: str) -> str:
    """A prompt as Hydra reads any text, with commas, brackets and quotes, unless it is quoted already."""
    name, equals, text = argument.partition("=")
    if name != "prompt" or not equals or re.fullmatch(QUOTED, text, re.DOTALL):
        return argument
    text = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + (found[2] and '\\"'), text)
    return f'prompt="{text}"'.replace("${", r"\${")


def _read(model: MemoryModel, document: torch.Tensor, length: int, before: ReadText | None) -> ReadText:
    begin = time.perf_counter()
    read = read_text(model, document, length, before, progress=True)
    size = 0 if read.state is None else read.state.nbytes
    logger.info(
        "read %s tokens in %.1f s; what is remembered of them takes %s",
        f"{len(document):,}",
        time.perf_counter() - begin,
        in_bytes(size),
    )
    return read


def _write(
    model: MemoryModel, tokenizer: PreTrainedTokenizerBase, read: ReadText, length: int, config: GenerationRunConfig
) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    sampled = sample_tokens(model, read, length, config.temperature, config.top_k, config.top_p, generator)
    streamer = TextStreamer(tokenizer)
    for token in islice(sampled, config.tokens):
        if token == tokenizer.eos_token_id:
            break
        streamer.put(torch.tensor([token]))
    streamer.end()


def _text(path: Path) -> str:
    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"document={path}: there is no such file (seen from {Path.cwd()})")
    if holds_records(path):
        raise DataError(f"document={path}: this holds records, and one text is read; save that in a file such as .txt")
    try:
        return "".join(read_lines(path))
    except DataError as error:
        raise DataError(f"document={error}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, option: str, text: str, first: list[int]) -> torch.Tensor:
    """Token ids of a text, and before them the first ones, [length]."""
    (tokens,) = Encoder(tokenizer)([option], [text])
    if not tokens:
        raise DataError(f"{option}=: there is no text in it; give at least one word, or leave {option}= out")
    return torch.tensor([*first, *tokens])


if __name__ == "__main__":
    command.run(main)
