"""`tandem.LLM`: ranks of a program's own, compared with `tandem predict` on the same checkpoint."""

import gc
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tandem import LLM, InputError, RanksFailedError, RequestOutput, RunError, SamplingParams, StructuredOutputsParams
from tests.end_to_end.conftest import PROMPTS

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem

GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=0)
LONG = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True)
OPTIONS = ("--max-new-tokens", "12", "--dtype", "float32", "--threads-per-rank", "1", "--logprobs")
RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.fixture(scope="module")
def start(checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LLM]:
    """Starts an LLM on the tiny model, with logs of its own."""

    def begin(workers: int, **options: Any) -> LLM:
        return LLM(checkpoints.float, workers, dtype="float32", threads_per_rank=1, log_dir=tmp_path_factory.mktemp("logs"), **options)

    return begin


@pytest.fixture(scope="module")
def llm(start: Callable[..., LLM]) -> Iterator[LLM]:
    """An LLM of two ranks."""
    with start(2, max_batch_size=4) as one:
        yield one


@pytest.fixture(scope="module")
def predicted(tandem: "Tandem", checkpoints: "Checkpoints") -> "Outcome":
    """What the command line decodes with one rank."""
    return tandem.predict("--checkpoint", checkpoints.float, "--workers", "1", *OPTIONS)


