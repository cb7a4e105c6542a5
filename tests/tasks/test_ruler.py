"""Whoever reads the text to its end can answer, and nobody else."""

import re

import numpy as np
import pytest

from infformer.data.options import DataConfig
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents
from infformer.tasks.retrieval import RetrievalConfig
from infformer.tasks.ruler import MultikeyConfig, VariableTrackingConfig
from infformer.tasks.task import Material

LENGTH = 2500
HIDDEN = r"\n(?:Lucky|VAR)[^\n]*\.\n"


@pytest.fixture(scope="module")
def documents(tmp_path_factory, tokenizer) -> dict[str, TokenizedDocuments]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "book.txt").write_text("The whale rose. Who saw it? We did! The sea was white all day. " * 60)
    data = DataConfig(source="files", test=str(folder / "book.txt"), cache_dir=str(folder / "cache"))
    return {"test": tokenize_documents(data, "test", tokenizer)}


@pytest.fixture
def ask(documents, tokenizer):
    """The text of each question, and the answer to it: `ask(config, depths)`."""

    def draw(config: RetrievalConfig, *depths: float, numbers: list[int] | None = None) -> list[tuple[str, str]]:
        source = config.build_source(Material(None, tokenizer, documents))
        numbers = list(range(len(depths))) if numbers is None else numbers
        questions = source.draw("test", numbers, 5, LENGTH, np.array(depths).reshape(-1, 1))
        assert questions.tokens.shape == (len(depths), LENGTH)
        asked = []
        for row, answers in zip(questions.tokens, questions.answers, strict=True):
            end = len(row) - (answers == 0).sum()
            asked.append((tokenizer.decode(row[1:end]), tokenizer.decode(row[end:])))
        return asked

    return draw


def numbers_of(text: str) -> dict[str, list[str]]:
    """All numbers by their keys, in the order of the text."""
    found: dict[str, list[str]] = {}
    for key, number in re.findall(r"\nLucky numbers of ([^:]*): (\d+)\.\n", text):
        found.setdefault(key, []).append(number)
    return found


@pytest.mark.parametrize(("keys", "values", "digits"), [(1, 1, 1), (4, 1, 5), (3, 3, 7)])
def test_the_numbers_of_one_key_of_many_are_asked_for(ask, keys, values, digits):
    for text, answer in ask(MultikeyConfig(keys=keys, values=values, digits=digits), 0.0, 0.3, 1.0):
        found = numbers_of(text)
        assert [len(own) for own in found.values()] == [values] * keys
        everything = [number for own in found.values() for number in own]
        assert {len(number) for number in everything} == {digits}
        assert len(set(everything)) == keys * values
        key = re.search(r"\nLucky numbers of ([^:]*):$", text).group(1)
        assert answer == f" {', '.join(found[key])}."


def names_of(text: str) -> dict[str, list[str]]:
    """The names of every number, by executing one line after the other."""
    values: dict[str, str] = {}
    for name, other, number in re.findall(r"\nVAR ([A-Z]{3}) = (?:VAR ([A-Z]{3})|(\d+))\.\n", text):
        assert name not in values
        values[name] = number or values[other]
    return {number: [name for name, own in values.items() if own == number] for number in values.values()}


@pytest.mark.parametrize(("chains", "hops", "digits"), [(1, 0, 1), (2, 2, 5), (3, 4, 6)])
def test_all_names_of_one_number_are_asked_for(ask, chains, hops, digits):
    for text, answer in ask(VariableTrackingConfig(chains=chains, hops=hops, digits=digits), 0.0, 0.3, 1.0):
        found = names_of(text)
        assert [len(own) for own in found.values()] == [hops + 1] * chains
        assert {len(number) for number in found} == {digits}
        number = re.search(r"\nThe names of all variables with the value (\d+) are$", text).group(1)
        assert answer == f" {', '.join(found[number])}."


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (MultikeyConfig(values=3), lambda text: text.index(re.search(r"\nLucky numbers [^:]*:$", text).group(0))),
        (VariableTrackingConfig(), lambda text: text.index(f"= {re.search(r'value (.*) are$', text).group(1)}.")),
    ],
    ids=["multikey", "variable_tracking"],
)
def test_what_is_asked_for_begins_at_its_depth(ask, config, first):
    """With other depths it is the same text, in which the same is hidden at other places."""
    found = []
    for depth in (0.0, 0.3, 0.6, 1.0):
        ((text, answer),) = ask(config, depth, numbers=[3])
        hidden = re.findall(HIDDEN, text)
        before, length = (len(re.sub(HIDDEN, "", part)) for part in (text[: first(text)], text))
        assert abs(before - depth * length) <= 0.05 * length
        found.append((answer, sorted(hidden), re.sub(HIDDEN, "", text)))
    assert len(found[0][1]) == (12 if isinstance(config, MultikeyConfig) else 6)
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (MultikeyConfig, {"keys": 0}, "task.keys=0: must be from 1 to 128"),
        (MultikeyConfig, {"values": 0}, "task.values=0: must be at least 1"),
        (MultikeyConfig, {"keys": 5, "values": 2, "digits": 1}, "task.digits=1: .* there are 10 numbers"),
        (VariableTrackingConfig, {"chains": 0}, "task.chains=0"),
        (VariableTrackingConfig, {"hops": -1}, "task.hops=-1"),
        (VariableTrackingConfig, {"chains": 2000, "hops": 9}, "have 20,000 names, and there are 17,576"),
        (VariableTrackingConfig, {"digits": 19}, "task.digits=19"),
        (VariableTrackingConfig, {"depths": [2]}, r"task.depths=\[2\]"),
    ],
)
def test_options_that_cannot_be_are_refused(config, options, says):
    with pytest.raises(ValueError, match=says):
        config(**options)
