"""Trackers: each reports all that it is given, none can stop a run, and one that cannot start says why."""

import builtins
import logging
import sys
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from infformer.config import TrackerConfig
from infformer.training.tracking import Tracker, TrackerError, _ForgivingTracker, open_tracker

CONFIG = {"seed": 1, "model": {"name": "gpt2_ltm", "layers": [0, 1], "memory": {"size": 512, "ridge": 0.5, "kl": None}}}


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "figure.png"
    drawing = Figure(figsize=(1, 1))
    drawing.add_subplot().plot([1, 2])
    drawing.savefig(path)
    return path


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """wandb as on a machine where nobody has configured it or logged in."""
    import wandb as package

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    package.teardown()
    yield package
    package.teardown()


def report_everything(tracker, figure):
    tracker.log({"train/loss": 3.5, "train/learning_rate": 5e-5}, step=1)
    tracker.log_text("samples", "Call me <Ishmael>.\nSome years ago", step=1)
    tracker.log_figure("plots/training", figure, step=1)
    tracker.summarise({"test/perplexity": 20.5, "test/rise_by_memory_off": 0.25}, step=2)
    tracker.finish()


def test_no_tracker_writes_nothing(tmp_path, figure):
    report_everything(open_tracker(TrackerConfig(), "run", tmp_path / "run", CONFIG), figure)
    assert not (tmp_path / "run").exists()


@pytest.mark.needs("tensorboard")
def test_tensorboard_receives_everything(tmp_path, figure):
    from tensorboard.backend.event_processing import event_accumulator

    report_everything(open_tracker(TrackerConfig("tensorboard"), "run", tmp_path / "run", CONFIG), figure)
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.5)]
    assert [(event.step, event.width) for event in events.Images("plots/training")] == [(1, 100)]
    assert [event.step for event in events.Tensors("samples/text_summary")] == [1]
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    Call me <Ishmael>.\n    Some years ago"
    assert [(event.step, event.value) for event in events.Scalars("test/perplexity")] == [(2, 20.5)]
    assert b"model.memory.ridge" in events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content


@pytest.mark.needs("tensorboard")
def test_tensorboard_shows_steps_that_are_made_again_once(tmp_path):
    """A run goes on after its last checkpoint, which may lie some steps back."""
    from tensorboard.backend.event_processing import event_accumulator

    for begins_after, losses in ((0, {1: 5.0, 2: 4.0, 3: 3.0}), (1, {2: 4.5, 3: 3.5, 4: 2.5})):
        tracker = open_tracker(TrackerConfig("tensorboard"), "run", tmp_path, CONFIG, begins_after)
        for step, loss in losses.items():
            tracker.log({"train/loss": loss}, step)
        tracker.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 5.0), (2, 4.5), (3, 3.5), (4, 2.5)]


@pytest.mark.needs("tensorboard")
def test_tensorboard_shows_the_final_figures_beside_the_options(tmp_path, figure):
    """In its table of hyperparameters, as the plugin itself finds them."""
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import backend_context

    report_everything(open_tracker(TrackerConfig("tensorboard"), "run", tmp_path / "run", CONFIG), figure)
    events = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(tmp_path))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = context.RequestContext()
    found = backend.experiment_from_metadata(request, "", True, backend.hparams_metadata(request, ""), None)
    assert {metric.name.tag for metric in found.metric_infos} >= {"test/perplexity", "test/rise_by_memory_off"}
    assert "model.memory.size" in {option.name for option in found.hparam_infos}


def test_wandb_is_told_all_of_it(tmp_path, figure, monkeypatch):
    """Read back from a wandb that only writes down what it is asked; it need not be installed."""
    calls = []

    class Run:
        summary = SimpleNamespace(update=lambda figures: calls.append(("summary", figures)))

        def log(self, values):
            calls.append(values)

        def define_metric(self, name, **options):
            calls.append((name, options))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    class Error(Exception):
        pass

    errors = SimpleNamespace(CommError=Error, Error=Error)
    asked = {"login": lambda prompt: True, "init": init, "Html": lambda text: text, "Image": lambda path: path}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(errors=errors, **asked))
    options = TrackerConfig("wandb", project="books", entity="readers", tags=["long", "old"], mode="online")
    report_everything(open_tracker(options, "a name", tmp_path / "run", CONFIG), figure)
    assert calls == [
        {
            "project": "books",
            "entity": "readers",
            "name": "a name",
            "id": (tmp_path / "run" / "wandb_id").read_text().strip(),
            "tags": ["long", "old"],
            "dir": tmp_path / "run",
            "config": CONFIG,
            "mode": "online",
            "resume": "allow",
        },
        ("*", {"step_metric": "step"}),
        {"train/loss": 3.5, "train/learning_rate": 5e-5, "step": 1},
        {"samples": "<pre>Call me &lt;Ishmael&gt;.\nSome years ago</pre>", "step": 1},
        {"plots/training": str(figure), "step": 1},
        ("summary", {"test/perplexity": 20.5, "test/rise_by_memory_off": 0.25}),
        "finish",
    ]


