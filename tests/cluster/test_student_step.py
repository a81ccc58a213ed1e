from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.student_step import check_stores
from schemas.errors import DamagedStoreError
from tests.store_factory import target
from tests.tiny_stage import TinyStage


def test_what_a_later_stage_lacks_shows_before_the_first(tmp_path: Path) -> None:
    stage = TinyStage(tmp_path / "stage")
    root = Path(shutil.copytree(stage.stores["first"], tmp_path / "copy"))
    jobs = [stage.job("stage-1"), stage.job("stage-2", soft_targets=(target(("first", [root])),))]
    check_stores(jobs)
    next((root / "data").iterdir()).unlink()
    with pytest.raises(DamagedStoreError, match="is missing"):
        check_stores(jobs)
    check_stores(jobs[:1])
