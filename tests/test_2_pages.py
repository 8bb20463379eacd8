"Every definition page and reading page runs top to bottom, each in a process of its own."
import pytest
from conftest import run, tracked


@pytest.mark.parametrize("page", [p for p in tracked("nbs/*.ipynb") if "/experiments/" not in p])
def test_page(page):
    run("nbdev_test", "--path", page, "--n_workers", "0", timeout=300)
