"""Runs each experiment's page repeatedly in a kernel that is never restarted, as a reader in JupyterLab would.

It watches what the runs leave behind.

    python tests/soak.py FOLDER SECONDS    training and measuring with one seed after the other
    python tests/soak.py FOLDER 0          every experiment twice

Prints JSON: the runs, and the memory and the open files after a fifth of the time and at the end.
"""

import ctypes
import gc
import itertools
import json
import os
import sys
import time
from pathlib import Path

import nbformat
import resource
from execnb.shell import CaptureShell

ROOT = Path(__file__).resolve().parent.parent


def left(shells):
    "Memory in MB and open files of this process, without what IPython keeps in `Out` and the allocator for later."
    for shell in shells:
        shell.reset(new_session=False)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {
        "mb": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
    }


def main(folder, seconds):
    os.environ["VAE_DIFFUSION_RUNS"] = folder
    wishes = (
        "scale, seed, seeds, methods = 'smoke', {}, [0], ['normal']"
        if seconds
        else "scale, seeds, methods, n_train, dm_images = 'smoke', [0], ['normal'], 300, 500"
    )
    shells, began, early, runs = {}, time.monotonic(), None, 0
    for seed in itertools.count():
        for stage in (
            ("train_vae", "measure_gaps")
            if seconds
            else ("train_diffusion", "sample_bank", "train_vae", "measure_gaps", "measure_diffusion", "report")
        ):
            if stage not in shells:
                shells[stage] = CaptureShell(mpl_format="png")  # a kernel for each page, all in this process
            shell = shells[stage]
            for cell in nbformat.read(ROOT / "nbs" / "experiments" / f"{stage}.ipynb", 4).cells:
                if cell.cell_type != "code":
                    continue
                told = "parameters" in cell.metadata.get("tags", [])
                shell.run(cell.source + f"\n{wishes.format(seed)}" * told)
                if shell.exc:
                    raise shell.exc
            runs += 1
        if not early and time.monotonic() - began > seconds / 5:
            early = left(shells.values())
        elif time.monotonic() - began > seconds:
            break
    print(json.dumps({"runs": runs, "early": early, "late": left(shells.values())}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
