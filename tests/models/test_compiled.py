import pytest
import torch
from transformers import GPT2LMHeadModel

from infformer.memory.long_term import LongTermMemoryConfig
from infformer.models.pretrained import InfformerForCausalLM


@pytest.mark.slow
def test_a_whole_model_is_one_graph_for_all_segments(backbone):
    """First and later segments, a reset row, a short last segment: nothing is compiled anew, and all of it in one."""
    model = InfformerForCausalLM.from_backbone(
        GPT2LMHeadModel(backbone.config),
        memory=LongTermMemoryConfig(
            basis_functions=8, past_samples=16, widths=[0.05, 0.1], sticky=True, sticky_bins=16
        ),
        segment_length=16,
    ).eval()
    for memory in model.memories:
        torch.nn.init.normal_(memory.output.weight, std=0.1)
    compiled = torch.compile(model, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    memory = model.initial_state(2)
    cases = [([0, 0], [16, 16]), ([0, 0], [16, 16]), ([1, 0], [16, 16]), ([0, 0], [16, 5]), ([0, 1], [3, 16])]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for reset, lengths in cases:
            ids = torch.randint(64, (2, 16), generator=generator)
            arguments = {
                "targets": ids,
                "state": memory,
                "reset": torch.tensor(reset, dtype=torch.bool),
                "lengths": torch.tensor(lengths),
                "noise": torch.rand(2, model.noise_size, generator=generator),
            }
            results = []
            for run in (compiled, model):
                output = run(ids, **arguments)
                gradients = torch.autograd.grad(output.loss, list(model.parameters()), materialize_grads=True)
                states = output.state.named_tensors()
                results.append([output.token_losses, *states.values(), *gradients])
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
            memory = output.state.detach()
