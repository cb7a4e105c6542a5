"""What we use of transformers, in the oldest version that is admitted as in the newest."""

import copy
import dataclasses
import logging
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, modeling_outputs
from transformers.utils import logging as transformers_logging

from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.generation import continue_text
from infformer.models.pretrained import InfformerForCausalLM, cache_argument
from infformer.models.segment_read import MemoryModelOutput

SEGMENT, VOCABULARY = 8, 50
KINDS = ("gpt2", "llama", "decoder")


@pytest.fixture
def llama() -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 20, "max_position_embeddings": 64}
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=0)
    )


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, backbone, llama) -> MemoryModel:
    memory = LongTermMemoryConfig(basis_functions=8, past_samples=16)
    if request.param == "decoder":
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        return DecoderForCausalLM(DecoderConfig(**sizes, memory=memory, segment_length=SEGMENT))
    return InfformerForCausalLM.from_backbone(
        copy.deepcopy(backbone if request.param == "gpt2" else llama), memory, segment_length=SEGMENT
    )


@pytest.fixture
def deprecations() -> Iterator[list[str]]:
    """What warns of a name that will go, by Python's warnings as by transformers' log, which repeats nothing."""
    transformers_logging.warning_once.cache_clear()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
        said += [str(warning.message) for warning in caught]
    logger.removeHandler(handler)
    assert [message for message in said if "deprecated" in message or "will be removed" in message] == []


@pytest.mark.usefixtures("deprecations")
def test_nothing_deprecated_is_used(model, tmp_path):
    text = torch.randint(1, VOCABULARY, (2, 2 * SEGMENT))
    model.checkpoint_activations()
    memory = None
    for segment in text.split(SEGMENT, dim=1):
        output = model.train()(segment, labels=segment, state=memory, return_intermediates=True)
        memory = output.state
    output.loss.backward()
    continue_text(model.eval(), text[0, :-3], 6, SEGMENT)
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)(text[:, :SEGMENT])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_stock_model_takes_and_gives_its_cache_by_the_name_that_is_found(kind, backbone, llama):
    stock = backbone if kind == "gpt2" else llama
    text = torch.randint(1, VOCABULARY, (1, 6))
    name = cache_argument(stock.base_model)
    with torch.no_grad():
        begun = stock.base_model.eval()(text[:, :4], use_cache=True)
        continued = stock.base_model(text[:, 4:], **{name: begun[name]}, use_cache=True).last_hidden_state
        whole = stock.base_model(text).last_hidden_state
    torch.testing.assert_close(continued, whole[:, 4:])


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_of_a_wrapped_model_is_resized_as_that_of_a_stock_one(llama, tied, tmp_path):
    config = copy.deepcopy(llama.config)
    config.tie_word_embeddings = tied
    stock = AutoModelForCausalLM.from_config(config).eval()
    model = InfformerForCausalLM.from_backbone(
        copy.deepcopy(stock), LongTermMemoryConfig(basis_functions=8, past_samples=16), segment_length=SEGMENT
    ).eval()
    for resized in (model, stock):
        resized.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False, pad_to_multiple_of=4)
    size = VOCABULARY + 10
    assert model.config.vocab_size == model.vocabulary_size == stock.config.vocab_size == size
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embeddings) == tied
    text = torch.randint(VOCABULARY, (2, SEGMENT))
    output = model(text, labels=text, return_logits=True)
    assert torch.equal(output.logits[..., :VOCABULARY], stock(text).logits[..., :VOCABULARY])
    assert output.logits.shape[-1] == size
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(text).logits, output.logits)


class TestTheOutput:
    """A mapping of transformers' kind, with names of its own, which no version of transformers takes for another's."""

    values = {field.name: torch.zeros(1) for field in dataclasses.fields(MemoryModelOutput)}  # noqa: RUF012

    def test_an_output_shares_no_names_with_those_of_transformers_but_loss_and_logits(self):
        kinds = [kind for kind in vars(modeling_outputs).values() if dataclasses.is_dataclass(kind)]
        theirs = {field.name for kind in kinds for field in dataclasses.fields(kind)}
        assert len(theirs) > 10
        assert theirs & set(self.values) == {"loss", "logits"}

    def test_an_output_keeps_every_field_however_it_is_given_and_taken(self):
        output = MemoryModelOutput(**self.values)
        given_later = MemoryModelOutput()
        for name, value in self.values.items():
            setattr(given_later, name, value)
        for same in (output, given_later, pickle.loads(pickle.dumps(output)), copy.copy(output)):
            assert type(same) is MemoryModelOutput
            assert list(same) == list(self.values)
            assert all(getattr(same, name) is same[name] is not None for name in self.values)

    @pytest.mark.parametrize("converted", [convert_to_fp32, lambda output: tree_map(Tensor.float, output)])
    def test_what_data_parallel_and_precision_do_to_an_output_leaves_its_names(self, converted):
        output = converted(MemoryModelOutput(**{name: value.half() for name, value in self.values.items()}))
        assert type(output) is MemoryModelOutput
        assert {name: value.dtype for name, value in output.items()} == dict.fromkeys(self.values, torch.float32)
