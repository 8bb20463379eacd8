"The list of faults for `make mutants`: each can be put in, and every module has some."

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, tracked
from mutants import MUTANTS, page, put


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{Path(m['file']).stem}: {m['fault']}" for m in MUTANTS])
def test_fault_can_be_put_in(mutant, tmp_path):
    for f in mutant["file"], page(mutant["file"]):
        (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, tmp_path / f)
    put(mutant, tmp_path)
    for f in mutant["file"], page(mutant["file"]):
        assert (tmp_path / f).read_bytes() != (ROOT / f).read_bytes()
    compile((tmp_path / mutant["file"]).read_text(), mutant["file"], "exec")


def test_every_module_has_faults():
    modules = {f for f in tracked("vae_diffusion/*.py") if not Path(f).stem.startswith("_")}
    assert {m["file"] for m in MUTANTS} == modules
    assert len({m["fault"] for m in MUTANTS}) == len(MUTANTS) >= 60
