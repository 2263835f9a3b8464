"""provenance.intoto.json of a release: an in-toto Statement v1 with SLSA provenance v1.

The subjects are the release's files. The statement is not signed: whoever publishes the release can
sign it, as with `cosign attest-blob`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from phiconv import __version__
from phiconv.release.plan import ReleasePlan
from phiconv.release.sbom import model_url, package_url
from phiconv.verify.documents import PREDICATE_TYPE, STATEMENT_TYPE

BUILD_TYPE = "urn:phiconv:release:v1"
"""Says how to read `externalParameters`: docs/releases.md."""


def statement_json(plan: ReleasePlan, digests: Mapping[str, str]) -> str:
    """The statement.

    Args:
        plan: The release.
        digests: sha256 by path of every file but the statement itself and SHA256SUMS.
    """
    document = {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "name": plan.name,
                    "artifacts": [
                        {
                            "path": item.path,
                            "recipe": item.output.manifest["recipe"]["resolved"],
                            "allowed": [f"not-run:{waiver.provider}" for waiver in item.waivers],
                        }
                        for item in plan.items
                    ],
                },
                "internalParameters": {
                    "artifacts": [
                        {
                            "path": item.path,
                            "recipeDigest": item.output.result.recipe_digest,
                            "key": item.output.result.artifact_key,
                            "steps": item.output.manifest.get("steps"),
                        }
                        for item in plan.items
                    ]
                },
                "resolvedDependencies": list(_dependencies(plan)),
            },
            "runDetails": {
                "builder": {"id": plan.builder_id, "version": {"phiconv": __version__}},
                **({"metadata": {"finishedOn": plan.date}} if plan.date else {}),
            },
        },
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _dependencies(plan: ReleasePlan) -> Iterator[dict[str, Any]]:
    """The source model's files, the texts that were measured on, and the packages."""
    record = plan.checkpoint
    base = model_url(plan.base_model, record.revision) if plan.base_model else None
    for name, digest in sorted(record.files.items()):
        algorithm, _, content = digest.partition(":")
        place = {"uri": f"{base}#{quote(name)}"} if base else {}
        yield {"name": name, **place, "digest": {algorithm: content}}
    token_sets = {
        (validation.measurement.tokens.name, validation.measurement.tokens.text_digest)
        for item in plan.items
        for validation in item.output.result.validations
    }
    for name, digest in sorted(token_sets):
        algorithm, _, content = digest.partition(":")
        yield {"name": f"tokens {name}", "digest": {algorithm: content}}
    for stage, digest in sorted({pair for item in plan.items for pair in item.calibrations}):
        algorithm, _, content = digest.partition(":")
        yield {"name": f"token ids of {stage}", "digest": {algorithm: content}}
    packages = {tool for item in plan.items for tool in item.output.result.tools.items()}
    for name, version in sorted(packages):
        yield {"name": name, "uri": package_url(name, version)}
