"""Train a byte-level BPE tokenizer, in GPT-2's manner, on the training documents of a data set.

python scripts/train_tokenizer.py FOLDER --vocabulary 4096 data.source=files data.train=books.jsonl.gz
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infformer import durable
from infformer.config import CONF, RunConfig
from infformer.data.options import DataConfig
from infformer.data.sources import check_sources, read_documents
from infformer.errors import DataError
from infformer.training.command_line import compose

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 256 + 1  # each byte, and the end of a text
LARGEST = 2**20  # room is made for all of them before the text is read
FILES = ("tokenizer_config.json", "tokenizer.json")
PROBE = 2**20  # bytes: a disk that does not take these is full


def main() -> None:
    """Read the options, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the tokenizer is written")
    parser.add_argument("--vocabulary", type=int, default=4096, help="how many tokens it has at most")
    parser.add_argument("options", nargs="*", metavar="data…=…", help="which documents, as for train.py")
    arguments = parser.parse_intermixed_args()
    tokens = make(arguments.folder, arguments.vocabulary, arguments.options)
    fewer = f": the text gives no more, though --vocabulary={arguments.vocabulary}"
    print(f"written to {arguments.folder}: {tokens} tokens{fewer if tokens < arguments.vocabulary else ''}")


def make(folder: Path, vocabulary: int, options: Sequence[str]) -> int:
    """Train a tokenizer and write it into a folder, whole or not at all; returns how many tokens it has.

    Args:
        options: which documents, as they are typed.

    Raises:
        UserError: an option is wrong, the documents cannot be read, or the folder cannot be written.
    """
    if not SMALLEST <= vocabulary <= LARGEST:
        raise DataError(
            f"--vocabulary={vocabulary}: give a number from {SMALLEST} (a token for each byte, and one for the end of "
            f"a text) to {LARGEST}"
        )
    for option in options:
        if not option.startswith(("data=", "data.")):
            raise DataError(f"{option}: this is no option of a data set; type data=… or data.…=…, as for train.py")
    data = compose("train", RunConfig, CONF, options).data
    check_sources(data, ["train"])
    with _writing(folder) as place:
        tokenizer = train(data, vocabulary)
        try:
            tokenizer.save_pretrained(place)
        except Exception as error:  # the library below raises no OSError where a disk is full
            raise _unwritable(folder, error) from error
    return len(tokenizer)


def train(data: DataConfig, vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    blank = True

    def texts() -> Iterator[str]:
        nonlocal blank
        for document in read_documents(data, "train"):
            blank = blank and not document.text.strip()
            yield document.text

    tokenizer.train_from_iterator(texts(), trainer)
    if blank:
        raise DataError(
            f"data.train={', '.join(data.places('train'))}: there is no text in it, of which a tokenizer could be "
            "made; name documents with text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """A place whose files are moved into a folder in the end; that they can be is found out in the beginning."""
    for name in FILES:
        if (folder / name).exists():
            raise DataError(f"{folder}: there is a tokenizer already ({name}); name another folder, or remove it")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokenizer.", dir=folder) as temporary:
            probe = Path(temporary, "probe")
            probe.write_bytes(bytes(PROBE))
            probe.unlink()
            yield Path(temporary)
            durable.synchronise(Path(temporary))
            for name in FILES:  # the last one makes it a tokenizer
                durable.rename(Path(temporary, name), folder / name)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        if new:
            with suppress(OSError):
                folder.rmdir()  # which it is only if nothing was written


def _unwritable(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"{folder}: the tokenizer cannot be written there ({error}); make room or get access, or name another"
    )


if __name__ == "__main__":
    command.run(main)
