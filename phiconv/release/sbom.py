"""sbom.cdx.json of a release: CycloneDX 1.6 with the models, their files and what made them."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any
from urllib.parse import quote

from phiconv import __version__
from phiconv.release.licence import cyclonedx_licences
from phiconv.release.plan import Item, ReleasePlan
from phiconv.verify.documents import SBOM_FORMAT

Component = dict[str, Any]

_PHICONV = "phiconv"
_MEASURED = ("kl_divergence.mean", "top1_agreement", "perplexity.ratio")
_ALGORITHMS = {"blake3": "BLAKE3", "sha256": "SHA-256"}


def cyclonedx_json(plan: ReleasePlan, digests: Mapping[str, str]) -> str:
    """The bill of materials.

    Args:
        plan: The release.
        digests: sha256 by path of every file of the release that it lists.

    Returns:
        JSON; the same for the same release, so without the time of its making unless
        SOURCE_DATE_EPOCH is set.
    """
    shipped = {path for item in plan.items for path in item.files.values()}
    components = [
        _source(plan),
        *(_artifact(item, plan, digests) for item in plan.items),
        *(_file(name, digest) for name, digest in digests.items() if name not in shipped),
        *_libraries(plan),
    ]
    tools = {"components": [_tool()]}
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": SBOM_FORMAT[0],
        "specVersion": SBOM_FORMAT[1],
        "serialNumber": _serial_number(plan, components),
        "version": 1,
        "metadata": {
            **({"timestamp": plan.date} if plan.date else {}),
            "tools": tools,
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "release",
                "name": plan.name,
                **_with_licences(plan),
            },
        },
        "components": components,
        "dependencies": _dependencies(plan),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def package_url(name: str, version: str) -> str:
    """The purl of a Python package."""
    normal = name.lower().replace("_", "-")
    return f"pkg:pypi/{quote(normal)}@{quote(version, safe='')}"


def model_url(repo_id: str, revision: str | None) -> str:
    """The purl of a model on the Hugging Face Hub."""
    return f"pkg:huggingface/{quote(repo_id)}" + (f"@{revision}" if revision else "")


def _serial_number(plan: ReleasePlan, components: list[Component]) -> str:
    text = json.dumps([plan.name, components], sort_keys=True)
    return uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(text.encode()).hexdigest()).urn


def _with_licences(plan: ReleasePlan) -> dict[str, Any]:
    licences = cyclonedx_licences(plan.terms)
    return {"licenses": licences} if licences else {}


def _tool() -> Component:
    return {
        "type": "application",
        "name": _PHICONV,
        "version": __version__,
        "purl": package_url(_PHICONV, __version__),
    }


def _source(plan: ReleasePlan) -> Component:
    record = plan.checkpoint
    files: list[Component] = []
    for name, digest in sorted(record.files.items()):
        algorithm, _, content = digest.partition(":")
        files.append(
            {
                "type": "file",
                "bom-ref": f"source/{name}",
                "name": name,
                "hashes": [{"alg": _ALGORITHMS[algorithm], "content": content}],
            }
        )
    return {
        "type": "machine-learning-model",
        "bom-ref": "source",
        "name": plan.base_model or record.source,
        **({"version": record.revision} if record.revision else {}),
        **({"purl": model_url(plan.base_model, record.revision)} if plan.base_model else {}),
        **_with_licences(plan),
        "modelCard": {"modelParameters": _parameters(plan)},
        "components": files,
    }


def _parameters(plan: ReleasePlan) -> dict[str, Any]:
    architecture = plan.checkpoint.architecture
    named = {"modelArchitecture": architecture} if architecture else {}
    return {"task": "text-generation", "architectureFamily": "transformer", **named}


def _artifact(item: Item, plan: ReleasePlan, digests: Mapping[str, str]) -> Component:
    metrics = [
        {
            "type": name,
            "value": repr(value),
            "slice": f"{validation.measurement.tokens}, {validation.verdict}",
        }
        for validation in item.output.result.validations
        for name in _MEASURED
        if (value := validation.measurement.metrics.get(name)) is not None
    ]
    card: dict[str, Any] = {"modelParameters": _parameters(plan)}
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return {
        "type": "machine-learning-model",
        "bom-ref": f"artifact/{item.output.name}",
        "name": item.path,
        "description": f"made by the recipe {item.output.name}",
        **_with_licences(plan),
        "modelCard": card,
        "components": [_file(path, digests[path]) for path in sorted(item.files.values())],
    }


def _file(name: str, sha256: str) -> Component:
    return {
        "type": "file",
        "bom-ref": f"file/{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
    }


def _tools_of(item: Item) -> Iterator[tuple[str, str]]:
    yield from sorted(item.output.result.tools.items())


def _libraries(plan: ReleasePlan) -> Iterator[Component]:
    """What shaped bytes or figures, in the versions of the builds."""
    for name, version in sorted({tool for item in plan.items for tool in _tools_of(item)}):
        url = package_url(name, version)
        found: Component = {
            "type": "library",
            "bom-ref": url,
            "name": name,
            "version": version,
            "purl": url,
        }
        licences = _installed_licences(name, version)
        yield found | ({"licenses": licences} if licences else {})


def _installed_licences(name: str, version: str) -> list[dict[str, Any]]:
    """The licence that a package states, where the build's very version is installed."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return []
    return _stated_licences(package) if package.version == version else []


def _stated_licences(package: Distribution) -> list[dict[str, Any]]:
    metadata = package.metadata
    stated = {key: str(metadata[key]) for key in ("License-Expression", "License")
              if key in metadata}  # fmt: skip
    if expression := stated.get("License-Expression"):
        return [{"expression": expression}]
    named = stated.get("License", "").strip()
    if named and "\n" not in named:
        return [{"license": {"name": named}}]
    classifiers = metadata.get_all("Classifier") or []
    names = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License ::")]
    return [{"license": {"name": text}} for text in sorted(set(names))]


def _dependencies(plan: ReleasePlan) -> list[dict[str, Any]]:
    artifacts = [f"artifact/{item.output.name}" for item in plan.items]
    return [
        {"ref": "release", "dependsOn": artifacts},
        *(
            {
                "ref": artifact,
                "dependsOn": ["source", *(package_url(*tool) for tool in _tools_of(item))],
            }
            for artifact, item in zip(artifacts, plan.items, strict=True)
        ),
    ]
