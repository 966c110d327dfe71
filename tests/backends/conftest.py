"""What tests of backends share: folders of mapped files."""

import pytest

import fastrms.backends.pages


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of one page, so that small arrays are cut."""
    monkeypatch.setattr(fastrms.backends.pages, "PART_BYTES", 4096)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"