def assert_predicted(found: list[RequestOutput], predicted: "Outcome") -> None:
    records = predicted.records
    assert [out.prompt for out in found] == [record["prompt"] for record in records] == list(PROMPTS)
    assert [out.prompt_token_ids for out in found] == [record["prompt_token_ids"] for record in records]
    assert all(out.finished and len(out.outputs) == 1 for out in found)
    answers = [out.outputs[0] for out in found]
    assert [answer.token_ids for answer in answers] == [record["token_ids"] for record in records]
    assert [answer.text for answer in answers] == [record["text"] for record in records]
    reasons = {"stop": "eos", "length": "length"}
    assert [reasons[answer.finish_reason or ""] for answer in answers] == [record["finish_reason"] for record in records]
    for answer, record in zip(answers, records, strict=True):
        assert answer.logprobs is not None
        values = [one[token].logprob for token, one in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert values == record["logprobs"] and answer.cumulative_logprob == sum(values)


def test_two_ranks_answer_as_predict_and_this_process_needs_no_pytorch_of_its_own(llm: LLM, predicted: "Outcome") -> None:
    assert_predicted(llm.generate(list(PROMPTS), GREEDY), predicted)
    assert (llm.world_size, repr(llm)) == (2, "LLM('float', workers=2)")
    tokenizer = llm.get_tokenizer()
    assert_predicted_ids = [tokenizer.encode(text) for text in PROMPTS]
    by_ids = llm.generate([{"prompt_token_ids": ids} for ids in assert_predicted_ids], [GREEDY] * 3)
    assert [out.outputs[0].token_ids for out in by_ids] == [record["token_ids"] for record in predicted.records]
    (one,) = llm.generate(assert_predicted_ids[0], GREEDY)
    assert one.outputs[0].token_ids == by_ids[0].outputs[0].token_ids and one.prompt == tokenizer.decode(one.prompt_token_ids, True)
    assert llm.generate([]) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_ranks_answers_alike(start: Callable[..., LLM], predicted: "Outcome", workers: int) -> None:
    with start(workers) as other:
        assert_predicted(other.generate(list(PROMPTS), GREEDY), predicted)


def test_sampling_with_a_seed_is_that_of_predict(llm: LLM, tandem: "Tandem", checkpoints: "Checkpoints") -> None:
    words = ("--do-sample", "--temperature", "0.7", "--top-k", "40", "--top-p", "0.9", "--seed", "5", "--repetition-penalty", "1.1")
    outcome = tandem.predict("--checkpoint", checkpoints.float, "--workers", "1", *OPTIONS, *words)
    params = SamplingParams(max_tokens=12, temperature=0.7, top_k=40, top_p=0.9, seed=5, repetition_penalty=1.1)
    found = llm.generate(list(PROMPTS), params)
    assert [out.outputs[0].token_ids for out in found] == [record["token_ids"] for record in outcome.records]
    params.n = 3
    several = llm.generate(PROMPTS[0], params)[0].outputs
    assert [answer.index for answer in several] == [0, 1, 2] and several[0].token_ids == found[0].outputs[0].token_ids
    assert len({tuple(answer.token_ids) for answer in several}) == 3


def test_a_stream_adds_up_to_the_answers(llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, temperature=0, logprobs=2, n=2, ignore_eos=True)
    whole = llm.generate(list(PROMPTS), params)
    tokens = list(llm.generate(list(PROMPTS), params, stream=True))
    for number, out in enumerate(whole):
        for answer in out.outputs:
            mine = [token for token in tokens if (token.index, token.output_index) == (number, answer.index)]
            assert [token.token_id for token in mine] == answer.token_ids
            assert "".join(map(str, mine)) == answer.text
            assert [token.logprobs for token in mine] == answer.logprobs
            assert [token.finish_reason for token in mine] == [None] * 8 + ["length"]
    best = whole[0].outputs[0].logprobs
    assert best is not None and all(next(iter(one.values())).rank == 1 and len(one) == 2 for one in best), "greedy takes the likeliest"


def test_structured_outputs_limit_the_text_and_bad_words_do_not_occur(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    limits: list[tuple[Any, Callable[[str], bool]]] = [
        (StructuredOutputsParams(regex="[0-9]{3}-[a-f]{2}"), lambda text: re.fullmatch("[0-9]{3}-[a-f]{2}", text) is not None),
        (StructuredOutputsParams(choice=["red", "green"]), lambda text: text in ("red", "green")),
        ({"json": schema, "disable_any_whitespace": True}, lambda text: isinstance(json.loads(text)["n"], int)),
        ({"grammar": 'start: "(" start ")" | "x"'}, lambda text: text.count("(") == text.count(")") < 99),
    ]
    bias = {id: 5.0 for text in ("}", ")", "x") for id in llm.get_tokenizer().encode(text, add_special_tokens=False)}  # to come to an end
    several = [SamplingParams(max_tokens=60, seed=4, n=2, logit_bias=bias, structured_outputs=limit) for limit, _ in limits]
    several.append(SamplingParams(max_tokens=60, seed=4, guided_decoding={"regex": "a{7}"}))
    *found, older = llm.generate([PROMPTS[0]] * len(several), several)
    for out, (_, holds) in zip(found, limits, strict=True):
        for answer in out.outputs:
            assert answer.finish_reason == "stop" and holds(answer.text), answer.text
    assert older.outputs[0].text == "aaaaaaa"
    whole = llm.generate(PROMPTS[0], LONG)[0].outputs[0].text
    word = max(whole.split(), key=len)
    tokens = llm.get_tokenizer().encode(word, add_special_tokens=False)
    without = llm.generate(PROMPTS[0], SamplingParams(max_tokens=120, temperature=0, ignore_eos=True, bad_words=[word]))[0].outputs[0]
    banned = [without.token_ids[i : i + len(tokens)] == tokens for i in range(len(without.token_ids))]
    assert not any(banned)
    with pytest.raises(InputError, match="structured_outputs cannot be used"):
        llm.generate(PROMPTS[0], SamplingParams(structured_outputs={"regex": "(?=a)b"}))
    with pytest.raises(InputError, match="the JSON schema is not JSON"):
        llm.generate(PROMPTS[0], SamplingParams(structured_outputs={"json": "{"}))
    assert len(llm.generate(PROMPTS[0], GREEDY)) == 1, "a refused call harms no other"


def test_stop_texts_and_stop_tokens_end_an_answer(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], LONG)[0].outputs[0]
    stop = whole.text[20:24]
    cut = llm.generate(PROMPTS[0], SamplingParams(max_tokens=120, temperature=0, ignore_eos=True, stop=["\0never", stop]))[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)] and (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    end = whole.token_ids[7]
    cut = llm.generate(PROMPTS[0], SamplingParams(max_tokens=120, temperature=0, ignore_eos=True, stop_token_ids=[end]))[0].outputs[0]
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1] and cut.stop_reason == end


def test_the_answer_ends_at_the_context(llm: LLM) -> None:
    ids = [5] * (llm.context_tokens - 3)
    for max_tokens in (None, 10):
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        (out,) = llm.generate(ids, params)
        assert (len(out.outputs[0].token_ids), out.outputs[0].finish_reason) == (3, "length")


