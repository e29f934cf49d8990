"""Hold the documents to what is there: every test that docs/semantics.md names exists, every link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def known_tests() -> set[str]:
    sources = (path.read_text() for path in (ROOT / "tests").glob("t?_*.py"))
    return {name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)}


def test_every_test_that_the_semantics_name_exists() -> None:
    named = set(re.findall(r"\btest_\w+", (ROOT / "docs" / "semantics.md").read_text()))
    assert len(named) > 40
    assert not named - known_tests()


def test_every_promise_names_a_test() -> None:
    text = (ROOT / "docs" / "semantics.md").read_text()
    promises = re.split(r"\n(?=\* )|\n\n", text)
    bare = [one for one in promises if one.startswith("* ") and not re.search(r"\[[^\]]*test_\w+[^\]]*\]", one)]
    assert not bare


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
