"What is said when something fails: what it was, what to do, and where to read more."
import os
import re
import subprocess

from conftest import ROOT
from vae_diffusion import runs
from vae_diffusion.settings import Settings


def reproduce(place, *options):
    return subprocess.Popen(["make", "--no-print-directory", "reproduce", "SCALE=smoke", *options], cwd=ROOT, env=os.environ | {"VAE_DIFFUSION_RUNS": str(place)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_place_for_runs_that_cannot_be_used_is_refused_first(tmp_path):
    (tmp_path / "file").touch()
    wrong = {tmp_path / "file": "cannot be written .Not a directory", "/proc/none": "cannot be written", tmp_path / "a{b}": "braces in its name"}
    for (place, message), make in zip(wrong.items(), [reproduce(place) for place in wrong]):
        said, errors = make.communicate(timeout=300)
        assert make.returncode and not said
        line = errors.splitlines()[0]
        assert str(place) in line and re.search(message, line), (place, errors)


def test_failed_runs_and_reports_say_why_and_where_their_log_is(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path))
    gaps, folder = runs.Run("measure_gaps", Settings()), tmp_path / "digits-smoke"
    gaps.folder.mkdir(parents=True)
    (gaps.folder / "config.json").write_text("of another run")
    (folder / "results.csv").mkdir()
    make = reproduce(tmp_path, "PART=methods=normal")
    said, errors = make.communicate(timeout=300)
    assert make.returncode and "Some runs failed" in errors
    assert f"{gaps.name} failed" in errors and "does not hold the configuration" in errors and f"see {folder}/logs/{gaps.name}.log" in errors
    assert "the report failed" in errors and "results.csv cannot be written (Is a directory)" in errors and f"see {folder}/logs/report.log" in errors
    assert "Traceback" in (folder / f"logs/{gaps.name}.log").read_text() and "results.csv cannot be written" in (folder / "logs/report.log").read_text()
