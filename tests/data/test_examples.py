"""Examples of classes are read from tables, archives, the hub and generators, kept on disk, and refused in words."""

import csv
import io
import json
import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from infformer.data import long_range_arena
from infformer.data.examples import Example, in_order, keep_examples
from infformer.data.list_operations import SYMBOLS, draw_trees
from infformer.data.long_range_arena import ExampleSource, grey
from infformer.data.options import DATA, DataConfig
from infformer.errors import DataError

SPLITS = ["train", "validation", "test"]


def table(path: Path, rows: list[tuple], columns: tuple = ("text", "label")) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return str(path)


def texts(examples) -> list[str]:
    return [bytes((examples.text(number) - 1).astype(np.uint8)).decode() for number in range(len(examples))]


def labels(examples) -> list[str]:
    return [examples.classes[label] for label in examples.labels]


class TestOwnTexts:
    ROWS = [("a fine film", "good"), ('"no", he said,\nand left', "bad"), ("schön", "good")]  # noqa: RUF012

    @pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
    def test_texts_and_labels_of_a_table_are_read(self, tmp_path, ending):
        path = tmp_path / f"mine{ending}"
        if ending == ".jsonl":
            path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in self.ROWS))
        else:
            table(path, self.ROWS)
        examples = ExampleSource("text", 100).read(DataConfig(train=str(path)), ["train"])["train"]
        assert texts(examples) == [text for text, _ in self.ROWS]
        assert examples.classes == ["bad", "good"]
        assert labels(examples) == ["good", "bad", "good"]

    def test_longer_texts_are_cut_and_batches_padded(self, tmp_path):
        data = DataConfig(train=table(tmp_path / "mine.csv", [("abcdef", 1), ("ab", 0)]))
        examples = ExampleSource("text", 4).read(data, ["train"])["train"]
        tokens, lengths = examples.batch([1, 0])
        assert tokens.tolist() == [[98, 99, 0, 0], [98, 99, 100, 101]]
        assert lengths.tolist() == [2, 4]
        assert examples.batch([1], least=3)[0].tolist() == [[98, 99, 0]]

    def test_held_out_texts_are_cut_as_asked(self, tmp_path):
        train, test = (table(tmp_path / f"{split}.csv", [("abcdef", 1), ("ab", 0)]) for split in ("train", "test"))
        data = DataConfig(train=train, test=test, max_document_characters=5)
        source = ExampleSource("text", 100)
        for most, expected in ((None, "abcde"), (3, "abc")):
            found = source.read(replace(data, max_held_out_characters=most), ["train", "test"])
            assert [texts(found[split])[0] for split in ("train", "test")] == ["abcde", expected]

    def test_texts_of_ones_own_are_not_cut_like_the_novels(self, tmp_path):
        data = replace(DATA["sample"], test=table(tmp_path / "mine.csv", [("a", 1)]))
        assert ExampleSource("text", 100).own(data).max_held_out_characters is None

    def test_pairs_have_half_of_a_row_each(self, tmp_path):
        path = table(tmp_path / "pairs.csv", [("ab", "abc", 1), ("abcd", "a", 0)], ("text1", "text2", "label"))
        examples = ExampleSource("pairs", 100).read(DataConfig(train=path), ["train"])["train"]
        tokens, lengths = examples.batch([0, 1])
        assert tokens.tolist() == [[98, 99, 0, 0, 98, 99, 100, 0], [98, 99, 100, 101, 98, 0, 0, 0]]
        assert lengths.tolist() == [7, 5]
        tokens, lengths = examples.batch([0, 1], towers=1)  # one after the other
        assert tokens.tolist() == [[98, 99, 0, 98, 99, 100], [98, 99, 100, 101, 0, 98]]
        assert lengths.tolist() == [6, 6]

    def test_classes_are_those_that_are_learned(self, tmp_path):
        data = DataConfig(
            train=table(tmp_path / "train.csv", [("a", 10), ("b", 9), ("c", 2)]),
            test=table(tmp_path / "test.csv", [("d", 9)]),
        )
        source = ExampleSource("text", 10)
        assert source.splits(data) == ["train", "test"]  # nothing was named to validate by
        alone = source.read(data, ["test"])["test"]
        assert (alone.classes, labels(alone)) == (["2", "9", "10"], ["9"])

    def test_a_part_is_drawn_from_all(self, tmp_path):
        """A table may hold one class after the other."""
        rows = [(f"text {number}", number // 50) for number in range(100)]
        data = DataConfig(train=table(tmp_path / "mine.csv", rows))
        some = ExampleSource("text", 100).read(data, ["train"], lambda split: 20)["train"]
        assert len(some) == len(set(texts(some))) == 20
        assert set(labels(some)) == {"0", "1"}
        whole = ExampleSource("text", 100).read(data, ["train"])["train"]
        assert some.fingerprint != whole.fingerprint

    @pytest.mark.parametrize(
        ("rows", "columns", "said"),
        [
            ([("a", 1), ("", 0)], ("text", "label"), "line 3: the text is empty; remove the example"),
            ([("a", 1), ("b", "")], ("text", "label"), "line 3: the label is empty; remove the example"),
            (
                [("a", 1)],
                ("text", "class"),
                "task.label_field=label, and there is no such field .*; there are text, class",
            ),
            ([("a", 1)], ("body", "label"), "data.text_field=text, and there is no such field .*there are body, label"),
            (
                [("a", 1), ("b", 1)],
                ("text", "label"),
                "all examples are of the class '1'; there is nothing to tell apart",
            ),
            ([("a", 1, "x")], ("text", "label"), "line 2: this row has not the 2 columns that the first line names"),
            ([], ("text", "label"), "the file names columns and has no rows"),
        ],
    )
    def test_what_cannot_be_learned_is_refused(self, tmp_path, rows, columns, said):
        data = DataConfig(train=table(tmp_path / "mine.csv", rows, columns))
        with pytest.raises(DataError, match=said):
            ExampleSource("text", 100).read(data, ["train"])

    def test_a_label_that_is_not_learned_is_refused(self, tmp_path):
        data = DataConfig(
            train=table(tmp_path / "train.csv", [("a", "x"), ("b", "y")]),
            test=table(tmp_path / "test.csv", [("d", "z")]),
        )
        with pytest.raises(DataError, match=r"test.csv, line 2: the label 'z' is none of the classes .*\(x, y\)"):
            ExampleSource("text", 10).read(data, ["train", "test"])

    def test_lists_of_ones_own_are_read_and_none_are_drawn(self, tmp_path):
        data = DataConfig(train=table(tmp_path / "mine.csv", [("[MAX 1 2 ]", 2), ("7", 7)], ("Source", "Target")))
        examples = ExampleSource("listops", 100).read(data, ["train"])["train"]
        assert (len(examples), labels(examples)) == (2, ["2", "7"])

    def test_a_tokenizer_keeps_its_numbers_and_leaves_nothing_out(self, tmp_path):
        path = table(tmp_path / "mine.csv", [("a", 1), ("ab", 0)])
        with_holes = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 1, "b": 300}, [])))
        examples = ExampleSource("text", 2).read(DataConfig(train=path), ["train"], tokenizer=with_holes)["train"]
        assert [examples.text(number).tolist() for number in range(2)] == [[1], [1, 300]]
        for text, said in (("a z", "no token for ' '"), ("\ud800", "the text holds half a character at 0")):
            path = tmp_path / "mine.jsonl"
            path.write_text(json.dumps({"text": text, "label": 1}))
            with pytest.raises(DataError, match=f"line 1.*{said}"):
                ExampleSource("text", 2).read(DataConfig(train=str(path)), ["train"], tokenizer=with_holes)

    @pytest.mark.parametrize("option", [{"shuffle": False}, {"articles": True}, {"skip_short_documents": True}])
    def test_an_option_that_does_nothing_to_examples_is_refused(self, tmp_path, option):
        data = DataConfig(train=table(tmp_path / "mine.csv", [("a", 1), ("b", 0)]), **option)
        with pytest.raises(DataError, match=rf"data\.{next(iter(option))}=(true|false): this is for documents"):
            ExampleSource("text", 10).check(data, ["train"])

    def test_without_files_it_is_said_what_to_name(self):
        with pytest.raises(DataError, match=r"data\.train=train: name files of texts with their labels"):
            ExampleSource("text", 10).check(DataConfig(), ["train"])
        with pytest.raises(DataError, match=r"data\.train=missing\.csv: no such file"):
            ExampleSource("text", 10).check(DataConfig(train="missing.csv"), ["train"])


