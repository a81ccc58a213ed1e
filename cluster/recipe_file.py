"""Recipes as files: YAML in, overrides applied, a frozen recipe of either task out, and back.

Invariant: every error names the file, the field's path and what was expected
(tests/cluster/test_recipe_file.py).
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from schemas.any_recipe import AnyRecipe, recipe_type
from schemas.digest import replace_file
from schemas.errors import RecipeError


def load_recipe(
    source: str, overrides: Sequence[str] = (), *, out: str | None = None, size: str | None = None
) -> AnyRecipe:
    """Reads a recipe.

    Args:
        source: A path, or the name of a recipe that ships with tmkd, such as ``quickstart``.
        overrides: ``dotted.path=value`` each; the value is YAML, list items go by index or by their
            ``name``: ``stages.0.alpha=0.5``, ``teachers.t1.num_actors=2``.
        out: Overrides the recipe's output root.
        size: One of the file's ``sizes``.

    Raises:
        RecipeError: The file is missing, no YAML mapping, or does not describe a recipe.
    """
    document = load_document(source, size=size)
    for override in overrides:
        apply_override(document, override)
    if out is not None:
        document["out"] = out
    return parse_recipe(document, source=source)


def load_document(source: str, *, size: str | None = None) -> dict[str, Any]:
    """Reads a recipe's or a sweep's file as a mapping, its size applied.

    A file may offer ``sizes``: from a name to ``{dotted.path: value}``. Without one it is as written.

    Raises:
        RecipeError: The file is missing, no YAML mapping, or has no such size.
    """
    text = _read_source(source)
    try:
        document = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"is not YAML: {' '.join(str(error).split())}", source=source) from error
    if not isinstance(document, dict):
        raise RecipeError("expected a mapping of fields at the top level", source=source)
    # An alias is the same object: setting a field in one place would set it in all.
    document = _copy(document)
    sizes = document.pop("sizes", {})
    if not isinstance(sizes, dict) or not all(isinstance(changes, dict) for changes in sizes.values()):
        raise RecipeError("expected names with {dotted.path: value} each", source=source, field="sizes")
    if size is not None and size not in sizes:
        known = ", ".join(sizes) or "none"
        raise RecipeError(f"there is no size {size!r}; the file has {known}", source=source, field="sizes")
    for path, value in sizes.get(size, {}).items():
        set_field(document, str(path), value)
    return document


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def parse_recipe(document: dict[str, Any], *, source: str | None = None) -> AnyRecipe:
    """Validates a recipe that is already a dictionary.

    Raises:
        RecipeError: The first error, and how many more there are.
    """
    kind = recipe_type(document, source=source)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise explain_validation(error, source, kind.model_json_schema()) from error


def dump_recipe(recipe: AnyRecipe) -> str:
    """Returns the resolved recipe as YAML, defaults included."""
    document = recipe.model_dump(mode="json")
    return yaml.dump(document, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=100)


def write_recipe(recipe: AnyRecipe, path: Path) -> None:
    """Writes the resolved recipe atomically."""
    replace_file(path, dump_recipe(recipe).encode())


def shipped_recipes() -> tuple[str, ...]:
    """Returns the names of the recipes that ship with tmkd."""
    return _list_shipped("")


def shipped_sweeps() -> tuple[str, ...]:
    """Returns the names of the sweeps that ship with tmkd, such as ``sweeps/qnli``."""
    return _list_shipped("sweeps/")


def _list_shipped(folder: str) -> tuple[str, ...]:
    files = (importlib.resources.files("recipes") / folder).iterdir()
    names = sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
    return tuple(f"{folder}{name}" for name in names)


_MERGE_TAG = "tag:yaml.org,2002:merge"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


class _RecipeLoader(yaml.SafeLoader):
    """Reads ``1e-5`` as a number, and refuses a key given twice.

    YAML 1.1 would take the number for text and silently keep the last of the keys.
    """


class _RecipeDumper(yaml.SafeDumper):
    """Quotes text that ``_RecipeLoader`` would read as a number."""


def _construct_unique(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE_TAG]
    for position, key in enumerate(keys):
        if key in keys[:position]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", node.start_mark
            )
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_RecipeLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique)
for _kind in (_RecipeLoader, _RecipeDumper):
    _kind.add_implicit_resolver(_FLOAT_TAG, _EXPONENT, list("-+0123456789"))


def _read_source(source: str) -> str:
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot be read ({error})", source=source) from error
    # `recipes/quickstart.yaml` also works where tmkd was installed from a wheel.
    name = source.removesuffix(".yaml").removeprefix("recipes/")
    if name in (*shipped_recipes(), *shipped_sweeps()):
        return (importlib.resources.files("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    known = ", ".join((*shipped_recipes(), *shipped_sweeps()))
    raise RecipeError(f"there is no such file; recipes that ship with tmkd: {known}", source=source)


def apply_override(document: dict[str, Any], override: str) -> None:
    """Applies ``dotted.path=value``, whose value is YAML.

    Raises:
        RecipeError: It is not of that form, or the path leads nowhere.
    """
    path, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"--set wants dotted.path=value, got {override!r}")
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {path}: the value {text!r} is not YAML", field=path) from error
    set_field(document, path, value)


def set_field(document: dict[str, Any], path: str, value: Any) -> None:
    """Sets a field; mappings on the way that are not there are made.

    Args:
        document: Of a recipe.
        path: Dotted; list items go by index or by their ``name``.
        value: Any.

    Raises:
        RecipeError: The path leads nowhere.
    """
    steps = path.split(".")
    if not all(steps):
        raise RecipeError(f"--set wants dotted.path=value, got the path {path!r}")
    target: Any = document
    for step in steps[:-1]:
        target = _descend(target, step, path)
    last = steps[-1]
    if isinstance(target, list):
        target[_list_position(target, last, path)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise RecipeError(f"--set {path}: {last!r} is below a value that has no fields", field=path)


def _descend(target: Any, step: str, path: str) -> Any:
    if isinstance(target, list):
        return target[_list_position(target, step, path)]
    if isinstance(target, dict):
        if target.get(step) is None:
            target[step] = {}
        return target[step]
    raise RecipeError(f"--set {path}: {step!r} is below a value that has no fields", field=path)


def _list_position(items: list[Any], step: str, path: str) -> int:
    for position, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == step:
            return position
    if step.isdigit() and int(step) < len(items):
        return int(step)
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    expected = f"0 to {len(items) - 1}" + (f", or a name of {', '.join(names)}" if names else "")
    raise RecipeError(f"--set {path}: no item {step!r}; expected {expected}", field=path)


def explain_validation(error: ValidationError, source: str | None, schema: dict[str, Any]) -> RecipeError:
    """Returns the error that names a document's first mistake, and how many more there are."""
    details = error.errors(include_url=False)
    first = details[0]
    path, parent = _walk_schema(first["loc"], schema)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key; expected one of {', '.join(sorted(parent.get('properties', {})))}"
    elif "input" in first and isinstance(first["input"], str | int | float | bool | None):
        message = f"{message}, got {first['input']!r}"
    if len(details) > 1:
        message = f"{message} (and {len(details) - 1} more errors)"
    return RecipeError(message, source=source, field=".".join(path) or None)


def _walk_schema(location: tuple[int | str, ...], schema: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Follows an error's location through the recipe's JSON schema.

    Returns:
        The path as the recipe's author wrote it (pydantic adds the tag of a union), and the schema
        of the mapping that holds the last step.
    """
    node: dict[str, Any] = schema
    path: list[str] = []
    parent = node
    for step in location:
        node = _resolve(node, schema)
        tags = node.get("discriminator", {}).get("mapping", {})
        if step in tags:
            node = {"$ref": tags[step]}
            continue
        path.append(str(step))
        parent = node
        if isinstance(step, int):
            node = node.get("items", {})
        else:
            maps = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
            value_schema = next((value for value in maps if isinstance(value, dict)), {})
            node = node.get("properties", {}).get(step, value_schema)
    return path, parent


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    options = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
    if len(options) == 1:
        node = options[0]
    if "$ref" in node:
        return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node
