"""Each option of a run reaches what it says: the model, what it reads, and how it is measured."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from infformer.config import EvaluationConfig, RunConfig
from infformer.data.segments import Segment
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.base import MemoryModel
from infformer.models.memories import save_memories
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks.haystack import PasskeyConfig
from infformer.tasks.sorting import SortingConfig
from infformer.tasks.task import Evaluation, TrainingStream
from infformer.training.building import build_material, build_model, build_tokenizer
from infformer.training.optimization import make_optimizer
from infformer.training.runtime import init_distributed, resolve_engine

Build = Callable[..., MemoryModel]
Ask = Callable[..., tuple[TrainingStream, Evaluation]]
SHARE = range(4)
GPT2 = {"model_type": "gpt2", "n_positions": 64, "n_embd": 8, "n_layer": 3, "n_head": 2}
LLAMA = {
    "model_type": "llama", "max_position_embeddings": 32, "hidden_size": 12, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
DECODER = {
    "model_type": "decoder", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3,
    "feed_forward_size": 20,
}  # fmt: skip


@pytest.fixture
def accelerator(configure, tmp_path) -> Any:
    return init_distributed(resolve_engine(configure(tmp_path).engine), "float32", 2)


@pytest.fixture
def build(configure, model_folder, tmp_path, tokenizer) -> Build:
    """The model of a run, some options changed."""

    def make(changes: dict[str, Any] | None = None, tokens: PreTrainedTokenizerFast | None = tokenizer) -> MemoryModel:
        return build_model(configure(tmp_path, {"model.pretrained": str(model_folder), **(changes or {})}), tokens)

    return make


@pytest.fixture
def ask(configure, tmp_path, tokenizer, accelerator) -> Ask:
    """The stream and the evaluation of a run, some options changed, for the model of that run."""

    def make(
        changes: dict[str, Any] | None = None,
        rank_rows: range = SHARE,
        after_segment: Callable[[], None] = lambda: None,
        change: Callable[[RunConfig], None] = lambda config: None,
    ) -> tuple[TrainingStream, Evaluation]:
        config = configure(tmp_path, changes)
        change(config)
        tokens = build_tokenizer(config, accelerator)
        model = build_model(config, tokens)
        material = build_material(config, tokens, model, accelerator, rank_rows, after_segment)
        return config.task.build_stream(material), config.task.build_evaluation(material)

    return make


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, int]]:
    """Rows and tokens of all that a model reads at once, but for the one token by which it is tried when it is made."""
    found: list[tuple[int, int]] = []
    forward = InfformerForCausalLM.forward

    def noted(self: InfformerForCausalLM, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if input_ids.numel() > 1:
            found.append(tuple(input_ids.shape))
        return forward(self, input_ids, *arguments, **options)

    monkeypatch.setattr(InfformerForCausalLM, "forward", noted)
    return found


class TestThePretrainedModel:
    def test_a_pretrained_model_has_the_weights_of_its_folder(self, build, backbone):
        loaded = build().backbone.state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in backbone.state_dict().items())

    @pytest.mark.parametrize("layers", [None, [1]])
    def test_the_layers_that_are_named_have_a_memory(self, build, layers):
        assert list(build({"model.memory_layers": layers}).layer_memories()) == (layers or [0, 1])

    def test_every_option_of_the_memory_reaches_it(self, build):
        """Some memories, as not every value goes with every other; in one of them, each is another than by default."""
        common = LongTermMemoryConfig(
            short_term_length=0, sink_tokens=2, basis_functions=12, widths=[0.03, 0.07, 0.2], past_samples=24,
            contraction_rate=0.6, ridge=0.7, read="moments", density="truncated_parabola", sticky=True, sticky_bins=9,
            input_gate=True, divergence_weight=0.3, prior_standard_deviation=0.2, sharpness=2.0, heads=1,
        )  # fmt: skip
        memories = [
            replace(common, contraction="uniform", sticky_by="both"),
            replace(common, sticky_placement="published", training_rates=[0.4, 0.6]),
            LongTermMemoryConfig(short_term_length=0, basis_functions=12, contraction="dyadic", levels=3, read="slots"),
            LongTermMemoryConfig(
                short_term_length=0, basis_functions=12, read="gibbs", points=20, stores="keys_values",
                combination="joint", key_convolution=3,
            ),
        ]  # fmt: skip
        defaults = asdict(LongTermMemoryConfig(basis_functions=8))
        for name, default in defaults.items():
            assert any(asdict(memory)[name] != default for memory in memories), name
        for memory in memories:
            model = build({"model.memory": memory, "training.bptt_segments": 2})
            assert [each.config for each in model.layer_memories().values()] == [memory, memory]

    @pytest.mark.parametrize("kernel", ["eager", "sdpa"])
    def test_attention_is_by_the_kernel_that_is_named(self, build, kernel):
        assert build({"model.attention": kernel}).backbone.config._attn_implementation == kernel

    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_frozen_backbone_is_not_trained(self, build, frozen):
        model = build({"training.freeze_backbone": frozen})
        assert {parameter.requires_grad for parameter in model.backbone.parameters()} == {not frozen}
        assert all(parameter.requires_grad for parameter in model.memory_parameters())

    def test_a_run_begins_with_the_memories_of_a_folder(self, build, tmp_path):
        trained, new = build(), build()
        for parameter in trained.memory_parameters():
            torch.nn.init.normal_(parameter)
        save_memories(trained, tmp_path / "memories")
        begun = build({"model.memories": str(tmp_path / "memories")})
        memories = zip(*(model.memory_parameters() for model in (begun, trained, new)), strict=True)
        assert all(torch.equal(one, same) and not torch.equal(one, other) for one, same, other in memories)

    @pytest.mark.needs("peft")
    def test_an_optimiser_sees_what_learns_and_nothing_else(self, build, configure, tmp_path):
        model = build({"model.lora": {"rank": 2, "targets": ["c_fc"]}})
        optimizer = make_optimizer(model, configure(tmp_path).optimizer)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        seen = {group["name"]: [names[id(each)] for each in group["params"]] for group in optimizer.param_groups}
        assert sorted(seen) == ["backbone", "memory"]
        adapters = [
            f"backbone.transformer.h.{layer}.mlp.c_fc.lora_{part}.default.weight" for layer in (0, 1) for part in "AB"
        ]
        assert seen["backbone"] == adapters
        assert all(name.startswith("memories.") for name in seen["memory"])

    @pytest.mark.parametrize("again", [False, True])
    def test_activations_are_computed_again_if_asked(self, build, again, monkeypatch):
        asked: list[None] = []
        monkeypatch.setattr(MemoryModel, "checkpoint_activations", lambda model: asked.append(None))
        build({"training.gradient_checkpointing": again})
        assert bool(asked) == again


class TestAModelFromScratch:
    @pytest.fixture
    def scratch(self, build, model_folder) -> Build:
        def make(architecture: dict[str, Any], changes: dict[str, Any] | None = None) -> MemoryModel:
            new = {"model.pretrained": None, "model.architecture": architecture, "model.tokenizer": str(model_folder)}
            return build({**new, **(changes or {})})

        return make

    @pytest.mark.parametrize("architecture", [GPT2, LLAMA], ids=lambda fields: fields["model_type"])
    def test_a_model_from_scratch_is_as_its_options_say(self, scratch, tokenizer, architecture):
        model = scratch(architecture, {"model.memory_layers": [1], "model.attention": "eager"})
        config = model.backbone.config
        assert {name: getattr(config, name) for name in architecture} == architecture
        assert (model.vocabulary_size, config.bos_token_id) == (len(tokenizer), tokenizer.bos_token_id)
        assert config._attn_implementation == "eager"
        assert list(model.layer_memories()) == [1]

    def test_a_vocabulary_may_be_larger_than_the_tokenizer_s(self, scratch):
        assert scratch({**GPT2, "vocab_size": 300}).vocabulary_size == 300

    @pytest.mark.parametrize(
        ("changes", "memory"),
        [
            ({"model.memory": None}, None),
            ({"model.memory": MemoryConfig(24)}, MemoryConfig(24)),
            (
                {"model.memory": CompressiveMemoryConfig(length=12, rate=2, reconstruction_weight=0.5)},
                CompressiveMemoryConfig(16, length=12, rate=2, reconstruction_weight=0.5),
            ),
            (
                {"model.memory.short_term_length": 32},
                LongTermMemoryConfig(32, 8, [0.05, 0.1], 16, sticky=True, sticky_bins=16),
            ),
        ],
        ids=["none", "short_term", "compressive", "long_term"],
    )
    def test_a_decoder_has_the_memory_that_is_chosen(self, scratch, changes, memory):
        model = scratch(DECODER, changes)
        assert {name: getattr(model.config, name) for name in DECODER} == DECODER
        assert model.config.memory_config == memory
        assert model.has_memory == (memory is not None)

    def test_a_task_of_symbols_says_the_vocabulary(self, configure, tmp_path):
        config = configure(tmp_path, {"model.pretrained": None, "model.architecture": DECODER, "model.tokenizer": "x"})
        config.task = SortingConfig(symbols=6)
        assert build_model(config, None).vocabulary_size == 7


def read(task: tuple[TrainingStream, Evaluation], steps: int) -> list[Segment]:
    return [segment for _ in range(steps) for segment in task[0].next_step()]


class TestWhatIsRead:
    """Sizes, visits and the order of the documents: test_literal_loop.py."""

    def test_a_share_is_those_lanes_of_all(self, ask):
        whole, own = read(ask(), 2), read(ask(rank_rows=range(1, 3)), 2)
        for segment, part in zip(whole, own, strict=True):
            assert part.lanes.tolist() == [1, 2]
            assert torch.equal(part.input_ids, segment.input_ids[1:3])
            assert part.global_tokens == segment.global_tokens

    def test_documents_are_read_in_an_order_that_is_the_seed_s(self, ask):
        orders = [[segment.documents.tolist() for segment in read(ask({"seed": seed}), 3)] for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]

    @pytest.mark.parametrize("beginning", [True, False])
    def test_documents_begin_as_said(self, ask, beginning):
        first = ask({"data.shuffle": False, "data.beginning_of_document": beginning})[0].next_step()[0]
        assert (first.input_ids[0, 0] == 0) == beginning  # the tokenizer's <s>

    def test_the_log_says_with_which_token_documents_begin(self, ask, caplog):
        with caplog.at_level("INFO"):
            ask()
        assert "every document begins with the token <s>" in caplog.text


class TestHowItIsMeasured:
    def test_all_of_it_is_measured_by_default(self, ask, shapes):
        _, evaluation = ask({"evaluation.controls": EvaluationConfig().controls})
        assert evaluation.measure_before()["documents"] == 4
        results = evaluation.measure("here")
        assert len(results["controls"]) == 3
        assert results["protocol"].items() >= {"segment": 16, "stride": 16, "dtype": "float32"}.items()
        assert results["protocol"]["checkpoint"] == "here"
        assert max(shapes) == (4, 16)

    @pytest.mark.parametrize(
        ("changes", "call", "expected"),
        [
            ({"evaluation.before": False}, lambda exam: exam.measure_before(), None),
            ({"data.test": None}, lambda exam: exam.measure_before(), None),
            ({"data.test": None}, lambda exam: exam.measure("here"), None),
            ({"data.validation": None}, lambda exam: exam.validate(), None),
            ({}, lambda exam: exam.measure("here")["controls"], {}),
            ({"training.precision": "bfloat16"}, lambda exam: exam.measure("here")["protocol"]["dtype"], "bfloat16"),
            (
                {"training.segment_length": 8, "model.memory": None},
                lambda exam: exam.measure("here")["protocol"]["segment"],
                8,
            ),
            ({"evaluation.inspected_segments": 3}, lambda exam: exam.inspect()["document"]["segments"], 3),
            ({"evaluation.inspected_segments": 0}, lambda exam: exam.inspect(), None),
        ],
        ids=[
            "not before", "no test", "no test at the end", "no validation", "no controls", "bfloat16", "segments of 8",
            "inspected", "not inspected",
        ],
    )  # fmt: skip
    def test_what_is_measured_is_as_asked(self, ask, changes, call, expected):
        assert call(ask(changes)[1]) == expected

    @pytest.mark.parametrize(("rows", "read"), [(1, {1}), (3, {3})])
    def test_so_many_documents_are_read_side_by_side(self, ask, shapes, rows, read):
        ask({"evaluation.batch_size": rows})[1].measure_before()
        assert {rows for rows, _ in shapes} == read

    def test_so_much_of_the_validation_documents_is_read(self, ask, shapes):
        """Of these 20 are the beginnings, 10 of each."""
        ask({"evaluation.max_validation_tokens": 20, "evaluation.batch_size": 2})[1].validate()
        assert shapes == [(2, 16)]

    def test_who_asks_is_told_of_every_segment(self, ask, shapes):
        told: list[None] = []
        ask(after_segment=lambda: told.append(None))[1].validate()
        assert len(told) == len(shapes) > 1


class TestAnotherTask:
    @staticmethod
    def chosen(config: RunConfig) -> None:
        """Sorting, at other numbers than by default."""
        config.task = SortingConfig(
            length=20,
            symbols=4,
            training_sequences=7,
            validation_sequences=3,
            test_sequences=5,
            evaluation_lengths=[36],
        )

    CHANGES: dict[str, Any] = {  # noqa: RUF012, no test changes it
        "model.pretrained": None,
        "model.architecture": DECODER,
        "model.tokenizer": "none is asked for",
        "model.memory": MemoryConfig(32),
        "training.batch_size": 4,
        "training.precision": "bfloat16",
    }

    def test_sorting_is_asked_as_its_options_say(self, ask):
        stream, evaluation = ask(self.CHANGES, rank_rows=range(2, 4), change=self.chosen)
        first, last = stream.next_step()
        assert first.lanes.tolist() == [2, 3]
        assert (first.input_ids.shape, last.input_ids.shape) == ((2, 16), (2, 8))
        assert first.global_tokens + last.global_tokens == 4 * 4
        assert int(torch.stack([first.documents for first, _ in (stream.next_step() for _ in range(6))]).max()) < 7
        results = evaluation.measure("there")
        assert [(each["length"], each["sequences"]) for each in results["lengths"]] == [(20, 5), (36, 5)]
        assert "last_48" in results["lengths"][0]["ideal_counters"]  # those of a segment and of the short-term memory
        assert results["protocol"].items() >= {"dtype": "bfloat16", "checkpoint": "there"}.items()

    def test_questions_are_the_seed_s(self, ask):
        drawn = [
            ask({**self.CHANGES, "seed": seed}, change=self.chosen)[0].next_step()[0].input_ids for seed in (0, 0, 1)
        ]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    @pytest.mark.parametrize("controls", [True, False])
    def test_a_passkey_is_asked_as_its_options_say(self, ask, tmp_path, controls):
        for split, sentences in (("train", 40), ("validation", 20), ("test", 30)):
            (tmp_path / f"{split}.txt").write_text("The white whale rose, and nobody saw it. " * sentences)

        def chosen(config: RunConfig) -> None:
            config.task = PasskeyConfig(
                lengths=[150], depths=[0.5], training_lengths=[140], test_questions=2, validation_questions=1, digits=3
            )

        changes = {f"data.{split}": str(tmp_path / f"{split}.txt") for split in ("train", "validation", "test")}
        stream, evaluation = ask({**changes, "evaluation.controls": controls}, change=chosen)
        segments = stream.next_step()
        assert sum(segment.input_ids.shape[1] for segment in segments) == 139
        results = evaluation.measure("here")
        (cell,) = results["cells"]
        assert (cell["length"], cell["depth"], cell["answers"]) == (150, 0.5, 2)
        assert set(results["controls"]) == ({"memory_off"} if controls else set())
        assert results["protocol"]["window"] == 16
        assert results["chance"] == pytest.approx(1 / 900)
        assert evaluation.validate() is not None
