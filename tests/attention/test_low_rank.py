"""Linformer and Synthesizer where they are something known."""

import torch

from infformer.attention.low_rank import linformer_attention, synthesizer_attention
from infformer.attention.softmax import softmax_attention


def new_inputs(length=20):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 8, dtype=torch.float64, generator=generator) for _ in range(3)]


def test_linformer_that_mixes_nothing_is_softmax_attention():
    query, key, value = new_inputs()
    mix = torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(linformer_attention(query, key, value, mix, mix), softmax_attention(query, key, value))


def test_linformer_takes_the_first_columns_for_a_shorter_text():
    query, key, value = new_inputs()
    mix = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        linformer_attention(query, key, value, mix, mix),
        linformer_attention(query, key, value, mix[:, :20], mix[:, :20]),
    )


def test_synthesizer_with_the_scores_of_softmax_attention_is_softmax_attention():
    query, key, value = new_inputs()
    real = torch.arange(20) < torch.tensor([[20], [13]])
    for causal in (False, True):
        scores = query @ key.mT / 8**0.5
        torch.testing.assert_close(
            synthesizer_attention(scores, value, real, causal), softmax_attention(query, key, value, real, causal)
        )