def test_a_conversation_is_rendered_with_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "I love tea"}, {"role": "assistant", "content": "Me too"}, {"role": "user", "content": "Why?"}]
    # Llama-2's template, since the checkpoint has none.
    texts = ["<s>[INST] I love tea [/INST] Me too </s><s>[INST] Why? [/INST]", "<s>[INST] Hi [/INST]"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    found = llm.chat([messages, parts], GREEDY)
    assert [out.prompt for out in found] == texts
    tokenizer = llm.get_tokenizer()
    expected = llm.generate([tokenizer.encode(text, add_special_tokens=False) for text in texts], GREEDY)
    assert [out.outputs for out in found] == [out.outputs for out in expected]
    assert "".join(map(str, llm.chat(parts, GREEDY, stream=True))) == found[1].outputs[0].text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate(""), None),
        (lambda llm: llm.generate([[]]), "prompt 0 has no tokens"),
        (lambda llm: llm.generate([[1, 2], [3, 10**6]]), "prompt 1 has id 1000000, but the vocabulary has"),
        (lambda llm: llm.generate([[1, -1]]), "prompt 0 has id -1, but the vocabulary has"),
        (lambda llm: llm.generate([5] * llm.context_tokens), "prompt 0 has 2048 tokens, but the context is 2048: shorten it"),
        (lambda llm: llm.generate(["x", 3.5]), "prompt 1 is a float, but a text or a list of token ids is needed"),
        (lambda llm: llm.generate(7), "prompts is a int, but a text, token ids, or a list of them is needed"),
        (lambda llm: llm.generate({"text": "x"}), "prompt 0 has the keys text, but prompt or prompt_token_ids is needed"),
        (lambda llm: llm.generate("\ud800"), "prompt 0 holds a lone surrogate"),
        (lambda llm: llm.generate(["x", "y"], [GREEDY]), "sampling_params has 1 entries, but there are 2 prompts"),
        (lambda llm: llm.generate("x", {"n": 1}), "sampling_params"),
        (lambda llm: llm.generate("x", SamplingParams(stop_token_ids=[10**6])), "stop_token_ids names id 1000000"),
        (lambda llm: llm.generate("x", SamplingParams(logit_bias={10**6: 1})), "logit_bias names id 1000000"),
        (lambda llm: llm.chat("hello"), "messages is 'hello', but a list of messages"),
        (lambda llm: llm.chat([{"content": "x"}]), "message 0 of conversation 0 is .*, but a dictionary with role and content is needed"),
        (lambda llm: llm.chat([{"role": "user", "content": 5}]), "message 0 of conversation 0 has a int as its content"),
        (lambda llm: llm.chat([{"role": "user", "content": [{"type": "image_url"}]}]), "only parts of type text are supported"),
        (lambda llm: llm.chat([{"role": "user", "content": "a"}] * 2), None),
    ],
)
def test_what_cannot_be_answered_is_refused_and_the_next_call_works(llm: LLM, call: Callable[[LLM], Any], words: str | None) -> None:
    if words is not None:
        with pytest.raises(InputError, match=words):
            call(llm)
    assert len(llm.generate("x", SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))[0].outputs[0].token_ids) == 2


def test_several_threads_share_the_batch(llm: LLM) -> None:
    expected = [llm.generate(text, LONG)[0].outputs[0].token_ids for text in PROMPTS]
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = llm.generate(PROMPTS[number % 3], LONG)[0].outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(number,)) for number in range(7)]  # more than fit the batch
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: expected[number % 3] for number in range(7)}


def test_ctrl_c_ends_the_call_and_the_next_one_works(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[0], LONG)[0].outputs[0].token_ids
    stream = llm.generate([*PROMPTS, *PROMPTS], LONG, stream=True)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            signal.raise_signal(signal.SIGINT)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPTS[0]] * 1000, LONG)
    timer.join()
    for number, _ in enumerate(llm.generate(PROMPTS[1], LONG, stream=True)):
        if number == 3:
            break
    assert llm.generate(PROMPTS[0], LONG)[0].outputs[0].token_ids == expected


