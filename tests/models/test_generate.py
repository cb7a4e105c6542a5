"""transformers' `generate` on models with memories: prompts of any length, in rows of different lengths, with beams."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria, pipeline
from transformers.generation.streamers import BaseStreamer

from infformer.errors import ModelError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.generation import Place, continue_text, read_on, read_text
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT, VOCABULARY, COUNT = 4, 99, 8
"""COUNT: tokens that are written, over the ends of two segments."""
PADDING = 1
LENGTHS = (13, 10, 10)
"""Of the prompts: segments end at other tokens in the rows, but in two of them at the same."""


def long_term(**options: int) -> LongTermMemoryConfig:
    return LongTermMemoryConfig(basis_functions=16, past_samples=16, sticky=True, sticky_bins=16, **options)


def wrapped(family: str, memory: MemoryConfig | None, num_hidden_layers: int = 1, **sizes: int) -> MemoryModel:
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
    common |= {"num_hidden_layers": num_hidden_layers}
    config = AutoConfig.for_model(family, **common, **sizes, bos_token_id=0, eos_token_id=0, pad_token_id=PADDING)
    return InfformerForCausalLM.from_backbone(AutoModelForCausalLM.from_config(config), memory, segment_length=SEGMENT)


MODELS = {
    "llama, short-term": lambda: wrapped("llama", MemoryConfig(8), intermediate_size=48, num_key_value_heads=2),
    "llama, both": lambda: wrapped("llama", long_term(short_term_length=8), 2, intermediate_size=48),
    "gpt2, sticky": lambda: wrapped("gpt2", long_term(), 2),
    "bloom, short-term": lambda: wrapped("bloom", MemoryConfig(8)),
    "gpt2, none": lambda: wrapped("gpt2", None, n_positions=24),
    "decoder": lambda: DecoderForCausalLM(
        DecoderConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, feed_forward_size=48,
            memory=long_term(), segment_length=SEGMENT, bos_token_id=0, eos_token_id=0, pad_token_id=PADDING,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param("llama, short-term", marks=pytest.mark.slow), *list(MODELS)[1:]])
def model(request: pytest.FixtureRequest) -> MemoryModel:
    """With weights so large that it is sure of itself, and that all it has seen matters."""
    torch.manual_seed(2)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Token ids and mask, [rows, length], with padding before the shorter ones."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS).unsqueeze(1)
    return ids.where(mask, PADDING), mask.long()


def written(model: MemoryModel, ids: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    """COUNT tokens after each prompt; nothing ends them."""
    options = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def test_rows_of_different_lengths_are_continued_as_each_alone(model):
    ids, mask = prompts()
    together = written(model, ids, mask)
    for row, length in enumerate(LENGTHS):
        prompt = ids[row, -length:]
        segment_length = model.choose_segment_length(None)
        assert together[row].tolist() == continue_text(model, prompt, COUNT, segment_length, temperature=0).tolist()


def test_beams_of_a_batch_are_those_of_each_row_alone(model):
    ids, mask = prompts()
    together = written(model, ids, mask, num_beams=3)
    for row, length in enumerate(LENGTHS):
        assert together[row].tolist() == written(model, ids[row : row + 1, -length:], num_beams=3)[0].tolist()


def test_a_beam_is_the_text_of_its_own_scores(model):
    """What each beam remembers goes with it: its scores are those of reading its text from the beginning."""
    ids = prompts()[0][:1]
    found = model.generate(
        ids, max_new_tokens=COUNT, num_beams=4, do_sample=False, eos_token_id=None,
        output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
    )  # fmt: skip
    segment_length, place, total = model.choose_segment_length(None), Place(), 0.0
    unread = ids
    for token in found.sequences[0, ids.shape[1] :]:
        scores, place = read_on(model, unread, segment_length, place)
        total += float(scores[0, -1].log_softmax(-1)[token])
        unread = token.view(1, 1)
    assert float(found.sequences_scores[0]) == pytest.approx(total, rel=1e-4)


def test_a_prompt_in_one_call_in_pieces_and_token_by_token_has_the_same_scores_and_leaves_the_same_state(model):
    """Also the scores of its last tokens, if they are asked for."""
    ids, segment_length = prompts()[0][:1], model.choose_segment_length(None)
    whole, expected = read_on(model, ids, segment_length, Place())
    for cuts in ([2, 9, 1, 1], [SEGMENT, SEGMENT, 5], [1] * ids.shape[1]):
        place, each = Place(), []
        for piece in ids.split(cuts, dim=1):
            scores, place = read_on(model, piece, segment_length, place)
            each.append(scores)
        torch.testing.assert_close(scores, whole, rtol=1e-4, atol=1e-4)
        for name, tensor in expected.state.named_tensors().items():
            torch.testing.assert_close(place.state.named_tensors()[name], tensor, rtol=1e-4, atol=1e-4)
    for scored in (1, 5, SEGMENT + 3, ids.shape[1]):
        together, _ = read_on(model, ids, segment_length, Place(), scored)
        torch.testing.assert_close(together, torch.cat(each[-scored:], dim=1), rtol=1e-4, atol=1e-4)


def test_prompts_that_are_equal_are_read_once(model):
    lengths: list[tuple[int, ...]] = []
    ids = prompts()[0][:1].repeat(2, 1)
    with model.register_forward_pre_hook(lambda module, arguments: lengths.append(tuple(arguments[0].shape))):
        written(model, ids, num_return_sequences=2, do_sample=True, max_new_tokens=2)
    assert {rows for rows, length in lengths if length > 1} == {1}
    assert lengths[-1] == (4, 1)


def test_a_text_that_was_read_stands_before_every_prompt(model):
    ids, segment_length = prompts()[0], model.choose_segment_length(None)
    text = torch.arange(2, 2 + 2 * SEGMENT + 3)
    read = read_text(model, text, segment_length)
    found = written(model, ids[:, -5:], read=read)
    assert found.tolist() == written(model, torch.cat([text.expand(len(ids), -1), ids[:, -5:]], dim=1)).tolist()


def test_padding_behind_a_prompt_is_refused(model):
    ids, mask = prompts()
    with pytest.raises(ModelError, match=r"ones before zeros.*padding_side='left'"):
        written(model, ids.flip(1), mask.flip(1))


def test_guidance_by_a_cache_of_keys_and_values_is_refused(model):
    ids, mask = prompts()
    with pytest.raises(ModelError, match=r"guidance_scale=: .* set use_cache=False too"):
        written(model, ids, mask, guidance_scale=2.0)
    assert written(model, ids, mask, guidance_scale=2.0, use_cache=False, max_new_tokens=2).shape == (len(LENGTHS), 2)


def test_a_model_with_neither_memory_nor_a_limit_of_positions_writes_segment_by_segment():
    torch.manual_seed(0)
    model = wrapped("bloom", None).eval()
    ids = torch.randint(2, VOCABULARY, (1, 6))
    assert torch.equal(written(model, ids), written(model, ids[:, SEGMENT:]))


def test_choices_processors_criteria_and_streams_are_those_of_transformers(model):
    """Sampling that its seed repeats, a penalty that forbids, a criterion that ends, and a streamer that is told."""

    class Seen(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    class Five(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **options: object) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 13 + 5)

    ids, seen = prompts()[0][:1], Seen()
    options = {"do_sample": True, "top_k": 20, "temperature": 2.0, "no_repeat_ngram_size": 1}
    torch.manual_seed(0)
    text = written(model, ids, stopping_criteria=[Five()], streamer=seen, **options)
    assert text.shape == (1, 5)
    assert seen.tokens == [*ids[0].tolist(), *text[0].tolist(), -1]
    assert len({*ids[0].tolist(), *text[0].tolist()}) == len(set(ids[0].tolist())) + 5
    torch.manual_seed(0)
    assert written(model, ids, stopping_criteria=[Five()], **options).tolist() == text.tolist()


def test_a_pipeline_writes(backbone, tokenizer):
    model = InfformerForCausalLM.from_backbone(backbone, long_term(), segment_length=SEGMENT)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (text,) = write("the white whale " * 4, max_new_tokens=12, do_sample=False)
    assert text["generated_text"].startswith("the white whale the white whale ")


def test_a_saved_model_keeps_how_its_backbone_writes(tmp_path):
    stock = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)
    )
    stock.generation_config.eos_token_id = [3, 5]
    InfformerForCausalLM.from_backbone(stock, long_term(), segment_length=SEGMENT).save_pretrained(tmp_path)
    assert InfformerForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [3, 5]
