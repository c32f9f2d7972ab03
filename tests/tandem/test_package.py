"""The package: its names, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import tandem

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_public_name_exists_and_others_are_refused() -> None:
    assert {"LLM", "SamplingParams", "init", "AutoModel", "LlamaTokenizer", "InputError", "RanksFailedError"} <= set(tandem.__all__)
    assert all(getattr(tandem, name) is not None for name in tandem.__all__)
    assert dir(tandem) == sorted(tandem.__all__)
    with pytest.raises(AttributeError, match="module 'tandem' has no attribute 'Llm'; it has LLM"):
        _ = tandem.Llm


def test_only_programs_that_are_ranks_import_pytorch() -> None:
    code = (
        "import sys, tandem; light = {'typer', 'torch', 'numpy', 'tokenizers'} & set(sys.modules); "
        "tandem.LLM, tandem.SamplingParams, tandem.RanksFailedError, tandem.LlamaTokenizer, tandem.RequestOutput; "
        "print(light, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("set() False\n", "")
