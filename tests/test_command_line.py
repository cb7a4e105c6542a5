"""Bad input ends at once, with exit code 1, a message that says what to do, no traceback, and nothing harmed."""

import copy
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from infformer.command import Ended
from infformer.commands import eval as eval_command
from infformer.commands import train as train_command
from infformer.errors import UserError
from infformer.hub import problem_with_the_hub
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.loading import new_decoder
from infformer.models.pretrained import InfformerForCausalLM
from infformer.training import trainer

ROOT = Path(__file__).parents[1]
CLOSED_PORT = "http://127.0.0.1:9"
Refused = Callable[..., str]
pytestmark = pytest.mark.usefixtures("composed_quickly", "without_figures")


@pytest.fixture
def without_figures(monkeypatch) -> None:
    """Nobody looks at them."""
    monkeypatch.setattr(trainer, "plot_run", lambda folder: [])
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())


@pytest.fixture
def start(monkeypatch, capsys) -> Iterator[Callable[..., tuple[object, str]]]:
    """`train.py` or `eval.py` in this process: its exit code, and all that a user would see of it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(command, *options: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *options])
        code: object = 0
        sentence = ""
        try:
            command.main()
        except Ended as ended:
            code, sentence = ended.code, ended.sentence
        except SystemExit as ended:
            code = ended.code
        except UserError as error:
            code = f"error: {error}"
        shown = capsys.readouterr()
        # The interpreter prints a text, and exits with 1.
        return (1, shown.err + code) if isinstance(code, str) else (code, shown.err + sentence)

    yield call
    GlobalHydra.instance().clear()
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def refused(start, tmp_path) -> Refused:
    """The message with which a command is refused that would write to `refused`, and does not."""

    def message(command, *options: str) -> str:
        code, text = start(command, *options)
        assert code == 1
        assert "Traceback" not in text
        assert not (tmp_path / "refused").exists()
        return " ".join(text.split())

    return message


@pytest.fixture
def train_refused(refused, configure, options_of, tmp_path) -> Refused:
    """Of a small run, for some options."""
    return partial(refused, train_command, *options_of(configure(tmp_path / "refused")))


@pytest.fixture
def eval_refused(refused, texts, model_folder, token_cache, tmp_path) -> Refused:
    """Of an evaluation."""
    places = {
        "data.test": texts / "test.jsonl", "data.cache_dir": token_cache, "checkpoint": model_folder,
        "output_dir": tmp_path / "refused",
    }  # fmt: skip
    return partial(refused, eval_command, "data=text", *(f"{option}={place}" for option, place in places.items()))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("training.max_stepz=3", ["training.max_stepz=3", "did you mean training.max_steps?"]),
        pytest.param(
            *("training.precision=float16", ["training.precision=float16", "use bfloat16 or float32"]),
            marks=pytest.mark.processor,
        ),
        ("model.memory_layers=[0,7]", ["model.memory_layers=[0, 7]", "layers 0 to 0"]),
        ("model.memory=sticky", ["model.memory=sticky", "type model/memory=, one of ", " none, ", " sticky"]),
        ("memory=sticky", ["memory=sticky", "type model/memory=, one of "]),
        ("model.memory.kind=sticky", ["there is no option model.memory.kind"]),
        ("data=mine/book.txt", ["data=mine/book.txt", "or for files of your own text with data.train=FILES"]),
        ("training.batch_size=64", ["training.batch_size=64", "smaller batch"]),
        ("training.batch_size=3", ["training.batch_size=3", "training.gradient_accumulation=2", "multiple of 2"]),
        ("resume=nowhere", ["resume=nowhere", "there is no such folder", "resume=auto"]),
    ],
)
def test_training_refuses(train_refused, option, says):
    message = train_refused(option)
    assert all(part in message for part in says), message


@pytest.mark.parametrize("memory", ["model.memory=null", "model.memory.ridge=0.5"])
def test_a_segment_longer_than_the_positions_of_the_model_is_refused(train_refused, memory):
    message = train_refused("training.segment_length=17", memory)
    assert "segment_length=17" in message
    assert "16 positions" in message


def test_a_folder_that_is_no_model_is_refused(train_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    message = train_refused(f"model.pretrained={tmp_path / 'empty'}")
    assert f"model.pretrained={tmp_path / 'empty'}: this folder is no model, it has no config.json" in message


def test_a_broken_model_is_refused(train_refused, model_folder, tmp_path):
    (tmp_path / "broken").mkdir()
    for path in model_folder.iterdir():
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"model.pretrained={tmp_path / 'broken'}" in train_refused(f"model.pretrained={tmp_path / 'broken'}")


def test_a_tokenizer_of_another_model_is_refused(train_refused, tokenizer, tmp_path):
    larger = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<s>")
    larger.add_tokens([f"word{number}" for number in range(10)])
    larger.save_pretrained(tmp_path / "larger")
    message = train_refused(f"model.tokenizer={tmp_path / 'larger'}")
    assert "the tokenizer has 267 tokens and the model knows 257" in message
    assert "model.tokenizer=" in message


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("control=false", ["control=false", "did you mean controls?"]),
        pytest.param(
            *("precision=float16", ["precision=float16", "use bfloat16 or float32"]), marks=pytest.mark.processor
        ),
        ("segment_length=17", ["segment_length=17", "16"]),
        ("tokenizer=./nowhere", ["tokenizer=./nowhere", "no such folder"]),
    ],
)
def test_evaluation_refuses(eval_refused, option, says):
    message = eval_refused(option)
    assert all(part in message for part in says), message


def test_a_vocabulary_too_small_for_its_tokenizer_is_refused(refused, model_folder, tmp_path):
    options = ("model=decoder", "+model.architecture.vocab_size=100", f"model.tokenizer={model_folder}")
    message = refused(train_command, *options, f"output_dir={tmp_path / 'refused'}")
    assert all(part in message for part in ("has 257 tokens", "knows 100", "model.tokenizer=")), message


OTHER_MEMORIES = ("short_term", "compressive", "long_term")


class TestSorting:
    """The small experiment, smaller still, and of a length that is no multiple of the segment."""

    OPTIONS = (
        "experiment=sorting_small",
        "task.length=23",
        "task.training_lengths=[]",
        "task.evaluation_lengths=[41]",
        "task.validation_sequences=2",
        "task.test_sequences=3",
        "training.segment_length=16",
        "training.batch_size=2",
        "training.max_steps=2",
        "model.architecture.hidden_size=12",
    )

    @pytest.fixture
    def sort(self, start, tmp_path) -> Callable[..., tuple[object, str]]:
        return lambda *options: start(train_command, *self.OPTIONS, f"output_dir={tmp_path / 'run'}", *options)

    @pytest.mark.parametrize(
        "memory", ["none", "sticky", *(pytest.param(memory, marks=pytest.mark.slow) for memory in OTHER_MEMORIES)]
    )
    def test_every_memory_sorts(self, sort, tmp_path, memory):
        code, text = sort(f"model/memory={memory}")
        assert code == 0, text
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        window = "last_16" if memory == "none" else "last_32"
        for figures, length in zip(results["lengths"], (23, 41), strict=True):
            assert figures["length"] == length
            assert {"accuracy", "accuracy_free_running"} <= figures.keys()
            assert window in figures["ideal_counters"]
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "validation/accuracy" in line] == [2]

    def test_a_larger_vocabulary_is_kept(self, sort, tmp_path):
        code, text = sort("+model.architecture.vocab_size=30", "training.max_steps=1")
        assert code == 0, text
        weights = load_file(tmp_path / "run" / "checkpoints" / "best" / "model" / "model.safetensors")
        assert weights["vocabulary.embedding.weight"].shape == (30, 12)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["+model.architecture.vocab_size=20"], ["task.symbols=20", "a new one: model.architecture.vocab_size=21"]),
            (["task.symbols=40", "+model.architecture.vocab_size=21"], ["task.symbols=40", "vocab_size=41"]),
            (["model.architecture.num_attention_heads=5"], ["num_attention_heads=5", "hidden_size=12"]),
        ],
        ids=lambda value: " ".join(value),
    )
    def test_what_cannot_be_asked_is_refused(self, refused, tmp_path, options, says):
        message = refused(train_command, *self.OPTIONS, f"output_dir={tmp_path / 'refused'}", *options)
        assert all(part in message for part in says), message


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> list[str]:
    """`data=` of three splits of a text that is long enough to hide something in it."""
    folder = tmp_path_factory.mktemp("books")
    (folder / "book.txt").write_text("The white whale rose, and nobody saw it. " * 30)
    options = [f"data.{split}={folder}/book.txt" for split in ("train", "validation", "test")]
    return ["data=text", *options, f"data.cache_dir={folder / 'cache'}"]


class TestRetrieval:
    """Everything small: a text of a few segments, one question at two depths."""

    ASKED = ("task.lengths=[240]", "task.depths=[0,1]", "task.test_questions=1", "task.validation_questions=1")
    TRAINING = ("training.segment_length=16", "training.batch_size=2", "training.max_steps=2")
    MODEL = ("model.memory.basis_functions=8", "model.memory.past_samples=16")

    def cells(self, folder: Path) -> list[tuple]:
        results = json.loads((folder / "results.json").read_text())
        assert [cell["depth"] for cell in results["controls"]["memory_off"]] == [0, 1]
        return [(cell["length"], cell["depth"], cell["answers"], cell["nll"]) for cell in results["cells"]]

    @pytest.mark.parametrize(
        "task",
        [
            pytest.param("passkey", marks=pytest.mark.slow),
            "needle",
            pytest.param("multikey task.keys=2", marks=pytest.mark.slow),
            pytest.param("variable_tracking task.chains=2 task.hops=1", marks=pytest.mark.slow),
        ],
    )
    def test_a_model_is_trained_and_measured_again(self, start, one_layer_folder, books, tmp_path, task):
        asked = [*f"task={task}".split(), *self.ASKED, *books]
        options = [*asked, "task.training_lengths=[260]", *self.TRAINING, *self.MODEL]
        model = f"model.pretrained={one_layer_folder}"
        code, text = start(train_command, *options, model, f"output_dir={tmp_path / 'run'}")
        assert code == 0, text
        found = self.cells(tmp_path / "run")
        assert [cell[:3] for cell in found] == [(240, 0, 1), (240, 1, 1)]
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "validation/exact_match" in line] == [2]
        best = tmp_path / "run" / "checkpoints" / "best"
        code, text = start(eval_command, *asked, f"checkpoint={best}", f"output_dir={tmp_path / 'found'}")
        assert code == 0, text
        assert [cell[:3] for cell in self.cells(tmp_path / "found")] == [cell[:3] for cell in found]
        nats = [cell[3] for cell in found]
        assert [cell[3] for cell in self.cells(tmp_path / "found")] == pytest.approx(nats, rel=1e-5)

    @pytest.mark.parametrize("memory", [pytest.param("short_term", marks=pytest.mark.slow), "sticky"])
    def test_a_decoder_learns_to_recall(self, start, tmp_path, memory):
        """A model without a tokenizer, which `eval.py` needs none for either."""
        asked = ["task.lengths=[64]", "task.depths=[0,1]", "task.test_questions=1", "task.validation_questions=1"]
        small = ["task.training_lengths=[40,64]", "model.architecture.hidden_size=12", *self.TRAINING]
        options = ["experiment=associative_recall_small", f"model/memory={memory}", *asked, *small]
        code, text = start(train_command, *options, f"output_dir={tmp_path / 'run'}")
        assert code == 0, text
        found = self.cells(tmp_path / "run")
        assert [cell[:3] for cell in found] == [(64, 0, 8), (64, 1, 8)]
        options = ["task=associative_recall", "task.queries=8", *asked, f"output_dir={tmp_path / 'found'}"]
        code, text = start(eval_command, *options, f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'best'}")
        assert code == 0, text
        nats = [cell[3] for cell in found]
        assert [cell[3] for cell in self.cells(tmp_path / "found")] == pytest.approx(nats, rel=1e-5)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["task=passkey", "task.lengths=[20]"], ["a length of 20", "choose longer ones"]),
            (["task=needle", "task.lengths=[9000]"], ["a length of 9,000 (task", "longest test document has 74"]),
            (["task=associative_recall"], ["this task has 577 symbols", "the model knows 257"]),
        ],
        ids=lambda value: " ".join(value),
    )
    def test_what_cannot_be_asked_is_refused(self, eval_refused, options, says):
        message = eval_refused(*options, "segment_length=16")
        assert all(part in message for part in says), message


class TestShortTermMemoryInEvaluation:
    def test_it_may_be_longer_than_in_training(self, start, tokenizer, texts, tmp_path):
        sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "feed_forward_size": 20}
        sizes |= {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
        model = new_decoder(sizes, MemoryConfig(16), segment_length=16)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        options = ["data=text", f"data.test={texts}/test.jsonl", f"checkpoint={tmp_path}/model", "controls=false"]
        losses = []
        for length in ("null", "48", "1000", "2000"):
            folder = tmp_path / length
            code, text = start(eval_command, *options, f"short_term_length={length}", f"output_dir={folder}")
            assert code == 0, text
            losses.append(json.loads((folder / "results.json").read_text())["nll"])
        trained, longer, whole, beyond = losses
        assert len({trained, longer, whole}) == 3
        # No document has so many tokens: what is not there changes nothing.
        assert beyond == pytest.approx(whole, rel=1e-6)

    def test_it_is_of_whole_segments_beside_a_long_term_memory(self, eval_refused, tmp_path):
        sizes = {"vocab_size": 8, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        memory = LongTermMemoryConfig(16, 8, [0.05, 0.1], 16)
        new_decoder(sizes, memory, segment_length=16).save_pretrained(tmp_path / "model")
        message = eval_refused(f"checkpoint={tmp_path / 'model'}", "short_term_length=17")
        assert "short_term_length=17" in message
        assert "multiple of segment_length=16" in message

    @pytest.mark.parametrize(
        ("memory", "said"),
        [
            (None, "what a 'gpt2' has read cannot be moved back"),
            (LongTermMemoryConfig(0, 8, [0.05, 0.1], 16), "has no short-term memory; set it to null"),
        ],
    )
    def test_a_model_with_absolute_places_or_another_memory_gets_none(
        self, eval_refused, backbone, tmp_path, memory, said
    ):
        InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), memory, segment_length=16).save_pretrained(
            tmp_path / "model"
        )
        message = eval_refused(f"checkpoint={tmp_path / 'model'}", "short_term_length=32")
        assert "short_term_length" in message
        assert said in message


class TestAHubThatCannotBeReached:
    @pytest.fixture(autouse=True)
    def closed(self, monkeypatch) -> None:
        problem_with_the_hub.cache_clear()
        monkeypatch.setattr(constants, "ENDPOINT", CLOSED_PORT)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def test_it_is_named_for_a_model(self, train_refused):
        message = train_refused("model.pretrained=someone/something")
        assert f"model.pretrained=someone/something: {CLOSED_PORT} cannot be reached" in message
        assert all(way in message for way in ("local folder", "HF_HOME", "HF_HUB_OFFLINE=1", "HF_ENDPOINT="))

    def test_it_is_named_for_documents(self, train_refused):
        message = train_refused("data.source=hub", "data.repository=someone/texts", "data.train=train")
        assert "data.repository=someone/texts" in message
        assert f"{CLOSED_PORT} cannot be reached" in message
        assert all(way in message for way in ("local folder", "HF_HOME", "HF_HUB_OFFLINE=1", "HF_ENDPOINT="))


class TestExitCodes:
    @pytest.mark.parametrize("number", [int(signal.SIGTERM), int(signal.SIGHUP)])
    def test_a_run_that_was_stopped_exits_with_99(self, start, configure, options_of, tmp_path, monkeypatch, number):
        """As batch systems understand it: put this in the queue again."""

        def stop(config: object) -> None:
            raise trainer.TrainingStopped(number, 7)

        monkeypatch.setattr(trainer, "train", stop)
        code, text = start(train_command, *options_of(configure(tmp_path / "run")))
        assert code == 99
        assert f"stopped by signal {number} after step 7" in text
        assert "resume=auto" in text

    def test_a_run_that_failed_exits_with_1(self, start, configure, options_of, tmp_path, monkeypatch):
        def fail(config: object) -> None:
            raise trainer.TrainingFailedError("step 3: the loss is nan")

        monkeypatch.setattr(trainer, "train", fail)
        code, text = start(train_command, *options_of(configure(tmp_path / "run")))
        assert (code, text.strip()) == (1, "error: step 3: the loss is nan")

    def test_a_run_that_is_done_exits_with_0(self, start, configure, options_of, tmp_path):
        changes = {"training.max_steps": 1, "data.test": None, "data.validation": None}
        code, _ = start(train_command, *options_of(configure(tmp_path / "run", changes)))
        assert code == 0
        assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


def test_an_evaluation_finds_what_the_run_found(start, configure, train, texts, tmp_path, monkeypatch):
    """What `train.py` found in the end, `eval.py` finds again."""
    results = train(configure(tmp_path / "run", {"evaluation.controls": True, "training.max_steps": 3}))
    options = ["data=text", f"data.test={texts}/test.jsonl", f"checkpoint={tmp_path}/run/checkpoints/best"]
    code, text = start(eval_command, *options, f"output_dir={tmp_path}/found", "batch_size=3")
    assert code == 0, text
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert found["nll"] == pytest.approx(results["nll"], rel=1e-6)
    assert found["controls"].keys() == results["controls"].keys()
    assert (tmp_path / "found" / "plots" / "loss_by_position.png").exists()
    # What is there is measured for hours: nothing else is written over it, and that is said before any work.
    monkeypatch.setattr(eval_command, "load_trained", lambda *arguments: pytest.fail("it came to the model"))
    for folder, says in {"run": "holds a training run", "found": "stride was None, is 8"}.items():
        before = (tmp_path / folder / "results.json").read_bytes()
        code, text = start(eval_command, *options, "stride=8", f"output_dir={tmp_path}/{folder}")
        assert code == 1
        assert f"output_dir={tmp_path}/{folder} holds" in text
        assert says in text
        assert (tmp_path / folder / "results.json").read_bytes() == before
