"""The classifier of texts, by any mechanism of attention."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from infformer.data.segments import IGNORE_INDEX
from infformer.errors import ModelError
from infformer.models.encoder import ClassifierConfig, TextClassifier
from infformer.models.mechanisms import mechanism_kinds


def new_classifier(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "classes": 3, "longest": 48, "hidden_size": 32, "dropout": 0.0}
    return TextClassifier(ClassifierConfig(**{**sizes, **options})).eval()


def new_texts(length=40, batch=4):
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(1, 20, (batch, length), generator=generator)
    texts[1, 25:] = 0
    return texts


def new_targets(texts, place=-1):
    targets = torch.full_like(texts, IGNORE_INDEX)
    targets[:, place] = torch.arange(len(texts)) % 3
    return targets


@pytest.mark.parametrize("kind", sorted(mechanism_kinds()))
def test_a_saved_classifier_comes_back_by_the_auto_class_and_every_weight_learns(kind, tmp_path):
    model, texts = new_classifier(attention=kind), new_texts()
    output = model(texts, targets=new_targets(texts), return_logits=True)
    output.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert output.logits.shape == (4, 1, 3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(texts).logits, output.logits)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_what_a_text_is_taken_for_does_not_depend_on_its_padding_nor_on_other_texts(pooling, positions, placement):
    model = new_classifier(pooling=pooling, positions=positions, normalization_placement=placement)
    texts = new_texts()
    together = model(texts).logits
    torch.testing.assert_close(together[1:2], model(texts[1:2, :25]).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[2:], model(texts[2:]).logits, atol=1e-5, rtol=1e-4)


def test_the_loss_is_that_of_the_class_wherever_its_target_stands():
    model, texts = new_classifier(), new_texts()
    expected = torch.nn.functional.cross_entropy(model(texts).logits.squeeze(1), torch.arange(4) % 3, reduction="none")
    for place in (0, 7, -1):
        output = model(texts, targets=new_targets(texts, place))
        torch.testing.assert_close(output.token_losses[:, place], expected)
        torch.testing.assert_close(output.loss, expected.mean())
        assert output.token_losses.count_nonzero() == 4


def test_both_texts_of_a_pair_are_read_alike():
    model, texts = new_classifier(texts=2), new_texts()
    first, second = model.encode(texts), model.encode(texts.flip(0))
    pairs = torch.cat([texts, texts.flip(0)], dim=1)
    torch.testing.assert_close(model(pairs).logits, model.logits(torch.cat([first, second], dim=1).unsqueeze(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "perfomer"}, r"model\.architecture\.attention=perfomer: choose one of"),
        ({"attention": {"kind": "local", "blok": 3}}, r"attention\.blok=3: local has no such option; it has block"),
        ({"attention": {"kind": "local", "block": True}}, r"attention\.block=True: give a whole number of at least 1"),
        ({"texts": 3}, r"model\.architecture\.texts=3: give 1, or 2"),
        ({"classes": 0}, r"model\.architecture\.classes=0: give a whole number"),
        ({"pooling": "max"}, r"model\.architecture\.pooling=max: choose one of mean, first"),
        ({"dropout": 1.0}, r"model\.architecture\.dropout=1\.0"),
        ({"activation": "nothing"}, r"model\.architecture\.activation=nothing"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        new_classifier(**options)


def test_texts_that_are_too_long_or_no_pair_are_refused():
    with pytest.raises(ModelError, match=r"has 60 tokens: give 1 text of at most 48"):
        new_classifier()(torch.ones(1, 60, dtype=torch.long))
    with pytest.raises(ModelError, match=r"has 31 tokens: give 2 texts of at most 48 each"):
        new_classifier(texts=2)(torch.ones(1, 31, dtype=torch.long))


@pytest.mark.parametrize("kind", sorted(set(mechanism_kinds()) - {"linformer"}))
def test_every_mechanism_has_about_as_many_parameters_as_softmax(kind):
    """But for the Linformer, which has a matrix of numbers for each place."""
    softmax, other = (
        sum(p.numel() for p in TextClassifier(ClassifierConfig(attention=name)).parameters())
        for name in ("softmax", kind)
    )
    assert abs(other / softmax - 1) < 0.1
