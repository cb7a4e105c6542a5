"""The harness measures with our model what we measure, and what its own adapter measures where the two can agree."""

import json
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from infformer.data.options import DataConfig
from infformer.data.tokenization import tokenize_documents
from infformer.errors import UserError
from infformer.evaluation.perplexity import evaluate
from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.models.generation import continue_text
from infformer.models.loading import load_trained

lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'infformer[harness]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from infformer.harness.adapter import InfformerLM  # noqa: E402

pytestmark = pytest.mark.needs("lm_eval")

SEGMENT = 8
TEXTS = {
    "ship": "the ship went over the deep sea " * 5 + "to the wind",
    "short": "a whale",
    "naïve": "Über dem Wasser, naïve – “night” …\n\nand   so\ton",
    "exact": "x" * (3 * SEGMENT),
    "letter": "y",
}
"""Among them a document that ends where a segment does. None begins or ends with blanks, after which the harness counts
one word more than there is."""

PERPLEXITY = """
task: documents
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1.0
"""


def ask(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)


@pytest.fixture
def adapter(checkpoints) -> Callable[..., InfformerLM]:
    def make(kind: str = "memory", **options: Any) -> InfformerLM:
        return InfformerLM(str(checkpoints[kind]), batch_size=3, device="cpu", **options)

    return make


