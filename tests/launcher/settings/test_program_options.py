"""Which words of `tandem run` are tandem's options, and which belong to the program."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.settings.program_options import separate_program


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("script.py", "-- script.py"),
        ("script.py --workers 2 a b", "--workers 2 -- script.py a b"),
        ("--workers 2 script.py a --workers 7", "--workers 2 -- script.py a --workers 7"),
        ("script.py --workers=2 --own --log-dir x", "--workers=2 -- script.py --own --log-dir x"),
        ("-n2 script.py --log_dir d -h", "-n2 --log_dir d -- script.py -h"),
        ("script.py -- --workers 2", "-- script.py --workers 2"),
        ("-n 2 -- script.py --workers 2", "-n 2 -- script.py --workers 2"),
        ("-m package.module --workers 2 x -m y", "-m package.module --workers 2 -- x -m y"),
        ("--workers 2 -m package.module", "--workers 2 -m package.module"),
        ("--module=package --help", "--module=package -- --help"),
        ("--help", "--help"),
        ("--unknown script.py", "--unknown -- script.py"),
        ("script.py --workers", "--workers -- script.py"),
        ("", ""),
    ],
)
def test_words_after_the_program_are_its_own(line: str, expected: str) -> None:
    assert separate_program(line.split()) == expected.split()


@given(st.lists(st.text(max_size=8)))
def test_any_words_after_the_separator_pass_through_unchanged(words: list[str]) -> None:
    assert separate_program(["script.py", "-n", "2", "--", *words]) == ["-n", "2", "--", "script.py", *words]
