"""Which parameters learn how fast, with which decay, and how the rates change over a run."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from infformer.config import OptimizerConfig, ScheduleConfig
from infformer.errors import ModelError
from infformer.memory.fast_weights import FastWeightMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.document_classifier import DocumentClassifier, HeadConfig
from infformer.models.loading import new_decoder
from infformer.models.pretrained import InfformerForCausalLM
from infformer.training.optimization import depths_below_head, learning_rates, make_optimizer, make_schedule

RATES = {"learning_rate": 0.5, "memory_learning_rate": 2.0, "weight_decay": 0.25}


@pytest.fixture
def model(backbone) -> Callable[..., InfformerForCausalLM]:
    def build(**options) -> InfformerForCausalLM:
        config = LongTermMemoryConfig(basis_functions=8, past_samples=16, **options)
        return InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), config, segment_length=16)

    return build


def groups(model: InfformerForCausalLM, optimizer: Optimizer) -> dict[str, set[str]]:
    """The names of the parameters by the name of their group; each must be in one group only."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(group["name"], names[id(parameter)]) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(found) == len({name for _, name in found})
    return {group: {name for other, name in found if other == group} for group, _ in found}


class TestGroups:
    def test_every_parameter_is_in_the_group_it_belongs_to(self, model):
        some = model(input_gate=True)
        found = groups(some, make_optimizer(some, OptimizerConfig(**RATES)))
        assert found.keys() == {"backbone", "backbone_without_decay", "memory", "memory_without_decay"}
        assert set.union(*found.values()) == {name for name, _ in some.named_parameters()}
        for name, parameter in some.named_parameters():
            part = "backbone" if name.startswith("backbone.") else "memory"
            without = parameter.dim() < 2 or "ln_" in name or "bias" in name or ".gate." in name
            assert name in found[f"{part}_without_decay" if without else part], name
        assert any(name.endswith("output.weight") for name in found["memory"])
        assert any(".gate.weight" in name for name in found["memory_without_decay"])
        assert "backbone.transformer.wte.weight" in found["backbone"]

    def test_each_group_has_its_rate_and_its_decay(self, model):
        some = model()
        for group in make_optimizer(some, OptimizerConfig(**RATES)).param_groups:
            assert group["lr"] == (2.0 if group["name"].startswith("memory") else 0.5)
            assert group["weight_decay"] == (0.0 if group["name"].endswith("_without_decay") else 0.25)
            assert tuple(group["betas"]) == (0.9, 0.999)

    def test_gates_learn_at_a_rate_of_their_own_and_do_not_decay(self, backbone):
        some = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), FastWeightMemoryConfig(0), segment_length=16)
        optimizer = make_optimizer(some, OptimizerConfig(**RATES, gate_learning_rate=3.0))
        found = groups(some, optimizer)
        assert found["gates"] == {name for name, _ in some.named_parameters() if name.endswith(".gate")} != set()
        (gates,) = (group for group in optimizer.param_groups if group["name"] == "gates")
        assert (gates["lr"], gates["weight_decay"]) == (3.0, 0.0)
        assert learning_rates(optimizer)["train/gate_learning_rate"] == 3.0

    def test_a_frozen_backbone_is_in_none(self, model):
        some = model()
        some.backbone.requires_grad_(False)
        optimizer = make_optimizer(some, OptimizerConfig(**RATES))
        assert all(group.startswith("memory") for group in groups(some, optimizer))
        assert learning_rates(optimizer) == {"train/memory_learning_rate": 2.0}

    def test_without_memory_there_are_the_backbone_s_groups(self, backbone):
        some = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone))
        optimizer = make_optimizer(some, OptimizerConfig(**RATES))
        assert groups(some, optimizer).keys() == {"backbone", "backbone_without_decay"}
        assert learning_rates(optimizer) == {"train/learning_rate": 0.5}

    @pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("adam", Adam)])
    def test_the_optimizer_is_of_the_kind_that_is_named(self, model, name, kind):
        config = OptimizerConfig(name=name, betas=[0.8, 0.9], epsilon=1e-4)
        optimizer = make_optimizer(model(), config)
        assert type(optimizer) is kind
        assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-4 for group in optimizer.param_groups)

    def test_decay_pulls_at_matrices_only(self, model):
        some = model(input_gate=True)
        before = {name: parameter.detach().clone() for name, parameter in some.named_parameters()}
        optimizer = make_optimizer(some, OptimizerConfig(**RATES))
        for parameter in some.parameters():
            parameter.grad = torch.zeros_like(parameter)
        found = groups(some, optimizer)
        optimizer.step()
        for name, parameter in some.named_parameters():
            kept = {name in found["backbone"]: 1 - 0.5 * 0.25, name in found["memory"]: 1 - 2.0 * 0.25}.get(True, 1.0)
            torch.testing.assert_close(parameter.detach(), kept * before[name])


