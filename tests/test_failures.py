"What is said when something fails: what it was, what to do, and where to read more."

import re

from conftest import made
from vae_diffusion.harness import identity
from vae_diffusion.harness.settings import Settings


def test_a_place_for_runs_that_cannot_be_used_is_refused_first(tmp_path):
    (tmp_path / "file").touch()
    wrong = {
        tmp_path / "file": "cannot be written .Not a directory",
        "/proc/none": "cannot be written",
        tmp_path / "a{b}": "braces in its name",
    }
    for place, message in wrong.items():
        status, said = made("reproduce", "SCALE=smoke", VAE_DIFFUSION_RUNS=str(place))
        line = said.splitlines()[0]
        assert status and str(place) in line and re.search(message, line), (place, said)


def test_failed_runs_and_reports_say_why_and_where_their_log_is(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path))
    gaps, folder = identity.Run("measure_gaps", Settings()), tmp_path / "digits-smoke"
    gaps.folder.mkdir(parents=True)
    (gaps.folder / "config.json").write_text("of another run")
    (folder / "results.csv").mkdir()
    status, said = made("reproduce", "SCALE=smoke", "PART=methods=normal")
    assert status and "Some runs failed" in said
    assert (
        f"{gaps.name} failed" in said
        and "does not hold the configuration" in said
        and f"see {folder}/logs/{gaps.name}.log" in said
    )
    assert (
        "the report failed" in said
        and "results.csv cannot be written (Is a directory)" in said
        and f"see {folder}/logs/report.log" in said
    )
    assert (
        "Traceback" in (folder / f"logs/{gaps.name}.log").read_text()
        and "results.csv cannot be written" in (folder / "logs/report.log").read_text()
    )
