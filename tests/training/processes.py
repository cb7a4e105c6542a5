"""Runs one after the other, in processes that torchrun started: what takes longest, their start, is paid once.

Called with a JSON file: a list of [configuration (pickled), fault or null]. A fault is what happens to one process.
"""

import json
import os
import pickle
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed
from accelerate.state import AcceleratorState, GradientState

from infformer.errors import UserError
from infformer.training import trainer


def main() -> None:
    for path, fault in json.loads(Path(sys.argv[1]).read_text()):
        config = pickle.loads(Path(path).read_bytes())
        trainer.plot_run = lambda folder: []
        trainer.train_step = disturbed(train_step, fault)
        error = None
        try:
            trainer.train(config)
        except (UserError, trainer.TrainingStopped) as caught:
            error = str(caught)
        except BaseException:  # the other process would wait for this one
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        torch.distributed.barrier()  # the processes stay together from run to run
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate's own trace of the run before
        if os.environ["RANK"] == "0":
            Path(path).with_suffix(".outcome").write_text(json.dumps(error))


train_step = trainer.train_step


def disturbed(step, fault):
    """A step that goes wrong in one process: `{"process": 1, "step": 3, "how": "nan" | "sleep" | "kill" | "term"}`."""
    made = 0

    def make(accelerator, model, optimizer, parts, *arguments):
        nonlocal made
        made += 1
        if fault and made == fault["step"] and accelerator.process_index == fault["process"]:
            match fault["how"]:
                case "nan":
                    with torch.no_grad():
                        next(model.parameters()).fill_(float("nan"))
                case "sleep":
                    time.sleep(600)
                case "kill":
                    os.kill(os.getpid(), 9)
                case "term":
                    os.kill(os.getpid(), 15)
        return step(accelerator, model, optimizer, parts, *arguments)

    return make


if __name__ == "__main__":
    main()