@pytest.mark.parametrize(
    ("kind", "typed", "expected"),
    [
        ("memory", {"batch_size": "5"}, {"batch_size": 5}),
        ("memory", {"precision": "bfloat16"}, {"precision": torch.bfloat16}),
        ("memory", {"segment_length": 4}, {"segment_length": 4}),
        ("decoder", {"short_term_length": 3 * SEGMENT}, {"short_term_length": 3 * SEGMENT}),
        ("none", {"segment_length": 5}, {"segment_length": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_every_option_reaches_the_evaluator(checkpoints, kind, typed, expected):
    """And changes nothing else."""

    def options(**typed: Any) -> dict[str, Any]:
        evaluator = InfformerLM(str(checkpoints[kind]), device="cpu", **typed).evaluator
        assert evaluator.model.segment_length in (None, evaluator.protocol.segment_length)
        found = {**vars(evaluator.protocol), "batch_size": evaluator.batch_size}
        return {**found, "short_term_length": evaluator.model.short_term_length}

    default = options()
    assert options(**typed) == {**default, **expected} != default


def test_a_tokenizer_may_come_from_elsewhere(checkpoints, tmp_path):
    """The model's own folder has none."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoints["memory"] / name).read_bytes())
    model = InfformerLM(str(tmp_path), tokenizer=str(checkpoints["memory"]), device="cpu")
    assert model.tok_encode("a whale") == InfformerLM(str(checkpoints["memory"]), device="cpu").tok_encode("a whale")


def test_the_processor_is_taken_where_there_is_no_cuda(checkpoints, monkeypatch, caplog):
    """The harness's command asks for `cuda:0` on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with caplog.at_level("INFO"):
        assert InfformerLM(str(checkpoints["memory"]), device="cuda:0").device == torch.device("cpu")
    assert "device=cuda:0: there is no CUDA device here" in caplog.text


def test_a_task_of_the_harness_measures_what_eval_does(checkpoints, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in TEXTS.items()))
    (tmp_path / "documents.yaml").write_text(PERPLEXITY.format(file=file))
    results = lm_eval.simple_evaluate(
        model="infformer",
        model_args={"checkpoint": str(checkpoints["memory"])},
        tasks=["documents"],
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    config = DataConfig(source="files", test=str(file), cache_dir=str(tmp_path))
    documents = tokenize_documents(config, "test", tokenizer)
    model = load_trained(str(checkpoints["memory"]))
    ours = evaluate(Evaluator(model=model, protocol=ReadingProtocol(SEGMENT)), documents)
    found = results["results"]["documents"]
    assert found["word_perplexity,none"] == pytest.approx(ours["perplexity"]["word"], rel=1e-4)
    assert found["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"], rel=1e-6)
    assert found["byte_perplexity,none"] == pytest.approx(2 ** ours["bits_per_byte"], rel=1e-6)
    assert results["config"]["protocol"]["segment"] == SEGMENT


def test_documents_without_a_token_are_certain(adapter):
    texts = ["", TEXTS["ship"], "", TEXTS["short"]]
    found = adapter().loglikelihood_rolling([ask("loglikelihood_rolling", text) for text in texts], disable_tqdm=True)
    assert (found[0], found[2]) == (0.0, 0.0)
    assert max(found[1], found[3]) < 0
    assert adapter().loglikelihood_rolling([ask("loglikelihood_rolling", "")], disable_tqdm=True) == [0.0]


def test_documents_begin_with_what_begins_them_in_training(adapter):
    """The harness's convention too: one token that is not scored itself."""
    model, text = adapter(), TEXTS["ship"]
    (rolling,) = model.loglikelihood_rolling([ask("loglikelihood_rolling", text)], disable_tqdm=True)
    ((after_nothing, _),) = model.loglikelihood([ask("loglikelihood", "", text)], disable_tqdm=True)
    assert after_nothing == pytest.approx(rolling, rel=1e-5)


def test_a_continuation_is_scored_after_all_of_a_long_context(adapter, models, tokenizer):
    """Blanks between the two are the continuation's."""
    context, choices = TEXTS["ship"], (" whale", " sea")
    requests = [ask("loglikelihood", context + " ", choice[1:]) for choice in choices]
    found = adapter().loglikelihood(requests, disable_tqdm=True)
    for (likelihood, _), choice in zip(found, choices, strict=True):
        text = torch.tensor([tokenizer.encode(context + choice)])
        memory, losses = None, []
        for inputs, labels in zip(text[:, :-1].split(SEGMENT, 1), text[:, 1:].split(SEGMENT, 1), strict=True):
            with torch.no_grad():
                output = models["memory"](inputs, state=memory, targets=labels)
            memory = output.state
            losses.append(output.token_losses[0])
        assert likelihood == pytest.approx(-float(torch.cat(losses)[-len(choice) :].sum()), rel=1e-5)


def test_blanks_before_a_continuation_are_part_of_it(adapter):
    found = adapter().loglikelihood(
        [ask("loglikelihood", "  ", "a"), ask("loglikelihood", "", "  a")], disable_tqdm=True
    )
    assert found[0] == pytest.approx(found[1])


def test_a_text_is_written(adapter, models, tokenizer):
    prompt = torch.tensor(tokenizer.encode(TEXTS["ship"]))
    written = continue_text(models["memory"], prompt, 12, SEGMENT, temperature=0).tolist()
    assert 0 not in written
    requests = [ask("generate_until", TEXTS["ship"], {"until": [], "max_gen_toks": count}) for count in (12, 3)]
    assert adapter().generate_until(requests, disable_tqdm=True) == [
        tokenizer.decode(written),
        tokenizer.decode(written[:3]),
    ]


def test_what_a_task_cannot_have_is_found_before_anything_is_written(adapter, monkeypatch):
    requests = [ask("generate_until", "a", {"max_gen_toks": 2}), ask("generate_until", "a", {"num_beams": 2})]
    monkeypatch.setattr("infformer.harness.adapter.write_text", lambda *arguments: pytest.fail("too early"))
    with pytest.raises(UserError, match="num_beams=2"):
        adapter().generate_until(requests, disable_tqdm=True)


def test_without_memory_and_within_a_segment_it_is_the_stock_adapter(models, tokenizer, checkpoints, tmp_path):
    from lm_eval.models import huggingface

    models["none"].backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stock = huggingface.HFLM(str(tmp_path), device="cpu", dtype="float32", batch_size=2)
    ours = InfformerLM(str(tmp_path), batch_size=2, device="cpu")  # its 16 positions are a segment
    documents = [ask("loglikelihood_rolling", text) for text in ("a whale", "the deep sea", "x" * 16, "y")]
    pairs = [("the sea", " deep"), ("the sea ", "deep"), ("a", "b"), ("", "whale"), ("Ü", "ber")]
    continuations = [ask("loglikelihood", *pair) for pair in pairs]
    texts = [ask("generate_until", "the sea", {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False})]
    assert ours.loglikelihood_rolling(documents) == pytest.approx(stock.loglikelihood_rolling(documents), rel=1e-5)
    for own, other in zip(ours.loglikelihood(continuations), stock.loglikelihood(continuations), strict=True):
        assert own == (pytest.approx(other[0], rel=1e-5), other[1])
    assert ours.generate_until(texts) == stock.generate_until(texts)


@pytest.fixture
def beginning(tokenizer, tmp_path) -> str:
    """The folder of a tokenizer that begins each text by itself, as many do."""
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="<s>").save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_text_has_one_beginning(adapter, tokenizer, beginning):
    model, text = adapter(tokenizer=beginning), TEXTS["ship"]
    assert model.tok_encode(text) == model.tok_encode(f"<s>{text}") == [0, *tokenizer.encode(text)]
    assert model.tok_encode(text, add_special_tokens=False) == tokenizer.encode(text)
    document = [ask("loglikelihood_rolling", text)]
    assert model.loglikelihood_rolling(document) == adapter().loglikelihood_rolling(document)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": ""}, "checkpoint=.*say which model"),
        ({"checkpoint": "/nowhere/at/all"}, "checkpoint=/nowhere/at/all"),
        ({"pretrained": "gpt2"}, "pretrained=gpt2.*no such option"),
        ({"precision": "half"}, "precision=half.*float32"),
        ({"batch_size": "auto"}, "batch_size=auto.*at least 1"),
        ({"batch_size": 0}, "batch_size=0.*at least 1"),
        ({"segment_length": 0}, "segment_length=0.*at least 1"),
        ({"segment_length": "long"}, "segment_length=long.*number"),
        ({"segment_length": 64}, "segment_length=64.*16 positions"),
        ({"device": "abacus"}, "device=abacus.*--device"),
    ],
)
def test_what_cannot_be_is_refused(checkpoints, options, message):
    with pytest.raises(UserError, match=message):
        InfformerLM(**{"checkpoint": str(checkpoints["memory"]), "device": "cpu", **options})


def test_more_processes_than_one_are_refused(checkpoints, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes"):
        InfformerLM(str(checkpoints["memory"]))


def test_a_text_must_have_a_beginning(checkpoints, tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a beginning"):
        InfformerLM(str(checkpoints["memory"]), tokenizer=str(tmp_path))
