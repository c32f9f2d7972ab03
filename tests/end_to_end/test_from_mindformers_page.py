"""docs/from-mindformers.md: every command of the page, in order, on a small model under the names that the page uses."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Tandem

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PAGE = PROJECT_ROOT / "docs" / "from-mindformers.md"
RTN = """    quantization_config:
      quant_method: 'rtn'
      weight_dtype: 'int8'
      activation_dtype: None
      kvcache_dtype: None
      outliers_suppression: None
      modules_to_not_convert: ['lm_head']
      algorithm_args: {}
"""


@pytest.fixture
def desk(tandem: "Tandem", stories: Path, shared_dir: Path) -> Path:
    """A folder with what a reader of the page has: the Hugging Face model, MindFormers' two YAML files, the tokenizer, BoolQ."""
    yaml = shared_dir / "cases" / "mindformers" / "fused.yaml"
    boolq = shared_dir / "data" / "boolq"
    if not yaml.is_file() or not boolq.is_dir():
        pytest.skip("no cases/mindformers or data/boolq among the shared data")
    folder = tandem.new_folder()
    shutil.copytree(stories, folder / "Llama-2-13b-hf")
    shutil.copytree(boolq, folder / "boolq")
    shutil.copy(stories / "tokenizer.model", folder)
    text = yaml.read_text().replace("load_checkpoint: ''", "load_checkpoint: 'llama2-13b-fp16.ckpt'", 1)
    (folder / "predict_llama2_13b.yaml").write_text(text)
    (folder / "predict_llama2_13b_rtn.yaml").write_text(text.replace("  arch:\n", f"{RTN}  arch:\n", 1))
    (folder / "bin").mkdir()
    for name, words in (("tandem", "-m launcher"), ("python", "")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return folder


def test_every_command_of_the_page_runs(tandem: "Tandem", desk: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 11
    printed: dict[str, str] = {}
    path = f"{desk / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        result = tandem.run_command(["bash", "-c", command.replace(" scripts/", f" {PROJECT_ROOT}/scripts/")], cwd=desk, PATH=path)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        printed[" ".join(command.split()[:3])] = result.stdout
    single, parallel = printed["bash scripts/run_predict.sh single"], printed["bash scripts/run_predict.sh parallel"]
    assert single == parallel and single.count("'text_generation_text': [") == 3
    texts = [json.loads(line.partition(": ")[2].replace("['", '["').replace("']", '"]'))[0] for line in single.splitlines()]
    alone = printed["python scripts/examples/run_llama2_generate.py --config_path"]
    assert re.sub("<s>|</s>", "", alone) == "\n".join([*texts, ""])
    assert printed["tandem run --worker_num=2"] == alone, "tandem run prints what rank 0 prints"
    assert printed["tandem predict llama2_13b_rtn_a16w8_dir"].startswith(texts[0])
    assert printed["python scripts/run_mindformer.py --config"] == single.splitlines()[1] + "\n"
    assert (desk / "text_generation_result.txt").read_text() == str([{"text_generation_text": [texts[1]]}])
    assert (desk / "output" / "log" / "worker_0.log").read_text().endswith(single.splitlines()[1] + "\n")
