"""Which engine is meant, and what is refused before any process waits for another."""

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from infformer.config import ENGINES, EngineConfig
from infformer.training import runtime
from infformer.training.runtime import EngineError, init_distributed, resolve_engine, rows_of_rank, use_tf32

Launch = Callable[..., None]
ZERO = {stage: {"zero_optimization": {"stage": stage}} for stage in (1, 2, 3)}


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch) -> None:
    """No launcher has said anything yet."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)


@pytest.fixture
def launched(monkeypatch) -> Launch:
    """As if `accelerate launch` had been called with these options: what it tells processes by their environment."""

    def launch(*options: str) -> None:
        everything = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", *options]
        asked = launch_command_parser().parse_args([*everything, "train.py"])
        asked.deepspeed_fields_from_accelerate_config = ""
        said = prepare_deepspeed_cmd_env(asked)[1] if asked.use_deepspeed else prepare_multi_gpu_env(asked)
        for name, value in said.items():
            if name.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.setenv(name, value)

    return launch


def write(path: Path, options: Any) -> str:
    path.write_text(json.dumps(options))
    return str(path)


class TestTheEngineThatIsMeant:
    def test_without_a_configuration_of_accelerate_the_engine_is_ddp(self, launched):
        assert resolve_engine(EngineConfig()) == EngineConfig("ddp")
        launched("--multi_gpu")
        assert resolve_engine(EngineConfig()) == EngineConfig("ddp")

    @pytest.mark.parametrize("name", [name for name in ENGINES if name != "auto"])
    def test_the_engine_is_the_one_that_is_named(self, name):
        assert resolve_engine(EngineConfig(name)) == EngineConfig(name)

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_accelerate_s_deepspeed_is_the_engine_of_its_stage(self, launched, stage):
        launched("--use_deepspeed", f"--zero_stage={stage}")
        meant = resolve_engine(EngineConfig())
        assert (meant.name, meant.config) == (f"zero{stage}", None)
        assert meant.deepspeed["zero_optimization"]["stage"] == stage

    @pytest.mark.parametrize(("optimizer", "parameters"), [("cpu", "none"), ("none", "cpu"), ("cpu", "cpu")])
    def test_what_accelerate_s_deepspeed_keeps_elsewhere_is_kept_there(self, launched, optimizer, parameters):
        where = f"--offload_optimizer_device={optimizer}", f"--offload_param_device={parameters}"
        launched("--use_deepspeed", "--zero_stage=3", *where)
        zero = resolve_engine(EngineConfig()).deepspeed["zero_optimization"]
        assert zero["offload_optimizer"]["device"] == optimizer
        assert zero["offload_param"]["device"] == parameters

    def test_accelerate_s_file_for_deepspeed_is_the_engine_s(self, launched, tmp_path):
        path = write(tmp_path / "Mine.json", ZERO[2])
        launched("--use_deepspeed", f"--deepspeed_config_file={path}")
        assert resolve_engine(EngineConfig()) == EngineConfig("zero2", config=path)

    def test_accelerate_s_fsdp_is_fsdp2(self, launched):
        launched("--use_fsdp", "--fsdp_version=2")
        assert resolve_engine(EngineConfig()) == EngineConfig("fsdp2")

    def test_the_old_fsdp_is_refused(self, launched):
        launched("--use_fsdp", "--fsdp_version=1")
        with pytest.raises(EngineError, match="FSDP version 1: choose version 2, or engine=fsdp2"):
            resolve_engine(EngineConfig())

    @pytest.mark.parametrize(
        ("options", "meant"),
        [
            (["--multi_gpu"], "ddp"),
            (["--use_fsdp", "--fsdp_version=2"], "fsdp2"),
            (["--use_deepspeed", "--zero_stage=2"], "zero2"),
        ],
    )
    def test_what_has_nothing_to_do_with_the_launcher_is_kept(self, launched, options, meant):
        launched(*options)
        assert resolve_engine(EngineConfig(patience=7.0)).name == meant
        assert resolve_engine(EngineConfig(patience=7.0)).patience == 7.0

    @pytest.mark.parametrize(
        ("options", "configured"),
        [(["--use_fsdp", "--fsdp_version=2"], "fsdp2"), (["--use_deepspeed", "--zero_stage=2"], "zero2")],
    )
    @pytest.mark.parametrize("name", [name for name in ENGINES if name != "auto"])
    def test_a_named_one_is_not_quietly_another(self, launched, options, configured, name):
        launched(*options)
        if name == configured:
            assert resolve_engine(EngineConfig(name)).name == name
            return
        message = rf"engine\.name={name}, but accelerate was configured for {configured}: choose engine=auto"
        with pytest.raises(EngineError, match=message):
            resolve_engine(EngineConfig(name))

    def test_a_named_one_that_keeps_things_elsewhere_is_of_its_stage(self, launched):
        launched("--use_deepspeed", "--zero_stage=3")
        assert resolve_engine(EngineConfig("zero3_offload")).name == "zero3_offload"

    @pytest.mark.parametrize("options", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 0}}])
    def test_a_file_for_deepspeed_without_a_stage_is_refused(self, launched, tmp_path, options):
        path = write(tmp_path / "mine.json", options)
        launched("--use_deepspeed", f"--deepspeed_config_file={path}")
        with pytest.raises(EngineError, match=rf"{path}.*stage"):
            resolve_engine(EngineConfig())

    def test_deepspeed_of_stage_0_is_refused(self, launched):
        launched("--use_deepspeed", "--zero_stage=0")
        with pytest.raises(EngineError, match="stage"):
            resolve_engine(EngineConfig())


class TestPrecision:
    @pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero3_offload"])
    def test_float16_needs_a_device(self, monkeypatch, name):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        with pytest.raises(EngineError, match=r"training\.precision=float16: the CPU has no .* bfloat16 or float32"):
            init_distributed(EngineConfig(name, ZERO[1]), "float16")

    @pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero2", "zero3", "zero3_offload"])
    def test_float16_needs_gradients_that_are_whole(self, monkeypatch, name):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        with pytest.raises(
            EngineError, match=rf"training\.precision=float16 with engine={name}: .* bfloat16 or float32"
        ):
            init_distributed(EngineConfig(name, ZERO[1]), "float16")


@pytest.mark.needs("deepspeed")
class TestDeepSpeedsConfiguration:
    """What is wrong with it is said before any process is waited for."""

    @pytest.mark.parametrize("name", ["auto", "zero2"])
    def test_a_configuration_that_is_not_there_is_refused(self, launched, tmp_path, name):
        """Whether it was given to this project or to accelerate."""
        path = tmp_path / "nowhere.json"
        if name == "auto":
            launched("--use_deepspeed", f"--deepspeed_config_file={path}")
        with pytest.raises(
            EngineError, match=rf"engine\.config={path}: not a DeepSpeed configuration in JSON .*No such"
        ):
            init_distributed(
                resolve_engine(EngineConfig(name, config=None if name == "auto" else str(path))), "float32"
            )

    @pytest.mark.parametrize("text", ["", "stage: 2", '{"zero_optimization": {"stage": 2}'])
    def test_a_configuration_that_is_not_json_is_refused(self, tmp_path, text):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(EngineError, match=r"engine\.config=.*mine\.json: not a DeepSpeed configuration in JSON"):
            init_distributed(EngineConfig("zero2", config=str(tmp_path / "mine.json")), "float32")

    @pytest.mark.parametrize("options", [[], "zero2", 2, None])
    def test_a_configuration_that_is_no_object_is_refused(self, tmp_path, options):
        path = write(tmp_path / "mine.json", options)
        with pytest.raises(EngineError, match="a DeepSpeed configuration is an object with named parts"):
            init_distributed(EngineConfig("zero2", config=path), "float32")

    @pytest.mark.parametrize("options", [[], "auto", {"stage": "2"}, None])
    def test_a_configuration_whose_zero_is_no_stage_is_refused(self, tmp_path, options):
        path = write(tmp_path / "mine.json", {"zero_optimization": options})
        with pytest.raises(EngineError, match=r"mine\.json"):
            init_distributed(EngineConfig("zero3", config=path), "float32")

    @pytest.mark.parametrize(("name", "stage"), [("zero1", 2), ("zero2", 3), ("zero3_offload", 2)])
    def test_a_configuration_of_another_stage_is_refused(self, tmp_path, name, stage):
        path = write(tmp_path / "mine.json", ZERO[stage])
        message = rf"engine={name}, but zero_optimization\.stage is {stage} in {path}: choose engine=zero{stage}"
        with pytest.raises(EngineError, match=message):
            init_distributed(EngineConfig(name, config=path), "float32")

    def test_a_configuration_of_no_stage_is_refused(self, tmp_path):
        path = write(tmp_path / "mine.json", {"wall_clock_breakdown": True})
        with pytest.raises(EngineError, match=r"engine=zero2, but zero_optimization\.stage is None in"):
            init_distributed(EngineConfig("zero2", config=path), "float32")

    @pytest.mark.parametrize(
        ("part", "option"),
        [
            ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, "optimizer.*"),
            ({"scheduler": {"type": "WarmupLR"}}, "schedule.*"),
            ({"fp16": {"enabled": True}}, "training.precision"),
            ({"bf16": {"enabled": True}}, "training.precision"),
            ({"gradient_clipping": 0.5}, "training.gradient_clipping"),
            ({"gradient_accumulation_steps": 4}, "training.gradient_accumulation"),
            ({"train_batch_size": 64}, "training.batch_size"),
            ({"train_micro_batch_size_per_gpu": 8}, "training.batch_size"),
        ],
        ids=lambda value: value if isinstance(value, str) else next(iter(value)),
    )
    def test_a_configuration_that_decides_what_options_decide_is_refused(self, tmp_path, part, option):
        path = write(tmp_path / "mine.json", {**ZERO[2], **part})
        with pytest.raises(EngineError) as refused:
            init_distributed(EngineConfig("zero2", config=path), "float32")
        assert str(refused.value).startswith(f"{path}: {next(iter(part))} is decided by {option}; remove it there")

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_a_configuration_may_leave_to_options_what_they_decide(self, tmp_path, precision):
        """As Hugging Face's examples do, by `auto`."""
        automatic = {"enabled": "auto"}
        options = {
            **ZERO[2],
            "fp16": {**automatic, "loss_scale": 0, "initial_scale_power": 16},
            "bf16": automatic,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "wall_clock_breakdown": True,
        }
        engine = EngineConfig("zero2", config=write(tmp_path / "mine.json", options))
        made = runtime._deepspeed_plugin(engine, precision, 4, 0.5).hf_ds_config.config
        assert made["gradient_accumulation_steps"] == 4
        assert made["gradient_clipping"] == 0.5
        assert made["wall_clock_breakdown"] is True
        assert ("torch_autocast" in made) == (precision == "bfloat16")
        assert not {"fp16", "bf16", "train_batch_size"} & made.keys()

    def test_a_configuration_is_not_changed(self):
        engine = EngineConfig("zero1", {**ZERO[1], "gradient_clipping": "auto"})
        runtime._deepspeed_plugin(engine, "float32", 1, None)
        assert engine == EngineConfig("zero1", {**ZERO[1], "gradient_clipping": "auto"})