def test_a_dead_rank_is_restarted_with_the_same_tokens_until_restarts_are_used_up(start: Callable[..., LLM], llm: LLM) -> None:
    expected = [out.outputs[0].token_ids for out in llm.generate(list(PROMPTS), LONG)]
    with start(2, max_restarts=1) as other:
        assert other._engine is not None
        found: list[list[int]] = [[], [], []]
        for token in other.generate(list(PROMPTS), LONG, stream=True):
            found[token.index].append(token.token_id)
            if sum(map(len, found)) == 60:
                os.kill(other._engine.pids[1], signal.SIGKILL)
        assert found == expected
        with pytest.raises(RanksFailedError) as failed:
            for number, _ in enumerate(other.generate(list(PROMPTS), LONG, stream=True)):
                if number == 10:
                    os.kill(other._engine.pids[1], signal.SIGKILL)
        verdict = failed.value.verdict
        assert (verdict.first_failed_rank, verdict.signal, verdict.restarts_used) == (1, "SIGKILL", 1)
        assert verdict.log_file is not None and (Path(verdict.log_file).parent / "verdict.json").exists()
        with pytest.raises(RanksFailedError):
            other.generate(PROMPTS[0])


def test_closing_again_and_again_leaves_nothing(start: Callable[..., LLM], llm: LLM) -> None:
    assert llm._engine is not None
    before = None
    for is_collected in (False, True):
        other = start(1)
        assert other._engine is not None
        pids = [*other._engine.pids, other._engine._process.pid]
        stream = other.generate(PROMPTS[0], LONG, stream=True)
        next(stream)
        if is_collected:
            del other, stream
            gc.collect()
        else:
            other.close()
            for call in (lambda stream=stream: list(stream), lambda other=other: other.generate("x"), lambda other=other: other.chat([])):
                with pytest.raises(RunError, match="this LLM is closed: create another one"):
                    call()
            other.close()
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        state = len(os.listdir("/proc/self/fd")), threading.active_count(), sorted(os.listdir("/dev/shm"))
        # Fewer descriptors: what earlier tests left has been collected.
        assert before is None or (state[0] <= before[0] and state[1:] == before[1:]), (before, state)
        before = state


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wrkers": 2}, "LLM has no option 'wrkers'; did you mean workers"),
        ({"workers": 0}, "--workers is 0, but at least 1 rank is needed"),
        ({"workers": 10}, "10 ranks are too many"),
        ({"model": "no/such/model"}, "no/such/model does not exist"),
    ],
)
def test_what_cannot_start_is_refused(checkpoints: "Checkpoints", options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        LLM(**{"model": checkpoints.float, "log_dir": tmp_path, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_rank_starts_no_ranks(checkpoints: "Checkpoints", monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="LLM starts its own ranks, but torchrun started this process as one of several: use AutoModel"):
        LLM(checkpoints.float)


PROGRAM = """
import os, sys, threading
from tandem import LLM, RunError, SamplingParams

print("main runs once")
found = []


def work():
    # The thread that starts the ranks ends before they are used.
    found.append(LLM(sys.argv[1], workers=2, log_dir=sys.argv[2], threads_per_rank=1))


thread = threading.Thread(target=work)
thread.start()
thread.join()
print(found[0].generate("I love Beijing", SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].token_ids, flush=True)
child = os.fork()
if child == 0:
    try:
        found[0].generate("x")
    except RunError as error:
        print(str(error).replace(str(os.getppid()), "P"), flush=True)
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(len(found[0].generate("I love Beijing", SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].token_ids), flush=True)
print("torch" in sys.modules, flush=True)
if sys.argv[3] == "killed":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["returns", "killed"])
def test_a_plain_program_leaves_no_process(tandem: "Tandem", checkpoints: "Checkpoints", tmp_path: Path, end: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py", checkpoints.float, tmp_path / "logs", end]
    running = tandem.start(command, PYTHONWARNINGS="ignore")
    written, told = running.process.communicate(timeout=180)
    assert running.process.returncode == (0 if end == "returns" else -signal.SIGKILL), told
    lines = written.splitlines()
    assert lines[0] == "main runs once" and len(lines) == 6 and lines[1].count(",") == 3
    assert lines[2:] == ["this LLM belongs to process P, of which this one is a fork: create an LLM here", "3", "4", "False"]
    assert running.wait_until_gone(15) == [], "no rank and no engine is left"
