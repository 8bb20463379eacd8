"What people do to a checkout and have in their environment: make works, or says in a line what is wrong."

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import pytest
import yaml
from conftest import ROOT, run, snakemake, tracked
from jupyter_client.manager import start_new_kernel

from vae_diffusion.harness import execution


def make(*arguments, folder=ROOT, **variables):
    "Exit status and what was said to the user."
    plain = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # of `make test`
    done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=plain | variables)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    "The checkout as git would give it away, in a repository of its own."
    for f in tracked("."):
        (tmp_path / "copy" / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, tmp_path / "copy" / f)
    for command in "init", "add .", "-c user.name=x -c user.email=x@example.org commit -m x":
        run("git", "-C", tmp_path / "copy", *command.split())
    return tmp_path / "copy"


@pytest.mark.parametrize("cores", ["0", "-1", "", "1.5", "all of them"])
def test_a_number_of_runs_at_once_that_makes_no_sense(cores, tmp_path):
    status, said = make("reproduce", "SCALE=smoke", f"CORES={cores}", VAE_DIFFUSION_RUNS=str(tmp_path))
    assert status and f"CORES={cores}: give the number of runs at once" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["publish-weights", "publish-vaes", "figures"])
def test_only_results_of_the_published_scale_are_published(target, tmp_path):
    status, said = make(target, "SCALE=smoke", VAE_DIFFUSION_RUNS=str(tmp_path))
    assert status and f"make {target} SCALE=smoke: what is published has scale cpu" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale, folder", [("cpu", "binary_mnist"), ("paper", "binary_mnist-paper")])
def test_what_is_trained_is_published_by_a_command_of_its_own(scale, folder):
    "At scale paper beside the published model, on which the results of scale cpu depend."
    asked = "--dry-run", "DATASET=binary_mnist", f"SCALE={scale}"
    (failed, trains), (failed_too, publishes) = make("weights", *asked), make("publish-weights", *asked)
    assert not failed and not failed_too and f"-f nbs/experiments/params/binary_mnist-{scale}.yaml" in trains
    assert "publish" not in trains and publishes.startswith(trains)
    assert f"publish_weights(settings.load_params('binary_mnist', '{scale}'), '{folder}')" in publishes


def test_a_users_snakemake_profiles_have_no_say(tmp_path):
    profile = tmp_path / ".config/snakemake/default/config.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("nonsense: 1\n")
    own = {"HOME": str(tmp_path), "SNAKEMAKE_PROFILE": str(profile.parent)}
    status, said = make("reproduce", "SCALE=smoke", "PART=colour=red", **own)
    assert status and "colour is no part" in said, said


def test_a_moved_checkout_makes_its_environment_again(copy):
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/pip").write_text(f"#!{copy}/.venv/bin/python3\n")
    (copy / ".venv/bin/ready").touch()
    status, said = make("--dry-run", "test", folder=copy)
    assert not status and "-m venv" not in said, said
    moved = copy.rename(copy.parent / "moved")
    status, said = make("--dry-run", "test", folder=moved)
    assert not status and "This checkout was moved" in said and "-m venv --clear .venv" in said, said
    (moved / ".venv").rename(moved.parent / "environment")
    (moved / ".venv").symlink_to(moved.parent / "environment")
    status, said = make("--dry-run", "test", folder=moved)
    assert not status and "-m venv" not in said, said


def test_line_endings_of_a_users_git(copy):
    run("git", "clone", "--quiet", "-c", "core.autocrlf=true", copy, copy.parent / "clone")
    changed = [f for f in tracked(".") if (ROOT / f).read_bytes() != (copy.parent / "clone" / f).read_bytes()]
    assert not changed


def test_folders_that_are_links_to_another_disk(copy):
    for name in "runs", "build", ".venv", ".snakemake":
        (copy / name).symlink_to(copy.parent)
    assert run("git", "-C", copy, "status", "--porcelain") == ""


