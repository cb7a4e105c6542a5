"""Train a byte-level BPE tokenizer, in GPT-2's manner, on the training documents of a data set.

python scripts/train_tokenizer.py FOLDER --vocabulary 4096 data.source=files data.train=books.jsonl.gz
"""

from __future__ import annotations

import argparse

from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infformer.data.options import DataConfig
from infformer.data.sources import read_documents

END_OF_TEXT = "<|endoftext|>"


def main() -> None:
    """Read the options, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the tokenizer is written")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("options", nargs="*", metavar="data.…=…", help="which documents, as for train.py")
    arguments = parser.parse_intermixed_args()
    tree = OmegaConf.merge({"data": OmegaConf.structured(DataConfig)}, OmegaConf.from_dotlist(arguments.options))
    data = OmegaConf.to_object(tree.data)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((document.text for document in read_documents(data, "train")), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    ).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
