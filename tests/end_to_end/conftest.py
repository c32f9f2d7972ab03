"""Fixtures of the end-to-end tests: a tiny checkpoint in several forms, and the command line run as its users run it."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.command_host import ENTRY, CommandHost, HostedProcess

PROMPTS = ("I love Beijing, because", "LLaMA is a", "Huawei is a company that")
PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "TANDEM_TEST_RUN"
RANK_NAME = "tandem rank "
SECONDS = 180

# What another launcher, a shell or the machine's owner may have set must not decide a test.
_STRAY_PREFIXES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "MS_",
    "SLURM_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "PRTE_",
    "MPI_",
    "OMP_",
    "DEVICE_ID",
)

TRAINING_TEXT = """I love Beijing, because the streets are wide and the tea is warm. A llama is an animal that lives in the mountains.
Huawei is a company that makes telephones. Two riders sit on one bicycle, and both of them turn the same chain.
"""

YAML = """seed: 0
run_mode: 'predict'
load_checkpoint: ''
context: {{device_id: 0}}
parallel_config:
  model_parallel: 3
model:
  model_config:
    type: LlamaConfig
    hidden_size: 144
    num_layers: 2
    num_heads: 9
    n_kv_heads: 3
    intermediate_size: 400
    vocab_size: {vocab_size}
    rms_norm_eps: 1.0e-5
    compute_dtype: "float32"
    max_decode_length: 64
    do_sample: False
  arch:
    type: LlamaForCausalLM
"""
RTN = """    quantization_config:
      quant_method: 'rtn'
      weight_dtype: 'int8'
      activation_dtype: None
      kvcache_dtype: None
      outliers_suppression: None
      modules_to_not_convert: ['lm_head']
      algorithm_args: {}
