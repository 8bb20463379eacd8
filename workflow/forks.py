"""Runs a notebook through papermill in a forked process, where PyTorch is imported already.

A new kernel for each of a grid's small runs would spend as long on imports as on the work. The forked process is
as separate as a kernel's: it has its own memory, and its failure or death leaves the others alone.
"""

import logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path

import nbformat
import papermill
import sklearn.datasets  # as some others below, so that no forked process need import it
import sklearn.model_selection
import torch
from execnb.shell import CaptureShell
from nbconvert import HTMLExporter
from traitlets.config import Config
from papermill.engines import Engine, papermill_engines
from vae_diffusion.core import files, paths, stopping
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
STOPPED = 75  # the exit status of work whose minutes are over: try again


def last_line(log):
    "What a failed process said last."
    lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def begin(log):
    """Prepares this process, which was forked, for the work of a run: its output goes to `log`.

    A signal ends it at once, except where the library makes a checkpoint first.
    """
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    logging.disable(logging.WARNING)  # papermill's, for parameters that belong to other notebooks
    torch.set_num_threads(1)


def execute_notebook(stage, out, parameters):
    "Executes an experiment's notebook in this process."
    source = paths.root() / "nbs" / "experiments" / f"{stage}.ipynb"
    options = dict(engine_name="in_process", kernel_name="python3", progress_bar=False)
    papermill.execute_notebook(source, out, parameters, **options)


def execute_in_folder(run, log):
    "Executes the notebook of an `identity.Run` in this process, which was forked for it."
    begin(log)
    run.folder.mkdir(parents=True, exist_ok=True)
    execute_notebook(run.stage, run.folder / "notebook.ipynb", execution.non_default_parameters(run.settings))


def run_forked(work):
    """Does some work in a process of its own.

    Returns 0 if it ended well, 1 if it failed, `STOPPED` if its time is over, and another number if it was stopped.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        work()
        code = 0
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 2
    except BaseException as e:
        if "Stopped" in (type(e).__name__, getattr(e, "ename", "")):
            print(getattr(e, "evalue", e))
            code = STOPPED
        else:
            traceback.print_exc()
    finally:
        os._exit(code)


def has_gpu():
    "Whether there is a GPU, asked in a process of its own: one that has asked can no longer be forked."
    return not run_forked(lambda: os._exit(runs.device() != "cuda"))


def train(stack, log):
    """Trains a stack of runs in a process of its own. Returns whether it did; if not, each run can still go alone.

    Raises `ProjectError` if it was stopped, `stopping.Stopped` if its time is over.
    """

    def work():
        begin(log)
        stacks.train_stack(*stack)

    if all(run.done for run in stack):
        return True
    stopping.check_deadline()
    code = run_forked(work)
    if code == STOPPED:
        raise Stopped(last_line(log))
    if code not in (0, 1):
        raise ProjectError(f"a stack of {len(stack)} runs was stopped: {last_line(log)} ... see {log}")
    if code:
        said = f"A stack of {len(stack)} runs failed; each is now run alone: {last_line(log)} ... see {log}"
        print(said, file=sys.stderr)
    return not code


def execute(run, log):
    """Executes the notebook of an `identity.Run` in a process of its own.

    Raises `ProjectError` if it fails, `stopping.Stopped` if its time is over.
    """
    stopping.check_deadline()
    code = run_forked(lambda: execute_in_folder(run, log))
    if code == STOPPED:
        raise Stopped(last_line(log))
    if code:
        raise ProjectError(f"{run.name} failed: {last_line(log)} ... see {log}")


def report_page(notebook):
    "Makes one HTML page of the report that needs no script, no network and no other file; links lead to the pages."
    hide = dict(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    config = {"TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": ["page"]}}  # what only a page needs
    page, _ = HTMLExporter(config=Config(config), **hide).from_filename(str(notebook))
    page = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    nbs = os.path.relpath(paths.root() / "nbs", notebook.parent)
    page = page.replace('href="../', f'href="{nbs}/')
    style = "main {max-width: 60rem; margin: auto} .jp-RenderedImage img {width: 100%}"
    return page.replace("</head>", f"<style>{style}</style></head>")


def write_report(settings, folder, log):
    "Writes the report of a grid as notebook and HTML, in a process of its own. Raises `ProjectError` if it fails."

    def work():
        begin(log)
        execute_notebook("report", folder / "report.ipynb", execution.non_default_parameters(settings))
        files.write_text(folder / "report.html", report_page(folder / "report.ipynb"))

    if run_forked(work):
        raise ProjectError(f"the report failed: {last_line(log)} ... see {log}")