def test_labels_are_ordered_by_number_or_by_letter():
    assert in_order(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert in_order(["b", "10", "a"]) == ["10", "a", "b"]
    same_numbers = [f"{zeros}{number}" for number in range(1, 20) for zeros in ("0", "")]
    assert in_order(same_numbers) == same_numbers  # whatever the order of a set


def test_examples_are_made_once(tmp_path):
    made = []

    def examples():
        for number in range(3):
            made.append(number)
            yield Example("here", (np.array([1, 2, number]),), str(number % 2))

    first = keep_examples(tmp_path / f"train-{'0' * 32}", examples(), 300, None, "here")
    again = keep_examples(tmp_path / f"train-{'0' * 32}", examples(), 300, None, "here")
    assert made == [0, 1, 2]
    assert first.fingerprint == again.fingerprint
    assert [again.text(number).tolist() for number in range(3)] == [[1, 2, 0], [1, 2, 1], [1, 2, 2]]


class TestListOps:
    def test_splits_are_pieces_of_one_sequence(self, monkeypatch):
        """Of the numbers that were published; of fewer here, as they take their time."""
        numbers = long_range_arena._LIST_OPERATIONS
        assert numbers == {"test": 2000, "validation": 2000, "train": 96_000}
        monkeypatch.setitem(numbers, "test", 70)
        monkeypatch.setitem(numbers, "validation", 50)
        found = ExampleSource("listops", 100).read(DataConfig(), SPLITS, {"train": 30}.get)
        assert [len(found[split]) for split in SPLITS] == [30, 50, 70]
        trees = list(islice(draw_trees(25, 100, 0), 150))
        pieces = {"test": trees[:70], "validation": trees[70:120], "train": trees[120:]}
        for split, piece in pieces.items():
            examples = found[split]
            assert examples.labels.tolist() == [value for _, value in piece]
            assert all(np.array_equal(examples.text(n), tree.astype(int) + 1) for n, (tree, _) in enumerate(piece))

    @pytest.fixture
    def archive(self, tmp_path) -> DataConfig:
        folder = tmp_path / "lra_release" / "listops-1000"
        folder.mkdir(parents=True)
        rows = "Source\tTarget\n( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )\t4\n7\t7\n"
        for split in ("train", "val", "test"):
            (folder / f"basic_{split}.tsv").write_text(rows)
        return DataConfig(path=str(folder.parent))

    def test_the_archive_is_read_as_it_is(self, archive):
        examples = ExampleSource("listops", 2000).read(archive, SPLITS)["validation"]
        assert [SYMBOLS[token - 1] for token in examples.text(0)] == ["[MAX", "4", "[MIN", "2", "3", "]", "]"]
        assert examples.labels.tolist() == [4, 7]

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ("[MAX 4 2 ]\t10", r"basic_test.tsv, line 4: the label '10' is none of the classes"),
            ("[MEAN 4 2 ]\t3", r"line 4: '\[MEAN' is none of 0 1 2"),
            ("[MAX 4 2 ]", "line 4: not the two columns Source and Target"),
        ],
    )
    def test_a_line_that_is_no_list_is_refused(self, archive, row, said):
        file = Path(archive.path) / "listops-1000" / "basic_test.tsv"
        file.write_text(file.read_text() + row + "\n")
        with pytest.raises(DataError, match=said):
            ExampleSource("listops", 2000).read(archive, ["test"])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("listops", r"there is no listops-1000/basic_train.tsv in it; download https://.*lra_release.gz .* drawn here"),
        ("pairs", r"there is no tsv_data/new_aan_pairs.train.tsv in it; download .* to its folder lra_release\.$"),
        ("pathfinder", r"there is no pathfinder32/curv_contour_length_14/metadata/0.npy in it; .* drawn here"),
        ("path_x", r"there is no pathfinder128/curv_contour_length_14/metadata/0.npy in it"),
        ("bytes", "the archive has nothing for this task; choose data=imdb"),
        ("pixels", "the archive has nothing for this task; choose data=cifar10"),
    ],
)
def test_it_is_said_what_an_archive_lacks(tmp_path, kind, said):
    with pytest.raises(DataError, match=said):
        ExampleSource(kind, 100).check(DataConfig(path=str(tmp_path)), ["train"])


