"""Runs a notebook through papermill in a forked process, where PyTorch is imported already.

A new kernel for each of a grid's small runs would spend as long on imports as on the work. The forked process is
as separate as a kernel's: it has its own memory, and its failure or death leaves the others alone.
"""

import logging
import os
import signal
import sys
import traceback
from pathlib import Path

import nbformat
import papermill
import sklearn.datasets
import sklearn.model_selection
import torch
from execnb.shell import CaptureShell
from papermill.engines import Engine, papermill_engines
from vae_diffusion.core import paths, stopping
from vae_diffusion.harness import execution, figures, runs, stacks, style
from vae_diffusion.metrics import sample_quality
from vae_diffusion.core.errors import ProjectError
from vae_diffusion.core.stopping import Stopped


class InProcess(Engine):
    "A papermill engine that executes the cells in this process."

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        shell = CaptureShell(mpl_format="png")
        for i, cell in enumerate(nb_man.nb.cells):
            if cell.cell_type != "code":
                continue
            nb_man.cell_start(cell, i)
            cell.outputs = [nbformat.from_dict(output) for output in shell.run(cell.source)]
            if shell.exc:
                nb_man.cell_exception(cell, i, exception=shell.exc)
                return
            nb_man.cell_complete(cell, i)


papermill_engines.register("in_process", InProcess)
STOPPED = 75  # the exit status of what its minutes have ended: try again


def end(log):
    "What a failed process said last."
    return next(
        (line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "it said nothing"
    )


def begin(log):
    "Makes this process one that does a run's work: its output goes to `log`, and a signal ends it at once where no checkpoint is made."
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    logging.disable(logging.WARNING)  # papermill's, for parameters that belong to other notebooks
    torch.set_num_threads(1)


def notebook(run, log):
    "Executes the notebook of a `identity.Run` in this process; its output goes to `log`."
    begin(log)
    run.folder.mkdir(parents=True, exist_ok=True)
    source = paths.root() / "nbs" / "experiments" / f"{run.stage}.ipynb"
    papermill.execute_notebook(
        source,
        run.folder / "notebook.ipynb",
        execution.non_default_parameters(run.settings),
        engine_name="in_process",
        kernel_name="python3",
        progress_bar=False,
    )


def apart(work):
    "Does some work in a process of its own. Returns 0 if it ended well, 1 if it failed, `STOPPED` if its time is over, another number if it was stopped."
    process = os.fork()
    if not process:
        code = 1
        try:
            work()
            code = 0
        except KeyboardInterrupt:
            traceback.print_exc()
            code = 2
        except BaseException as e:
            if "Stopped" not in (type(e).__name__, getattr(e, "ename", "")):
                traceback.print_exc()
            else:
                print(getattr(e, "evalue", e))
                code = STOPPED
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def gpu():
    "Whether there is a GPU, asked in a process of its own: one that has asked cannot be forked any more."
    return not apart(lambda: os._exit(runs.device() != "cuda"))


def train(stack, log):
    "Trains a stack of runs in a process of its own. Returns whether it did not fail; if it did, each run can still go on alone. Raises `ProjectError` if it was stopped, `stopping.Stopped` if its time is over."

    def work():
        begin(log)
        stacks.train_stack(*stack)

    if all(run.done for run in stack):
        return True
    stopping.check_deadline()
    code = apart(work)
    if code == STOPPED:
        raise Stopped(end(Path(log)))
    if code not in (0, 1):
        raise ProjectError(f"a stack of {len(stack)} runs was stopped: {end(Path(log))} ... see {log}")
    if code:
        print(
            f"A stack of {len(stack)} runs failed, and each goes on alone: {end(Path(log))} ... see {log}",
            file=sys.stderr,
        )
    return not code


def execute(run, log):
    "Executes the notebook of a `identity.Run` in a process of its own. Raises `ProjectError` if it fails, `stopping.Stopped` if its time is over."
    stopping.check_deadline()
    code = apart(lambda: notebook(run, log))
    if code == STOPPED:
        raise Stopped(end(Path(log)))
    if code:
        raise ProjectError(f"{run.name} failed: {end(Path(log))} ... see {log}")
