"""Fixtures of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.tiny_pipeline import save_tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))
