"""scripts/run_mindformer.py: MindFormers' options as words of `tandem predict`, and what is no prediction."""

from pathlib import Path

import pytest

from parallel.errors import ConfigError
from scripts.run_mindformer import RESULT_FILE, build_parser, translate


def to_words(*arguments: str) -> list[str]:
    return translate(build_parser().parse_args(arguments))


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "predict.yaml"
    path.write_text("run_mode: predict\ninput_data: 'from the file'\n")
    return str(path)


def test_options_of_a_prediction_are_those_of_predict(config: str) -> None:
    given = "--run_mode predict --load_checkpoint c.ckpt --predict_batch_size 4 --seq_length 256 --vocab_file t.model --seed 3"
    ignored = "--auto_trans_ckpt True --src_strategy_path_or_dir s --register_path r --device_id 0 --use_parallel True"
    words = to_words("--config", config, *given.split(), *ignored.split(), "--predict_data", "I love\\nBeijing", "x")
    start = ["predict", "--format", "mindformers", "--save_file", RESULT_FILE, "--config", config]
    options = "--checkpoint c.ckpt --max-batch-size 4 --seq_length 256 --vocab_file t.model --seed 3"
    assert words == [*start, *options.split(), "--prompt", "I love\nBeijing", "--prompt", "x"]


def test_prompts_come_from_texts_a_file_or_the_yaml(config: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    assert to_words("--config", config, "--predict_data", str(prompts))[-2:] == ["--prompts-file", str(prompts)]
    assert to_words("--config", config)[-2:] == ["--prompt", "from the file"]
    long = "word " * 2000  # longer than a path may be
    assert to_words("--config", config, "--predict_data", long)[-2:] == ["--prompt", long]
    (tmp_path / "predict.yaml").write_text("run_mode: predict\ninput_data: None\n")
    with pytest.raises(ConfigError, match="no prompt: give --predict_data TEXT"):
        to_words("--config", config)


def test_one_rank_unless_a_launcher_has_started_several(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_words("--config", config, "--use_parallel", "False")[7:9] == ["--workers", "1"]
    for name, text in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match="--use_parallel is False, but torchrun started 2 ranks"):
        to_words("--config", config, "--use_parallel", "False")
    assert "--workers" not in to_words("--config", config, "--use_parallel", "True")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--run_mode finetune", "--run_mode is 'finetune', but tandem only predicts"),
        ("--only_save_strategy True", "asks for strategy files"),
    ],
)
def test_what_is_no_prediction_is_refused(config: str, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_words("--config", config, *words.split())


@pytest.mark.parametrize("words", ["--use_parallel maybe", "--train_dataset_dir x", "--predict_data"])
def test_other_words_end_with_code_2(config: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        to_words("--config", config, *words.split())
    assert ended.value.code == 2 and words.split()[0] in capsys.readouterr().err
