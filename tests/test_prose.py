"""Documentation and help texts are plain technical English: under one odd phrase per 1000 words."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launcher.cli.main import app
from tests.prose_patterns import MAX_HITS_PER_1000_WORDS, PATTERNS

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(PROJECT_ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((PROJECT_ROOT / "docs").glob("*.md")),
]
COMMANDS = sorted(typer.main.get_group(app).commands)


def find_odd_phrases(text: str) -> list[str]:
    """Each hit with its surroundings."""
    return [text[max(0, hit.start() - 40) : hit.end() + 40] for pattern in PATTERNS for hit in re.finditer(pattern, text)]


def check_prose(text: str) -> None:
    """Fail with the phrases of a text that has too many of them."""
    found = find_odd_phrases(text)
    words = len(text.split())
    assert 1000 * len(found) / words < MAX_HITS_PER_1000_WORDS, f"{len(found)} in {words} words: {found}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_plain_english(path: Path) -> None:
    check_prose(re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))


def test_the_help_texts_are_plain_english() -> None:
    runner = CliRunner()
    texts = []
    for words in ([], *([command] for command in COMMANDS)):
        result = runner.invoke(app, [*words, "--help"])
        assert result.exit_code == 0 and len(result.output) > 200
        texts.append(result.output)
    check_prose(re.sub(r"\s+", " ", "\n".join(texts)))


@pytest.mark.parametrize("text", ["what stands in the file", "the server goes on", "a process of its own", "so many ranks", "beside it"])
def test_an_odd_phrase_is_found(text: str) -> None:
    with pytest.raises(AssertionError, match="1 in"):
        check_prose(text)
