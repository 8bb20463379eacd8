"Shared by all tests: one thread a process, and a last line that counts."

import csv
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "build/browser"))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # two threads on a busy core would only wait for each other
sys.path.insert(0, str(ROOT / "workflow"))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
if "OFFLINE" in os.environ:  # what each worker asks of other machines is noted in a file of its own
    os.environ["OFFLINE"] += f"-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    Path(os.environ["OFFLINE"]).touch()
counts = dict(passed=0, failed=0, skipped=0)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
LONG = {  # seconds of the longest tests on one core
    "test_nbdev_test_as_it_is_typed": 130,
    "test_page_shows_all_data_sets": 15,
    "test_stages_that_are_repeated_killed_and_started_at_once": 52,
    "test_runs_that_are_stopped_in_time_and_moved_to_and_fro_end_with_the_same_results": 45,
    "test_workflow_is_interrupted_fails_in_part_resumes_and_reports": 28,
    "test_published_run": 47,
    "test_a_grid_by_the_workflow_has_the_numbers_of_each_run_alone": 25,
    "test_a_compiled_stack": 15,
    "test_every_other_number_is_printed": 36,
    "test_the_workflow_says_what_is_wrong": 33,
    "test_compiled_diffusion_training_gives_the_plain_numbers": 25,
    "test_real_data_sets_from_diffusion_to_gaps": 40,
    "test_compiled_training_gives_the_plain_numbers": 35,
    "test_a_long_workflow_leaves_nothing_behind": 35,
    "test_a_page_that_changes_the_process_is_seen": 30,
    "test_memory_at_full_size": 30,
    "test_every_experiment_can_be_run_again_in_the_same_kernel": 25,
    "test_a_long_session_leaves_nothing_behind": 25,
    "test_measure_gaps_alone_runs_what_it_needs": 14,
    "test_measure_encoder_alone_trains_both_vaes": 18,
    "test_a_run_started_three_times_at_once_is_trained_once": 9,
    "test_another_seed_or_number_of_threads": 5,
    "test_killed_run_ends_with_the_same_numbers": 13,
    "test_bench_stores_resumes_and_draws": 15,
    "test_sliders_move_their_pictures": 26,
    "test_a_folder_of_pictures_is_compared": 25,
    "test_the_wheel_works_without_the_checkout": 14,
    "test_a_model_is_drawn_from_where_nothing_of_ours_is_installed": 13,
    "test_links_of_the_site_lead_somewhere": 50,
    "test_the_command_for_several_gpus": 35,
    "test_the_experiment_by_two_processes_that_were_killed": 20,
    "test_models_go_to_the_hub_and_come_back": 25,
    "test_datasets_reads_what_a_bank_holds": 8,
}
WITHOUT_DATA = pytest.mark.skip(
    reason="needs the full data sets: set VAE_DIFFUSION_DATA to the folder that holds them "
    "(nbs/reproduce.ipynb says how) and run the same command to have it run"
)


def git(*arguments):
    "What git says of this folder, whoever owns it. In an unpacked archive, which is no checkout, all files are new."
    with tempfile.TemporaryDirectory() as empty:
        if not (ROOT / ".git").exists():
            subprocess.run(["git", "init", "--quiet", "--bare", empty], check=True)
            arguments = f"--git-dir={empty}", f"--work-tree={ROOT}", *arguments
        done = subprocess.run(["git", "-c", "safe.directory=*", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.exit(f"git {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def tracked(pattern):
    "Files that git knows, or would add, as paths from the root."
    listed = git("ls-files", "--cached", "--others", "--exclude-standard", pattern).splitlines()
    return sorted(f for f in listed if (ROOT / f).exists())


def run(*command, **options):
    "Runs a command from the root; its output is in the error if it fails."
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def forked(stage, out, parameters=None):
    """Begins an experiment in a fork of this process, which has PyTorch; papermill executes it as in a new kernel.

    Its scale is `smoke` if nothing else is asked.

    Returns the process. What it says is beside its page `out`, which ends in .ipynb, in a file that ends in .log.
    """
    import forks

    def work():
        forks.begin(out.with_suffix(".log"))
        forks.execute_notebook(stage, out, {"scale": "smoke"} | (parameters or {}))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def snakemake(*options, said=None):
    "Begins snakemake in a fork of this process, with its imports. Returns the process; its output goes to `said`."
    from snakemake.cli import main

    def work():
        os.chdir(ROOT)
        if said:
            sys.stdout = sys.stderr = said
        main([str(o) for o in options])

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def made(*arguments, **variables):
    "The command that `make` would start, begun by `snakemake`, to its end: exit status and what was said to the user."
    plain = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # of `make test`
    command = shlex.split(run("make", "--no-print-directory", "--dry-run", *arguments, env=plain))
    assert not set("|&;<>") & set("".join(command)), f"only a shell could do all of it: {command}"
    with tempfile.TemporaryFile("w+") as said, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        process = snakemake(*command[command.index("snakemake") + 1 :], said=said)
        process.join()
        said.seek(0)
        return process.exitcode, said.read()


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    "A folder for the test's runs, so that it never touches the user's."
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


WITHOUT_NETWORK = """
import fcntl, os, socket, struct, sys
with socket.socket() as s: # loopback is up: papermill speaks to a notebook's kernel through it
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 1))
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="session")
def cut():
    "What to put before a command so that it has no network; nothing where the network cannot be cut off."
    apart = ["unshare", "--map-root-user", "--net"]
    possible = not subprocess.run([*apart, "true"], capture_output=True).returncode
    return [*apart, sys.executable, "-c", WITHOUT_NETWORK] if possible else []


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "Chromium, which Playwright drives."
    if not shutil.which("chromium"):
        pytest.skip("needs Chromium, such as Debian's package `chromium`")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make build/browser/ready")
    with sync_api.sync_playwright() as playwright:
        where = tmp_path_factory.mktemp("chromium")
        how = {"executable_path": shutil.which("chromium"), "args": FLAGS}
        own = playwright.chromium.launch_persistent_context(where, viewport={"width": 1200, "height": 5000}, **how)
        yield own
        own.close()


@pytest.fixture
def tries():
    "How often a fault is tried: `tries(sample, full)`, the full number in `make stress`."
    return lambda sample, full: full if "STRESS" in os.environ else sample


@pytest.fixture
def record():
    "Adds a line to the record that `make stress` keeps: what was tried, how often, and what came of it."

    def add(fault, tried, outcome):
        if "STRESS" not in os.environ:
            return
        file = Path(os.environ["STRESS"])
        rows = ([] if file.exists() else [["fault", "tried", "outcome"]]) + [[fault, tried, outcome]]
        with open(file, "a") as f:
            csv.writer(f, lineterminator="\n").writerows(rows)

    return add


@pytest.fixture(autouse=True)
def asks_no_other_machine():
    "Fails a test that asked another machine, where `tests/offline` refuses and notes it."
    log = Path(os.environ.get("OFFLINE", os.devnull))
    before = log.read_text()
    yield
    assert log.read_text() == before, "another machine was asked"


def pytest_configure(config):
    config.addinivalue_line("markers", "data: needs the full data sets")


def pytest_collection_modifyitems(config, items):
    "Skips what needs the data where they are not. Among several workers the longest tests begin first."
    for item in items:
        if item.get_closest_marker("data") and not os.environ.get("VAE_DIFFUSION_DATA"):
            item.add_marker(WITHOUT_DATA)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -LONG.get(item.originalname, 0))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        counts[report.outcome] += 1


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