@pytest.mark.parametrize(("kind", "length", "least"), [("listops", 7, "8"), ("path_x", 1024, "16,384")])
def test_a_length_for_which_nothing_can_be_drawn_is_refused_before_it_is_tried(kind, length, least):
    with pytest.raises(DataError, match=rf"task\.length={length}: .* task\.kind={kind} takes {least} tokens at least"):
        ExampleSource(kind, length).check(DataConfig(), ["train"])


def test_it_is_said_where_the_papers_are():
    with pytest.raises(DataError, match=r"download https://.*lra_release.gz .*, unpack it, and set data.path="):
        ExampleSource("pairs", 4000).check(DataConfig(), ["train"])


class TestImages:
    def archive(self, folder: Path, as_array: bool) -> DataConfig:
        place = folder / "pathfinder32" / "curv_contour_length_14"
        (place / "metadata").mkdir(parents=True)
        number = 0
        for batch in ("0", "1", "10", "2"):
            (place / "imgs" / batch).mkdir(parents=True)
            rows = []
            for image in range(5):
                path = place / "imgs" / batch / f"sample_{image}.png"
                Image.fromarray(np.full((32, 32), 10 * int(batch) + image, dtype=np.uint8)).save(path)
                rows.append(
                    [f"imgs/{batch}", path.name, str(image), str(number % 2), "1.0", "14", "4", "2", ".5", "1", "1"]
                )
                number += 1
            if as_array:
                np.save(place / "metadata" / f"{batch}.npy", np.array(rows))
            else:
                (place / "metadata" / f"{batch}.npy").write_text("".join(" ".join(row) + "\n" for row in rows))
        return DataConfig(path=str(folder))

    @pytest.mark.parametrize("as_array", [True, False])
    def test_the_archive_is_cut_into_its_splits(self, tmp_path, as_array):
        found = ExampleSource("pathfinder", 1024).read(self.archive(tmp_path, as_array), SPLITS)
        grey_levels = {split: [int(found[split].text(n)[0]) - 1 for n in range(len(found[split]))] for split in SPLITS}
        everything = [10 * batch + image for batch in (0, 1, 2, 10) for image in range(5)]
        assert grey_levels == {"train": everything[:16], "validation": everything[16:18], "test": everything[18:]}
        assert found["train"].labels.tolist()[:6] == [0, 1, 0, 1, 0, 1]

    def test_a_broken_image_is_left_out_by_name(self, tmp_path, caplog):
        data = self.archive(tmp_path, False)
        (tmp_path / "pathfinder32" / "curv_contour_length_14" / "imgs" / "1" / "sample_2.png").write_bytes(b"")
        with caplog.at_level(logging.WARNING):
            found = ExampleSource("pathfinder", 1024).read(data, ["train"])["train"]
        assert len(found) == 15
        assert [record.message for record in caplog.records if "1/sample_2.png is left out" in record.message]

    def test_drawn_images_are_kept_and_gone_on_with(self, monkeypatch):
        monkeypatch.setattr(long_range_arena, "_IMAGES_AT_A_TIME", 2)
        drawn = []

        def draw(size, numbers, seed, split):
            drawn.append((split, numbers.start))
            if len(drawn) == 3:
                raise KeyboardInterrupt
            return np.full((len(numbers), 1024), numbers.start, np.uint8), np.array([0, 1], np.uint8)

        monkeypatch.setattr(long_range_arena, "draw_images", draw)
        source = ExampleSource("pathfinder", 1024)
        with pytest.raises(KeyboardInterrupt):
            source.read(DataConfig(), ["train"], lambda split: 7)
        found = source.read(DataConfig(), ["train"], lambda split: 7)["train"]
        assert drawn == [(0, 0), (0, 2), (0, 4), (0, 4), (0, 6)]
        assert [int(found.text(n)[0]) - 1 for n in range(7)] == [0, 0, 2, 2, 4, 4, 6]
        source.read(DataConfig(), ["train"], lambda split: 8)
        assert len(drawn) == 5  # more of the same are the same

    def test_several_processes_draw_the_same_images(self, monkeypatch, tmp_path):
        monkeypatch.setattr(long_range_arena, "_IMAGES_AT_A_TIME", 2)
        source, found = ExampleSource("pathfinder", 1024), []
        for workers in (1, 2):
            data = DataConfig(cache_dir=str(tmp_path / str(workers)), workers=workers)
            found.append(source.read(data, ["test"], lambda split: 4)["test"].fingerprint)
        assert found[0] == found[1]

    def test_images_of_the_hub_become_grey(self, tmp_path, shared):
        """The excerpt of CIFAR-10, laid out as the dataset is on the hub."""
        excerpt = np.load(shared / "lra" / "cifar10_gray_excerpt.npz")
        images, known = excerpt["x_test"], excerpt["y_test"]
        rows = []
        for image, label in zip(images[:20], known[:20], strict=True):
            content = io.BytesIO()
            Image.fromarray(image.reshape(32, 32)).save(content, "png")
            rows.append({"img": {"bytes": content.getvalue(), "path": None}, "label": int(label)})
        (tmp_path / "data").mkdir()
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train-00000-of-00001.parquet")
        data = DataConfig("hub", str(tmp_path), train="train", validation=None, test=None, text_field="img")
        found = ExampleSource("pixels", 1024).read(data, ["train"])["train"]
        assert np.array_equal(found.text(3) - 1, images[3].ravel())
        assert labels(found) == [str(label) for label in known[:20]]
        with pytest.raises(DataError, match=r"the image has 1,024 pixels, task\.length=100"):
            ExampleSource("pixels", 100).read(data, ["train"])

    @pytest.mark.parametrize(
        ("content", "said"), [(b"none", "cannot identify"), (b"P5 20000 20000 255\n", "Image size")]
    )
    def test_an_image_that_is_none_is_refused_by_its_place(self, tmp_path, content, said):
        rows = [{"img": {"bytes": content, "path": None}, "label": label} for label in (0, 1)]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        data = DataConfig(train=str(tmp_path / "a.parquet"), text_field="img")
        for kind in ("pixels", "pathfinder"):
            with pytest.raises(DataError, match=rf"a\.parquet, row 1: this is no whole image \({said}"):
                ExampleSource(kind, 1024).read(data, ["train"])

    def test_grey_is_by_the_weights_of_the_benchmark(self):
        colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]], dtype=np.uint8)
        assert grey(Image.fromarray(colours)).tolist() == [[76, 149, 29, 18]]


