"""MindFormers' run_mindformer.py in prediction mode, as `tandem predict`: the same options, the same result file.

    python scripts/run_mindformer.py --config predict_llama2_7b.yaml --run_mode predict --predict_data 'I love Beijing, because' \
        --load_checkpoint llama2_7b.ckpt --use_parallel True

Starts as many ranks as MS_WORKER_NUM or the YAML says; under msrun or torchrun each process is one rank. Writes
text_generation_result.txt into the current folder.
"""

import argparse
import os
import sys
from pathlib import Path

from launcher.cli.main import main as run_tandem
from launcher.environment.detection import read_environment
from launcher.settings.yaml_file import read_mapping
from parallel.errors import ConfigError, InputError

RESULT_FILE = "text_generation_result.txt"
IGNORED = ("auto_trans_ckpt", "src_strategy_path_or_dir", "transform_process_num", "register_path", "mode", "device_id", "device_target")
"""Checkpoints are read in any layout without being transformed, and models need no registration."""


def parse_flag(word: str) -> bool:
    """Read MindFormers' True and False."""
    flags = {"true": True, "1": True, "false": False, "0": False}
    if word.lower() not in flags:
        raise argparse.ArgumentTypeError(f"{word!r}, but True or False is needed")
    return flags[word.lower()]


def build_parser() -> argparse.ArgumentParser:
    """Declare the options of run_mindformer.py that a prediction takes."""
    parser = argparse.ArgumentParser(
        description="MindFormers' run_mindformer.py --run_mode predict, on tandem's ranks.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="MindFormers YAML")
    parser.add_argument("--run_mode", help="predict (default: the YAML's)")
    parser.add_argument("--predict_data", nargs="+", help="prompts, or one file with a prompt per line (default: the YAML's input_data)")
    parser.add_argument("--predict_batch_size", help="maximum sequences per batch")
    parser.add_argument("--load_checkpoint", help="checkpoint (default: the YAML's)")
    parser.add_argument("--use_parallel", type=parse_flag, help="False: one rank (default: MS_WORKER_NUM, then model_parallel)")
    parser.add_argument("--seq_length", help="maximum tokens of a sequence (default: the YAML's)")
    parser.add_argument("--vocab_file", help="tokenizer.model or tokenizer.json (default: the YAML's)")
    parser.add_argument("--seed", help="random seed (default: the YAML's)")
    parser.add_argument("--only_save_strategy", type=parse_flag, default=False, help="False")
    for name in IGNORED:
        parser.add_argument(f"--{name}", help="accepted without effect")
    return parser


def translate(arguments: argparse.Namespace) -> list[str]:
    """Return the words of `tandem predict`. Raises ConfigError for what is no prediction."""
    if arguments.run_mode not in (None, "predict"):
        raise ConfigError(f"--run_mode is {arguments.run_mode!r}, but tandem only predicts: set it to predict")
    if arguments.only_save_strategy:
        raise ConfigError("--only_save_strategy True asks for strategy files, which tandem does not need: leave it out")
    words = ["predict", "--format", "mindformers", "--save_file", RESULT_FILE, "--config", arguments.config]
    for name, flag in (
        ("load_checkpoint", "--checkpoint"),
        ("predict_batch_size", "--max-batch-size"),
        ("seq_length", "--seq_length"),
        ("vocab_file", "--vocab_file"),
        ("seed", "--seed"),
    ):
        if getattr(arguments, name) is not None:
            words += [flag, getattr(arguments, name)]
    if arguments.use_parallel is False:
        environment = read_environment()
        if environment.is_rank and environment.world_size != 1:
            raise ConfigError(
                f"--use_parallel is False, but {environment.launcher} started {environment.world_size} ranks, each of which would load the "
                "whole model: give --use_parallel True, or start one process"
            )
        words += ["--workers", "1"]
    return words + list_prompts(arguments.predict_data or read_mapping(Path(arguments.config)).get("input_data"))


def list_prompts(data: object) -> list[str]:
    """Return the options of the prompts: texts, in which \\n is a line end, or one file."""
    texts = data if isinstance(data, list) else [data] if data not in (None, "", "None") else []
    if not texts:
        raise ConfigError("no prompt: give --predict_data TEXT, or a file with one prompt per line")
    if len(texts) == 1 and os.path.isfile(str(texts[0])):
        return ["--prompts-file", str(texts[0])]
    return [word for text in texts for word in ("--prompt", str(text).replace("\\n", "\n"))]


def main() -> None:
    """Run the command and exit with its exit code."""
    arguments = build_parser().parse_args()
    try:
        words = translate(arguments)
    except InputError as error:
        print(f"run_mindformer.py: {error}", file=sys.stderr)
        sys.exit(2)
    sys.argv = ["tandem", *words]
    run_tandem()


if __name__ == "__main__":
    main()
