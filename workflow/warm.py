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
from vae_diffusion import figures, paths, runs  # imported here like scikit-learn, so that every run has them


class InProcess(Engine):
    "A papermill engine that executes the cells in this process."

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        shell = CaptureShell(mpl_format="png")
        for i, cell in enumerate(nb_man.nb.cells):
            if cell.cell_type != "code": continue
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
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "it said nothing")


def notebook(run, log):
    "Executes the notebook of a `runs.Run` in this process; its output goes to `log`."
    for number in signal.SIGINT, signal.SIGTERM: signal.signal(number, signal.SIG_DFL)  # where no checkpoint is made, they end it at once
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    logging.disable(logging.WARNING)  # papermill's, for parameters that belong to other notebooks
    torch.set_num_threads(1)
    run.folder.mkdir(parents=True, exist_ok=True)
    source = paths.root() / "nbs" / "experiments" / f"{run.stage}.ipynb"
    papermill.execute_notebook(source, run.folder / "notebook.ipynb", runs.changed(run.settings), engine_name="in_process", kernel_name="python3", progress_bar=False)


def execute(run, log):
    "Executes the notebook of a `runs.Run` in a process of its own. Raises `ProjectError` if it fails, `paths.Stopped` if its time is over."
    paths.in_time()
    process = os.fork()
    if not process:
        status = 1
        try:
            notebook(run, log)
            status = 0
        except BaseException as e:
            if getattr(e, "ename", "") != "Stopped": traceback.print_exc()
            else:
                print(e.evalue)
                status = STOPPED
        finally: os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status == STOPPED: raise paths.Stopped(end(Path(log)))
    if status: raise paths.ProjectError(f"{run.name} failed: {end(Path(log))} ... see {log}")