"""


@dataclass(frozen=True)
class Checkpoints:
    """One tiny random Llama (9 query heads, 3 key-value heads) in every form that a run reads."""

    float: Path
    int8: Path
    int8_two_ranks: Path
    """Rank files made of `int8`."""
    float_three_ranks: Path
    """Rank files made of `float`."""
    config: Path
    """Its MindFormers YAML, which asks for three ranks."""
    int8_config: Path
    """The same for the quantized forms."""


@dataclass
class Running:
    """A command that has been started, with every process that comes of it: they all inherit its mark."""

    process: subprocess.Popen[str] | HostedProcess
    mark: str

    def find_processes(self) -> list[int]:
        """Ids of all its processes that are not zombies."""
        return [pid for pid in _list_pids() if _read(pid, "environ").find(f"{MARK}={self.mark}\0") >= 0]

    def find_ranks(self) -> dict[int, int]:
        """Process id of each rank."""
        names = {pid: _read(pid, "comm").strip() for pid in self.find_processes()}
        return {int(name.removeprefix(RANK_NAME)): pid for pid, name in names.items() if name.startswith(RANK_NAME)}

    def find_starter(self) -> int | None:
        """Process id of the process that starts the ranks."""
        return next((pid for pid in self.find_processes() if _read(pid, "comm").strip() == "tandem starter"), None)

    def wait_until_gone(self, seconds: float) -> list[int]:
        """Wait until none of its processes is left; those that still are after `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := self.find_processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def end(self) -> None:
        """Kill what is left of it."""
        for pid in self.find_processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.communicate(timeout=SECONDS)


@dataclass
class Outcome:
    """A `tandem predict` that has ended, with what it left."""

    returncode: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def jsonl(self) -> str:
        """The results, as they were written."""
        return (self.folder / "results.jsonl").read_text(encoding="utf-8")

    @property
    def records(self) -> list[dict[str, Any]]:
        """The results."""
        return [json.loads(line) for line in self.jsonl.splitlines()]

    @property
    def stats(self) -> dict[str, Any]:
        """Speeds, bytes and memory."""
        raw: dict[str, Any] = json.loads((self.folder / "stats.json").read_text(encoding="utf-8"))
        return raw

    @property
    def logs(self) -> Path:
        """The log folder."""
        return self.folder / "logs"

    @property
    def texts(self) -> list[str]:
        """What stands in the lines of standard output. Fails when anything else stands there."""
        texts = []
        for line in self.stdout.splitlines():
            key, _, value = line.partition(": ")
            assert key == "'text_generation_text'", line
            (text,) = ast.literal_eval(value)
            texts.append(text)
        return texts


@dataclass
class Tandem:
    """Runs the command line from a folder outside the project."""

    folder: Path
    environment: dict[str, str]
    """What commands have without variables of their own."""
    host: CommandHost
    started: list[Running] = field(default_factory=list)
    _cached: dict[Any, Outcome] = field(default_factory=dict)

    def start(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        stdin: Path | None = None,
        stderr: Path | None = None,
        fresh: bool = False,
        **variables: str,
    ) -> Running:
        """Start a command and go on. `python -m launcher` is forked from the command host, unless it is to be `fresh`.

        `stdin` and `stderr` are files; without them standard input is empty and standard error a pipe.
        """
        mark = uuid.uuid4().hex
        words = [str(word) for word in command]
        environment = {**self.environment, **variables, MARK: mark}
        process: subprocess.Popen[str] | HostedProcess
        with open(stdin or os.devnull, "rb") as given, open(stderr or os.devnull, "wb") as errors:
            where = errors.fileno() if stderr else None
            if not fresh and self.host.takes(words, environment):
                process = self.host.start(words, environment=environment, cwd=cwd or self.folder, stdin=given.fileno(), stderr=where)
            else:
                process = subprocess.Popen(
                    words,
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE if where is None else where,
                    text=True,
                    encoding="utf-8",
                    cwd=cwd or self.folder,
                    env=environment,
                )
        self.started.append(Running(process, mark))
        return self.started[-1]

    def run(self, *arguments: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `tandem ARGUMENTS` to its end; `variables` go into its environment."""
        return self.run_command([*ENTRY, *arguments], cwd=cwd, **variables)

    def run_command(
        self, command: Sequence[str | Path], *, cwd: Path | None = None, stdin: Path | None = None, fresh: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run any command to its end; see `start`."""
        running = self.start(command, cwd=cwd, stdin=stdin, fresh=fresh, **variables)
        try:
            stdout, stderr = running.process.communicate(timeout=SECONDS)
        finally:
            running.end()
        assert running.process.returncode is not None
        return subprocess.CompletedProcess(command, running.process.returncode, stdout or "", stderr or "")

    def new_folder(self) -> Path:
        """An empty folder."""
        folder = self.folder / uuid.uuid4().hex[:8]
        folder.mkdir()
        return folder

    def predict_command(self, folder: Path, *arguments: str | Path, module: Sequence[str] = ("-m", "launcher")) -> list[str | Path]:
        """The command line of a predict whose files land in `folder`."""
        files = ("--output", folder / "results.jsonl", "--stats", folder / "stats.json", "--log-dir", folder / "logs")
        given = [] if {"--prompt", "--prompts-file"} & set(arguments) else [word for text in PROMPTS for word in ("--prompt", text)]
        return [sys.executable, *module, "predict", "--format", "mindformers", *arguments, *given, *files]

    def predict(self, *arguments: str | Path, module: Sequence[str] = ("-m", "launcher"), fresh: bool = False, **variables: str) -> Outcome:
        """Run `tandem predict ARGUMENTS` to a good end. The same run is made once in a session. See `start` for `fresh`."""
        key = (arguments, tuple(module), fresh, tuple(sorted(variables.items())))
        if key not in self._cached:
            folder = self.new_folder()
            result = self.run_command(self.predict_command(folder, *arguments, module=module), fresh=fresh, **variables)
            assert result.returncode == 0, result.stderr
            self._cached[key] = Outcome(result.returncode, result.stdout, result.stderr, folder)
        return self._cached[key]


@pytest.fixture(scope="session")
def tandem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tandem]:
    """The command line. No process that was started with it outlives the session."""
    environment = _clean_environment()
    tandem = Tandem(tmp_path_factory.mktemp("tandem"), environment, CommandHost(environment))
    yield tandem
    for running in tandem.started:
        running.end()
    tandem.host.close()


@pytest.fixture(scope="session")
def checkpoints(tandem: Tandem, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The tiny checkpoint; `tandem` itself makes its other forms."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = Checkpoints(
        float=folder / "float",
        int8=folder / "int8",
        int8_two_ranks=folder / "int8-2",
        float_three_ranks=folder / "float-3",
        config=folder / "tiny.yaml",
        int8_config=folder / "tiny_rtn.yaml",
    )
    vocab_size = _write_tokenizer(made.float)
    _write_model(made.float, vocab_size)
    made.config.write_text(YAML.format(vocab_size=vocab_size))
    made.int8_config.write_text(YAML.format(vocab_size=vocab_size).replace("  arch:\n", f"{RTN}  arch:\n"))
    for arguments in (
        ("quantize", "-c", made.int8_config, "--checkpoint", made.float, "-a", "rtn-a16w8", "--output", made.int8),
        ("reshard", made.int8, made.int8_two_ranks, "--workers", "2"),
        ("reshard", made.float, made.float_three_ranks, "--workers", "3"),
    ):
        result = tandem.run(*arguments)
        assert result.returncode == 0, result.stderr
    return made


@pytest.fixture
def refuse(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """Runs a command in this process, which saves seconds, and holds its refusal against what any refusal has to be.

    (make, names, usage): arguments from the good checkpoints and an empty folder; what the message has to hold, as regular
    expressions; whether the option parser answers, which shows the usage first.
    """

    def run(make: Callable[[Checkpoints, Path], Sequence[str | Path]], names: Sequence[str], usage: bool) -> None:
        command = list(make(checkpoints, tmp_path))
        if command[0] == "predict" and not {"--prompt", "--prompts-file"} & set(command):
            command += ["--prompt", "x"]
        inputs = sorted(tmp_path.rglob("*"))
        before = sorted(checkpoints.int8.parent.rglob("*"))
        (tmp_path / "cwd").mkdir()
        monkeypatch.chdir(tmp_path / "cwd")
        for variable in [name for name in os.environ if name.startswith(_STRAY_PREFIXES)]:
            monkeypatch.delenv(variable)
        monkeypatch.setattr(sys, "argv", ["tandem", *map(str, command)])
        for place in (
            "launcher.supervision.foreign_launchers.join_ranks",
            "launcher.commands.run_ranks.spawn_ranks",
            "launcher.rendezvous.msrun_scheduler.serve_ranks",
        ):
            monkeypatch.setattr(place, _start_nothing)
        monkeypatch.setattr("signal.signal", lambda number, handler: None)  # the handlers of this process stay
        from launcher.cli.main import main

        with pytest.raises(SystemExit) as ended:
            main()
        written, message = capsys.readouterr()
        assert (ended.value.code, written) == (2, ""), message
        message = re.sub(r"\Aconfig: .*\n", "", message)  # which YAML was found next to the checkpoint
        words = " ".join(message.split())
        for name in names:
            assert re.search(name, words), f"{name!r} is not in {words!r}"
        if not usage:
            assert message.startswith("tandem: ") and message.count("\n") == 1, message
            assert len(re.findall(r"[.?!](?= [A-Z])", message)) <= 1, "more than two sentences"
        assert list((tmp_path / "cwd").iterdir()) == [], "a refused command leaves nothing, no log folder either"
        assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "cwd"] == inputs, "nothing is written beside the input"
        assert sorted(checkpoints.int8.parent.rglob("*")) == before

    return run


def _start_nothing(*arguments: object) -> None:
    raise AssertionError("a rank was started")


@pytest.fixture(scope="session")
def choose_with_transformers() -> Callable[..., list[list[int]]]:
    """What transformers takes in float32 after each part of a continuation: (folder, prompts as ids, continuations) to ids.

    Where that equals the continuation, it is transformers' own greedy one, by induction; one forward pass a prompt tells it.
    """

    def choose(folder: Path, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[list[int]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import LlamaForCausalLM

            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        chosen = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *continuation]])).logits[0]
            chosen.append(logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist())
        return chosen

    return choose


def _write_tokenizer(folder: Path) -> int:
    """A byte-level BPE of about 300 ids with <s> and </s>; gives their number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def _write_model(folder: Path, vocab_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=144,
            intermediate_size=400,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=16,
            vocab_size=vocab_size,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            initializer_range=0.2,  # far from ties, so that another program's rounding takes the same tokens
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(folder)


def _clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_STRAY_PREFIXES)}
    return {**kept, "PYTHONPATH": str(PROJECT_ROOT), "PYTHONSAFEPATH": "1", "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def _list_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _read(pid: int, name: str) -> str:
    """A file of a process, empty when the process is gone, a zombie or another user's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""
