"""What tests of backends share: where gradients are read, and folders of mapped files."""

import pytest

import fastrms.backends.pages
from fastrms.kernels import pointers


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of one page, so that small arrays are cut."""
    monkeypatch.setattr(fastrms.backends.pages, "PART_BYTES", 4096)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture(params=[0, 10**9], ids=["read in place", "gathered"])
def gather_below(request, monkeypatch):
    """Small arrays are copied together by compiled code, larger ones are read where they lie: both, for any size."""
    monkeypatch.setattr(pointers, "GATHER_BELOW", request.param)
