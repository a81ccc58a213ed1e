from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import run_command
from schemas.errors import ResourceError

HEAVY = ("torch", "ray", "deepspeed", "transformers", "datasets")

RECIPE = """
name: run
out: {out}
corpora:
  train: {{labels: [a, b], text: [x], parts: [{{kind: file, path: {out}/missing.jsonl}}]}}
student: {{init: {{kind: layers, model: some/model, layers: 2}}, arm: golden}}
stages: [{{kind: finetune, corpus: train}}]
compare: {{arms: []}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path))
    return path


@pytest.mark.parametrize("statement", ["import schemas, schemas.job, schemas.plan", "HELP"])
def test_help_and_schemas_load_no_heavy_library(statement: str) -> None:
    help_ = "from cluster.cli import run_command; run_command(['--help'])"
    code = f"{help_ if statement == 'HELP' else statement}\nimport sys\n"
    code += f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
    code += "sys.exit(repr(loaded) if loaded else 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "nowhere.yaml"], "there is no such file"),
        (["run", "quickstart", "--set", "typo=1"], "unknown key"),
        (["evaluate", "somewhere"], "either --recipe or --data"),
        (["distill", "quickstart", "--hostfile", "nowhere"], "does not exist"),
    ],
)
def test_bad_usage_is_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_an_error_is_one_line_with_its_exit_code(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", str(recipe)]) == 3
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("tmkd: ")
    assert "missing.jsonl" in lines[-1]


def test_a_directory_without_permission_is_exit_code_6(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run_command(["plan", str(recipe)]) == ResourceError.exit_code
    assert "no permission" in capsys.readouterr().err


def test_a_traceback_only_with_debug(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["--debug", "plan", str(recipe)])
    assert "Traceback" in capsys.readouterr().err
    run_command(["plan", str(recipe), "--debug"])
    assert "Traceback" in capsys.readouterr().err
    run_command(["plan", str(recipe)])
    assert "Traceback" not in capsys.readouterr().err


def test_distill_without_stores_says_what_to_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["distill", str(recipe)]) == 3
    assert "tmkd precompute" in capsys.readouterr().err


def test_the_list_of_an_empty_root_is_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stores").mkdir()
    assert run_command(["store", "ls", str(tmp_path / "stores"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stores": []}
