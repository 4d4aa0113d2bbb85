"""The guide's code for CuPy as it stands there, on a GPU."""

import pytest

from tests.blocks import blocks_of, pages, run_page

pytestmark = pytest.mark.gpu

CUPY = [page for page in pages() if any("import cupy" in block.text for block in blocks_of(page))]


@pytest.mark.parametrize("page", CUPY)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # a process holds one GPU; JAX takes CPU devices
    run_page(page, tmp_path, "cuda")
