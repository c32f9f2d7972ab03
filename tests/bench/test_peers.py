"""What other programs print, in the shape in which they print it, and how they are called. None of them is run."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import peers
from compare import parse
from peers import PEERS, build_tandem, read_dllama, read_llama_bench, read_tandem, read_transformers
from tandem_bench import BenchCall, BenchError, find_reason, run_program, slug

LLAMA_BENCH = [
    {"build_commit": "0c1e570", "model_size": 45142272, "n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 93.04},
    {"build_commit": "0c1e570", "model_size": 45142272, "n_prompt": 0, "n_gen": 32, "n_depth": 512, "avg_ts": 27.13},
]
DLLAMA = """💡 Arch: Llama
Hello world
🔷️ E 1043 ms S   272 kB R   272 kB (18 tokens)
🔶 P   59 ms S   272 kB R   272 kB  tokens/s: 99

Evaluation
   nBatches: 32
    nTokens: 18
   tokens/s: 17.26 (57.94 ms/tok)
Prediction
    nTokens: 33
   tokens/s: 16.61 (60.20 ms/tok)
"""


def _options(*words: str) -> Namespace:
    return parse(["--model-config", "c.json", "--threads", "4", "--workers", "1,2", *words])


def test_llama_bench_gives_prefill_and_decode_of_one_sequence() -> None:
    speed = read_llama_bench(json.dumps(LLAMA_BENCH))
    assert speed.figures() == {"prefill": 93.04, "decode@1": 27.13}
    assert speed.details == {"build": "0c1e570", "model_bytes": 45142272}
    assert read_llama_bench(json.dumps(LLAMA_BENCH[:1])).figures() == {"prefill": 93.04}
    assert read_llama_bench(json.dumps(LLAMA_BENCH[1:])).figures() == {"decode@1": 27.13}


def test_llama_bench_decodes_behind_a_prompt_as_short_as_tandems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def answer(command: list[str], _seconds: float) -> str:
        calls.append(command)
        return json.dumps(LLAMA_BENCH[len(calls) - 1 : len(calls)])

    monkeypatch.setattr(peers, "run_program", answer)
    contender = PEERS["llama.cpp"](_options("--llama-bench", "llama-bench", "--gguf", "m.gguf", "--prompt-tokens", "100"))
    assert contender is not None
    assert contender.measure().figures() == {"prefill": 93.04, "decode@1": 27.13}
    assert calls[0][-4:] == ["-p", "100", "-n", "0"]
    assert calls[1][-6:] == ["-p", "0", "-n", "32", "-d", "16"]
    assert all(call[call.index("-t") + 1] == "4" for call in calls)


def test_dllama_gives_the_two_blocks_at_its_end() -> None:
    speed = read_dllama(DLLAMA)
    assert speed.figures() == {"prefill": 17.26, "decode@1": 16.61}
    assert speed.details == {"prompt_tokens": 18, "new_tokens": 33}


@pytest.mark.parametrize("output", ["", "🚨 Critical error: Cannot open file", DLLAMA.partition("Prediction")[0]])
def test_dllama_without_both_blocks_is_an_error_with_its_last_words(output: str) -> None:
    with pytest.raises(BenchError, match="no tokens/s"):
        read_dllama(output)


def test_transformers_answer_is_its_last_line() -> None:
    answer = {"version": "5.0.0", "ranks": 2, "dtype": "bfloat16", "prefill_tokens_per_second": 100.5, "decode": {"1": 9.5, "8": 40.0}}
    speed = read_transformers(f"Loading weights\n{json.dumps(answer)}\n")
    assert speed.figures() == {"prefill": 100.5, "decode@1": 9.5, "decode@8": 40.0}
    assert speed.details["ranks"] == 2


def test_tandem_answer_has_a_metric_for_every_batch() -> None:
    answer: dict[str, Any] = {"prefill_tokens_per_second": 70.0, "kernel": "fbgemm"}
    answer["decode"] = [{"batch_size": 1, "tokens_per_second": 20.0}, {"batch_size": 8, "tokens_per_second": 99.0}]
    speed = read_tandem(answer)
    assert speed.figures() == {"prefill": 70.0, "decode@1": 20.0, "decode@8": 99.0}
    assert speed.details["kernel"] == "fbgemm"


def test_tandem_shares_the_threads_between_its_ranks_and_is_named_by_it() -> None:
    contenders = build_tandem(_options("--quantization", "rtn-a16w8,none"))
    assert [one.name for one in contenders] == [
        "tandem 1x4 rtn-a16w8",
        "tandem 2x2 rtn-a16w8",
        "tandem 1x4 bfloat16",
        "tandem 2x2 bfloat16",
    ]
    assert all(one.is_tandem for one in contenders)


def test_a_peer_takes_part_only_when_it_is_asked_for() -> None:
    assert [name for name, build in PEERS.items() if build(_options())] == []
    words = ("--llama-bench", "l", "--gguf", "g.gguf", "--dllama", "d", "--dllama-model", "m.m", "--dllama-tokenizer", "t.t")
    built = [build(_options(*words, "--transformers", "--tp-plan")) for build in PEERS.values()]
    assert [one.name for one in built if one] == [
        "llama.cpp g 4 threads",
        "distributed-llama 2x2 m",
        "transformers 1x4 bfloat16",
        "transformers tp_plan 2x2 bfloat16",
    ]


def test_the_libraries_of_npm_are_a_peer_each_and_measure_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    answer = {"version": "v0.5.0", "ranks": 1, "dtype": "zen4", "prefill_tokens_per_second": 90.0, "decode": {"1": 20.0, "8": 66.0}}

    def run(command: list[str], _seconds: float) -> str:
        calls.append(command)
        return json.dumps(answer) + "\n"

    monkeypatch.setattr(peers, "run_program", run)
    options = _options("--llama-package", "package", "--gguf", "g.gguf", "--batch-size", "1,8", "--llama-cpu", "haswell,zen4")
    built = [one for build in PEERS.values() if (one := build(options))]
    assert [one.name for one in built] == ["llama.cpp zen4 library g 4 threads", "llama.cpp haswell library g 4 threads"]
    assert [one.measure().figures() for one in built] == [{"prefill": 90.0, "decode@1": 20.0, "decode@8": 66.0}] * 2
    assert [call[call.index("--cpu") + 1] for call in calls] == ["zen4", "haswell"]
    assert all(call[call.index("--batch-size") + 1] == "1,8" and call[call.index("--threads") + 1] == "4" for call in calls)


def test_openvino_runs_in_its_own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    answer = {"version": "2026.4", "ranks": 1, "dtype": "int8", "prefill_tokens_per_second": 215.0, "decode": {"1": 25.2}}

    def run(command: list[str], _seconds: float) -> str:
        calls.append(command)
        return json.dumps(answer)

    monkeypatch.setattr(peers, "run_program", run)
    (tmp_path / "python").symlink_to(sys.executable)
    contender = PEERS["OpenVINO GenAI"](_options("--openvino", str(tmp_path / "python"), "--gguf", "g.gguf"))
    assert contender is not None and contender.name == "OpenVINO GenAI g 4 threads"
    assert contender.measure().figures() == {"prefill": 215.0, "decode@1": 25.2}
    assert calls[0][0] == str(tmp_path / "python"), "the link, which tells Python its environment"
    with pytest.raises(SystemExit, match="needs --openvino-model or --gguf"):
        PEERS["OpenVINO GenAI"](_options("--openvino", "python"))


def test_an_unknown_cpu_library_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _options("--llama-cpu", "zen5")
    assert "--llama-cpu zen5 is not one of zen4, haswell" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--llama-bench", "l"), ("--llama-package", "p"), ("--dllama", "d", "--dllama-model", "m")])
def test_a_peer_without_its_files_says_what_it_needs(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="needs --"):
        [build(_options(*words)) for build in PEERS.values()]


def test_bench_call_speaks_the_command_line_of_tandem_bench(tmp_path: Path) -> None:
    words = BenchCall(model_config=tmp_path / "config.json", quantization="none", num_layers=4, batch_sizes=(1, 8)).arguments()
    assert words[0] == "bench"
    # Left out, it would be int8.
    assert words[words.index("--quantization") + 1] == "none"
    assert words[words.index("--model-config") + 1] == str(tmp_path / "config.json")
    assert words[words.index("--batch-size") + 1] == "1,8"
    assert words[words.index("--num-layers") + 1] == "4"
    words = BenchCall(checkpoint=tmp_path).arguments()
    assert "--random-weights" not in words
    assert words[words.index("--checkpoint") + 1] == str(tmp_path)


def test_a_program_that_fails_gives_the_error_that_says_something() -> None:
    with pytest.raises(BenchError, match="exit code 3: ValueError: no room"):
        run_program([sys.executable, "-c", "import sys; sys.stderr.write('ValueError: no room\\nend\\n'); sys.exit(3)"], 60)
    with pytest.raises(BenchError, match="cannot be started"):
        run_program(["/nowhere/program"], 60)
    with pytest.raises(BenchError, match="no end after"):
        run_program([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    torchrun = "[rank0]: ValueError: 9 heads do not split\nE1125 failed\ntorch.distributed.ChildFailedError: \n=====\n"
    assert find_reason(torchrun) == "[rank0]: ValueError: 9 heads do not split"
    assert find_reason("") == "it said nothing"


def test_slug_is_part_of_a_file_name() -> None:
    assert slug("AMD EPYC 9B14 (2 cores)") == "amd-epyc-9b14-2-cores"
