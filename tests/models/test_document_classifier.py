"""A head on top of a language model sees all of a document, however it is cut up and whatever is read beside it."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from infformer.data.segments import IGNORE_INDEX
from infformer.errors import ModelError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.document_classifier import DocumentClassifier, HeadConfig, PoolState
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.second_backward import BackwardError

SEGMENT, VOCABULARY = 6, 30
LABELS = ["bad", "good", "so so"]
LENGTHS = [17, 5, 12, 6]
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}


def decoder(memory: MemoryConfig | None = None, **options: Any) -> DecoderForCausalLM:
    sizes = {**SIZES, "feed_forward_size": 16, "dropout": 0.0, "initializer_range": None}
    config = DecoderConfig(vocab_size=VOCABULARY, memory=memory, segment_length=SEGMENT, **sizes, **options)
    return DecoderForCausalLM(config)


def wrapped(untied: bool = False) -> InfformerForCausalLM:
    memory = LongTermMemoryConfig(basis_functions=8, past_samples=8)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    backbone: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=3, **no_dropout)
    )
    if untied:
        sizes = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 16}
        backbone = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes))
    return InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT)


READERS = {
    "decoder without memory": decoder,
    "decoder": lambda: decoder(LongTermMemoryConfig(basis_functions=8, past_samples=8, short_term_length=6)),
    "adaptive decoder": lambda: decoder(MemoryConfig(short_term_length=4), adaptive_cutoffs=[10]),
    "gpt2": wrapped,
    "llama": lambda: wrapped(untied=True),
}


@pytest.fixture(params=READERS)
def reader(request) -> MemoryModel:
    torch.manual_seed(0)
    return READERS[request.param]()


@pytest.fixture(params=["batch_norm", "plain"])
def model(reader, request) -> DocumentClassifier:
    return DocumentClassifier.on_top(reader, HeadConfig(request.param, 7, 0.0), LABELS).eval()


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (1, length), generator=generator) for length in LENGTHS]


def padded() -> torch.Tensor:
    rows = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, document in zip(rows, documents(), strict=True):
        row[: document.shape[1]] = document[0]
    return rows


def read(model: Any, tokens: torch.Tensor, lengths: list[int] | None = None, **options: Any) -> Any:
    state, real = None, None if lengths is None else torch.tensor(lengths)
    for start in range(0, tokens.shape[1], SEGMENT):
        piece = tokens[:, start : start + SEGMENT]
        own = None if real is None else (real - start).clamp(0, piece.shape[1])
        output = model(piece, state=state, lengths=own, **options)
        state = output.state
    return output


@torch.no_grad()
def test_documents_of_different_lengths_side_by_side_are_taken_for_what_each_is_alone(model):
    together = read(model, padded(), LENGTHS)
    assert together.logits.shape == (len(LENGTHS), 1, len(LABELS))
    for row, document in enumerate(documents()):
        alone = read(model, document)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=1e-5)
        for name, tensor in alone.state.pool.named_tensors().items():
            torch.testing.assert_close(together.state.pool.named_tensors()[name][row], tensor[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_head_sees_the_last_the_highest_and_the_mean_of_what_the_language_model_makes(model, reader):
    (document, *_), hidden, state = documents(), [], None
    for segment in document.split(SEGMENT, dim=1):
        output = reader(segment, state=state, return_intermediates=True)
        hidden.append(output.hidden[0])
        state = output.state
    whole = torch.cat(hidden)
    expected = torch.cat([whole[-1], whole.amax(0), whole.mean(0)])
    torch.testing.assert_close(read(model, document, return_intermediates=True).hidden[0, 0], expected)


@pytest.mark.parametrize("pieces", [[17], [6, 6, 5], [1] * 17, [3, 0, 13, 1]])
def test_what_is_pooled_does_not_depend_on_how_a_document_is_cut_up(pieces):
    hidden = torch.randn(2, 17, 5, generator=torch.Generator().manual_seed(0)) - 3  # the empty pool is higher
    pool, start = PoolState.empty(2, 5, torch.device("cpu")), 0
    for length in pieces:
        longer = torch.cat([hidden[:, start : start + length], torch.full((2, 2, 5), torch.nan)], 1)
        pool = pool.after(longer, torch.full((2,), length))
        start += length
    assert torch.equal(pool.last, hidden[:, -1])
    assert torch.equal(pool.maximum, hidden.amax(1))
    torch.testing.assert_close(pool.vectors()[:, 10:], hidden.mean(1))


@torch.no_grad()
def test_pieces_within_a_segment_say_what_whole_segments_say(model):
    (document, *_), state = documents(), None
    for segment in document.split(SEGMENT, dim=1):
        cache = None
        for piece in segment.split(4, dim=1):
            output = model(piece, state=state, segment_cache=cache, use_cache=True)
            cache, state = output.segment_cache, output.state
    torch.testing.assert_close(output.logits, read(model, document).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_reset_row_is_a_new_document(model):
    state = read(model, documents()[0]).state
    again = model(documents()[1], state=state, reset=torch.tensor([True]))
    assert torch.equal(again.logits, model(documents()[1]).logits)


@torch.no_grad()
def test_the_loss_is_that_of_the_class_and_nothing_is_asked_without_one(model):
    tokens = padded()[:, :SEGMENT]
    targets = torch.full_like(tokens, IGNORE_INDEX)
    targets[0, 2], targets[2, 5] = 1, 2
    output = model(tokens, targets=targets)
    expected = torch.nn.functional.cross_entropy(
        model(tokens).logits.squeeze(1), torch.tensor([1, 0, 2, 0]), reduction="none"
    )
    torch.testing.assert_close(output.token_losses[[0, 2], [2, 5]], expected[[0, 2]])
    assert output.token_losses.count_nonzero() == 2
    torch.testing.assert_close(output.loss, expected[[0, 2]].mean() + sum(output.auxiliary_losses.values()))


def test_every_weight_that_learns_has_a_gradient_and_a_saved_classifier_comes_back(model, tmp_path):
    model.train()
    targets = torch.full((len(LENGTHS), 5), IGNORE_INDEX)
    targets[:, -1] = torch.tensor([0, 1, 2, 0])
    state = model(padded()[:, :SEGMENT], return_logits=False).state
    model(padded()[:, SEGMENT : SEGMENT + 5], state=state, targets=targets).loss.backward()
    learns = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in learns.items() if parameter.grad is None] == []
    frozen = {name for name, _ in model.named_parameters()} - learns.keys()
    assert frozen <= {"reader.vocabulary.bias", "reader.vocabulary.softmax.head.bias", "reader.backbone.lm_head.weight"}
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(padded()[:, :SEGMENT]).logits, model(padded()[:, :SEGMENT]).logits)
    assert again.config.labels == LABELS
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == learns.keys()


def test_the_language_model_stays_what_it_was(reader):
    before = copy.deepcopy(reader.state_dict())
    model = DocumentClassifier.on_top(reader, HeadConfig("plain"), LABELS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.reader.state_dict().items())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("ask", ["checkpoint_activations", "gradient_checkpointing_enable"])
def test_layers_are_computed_anew_in_the_backward_pass_whoever_asks_for_it(ask):
    gradients = []
    for is_asked in (False, True):
        torch.manual_seed(0)
        model = DocumentClassifier.on_top(wrapped(), HeadConfig("plain", 7, 0.0), LABELS).train()
        if is_asked:
            getattr(model, ask)()
        state = model(padded()[:, :SEGMENT]).state.detach()
        targets = torch.full((len(LENGTHS), SEGMENT), -100)
        targets[:, -1] = 1
        model(padded()[:, SEGMENT : 2 * SEGMENT], state=state, targets=targets).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_second_backward_pass_is_refused():
    model = DocumentClassifier.on_top(decoder(), HeadConfig("plain"), LABELS)
    first = model(documents()[3])
    first.logits.sum().backward()
    with pytest.raises(BackwardError, match="detach"):
        model(documents()[3], state=first.state).logits.sum().backward()


def test_what_a_classifier_cannot_do_is_refused():
    model = DocumentClassifier.on_top(decoder(), HeadConfig("batch_norm"), LABELS)
    with pytest.raises(ModelError, match="writes no text"):
        model.generate(documents()[0])
    with pytest.raises(ModelError, match="two documents side by side"):
        model.train()(documents()[0])


def test_a_classifier_whose_reader_has_a_shorter_type_is_loaded_as_it_was_saved(tmp_path, assert_same_model):
    stock = wrapped(untied=True).stock_backbone()
    for parameter in stock.parameters():
        parameter.data = parameter.data.bfloat16()
    memory = LongTermMemoryConfig(basis_functions=8, past_samples=8)
    reader = InfformerForCausalLM.from_backbone(stock, memory, segment_length=SEGMENT)
    model = DocumentClassifier.on_top(reader, HeadConfig(kind="batch_norm"), LABELS).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_same_model(model, loaded, documents()[0].split(SEGMENT, dim=1)[:2])
    assert {parameter.dtype for parameter in loaded.reader.backbone.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.maps.parameters()} == {torch.float32}
