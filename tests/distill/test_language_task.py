"""Training a tiny language model through the trainer, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.stage_directory import StageDirectory
from tests.distill.tiny_training import train
from tests.tiny_language import TinyLanguage
from tests.tiny_stage import read_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyLanguage:
    return TinyLanguage(tmp_path_factory.mktemp("language"))


def test_a_stage_leaves_a_model_a_record_and_a_complete_status(stage: TinyLanguage) -> None:
    job = stage.job("plain")
    assert train(job) == "complete"
    directory = StageDirectory(Path(job.output))
    status = directory.read_status()
    assert status is not None
    assert status.state == "complete"
    lines = read_metrics(job.output)
    print(lines)