@pytest.mark.needs("wandb")
def test_wandb_offline_receives_everything_and_resumes_the_same_run(tmp_path, figure, wandb):
    options = TrackerConfig("wandb", mode="offline", tags=["test"])
    report_everything(open_tracker(options, "run", tmp_path / "run", CONFIG), figure)
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    recorded = list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run_id.strip()}.wandb"))
    assert len(recorded) == 1
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/plots/training_*.png"))

    resumed = open_tracker(options, "run", tmp_path / "run", CONFIG)
    assert wandb.run.id == run_id.strip()
    resumed.finish()
    assert (tmp_path / "run" / "wandb_id").read_text() == run_id


@pytest.mark.needs("wandb")
def test_wandb_without_a_login_is_an_error_that_names_the_way_out(tmp_path, wandb):
    with pytest.raises(RuntimeError, match=r"tracker\.mode=offline \(or WANDB_MODE=offline\)"):
        open_tracker(TrackerConfig("wandb"), "run", tmp_path / "run", CONFIG)
    assert not (tmp_path / "run" / "wandb_id").exists()


@pytest.mark.needs("wandb")
class TestWandbThatCannotBeReached:
    """The run begins, and records on this machine; `wandb sync` sends it later."""

    @staticmethod
    def assert_records_offline(folder, figure, caplog):
        with caplog.at_level(logging.WARNING):
            report_everything(open_tracker(TrackerConfig("wandb"), "run", folder, CONFIG), figure)
        assert "wandb cannot be reached" in caplog.text
        assert "wandb sync" in caplog.text
        run_id = (folder / "wandb_id").read_text().strip()
        assert len(list((folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))) == 1
        assert list((folder / "wandb").glob("offline-run-*/files/media/images/plots/training_*.png"))

    @pytest.mark.parametrize("call", ["login", "init"])
    def test_wandb_that_cannot_be_reached_in_either_call_records_offline(
        self, tmp_path, figure, wandb, monkeypatch, caplog, call
    ):
        """To log in asks the server, too."""
        original = {name: getattr(wandb, name) for name in ("login", "init")}

        def login(**options):
            if call == "login":
                raise wandb.errors.CommError("no route to host")
            return True

        def init(**options):
            if options["mode"] == "online":
                raise wandb.errors.CommError("no route to host")
            return original["init"](**options)

        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr(wandb, "login", login)
        monkeypatch.setattr(wandb, "init", init)
        self.assert_records_offline(tmp_path / "run", figure, caplog)

    @pytest.mark.slow
    def test_wandb_at_a_closed_port_records_offline(self, tmp_path, figure, wandb, monkeypatch, caplog):
        """wandb waits for a while before it gives up."""
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
        self.assert_records_offline(tmp_path / "run", figure, caplog)


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch, name, module):
    real_import = builtins.__import__

    def refuse(imported, *arguments, **keywords):
        if imported == module:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real_import(imported, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(TrackerError, match=rf"pip install 'infformer\[{name}\]'"):
        open_tracker(TrackerConfig(name), "run", tmp_path, CONFIG)


def test_a_tracker_that_fails_does_not_stop_the_run(figure, caplog):
    class Broken(Tracker):
        calls = 0

        def log(self, metrics, step):
            Broken.calls += 1
            raise ConnectionError("no route to host")

    tracker = _ForgivingTracker(Broken())
    with caplog.at_level(logging.WARNING):
        report_everything(tracker, figure)
        tracker.log({"train/loss": 3.0}, step=2)
    assert Broken.calls == 1
    assert len(caplog.records) == 1
    assert "goes on without it" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"), [({"name": "comet"}, r"tracker\.name=comet"), ({"mode": "later"}, r"tracker\.mode=later")]
)
def test_impossible_options_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrackerConfig(**values)
