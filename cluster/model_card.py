"""The model card of an export: the hub's metadata and what a reader must know, as far as it is known.

The metadata goes through huggingface_hub, so that the hub reads what was meant. Nothing is asked of the
network, and nothing is made up: what no file records is said to be not known.

Invariants:
    1. No path of this machine is in a card (tests/cluster/test_model_card.py).
    2. A licence is the caller's word or ``unknown`` (tests/cluster/test_model_card.py).
    3. The accuracy in the metadata is that of the exported model (tests/cluster/test_model_card.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from cluster import figures
from cluster.card_facts import CardSource, CorpusFact, RunFacts, run_facts
from schemas.errors import RecipeError

CARD_FILE = "README.md"
UNKNOWN_LICENCE = "unknown"
OTHER_LICENCE = "other"
# Common ids that the hub takes as they are; of all others the name is given, which is never wrong.
# fmt: off
LICENCE_IDS = frozenset(
    (
        "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0",
        "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause",
        "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5",
        "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
        "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
        "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0",
        "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "fair-noncommercial-research-license", "gemma",
        "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1",
        "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4",
        "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "open-mdw",
        "openrail", "openrail++", "osl-3.0", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
    )
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Licences:
    """What the caller says of licences.

    Attributes:
        own: Of the export; None: not said.
        sources: From the name of a teacher or corpus to its licence.
    """

    own: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def is_hub_id(self) -> bool:
        """Tells whether the hub knows the export's licence by this id."""
        return self.own is None or self.own in LICENCE_IDS

    def of(self, name: str) -> str:
        """Returns the licence of a teacher or corpus."""
        return self.sources.get(name, "not recorded")


def parse_source_licences(values: list[str]) -> dict[str, str]:
    """Parses ``NAME=ID`` each.

    Raises:
        RecipeError: One is none, or a name is given twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, _, licence = value.partition("=")
        if not name or not licence.strip():
            raise RecipeError(f"--source-license wants NAME=ID, got {value!r}")
        if name in found:
            raise RecipeError(f"--source-license names {name} twice")
        found[name] = licence.strip()
    return found


def check_source_names(licences: Licences, source: CardSource) -> None:
    """Checks that licences are given to teachers and corpora of the student's run only.

    Raises:
        RecipeError: The run has no such teacher or corpus.
    """
    if source.origin is None:
        return
    recipe = source.origin.recipe
    names = [*(teacher.name for teacher in recipe.teachers), *recipe.corpora]
    wrong = next((name for name in licences.sources if name not in names), None)
    if wrong is not None:
        raise RecipeError(
            f"--source-license: the run has no teacher or corpus {wrong!r}; it has {', '.join(names)}"
        )


def write_card(path: Path, source: CardSource, licences: Licences) -> None:
    """Writes the card of an export."""
    ModelCard(render_card(source, licences)).save(path)


def render_card(source: CardSource, licences: Licences) -> str:
    """Returns the card: metadata and text."""
    facts = run_facts(source)
    environment = Environment(
        loader=PackageLoader("cluster"),
        # Markdown: what could end a table's cell or open a tag is escaped by `cell`.
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": cell,
        "percent": figures.format_percent,
        "points": figures.format_difference,
        "count": figures.format_count,
    }
    text = environment.get_template("model_card.md.j2").render(
        source=source, facts=facts, licences=licences, licence=licences.own or UNKNOWN_LICENCE
    )
    metadata = _metadata(source, facts, licences).to_yaml()
    return f"---\n{metadata}\n---\n\n{text}"


def cell(value: object) -> str:
    """Returns a name as one line of Markdown that ends no table cell and opens no tag."""
    line = " ".join(str(value).split())
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _metadata(source: CardSource, facts: RunFacts | None, licences: Licences) -> ModelCardData:
    fields: dict[str, Any] = {
        "license": UNKNOWN_LICENCE if licences.own is None else licences.own,
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["text-classification", "knowledge-distillation", *(["onnx"] if source.onnx else [])],
    }
    if not licences.is_hub_id():
        fields |= {"license": OTHER_LICENCE, "license_name": licences.own}
    if facts is not None:
        fields |= {
            "base_model": facts.base_hub_id,
            "datasets": list(facts.hub_datasets) or None,
        }
    cost = source.cost
    if cost is not None and cost.accuracy_folded is not None:
        fields |= {
            "metrics": ["accuracy"],
            "model_name": source.name,
            "eval_results": [_result(source.measured_on, cost.accuracy_folded)],
        }
    return ModelCardData(**fields)


def _result(corpus: CorpusFact, accuracy: float) -> EvalResult:
    return EvalResult(
        task_type="text-classification",
        dataset_type=corpus.hub_id or corpus.name,
        dataset_name=corpus.name,
        dataset_config=corpus.hub_config,
        dataset_split=corpus.hub_split,
        metric_type="accuracy",
        metric_value=round(accuracy, 6),
    )
