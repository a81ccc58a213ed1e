"""What a wheel holds; the suite itself runs from the checkout, where nothing can be missing."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("schemas", "precompute", "distill", "cluster", "recipes")


def test_the_wheel_holds_every_package() -> None:
    found = {path.parent.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {Path("schemas/storage"), Path("cluster/language")} < found
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["packages"]["find"]["include"]
    for package in found:
        assert (ROOT / package / "__init__.py").is_file(), f"{package} is left out of the wheel"
        name = ".".join(package.parts)
        assert any(fnmatch(name, pattern) for pattern in patterns), f"{name} is left out of the wheel"
