"""Where the tokenizer of a run is: named in the YAML, with the checkpoint, or next to the YAML."""

from pathlib import Path

import pytest

from launcher.settings.tokenizer_location import locate_tokenizer
from launcher.settings.yaml_settings import Settings, open_settings, read_settings
from parallel.errors import ConfigError


def write(folder: Path, tokenizer: str = "", rest: str = "") -> Settings:
    (folder / "run.yaml").write_text(f"processor: {{tokenizer: {{{tokenizer}}}}}\n{rest}")
    return read_settings(folder / "run.yaml")


def test_the_tokenizer_of_the_checkpoint_is_used_unless_the_yaml_names_one(tmp_path: Path) -> None:
    assert locate_tokenizer(write(tmp_path), Path("model")) == Path("model")
    assert locate_tokenizer(write(tmp_path), None) is None
    named = tmp_path / "named.model"
    named.touch()
    for key in ("vocab_file", "tokenizer_file"):
        assert locate_tokenizer(write(tmp_path, f"{key}: {named}"), Path("model")) == named
    settings = write(tmp_path, f"vocab_file: {named}, tokenizer_file: other")
    assert locate_tokenizer(settings, None) == named
    for nothing in ("vocab_file: ''", "vocab_file: None, tokenizer_file: ''"):
        assert locate_tokenizer(write(tmp_path, nothing), Path("model")) == Path("model")


def test_a_checkpoint_without_tokenizer_uses_the_folder_of_the_yaml_or_of_the_model(tmp_path: Path) -> None:
    assert locate_tokenizer(write(tmp_path, rest="pretrained_model_dir: hub"), None) == Path("hub")
    (tmp_path / "tokenizer.model").touch()
    assert locate_tokenizer(write(tmp_path), None) == tmp_path


def test_without_yaml_the_current_folder_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").touch()
    monkeypatch.chdir(tmp_path)
    assert locate_tokenizer(open_settings(None), None) is None


def test_a_relative_path_is_relative_to_the_current_folder_or_to_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "t.model").touch()
    monkeypatch.chdir(tmp_path)
    settings = write(folder, "vocab_file: t.model")
    assert locate_tokenizer(settings, None) == folder / "t.model"
    (tmp_path / "t.model").touch()
    assert locate_tokenizer(settings, None) == Path("t.model")


def test_a_name_that_leads_nowhere_is_refused_with_what_to_do(tmp_path: Path) -> None:
    settings = write(tmp_path, "vocab_file: /path/tokenizer.model")
    start = r"run\.yaml: processor\.tokenizer\.vocab_file is '/path/tokenizer\.model', which does not exist: correct it, or "
    with pytest.raises(ConfigError, match=start + "put tokenizer.model or tokenizer.json there"):
        locate_tokenizer(settings, None)
    with pytest.raises(ConfigError, match=start + "remove the key to use the tokenizer of model"):
        locate_tokenizer(settings, Path("model"))


def test_weights_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "big.ckpt").touch()
    with pytest.raises(ConfigError, match="which is a file of weights: name a tokenizer"):
        locate_tokenizer(write(tmp_path, "vocab_file: big.ckpt"), None)


def test_a_vocabulary_of_qwen_is_read_through_the_tokenizer_json_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").touch()
    settings = write(tmp_path, "vocab_file: vocab.json, merges_file: merges.txt")
    with pytest.raises(ConfigError, match=r"vocab\.json with merges\.txt is not read: put the model's tokenizer\.json next to it"):
        locate_tokenizer(settings, None)
    (tmp_path / "tokenizer.json").touch()
    assert locate_tokenizer(settings, None) == tmp_path
