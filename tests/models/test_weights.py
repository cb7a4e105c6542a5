"""What is loaded is what was saved: no weight is left to chance, of no other type than asked for, and none is NaN."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from infformer.errors import ModelError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models import folders
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.folders import model_folder
from infformer.models.loading import load_pretrained, load_trained
from infformer.models.pretrained import InfformerConfig, InfformerForCausalLM

SEGMENT = 8
MEMORY = LongTermMemoryConfig(basis_functions=8, past_samples=16, input_gate=True)
KINDS = ("wrapped", "decoder")
every_kind = pytest.mark.parametrize("kind", KINDS)
A_MEMORYS = {"wrapped": "memories.1.query.weight", "decoder": "layers.1.memory.behind.query.weight"}
A_BACKBONES = {"wrapped": "backbone.transformer.h.1.mlp.c_fc.weight", "decoder": "vocabulary.bias"}


@pytest.fixture(scope="session")
def saved(model_folder, tmp_path_factory) -> dict[str, MemoryModel]:
    """Models by their kind, whose `name_or_path` are the folders where they lie."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {
        "wrapped": InfformerForCausalLM.from_backbone(model_folder, MEMORY, segment_length=SEGMENT),
        "decoder": DecoderForCausalLM(DecoderConfig(**sizes, memory=MEMORY, segment_length=SEGMENT)),
    }
    for kind, model in models.items():
        for parameter in model.memory_parameters():
            torch.nn.init.normal_(parameter)
        model.name_or_path = str(tmp_path_factory.mktemp(kind))
        model.save_pretrained(model.name_or_path)
    return models