def factors(config: ScheduleConfig, steps: int) -> list[float]:
    """By what the rates are multiplied in each step."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = Adam([{"name": "backbone", "params": [parameter], "lr": 0.5}])
    schedule = make_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(learning_rates(optimizer)["train/learning_rate"] / 0.5)
        optimizer.step()
        schedule.step()
    return found


class TestSchedules:
    STEPS = 20

    @pytest.mark.parametrize("warmup", [0, 5])
    @pytest.mark.parametrize(
        ("name", "after"),
        [
            ("constant", lambda part, step, warmup: 1.0),
            ("linear", lambda part, step, warmup: 1 - part),
            ("cosine", lambda part, step, warmup: 0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2),
            ("inverse_sqrt", lambda part, step, warmup: 1 / math.sqrt(step / warmup if warmup else 1 + step / 10_000)),
        ],
    )
    def test_the_factor_of_every_step_is_the_formula_s(self, name, after, warmup):
        expected = [
            step / warmup if step < warmup else after((step - warmup) / (self.STEPS - warmup), step, warmup)
            for step in range(self.STEPS)
        ]
        config = ScheduleConfig(name=name, warmup_steps=warmup, final_ratio=0.1)
        assert factors(config, self.STEPS) == pytest.approx(expected, rel=1e-9, abs=1e-12)

    def test_a_cosine_falls_to_zero(self):
        found = factors(ScheduleConfig(name="cosine"), 100)
        assert found[0] == 1.0
        assert found == sorted(found, reverse=True)
        assert 0 < found[-1] < 0.001

    def test_all_groups_change_by_the_same_factor(self, model):
        optimizer = make_optimizer(model(), OptimizerConfig(**RATES))
        schedule = make_schedule(optimizer, ScheduleConfig(name="linear", warmup_steps=4), 10)
        for _ in range(7):
            optimizer.step()
            schedule.step()
        assert learning_rates(optimizer) == pytest.approx(
            {"train/learning_rate": 0.5 * 0.5, "train/memory_learning_rate": 2.0 * 0.5}
        )


def slanted(**options) -> ScheduleConfig:
    return ScheduleConfig(name="slanted_triangular", **options)


class TestLayers:
    """ULMFiT's three: rates by depth, a slanted triangle, layers that join one after the other."""

    def test_each_layer_learns_more_slowly_than_the_one_above_by_the_same_ratio(self, model):
        some = model()
        optimizer = make_optimizer(some, OptimizerConfig(**RATES, layer_decay=2.6))
        rate = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        layers = some.backbone.transformer.h
        of_layers = [{rate[id(parameter)] for parameter in layer.parameters()} for layer in reversed(layers)]
        assert of_layers == [{0.5 / 2.6**depth} for depth in range(1, len(layers) + 1)]
        assert rate[id(some.backbone.transformer.ln_f.weight)] == 0.5
        for embedding in (some.backbone.transformer.wte, some.backbone.transformer.wpe):
            assert rate[id(embedding.weight)] == 0.5 / 2.6 ** (len(layers) + 1)
        assert {rate[id(parameter)] for parameter in some.memory_parameters()} == {2.0}
        assert learning_rates(optimizer) == {"train/learning_rate": 0.5, "train/memory_learning_rate": 2.0}

    def test_a_decoder_has_layers_too(self):
        some = new_decoder({"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2})
        optimizer = make_optimizer(some, OptimizerConfig(**RATES, layer_decay=2.0))
        rate = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        assert rate[id(some.vocabulary.embedding.weight)] == 0.5 / 2**3
        assert [{rate[id(each)] for each in layer.parameters()} for layer in some.layers] == [{0.125}, {0.25}]

    def test_the_triangle_has_its_highest_rate_at_the_cut_and_its_lowest_at_the_ends(self):
        found = factors(slanted(cut=0.1, ratio=32), 101)
        assert found[0] == pytest.approx(1 / 32, abs=0)
        assert found[10] == 1.0
        assert found[100] == pytest.approx(1 / 32)
        assert found[:11] == sorted(found[:11])
        assert found[10:] == sorted(found[10:], reverse=True)
        assert found[5] == pytest.approx((1 + 0.5 * 31) / 32)
        assert factors(slanted(), 5)[0] == pytest.approx(1 / 32)  # where the cut would be at no step

    @pytest.mark.parametrize("name", ["adamw", "adam"])
    def test_a_layer_that_has_not_joined_keeps_every_bit_in_spite_of_gradients_and_decay(self, model, name):
        some = model()
        optimizer = make_optimizer(some, OptimizerConfig(name=name, **RATES), by_layer=True)
        schedule = make_schedule(optimizer, ScheduleConfig(name="constant", unfreeze_every=2), 100)
        layers = some.backbone.transformer.h
        parts = [some.backbone.transformer.ln_f, *reversed(layers), some.backbone.transformer.wte]
        before = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
        generator = torch.Generator().manual_seed(0)
        for step in range(2 * len(parts)):
            for depth, (part, old) in enumerate(zip(parts, before, strict=True)):
                same = all(torch.equal(value, old[key]) for key, value in part.state_dict().items())
                assert same == (step <= 2 * depth), (step, depth)
            for parameter in some.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            schedule.step()

    def test_a_schedule_that_restarts_is_whole_in_every_stage_and_in_what_is_left(self, model):
        some = model()
        optimizer = make_optimizer(some, OptimizerConfig(**RATES), by_layer=True)
        schedule = make_schedule(optimizer, slanted(unfreeze_every=20, restart=True), 200)
        depths = len(some.backbone.transformer.h) + 1
        found = []
        for _ in range(200):
            found.append(learning_rates(optimizer)["train/memory_learning_rate"] / 2.0)
            optimizer.step()
            schedule.step()
        stage, rest = factors(slanted(), 20), factors(slanted(), 200 - 20 * depths)
        assert found == pytest.approx(stage * depths + rest)

    @pytest.mark.parametrize("every", [None, 1])
    def test_layers_that_are_not_among_those_that_learn_keep_every_bit(self, model, every):
        some = model()
        optimizer = make_optimizer(some, OptimizerConfig(**RATES), by_layer=True)
        config = ScheduleConfig(name="constant", unfreeze_layers=1, unfreeze_every=every)
        schedule = make_schedule(optimizer, config, 100)
        *lower, last = some.backbone.transformer.h
        before = copy.deepcopy(some.state_dict())
        for _ in range(4):
            for parameter in some.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            schedule.step()
        changed = {name for name, tensor in some.state_dict().items() if not torch.equal(tensor, before[name])}
        names = {id(parameter): name for name, parameter in some.named_parameters()}
        below = [*lower, some.backbone.transformer.wte, some.backbone.transformer.wpe]
        assert changed.isdisjoint(names[id(parameter)] for part in below for parameter in part.parameters())
        assert changed >= {names[id(parameter)] for parameter in last.parameters()}

    def test_more_layers_than_there_are_cannot_learn(self, model):
        optimizer = make_optimizer(model(), OptimizerConfig(**RATES), by_layer=True)
        with pytest.raises(ModelError, match=r"schedule.unfreeze_layers=9: below the head of this model there are \d"):
            make_schedule(optimizer, ScheduleConfig(unfreeze_layers=9), 100)

    def test_a_decoder_and_a_head_have_depths_too(self, model):
        decoder = DecoderForCausalLM(
            DecoderConfig(10, 8, num_hidden_layers=2, num_attention_heads=2, feed_forward_size=8)
        )
        for some, layers in ((decoder, decoder.layers), (wrapped := model(), wrapped.backbone.transformer.h)):
            embedding = some.get_input_embeddings().weight
            top = DocumentClassifier.on_top(some, HeadConfig("batch_norm"), ["a", "b"])
            depths = depths_below_head(top)
            assert {depths[id(parameter)] for parameter in layers[0].parameters()} == {len(layers)}
            assert depths[id(embedding)] == len(layers) + 1
            assert depths.keys().isdisjoint(map(id, [*top.maps.parameters(), *top.norms.parameters()]))

    def test_a_run_that_ends_while_rates_still_rise_says_so(self, model, caplog):
        optimizer = make_optimizer(model(), OptimizerConfig())
        make_schedule(optimizer, ScheduleConfig(warmup_steps=99), max_steps=100)
        assert not caplog.text
        make_schedule(optimizer, ScheduleConfig(warmup_steps=100), max_steps=100)
        assert "schedule.warmup_steps=100: the rates still rise when the run ends" in caplog.text

    def test_a_run_that_ends_before_all_layers_have_joined_says_so(self, model, caplog):
        optimizer = make_optimizer(model(), OptimizerConfig(**RATES), by_layer=True)
        make_schedule(optimizer, ScheduleConfig(unfreeze_every=50), 100)
        assert "schedule.unfreeze_every=50: the lowest of" in caplog.text

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cut": 1.0}, "schedule.cut=1.0"),
            ({"ratio": 0.5}, "schedule.ratio=0.5"),
            ({"unfreeze_every": 0}, "schedule.unfreeze_every=0"),
            ({"unfreeze_layers": -1}, "schedule.unfreeze_layers=-1"),
            ({"restart": True}, "schedule.restart=true"),
        ],
    )
    def test_options_that_cannot_be_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ScheduleConfig(**options)
        with pytest.raises(ValueError, match=r"optimizer.layer_decay=0.5"):
            OptimizerConfig(layer_decay=0.5)