def test_lab_starts_on_loopback_for_every_user(tmp_path):
    (tmp_path / ".jupyter").mkdir()
    (tmp_path / ".jupyter/jupyter_server_config.py").write_text("c.ServerApp.ip = '0.0.0.0'\n")
    own = os.environ | {"HOME": str(tmp_path), "BROWSER": "true"}
    lab = subprocess.Popen(
        ["make", "lab"],
        cwd=ROOT,
        env=own,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    late = threading.Timer(120, os.killpg, (lab.pid, signal.SIGKILL))
    late.start()
    address = next((line for line in lab.stdout if "http://" in line), "")
    late.cancel()
    os.killpg(lab.pid, signal.SIGKILL)
    lab.wait()
    assert "http://127.0.0.1:" in address or "http://localhost:" in address, address


SLOW = """
import time
handlers = get_ipython().kernel.shell_handlers
async def slow(*message, told=handlers["kernel_info_request"]):
    await told(*message)
    time.sleep(5)
handlers["kernel_info_request"] = slow
"""


@pytest.mark.parametrize("told", [[], execution.QUIET["extra_arguments"]], ids=["on its own", "within a run"])
def test_a_kernel_that_ends_while_it_is_still_at_work_says_nothing(told):
    "The last that papermill asks of a kernel is kernel_info; with the reply it interrupts it, and ends it."
    with tempfile.TemporaryFile("w+") as said:
        manager, client = start_new_kernel(kernel_name="python3", stderr=said, extra_arguments=told)
        client.execute_interactive(SLOW, timeout=60)
        client.kernel_info(reply=True, timeout=60)
        manager.shutdown_kernel()
        said.seek(0)
        assert said.read() == ""


def test_make_runs_by_the_profile_of_one_machine():
    profile = ROOT / "workflow/profiles/local/config.yaml"
    status, said = make("reproduce", "--dry-run")
    options = shlex.split(said.split("snakemake ")[-1].split("--snakefile")[0])
    known = {"--profile": ["none"], "--workflow-profile": ["none"]}
    for key, value in yaml.safe_load(profile.read_text()).items():
        known[f"--{key}"] = {bool: [], str: [value]}.get(type(value), value)
    at = [i for i, word in enumerate(options) if word.startswith("--")] + [len(options)]
    assert not status and {options[i]: options[i + 1 : j] for i, j in zip(at, at[1:])} == known


def test_a_cluster_takes_a_profile_given_to_snakemake_itself(tmp_path, monkeypatch):
    "The command of nbs/reproduce.ipynb with the profile for SLURM, which here only plans the runs."
    profile = (ROOT / "workflow/profiles/slurm/config.yaml").read_text()
    assert profile.count("executor: slurm\n") == 1
    (tmp_path / "config.yaml").write_text(profile.replace("executor: slurm\n", "executor: local\ndry-run: true\n"))
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path))
    process = snakemake(
        "--snakefile",
        "workflow/Snakefile",
        "--profile",
        tmp_path,
        "--nolock",
        "--config",
        "dataset=binary_mnist",
        "scale=paper",
        "--",
        "report",
        said=(tmp_path / "said").open("w"),
    )
    process.join()
    said = (tmp_path / "said").read_text()
    assert not process.exitcode and "\nrule report:" in said, said
    assert said.count("\nrule run:") == said.count("runtime=240, mem_mb=4000") > 0, said


ASK = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server: socket.create_connection(server.getsockname()).close()
try: socket.create_connection((sys.argv[1], 80), 5)
except OSError as e: print(e)
"""


@pytest.mark.parametrize("host", ["example.org", "192.0.2.1"])
def test_ci_refuses_and_notes_what_asks_another_machine(host, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests/offline"), "OFFLINE": str(tmp_path / "asked")}
    assert f"{host} may not be asked" in run(sys.executable, "-c", ASK, host, env=env)
    assert (tmp_path / "asked").read_text().startswith(f"{host} by ")