@pytest.fixture
def damage(saved, tmp_path):
    """A copy of a folder whose weights a function has changed."""

    def copy(kind: str, change) -> Path:
        original = Path(saved[kind].name_or_path)
        weights = load_file(original / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
        return tmp_path

    return copy


@pytest.fixture
def arbitrary_memory(monkeypatch):
    """What is allocated without being initialised holds NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *arguments, **options: empty_like(*arguments, **options).fill_(torch.nan)
    )


def without(*names: str):
    return lambda weights: [weights.pop(name) for name in names]


@pytest.mark.usefixtures("arbitrary_memory")
class TestWeightsThatAFolderLacks:
    @every_kind
    def test_missing_weights_of_a_memory_are_new_ones_and_the_log_says_so(self, damage, saved, kind, caplog):
        missing = A_MEMORYS[kind]
        with caplog.at_level(logging.WARNING, "infformer"):
            model = AutoModelForCausalLM.from_pretrained(damage(kind, without(missing)))
        assert f"lacks 1 weights of the memory, such as {missing}" in caplog.text
        before = saved[kind].state_dict()
        for name, tensor in model.state_dict().items():
            if name == missing:
                assert tensor.isfinite().all()
                assert 0.01 < tensor.std() < 0.03
            else:
                assert torch.equal(tensor, before[name]), name

    def test_all_weights_of_a_memory_beside_a_stock_model_are_new_ones(self, model_folder, backbone):
        config = InfformerConfig(backbone.config, MEMORY, segment_length=SEGMENT)
        model = InfformerForCausalLM.from_pretrained(model_folder, config=config).eval()
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all(), name
        text = torch.arange(2 * SEGMENT).view(1, -1)
        memory = model(text[:, :SEGMENT]).state
        assert torch.equal(model(text[:, SEGMENT:], state=memory).logits, backbone(text[:, SEGMENT:]).logits)
        assert memory.layers[0].coefficients.isfinite().all()

    @every_kind
    def test_a_model_that_lacks_weights_of_its_memory_is_not_measured(self, damage, kind):
        with pytest.raises(ModelError, match=f"checkpoint=.*it lacks 1, such as {A_MEMORYS[kind]}"):
            load_trained(str(damage(kind, without(A_MEMORYS[kind]))))

    @every_kind
    @pytest.mark.parametrize("opened", [AutoModelForCausalLM.from_pretrained, load_trained])
    def test_missing_weights_of_a_backbone_are_refused(self, damage, kind, opened):
        with pytest.raises(ModelError, match=f"lacks 1.*such as {A_BACKBONES[kind]}"):
            opened(str(damage(kind, without(A_BACKBONES[kind]))))

    def test_missing_weights_of_a_stock_model_are_refused(self, backbone, tmp_path):
        backbone.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["transformer.h.1.mlp.renamed"] = weights.pop("transformer.h.1.mlp.c_fc.weight")
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        for opened, option in (
            (load_pretrained, r"model\.pretrained"),
            (load_trained, "checkpoint"),
            (InfformerForCausalLM.from_backbone, "backbone"),
        ):
            with pytest.raises(
                ModelError, match=rf"{option}=.*it lacks 1, such as transformer\.h\.1\.mlp\.c_fc\.weight"
            ):
                opened(str(tmp_path))


@every_kind
def test_weights_that_a_model_has_no_place_for_are_refused(damage, kind):
    def add(weights: dict[str, Tensor]) -> None:
        weights["memories.7.query.weight"] = torch.zeros(2)

    with pytest.raises(ModelError, match=r"it also holds 1, such as memories\.7\.query\.weight"):
        load_trained(str(damage(kind, add)))


@every_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_measured(damage, kind, value):
    def spoil(weights: dict[str, Tensor]) -> None:
        weights[A_MEMORYS[kind]][3, 2] = value

    with pytest.raises(ModelError, match=f"checkpoint=.*weights {A_MEMORYS[kind]} .*not finite.*earlier checkpoint"):
        load_trained(str(damage(kind, spoil)))


class TestTypes:
    """A folder in float16 is trained in float32, in which an optimiser does not end in NaN, unless asked otherwise."""

    @pytest.fixture
    def halves(self, saved, tmp_path) -> dict[str, Path]:
        for kind in KINDS:
            model = AutoModelForCausalLM.from_pretrained(saved[kind].name_or_path)
            model.half().save_pretrained(tmp_path / kind)
            assert json.loads((tmp_path / kind / "config.json").read_text())["dtype"] == "float16"
        return {kind: tmp_path / kind for kind in KINDS}

    def test_a_folder_of_ours_in_float16_is_opened_in_float32(self, halves):
        for folder in halves.values():
            for opened in (AutoModelForCausalLM.from_pretrained, load_trained):
                assert {parameter.dtype for parameter in opened(str(folder)).parameters()} == {torch.float32}

    def test_a_folder_is_opened_in_the_type_that_is_asked_for(self, halves):
        for kind, dtype in (("decoder", torch.float16), ("decoder", "auto"), ("wrapped", torch.float16)):
            model = AutoModelForCausalLM.from_pretrained(halves[kind], dtype=dtype)
            assert model.get_parameter(A_BACKBONES[kind]).dtype == torch.float16

    def test_a_stock_model_in_float16_is_opened_in_float32(self, backbone, tmp_path):
        AutoModelForCausalLM.from_config(backbone.config).half().save_pretrained(tmp_path)
        assert InfformerForCausalLM.from_backbone(tmp_path).dtype == torch.float32
        assert InfformerForCausalLM.from_backbone(tmp_path, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float32, False), (torch.bfloat16, True), ("auto", True)])
def test_what_weights_take_is_held_against_the_machine_in_their_own_type(dtype, fits, backbone, tmp_path, monkeypatch):
    backbone.save_pretrained(tmp_path)
    bytes_of_the_machine = {"SC_PAGE_SIZE": 3, "SC_PHYS_PAGES": backbone.num_parameters()}
    monkeypatch.setattr(folders.os, "sysconf", bytes_of_the_machine.get)
    if fits:
        InfformerForCausalLM.from_backbone(tmp_path, dtype=dtype)
    else:
        with pytest.raises(ModelError, match="in float32, and this machine has 0; give a smaller model"):
            InfformerForCausalLM.from_backbone(tmp_path, dtype=dtype)


class TestTheFolderOfARun:
    @pytest.fixture
    def run(self, tmp_path) -> Path:
        for step in (2, 4, 10):
            (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "model").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / "step-00000012").mkdir()  # not yet whole
        return tmp_path / "run"

    def test_the_folder_of_a_run_stands_for_its_newest_checkpoint(self, run):
        newest = str(run / "checkpoints" / "step-00000010" / "model")
        assert model_folder(str(run)) == model_folder(str(run / "checkpoints")) == newest

    def test_the_folder_of_a_run_stands_for_its_best_checkpoint(self, run):
        best = run / "checkpoints" / "best"
        best.symlink_to("step-00000004")
        for given in (run, run / "checkpoints", best):
            assert model_folder(str(given)) == str(best / "model")
        assert model_folder(str(best / "model")) == str(best / "model")

    def test_the_folder_of_a_run_opens_wherever_a_model_is_named(self, backbone, run):
        InfformerForCausalLM.from_backbone(backbone).save_pretrained(run / "checkpoints" / "step-00000010" / "model")
        stock = backbone.state_dict()
        for model in (
            load_pretrained(str(run), MEMORY, segment_length=SEGMENT),
            load_trained(str(run / "checkpoints")),
        ):
            for name, tensor in model.backbone.state_dict().items():
                assert torch.equal(tensor, stock[name])

    def test_a_run_of_a_model_with_a_memory_is_no_backbone(self, saved, run):
        saved["wrapped"].save_pretrained(run / "checkpoints" / "step-00000010" / "model")
        with pytest.raises(ModelError, match=r"model\.pretrained=.*has a memory already.*export\.py"):
            load_pretrained(str(run), MEMORY, segment_length=SEGMENT)
