"""Runs on two processes each, one run after the other, and what came of them as JSON.

Called with a file of pairs of a configuration and a fault (pickled), and a file to write to: for each run null where
nothing went wrong, what went wrong as the run says it, or false if a process did not survive. A fault is what happens
to one process: `{"process": 1, "step": 3, "how": "nan" | "sleep" | "kill" | "term"}`. In place of a configuration may
stand what is typed after `train.py`: that is one process, and what comes of it its exit code. What takes longest,
imports and what the first model that is loaded makes, is paid once: all processes are forked from this one.
"""

import gc
import json
import multiprocessing
import os
import pickle
import runpy
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

from infformer.errors import UserError
from infformer.tasks import language_modelling
from infformer.training import trainer

with suppress(ImportError):
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.original_muon  # imported late, and imports the compiler

    deepspeed.ops.__compatible_ops__  # noqa: B018 (looked for when first asked, with a compiler)

PATIENCE = 30
"""Seconds that a process whose other is gone has to notice it."""


def main() -> None:
    runs = pickle.loads(Path(sys.argv[1]).read_bytes())
    AutoModelForCausalLM.from_pretrained(runs[0][0].model.pretrained)
    processes, outcomes = multiprocessing.get_context("fork"), []
    gc.freeze()  # so that no process looks through what all of them have, which would copy it
    for config, fault in runs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        receive, send = processes.Pipe(duplex=False)
        if isinstance(config, list):
            both = [processes.Process(target=command, args=(config, fault))]
        else:
            both = [processes.Process(target=run, args=(rank, port, config, fault, send)) for rank in range(2)]
        for process in both:
            process.start()
        wait([process.sentinel for process in both])
        for process in both:
            process.join(PATIENCE)
            process.kill()
        outcomes.append(both[0].exitcode if isinstance(config, list) else receive.poll() and receive.recv())
    Path(sys.argv[2]).write_text(json.dumps(outcomes))


def run(rank, port, config, fault, outcome) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer.plot_run = language_modelling.plot_results = lambda results: []
    trainer.train_step = disturbed(trainer.train_step, fault)
    torch.compile = partial(torch.compile, backend="aot_eager")  # in seconds, and without a C++ compiler
    error = None
    try:
        trainer.train(config)
    except (UserError, trainer.TrainingStopped) as caught:
        error = str(caught)
    torch.distributed.barrier()  # neither takes its connections away from the other
    if rank == 0:
        outcome.send(error)


def command(words, fault) -> None:
    """As it is typed in another folder."""
    os.chdir(Path(sys.argv[2]).parent)
    sys.argv = ["train.py", *words]
    trainer.train_step = disturbed(trainer.train_step, fault)
    runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")


def disturbed(step, fault):
    """A step that goes wrong in one process."""
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
