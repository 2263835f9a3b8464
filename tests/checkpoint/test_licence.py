from __future__ import annotations

from pathlib import Path

import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.licence import ModelTerms, model_terms
from tests.phi3_checkpoints import write_phi3_checkpoint

MIT = "    MIT License\n\nCopyright (c) Somebody\r\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_phi3_checkpoint(tmp_path / "model")


def terms(folder: Path) -> ModelTerms:
    return model_terms(Checkpoint(folder))


def test_a_model_without_card_and_licence_has_no_terms(folder: Path) -> None:
    assert terms(folder) == ModelTerms()


def test_licence_files_are_carried_as_they_are(folder: Path) -> None:
    (folder / "LICENSE").write_bytes(MIT.encode())
    (folder / "NOTICE.md").write_bytes(b"Caf\xe9, Apache License components")
    found = terms(folder)
    assert found.license == "mit"
    assert found.files == {"LICENSE": MIT, "NOTICE.md": "Café, Apache License components"}


def test_the_card_goes_before_the_licence_file(folder: Path) -> None:
    (folder / "LICENSE").write_bytes(MIT.encode())
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: phi-terms\nlicense_link: LICENSE\n"
        "language: [en, fr]\ntags: [x]\n---\n# Phi\n"
    )
    found = terms(folder)
    assert (found.license, found.license_name, found.license_link) == (
        "other",
        "phi-terms",
        "LICENSE",
    )
    assert found.languages == ("en", "fr")


@pytest.mark.parametrize(
    "card",
    [
        "",
        "---\n",
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "# license: mit\n---\nlicense: x\n---\n",
        "---\nlicense: 3\nlanguage: 4\n---\n",
    ],
)
def test_a_card_that_says_nothing_counts_as_none(folder: Path, card: str) -> None:
    (folder / "README.md").write_text(card)
    assert terms(folder) == ModelTerms()


def test_the_card_is_no_part_of_the_digest(folder: Path) -> None:
    before = Checkpoint(folder).digest
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert Checkpoint(folder).digest == before
