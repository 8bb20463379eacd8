"""`nbdev_test` with the pages in a shuffled order; it also fails for a page that leaves its process changed.

python tests/guard.py SEED [WORKERS [PATH]]

Without WORKERS, or with "default", it starts as many workers as nbdev_test does by itself.
"""

import ctypes
import gc
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import matplotlib.pyplot as plt
import nbdev.test
import numpy as np
import pandas as pd
import pooch
import psutil
import sklearn.datasets
import torch
from diffusers.utils import logging as diffusers_logging
from execnb.shell import CaptureShell
from vae_diffusion.benchmark import command, diffusion_cases, metric_cases, report, suite, timing, vae_cases
from vae_diffusion.harness import measurements, quality_figures, runs, solver_study, studies
from vae_diffusion.metrics import sample_quality

WATCHED = [Path(__file__).resolve().parent.parent]
FIXED = types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type  # only a patch gives another to a name
OTHERS = "TMonitor", "HistorySavingThread"  # threads of tqdm, and of IPython, which a fork ends
glibc = ctypes.CDLL(None)


def files():
    "Files and folders of the checkout, and of the pages' folder if it is another; not what git and other tools keep."
    found = set()
    for folder, folders, names in (step for root in WATCHED for step in os.walk(root)):
        folders[:] = [f for f in folders if f[0] not in "._" and f != "build"]
        found |= {os.path.join(folder, name) for name in folders + names}
    return dict.fromkeys(found)


def meanings():
    "What the names of all modules, and of the project's classes, stand for."
    found = {}
    for name, module in list(sys.modules.items()):  # looking at a module may import another
        if name == "__main__" or not isinstance(module, types.ModuleType):
            continue
        ours = name.startswith("vae_diffusion")
        classes = [v for v in vars(module).values() if ours and isinstance(v, type) and v.__module__ == name]
        for owner in [module, *classes]:
            for attribute, value in list(vars(owner).items()):
                if attribute == "_backend_mod":
                    continue  # matplotlib's, made anew when the same one is chosen
                if issubclass(type(value), FIXED):
                    found[name, owner.__name__, attribute] = id(value)
                elif ours and not attribute.startswith("__"):
                    found[name, owner.__name__, attribute] = repr(value)
    return found


class MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def gives_back():
    "Whether a block that is larger than any free one goes back to the system as soon as it is free."
    if not hasattr(glibc, "mallinfo2"):
        return None
    glibc.mallinfo2.restype = MallInfo
    before, _ = glibc.mallinfo2().hblks, torch.empty(2**28)
    return glibc.mallinfo2().hblks > before


def state():
    "What a page leaves as it found it."
    gc.collect()
    process, mask, here = psutil.Process(), os.umask(0o22), tempfile.gettempdir()
    os.umask(mask)
    loggers = {name: log for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger)}
    loggers["pooch"] = pooch.get_logger()
    switches = torch.get_num_threads, torch.get_default_dtype, torch.get_float32_matmul_precision, torch.is_grad_enabled
    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "umask": mask,
        "temporary folder": here,
        "temporary files": dict.fromkeys(os.listdir(here)),
        "files of the project": files(),
        "open files": dict.fromkeys(f.path for f in process.open_files() if ".venv" not in f.path),
        "processes": dict.fromkeys(p.pid for p in process.children()),
        "threads": dict.fromkeys(t.name for t in threading.enumerate() if type(t).__name__ not in OTHERS),
        "random numbers": {
            "random": random.getstate(),
            "numpy": repr(np.random.get_state()),
            "torch": torch.get_rng_state().tolist(),
        },
        "PyTorch": {f.__name__: f() for f in switches},
        "NumPy": {**np.geterr(), **np.get_printoptions()},
        "pandas": repr(pd._config.config._global_config),
        "memory": gives_back(),
        "matplotlib": dict(plt.rcParams),
        "open figures": plt.get_fignums(),
        "signals": {s.name: signal.getsignal(s) for s in signal.Signals},
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
        "logging": {name: (log.level, log.disabled) for name, log in loggers.items()}
        | {"all": logging.root.manager.disable},
        "progress bars": diffusers_logging.is_progress_bar_enabled(),
        "names": meanings(),
    }


def differences(before, after):
    "What is not as it was, in words. A module that is loaded late brings names and loggers of its own."
    said = []
    for what, old in before.items():
        new, late = after[what], what in ("names", "logging")
        if isinstance(old, dict):
            keys = old if late else old | new
            changed = [k for k in keys if old.get(k, "none") != new.get(k, "none")]
        else:
            changed = [f"{old} before, {new} after"] * (old != new)
        if changed:
            said.append(f"  {what}: {', '.join(map(str, changed[:9]))}"[:500])
    return said


def guarded(shell, *args, run_all=CaptureShell.run_all, **options):
    "Runs the cells of a page; fails if they leave the process changed. Its threads and processes have a moment to end."
    if not tempfile.tempdir.endswith(str(os.getpid())):  # a folder for each worker
        os.environ["TMPDIR"] = tempfile.tempdir = f"{tempfile.tempdir}/{os.getpid()}"
        os.mkdir(tempfile.tempdir)
    before = state()
    run_all(shell, *args, **options)
    shell.reset(new_session=False)
    said, end = differences(before, state()), time.monotonic() + 1.5
    while any(s.startswith(("  threads", "  processes")) for s in said) and time.monotonic() < end:
        time.sleep(0.1)
        said = differences(before, state())
    if not said:
        return
    shell.exc = AssertionError("\n".join(["the page leaves the process changed:", *said]))
    raise shell.exc


def main(seed, workers="default", path=None):
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        if path:
            WATCHED.append(path)
        CaptureShell.run_all = guarded
        gc.collect()
        gc.freeze()  # what all pages import is not searched again for each
        nbdev.test.sorted = lambda pages: random.Random(seed).sample([*pages], len(pages))
        nbdev.test.nbdev_test(path, n_workers=None if workers == "default" else int(workers), do_print=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
