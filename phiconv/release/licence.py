"""The model's licence as the Hub's model cards and bills of materials write it."""

from __future__ import annotations

from collections.abc import Mapping

from phiconv.checkpoint.licence import ModelTerms

# The identifiers that the Hub takes, from its documentation of model cards.
HUB_LICENCES = frozenset(
    {
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "gemma",
        "unknown",
        "other",
    }
)
_SPDX = {"mit": "MIT", "apache-2.0": "Apache-2.0"}


def card_licence(terms: ModelTerms) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a model card's front matter.

    A licence that the Hub does not know is `other`, with its name.
    """
    name = terms.license
    known = name in HUB_LICENCES and name != "other"
    if known and name is not None:
        return {"license": name} | _without_none(license_link=terms.license_link)
    link = terms.license_link or next(iter(sorted(terms.files)), None)
    if name is None and not terms.files:
        return {"license": "unknown"}
    said = terms.license_name or (name if name != "other" else None)
    return {"license": "other"} | _without_none(license_name=said, license_link=link)


def licence_text(terms: ModelTerms) -> str:
    """The licence in a few words."""
    return terms.license_name or terms.license or "not stated"


def cyclonedx_licences(terms: ModelTerms) -> list[Mapping[str, Mapping[str, str]]]:
    """The `licenses` of a CycloneDX component; [] where nothing is known."""
    if terms.license in _SPDX:
        return [{"license": {"id": _SPDX[terms.license]}}]
    name = terms.license_name or terms.license
    return [{"license": {"name": name}}] if name else []


def _without_none(**values: str | None) -> dict[str, str]:
    return {key: value for key, value in values.items() if value is not None}
