import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from infformer.errors import ModelError
from infformer.models.loading import check_vocabulary, new_decoder, vocabulary_of


def test_a_model_from_scratch_has_room_for_a_vocabulary_with_holes():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 70}, "a")))
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = new_decoder({**vocabulary_of(tokenizer), **small})
    assert model.vocabulary_size == 71
    check_vocabulary(model, tokenizer)
    with pytest.raises(ModelError, match="the tokenizer has 71 tokens and the model knows 70"):
        check_vocabulary(new_decoder({"vocab_size": 70, **small}), tokenizer)