def test_papers_are_read_from_lines_of_five_columns(tmp_path):
    folder = tmp_path / "tsv_data"
    folder.mkdir()
    lines = ["1.0\tA\tB\tone text\tanother text\n", '0.0\tA\tC\tone text\ta "third one\n']
    (folder / "new_aan_pairs.train.tsv").write_text("".join(lines))
    found = ExampleSource("pairs", 8).read(DataConfig(path=str(tmp_path)), ["train"])["train"]
    assert (labels(found), found.texts) == (["1", "0"], 2)
    assert bytes((found.text(1, 1) - 1).astype(np.uint8)) == b'a "third'
    (folder / "new_aan_pairs.eval.tsv").write_text("2.0\tA\tB\ta\tb\n")
    with pytest.raises(DataError, match=r"eval\.tsv, line 1: not the five columns label"):
        ExampleSource("pairs", 8).read(DataConfig(path=str(tmp_path)), ["validation"])


def test_reviews_are_read_as_bytes(shared):
    data = DataConfig("files", **{split: str(shared / "lra" / f"imdb_{split}.jsonl.gz") for split in ("train", "test")})
    data.validation = None
    found = ExampleSource("bytes", 4000).read(data, ["train", "test"])
    assert [len(found[split]) for split in found] == [2500, 1000]
    assert np.bincount(found["test"].labels).tolist() == [500, 500]
    assert found["train"].longest == 4000


def test_reviews_of_the_hub_are_held_out_by_class():
    """They lie there by class, so what is held out is the end of each half."""
    assert DATA["imdb"].places("validation") == ["train[45%:50%]+train[95%:]"]
    assert DATA["imdb"].places("train") == ["train[:45%]+train[50%:95%]"]