def test_a_process_makes_one_run_after_the_other_each_as_it_says():
    """As Hydra does in a sweep: what a run is made of must not be that of the run before."""
    for precision, accumulation, says in (("bfloat16", 2, "bf16"), ("float32", 1, "no"), ("bfloat16", 3, "bf16")):
        made = init_distributed(EngineConfig("ddp"), precision, accumulation)
        assert (made.mixed_precision, made.gradient_accumulation_steps) == (says, accumulation)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_process_makes_a_run_without_deepspeed_after_one_with_it(monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate does
    assert init_distributed(EngineConfig(name), "bfloat16").distributed_type == DistributedType.NO
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


class TestProcessesThatDoNotWorkTogether:
    @pytest.fixture
    def accelerate(self, monkeypatch) -> Callable[[int, DistributedType], None]:
        """accelerate finds so many processes, of that kind."""

        def find(processes: int, kind: DistributedType) -> None:
            found = Namespace(num_processes=processes, distributed_type=kind)
            monkeypatch.setattr(runtime, "Accelerator", lambda **options: found)

        return find

    def test_processes_that_do_not_find_each_other_are_refused(self, accelerate, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        accelerate(1, DistributedType.NO)
        with pytest.raises(EngineError, match=r"started 4 processes, but only 1 of them found each other.*torchrun"):
            init_distributed(EngineConfig("ddp"), "float32")

    @pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_processes_that_work_in_another_way_are_refused(self, accelerate, name, kind):
        accelerate(1, kind)
        with pytest.raises(EngineError, match=rf"engine\.name={name}, but these processes work as {kind.value}"):
            init_distributed(EngineConfig(name), "float32")

    @pytest.mark.parametrize(("processes", "lanes"), [(1, 6), (2, 6), (3, 6), (6, 6)])
    def test_lanes_are_shared_out_without_a_gap(self, processes, lanes):
        shares = [
            rows_of_rank(Namespace(num_processes=processes, process_index=index), lanes) for index in range(processes)
        ]
        assert [lane for share in shares for lane in share] == list(range(lanes))
        assert {len(share) for share in shares} == {lanes // processes}


@pytest.mark.parametrize(
    ("device", "wanted", "precision"), [("cuda", True, "high"), ("cuda", False, "highest"), ("cpu", True, "highest")]
)
def test_float32_products_are_rounded_where_it_is_wanted_on_cuda_alone(monkeypatch, device, wanted, precision):
    now = ["by the run before"]
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda new: now.append(new))
    assert use_tf32(Namespace(device=torch.device(device)), wanted) == (precision == "high")
    assert now[-1] == precision
