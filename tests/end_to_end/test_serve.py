"""`tandem serve` as its callers see it: answers equal those of `tandem predict`, in OpenAI's forms, through OpenAI's own client."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.end_to_end.servers import Server, wait_until

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Checkpoints, Outcome, Tandem

pytestmark = pytest.mark.slow

NUM_NEW = 24
OPTIONS = ("--workers", "2", "--threads-per-rank", "1", "--dtype", "float32")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the tea?"}]
RENDERED = "<system> Be brief.\n<user> Where is the tea?\n<assistant>"
PROMPTS = ("I love Beijing", "A llama", "Huawei is", "Two riders sit on", "The tea", "bicycle, and", "the same chain", RENDERED)
"""The last one is what the template makes of MESSAGES, without the begin token."""
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 11}
UNTRUNCATED = {"temperature": 1.3, "top_k": 0, "top_p": 0.9, "seed": 12, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def folder(checkpoints: "Checkpoints", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, with a chat template."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    shutil.copytree(checkpoints.float, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(tandem: "Tandem", folder: Path) -> Iterator[Server]:
    server = Server(tandem, "--checkpoint", folder, *OPTIONS, "--max-batch-size", "8", "--max-body-mb", "0.1")
    try:
        # PlannedRequest before the ranks are there: it waits for them.
        assert server.health == (503, "loading")
        assert server.status["state"] == "loading"
        early = server.complete("I love", max_tokens=3, temperature=0)
        assert early["usage"]["completion_tokens"] == 3
        server.wait_until_ready()
        yield server
    finally:
        server.end()


def predict(tandem: "Tandem", folder: Path, **sampling: float) -> "Outcome":
    """`tandem predict` of all prompts on one rank; greedy ones with log-probabilities."""
    words = [word for name, value in sampling.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    how = ("--do-sample", *words) if sampling else ("--greedy", "--logprobs")
    ranks = ("--workers", "1", *OPTIONS[2:])
    return tandem.predict("--checkpoint", folder, *ranks, "--max-new-tokens", str(NUM_NEW), "--ignore-eos", *how, *prompts)


@pytest.fixture(scope="module")
def greedy(tandem: "Tandem", folder: Path) -> list[dict[str, Any]]:
    return predict(tandem, folder).records


@pytest.fixture(scope="module")
def sampled(tandem: "Tandem", folder: Path) -> list[dict[str, Any]]:
    return predict(tandem, folder, **SAMPLED).records


@pytest.fixture(scope="module")
def untruncated(tandem: "Tandem", folder: Path) -> list[dict[str, Any]]:
    return predict(tandem, folder, **UNTRUNCATED).records


def ask(server: Server, **fields: Any) -> Any:
    """A completion of OpenAI's client; greedy unless told otherwise."""
    names = ("top_k", "repetition_penalty", "timeout", "chat_id", "web_search_options")
    extra = {name: fields.pop(name) for name in names if name in fields}
    fields = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": NUM_NEW, "temperature": 0, **fields}
    return server.client.completions.create(**fields, extra_body={"ignore_eos": True, **extra})


def chat(server: Server, **fields: Any) -> Any:
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": NUM_NEW, "temperature": 0, **fields}
    return server.client.chat.completions.create(**fields, extra_body={"ignore_eos": True})


def read_metrics(server: Server) -> dict[str, float]:
    """Value of each sample without labels but the model's name."""
    status, headers, content = server.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(content.decode())
    return {sample.name: sample.value for family in families for sample in family.samples if sample.labels.keys() <= {"model_name"}}


def test_models_are_listed_and_described(server: Server) -> None:
    (model,) = server.client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "tandem")
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; 'tiny' is"):
        server.client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "name"), [({}, "greedy"), (SAMPLED, "sampled"), (UNTRUNCATED, "untruncated")], ids=lambda value: str(value)[:9]
)
def test_answers_equal_predicts_alone_and_beside_seven_others(
    server: Server, request: pytest.FixtureRequest, fields: dict[str, Any], name: str
) -> None:
    expected = [record["text"] for record in request.getfixturevalue(name)]
    assert ask(server, **fields).choices[0].text == expected[0]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda prompt: ask(server, prompt=prompt, **fields).choices[0].text, PROMPTS))
    assert texts == expected


def test_prompts_are_texts_lists_or_ids(server: Server, greedy: list[dict[str, Any]]) -> None:
    several = ask(server, prompt=list(PROMPTS[:2]))
    assert [choice.text for choice in several.choices] == [record["text"] for record in greedy[:2]]
    assert [choice.index for choice in several.choices] == [0, 1]
    ids = [record["prompt_token_ids"] for record in greedy[:2]]
    assert ask(server, prompt=ids[0]).choices[0].text == greedy[0]["text"]
    assert [choice.text for choice in ask(server, prompt=ids).choices] == [record["text"] for record in greedy[:2]]
    assert several.usage.prompt_tokens == sum(map(len, ids)) and several.usage.completion_tokens == 2 * NUM_NEW


def test_a_chat_answer_is_predicts_of_the_rendered_prompt(server: Server, greedy: list[dict[str, Any]]) -> None:
    answer = chat(server)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", greedy[-1]["text"], "length")
    assert answer.usage.prompt_tokens == len(greedy[-1]["prompt_token_ids"])
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == greedy[-1]["text"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_without_a_limit_goes_on_to_the_end_of_the_context(server: Server) -> None:
    status, _, answer = server.ask("POST", "/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "stop": ["a", "e", "i"]})
    assert status == 200 and answer["choices"][0]["finish_reason"] == "stop"


def test_pieces_of_a_stream_are_the_whole_answer(server: Server, greedy: list[dict[str, Any]]) -> None:
    chunks = list(ask(server, stream=True))
    assert len(chunks) > 2 and "".join(chunk.choices[0].text for chunk in chunks) == greedy[0]["text"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def find_boundary(tandem_record: dict[str, Any], logprobs: Any) -> tuple[str, str]:
    """(text before, a stop text) such that two tokens spell it together, and neither has it alone."""
    text: str = tandem_record["text"]
    for first, second in pairwise(logprobs.tokens):
        stop = first[-1:] + second[:1]
        place = text.find(stop)
        if len(stop) == 2 and "\ufffd" not in first + second and place > 0:
            return text[:place], stop
    raise AssertionError("no two tokens of whole characters in a row")


def test_a_stop_text_of_two_tokens_ends_an_answer_and_no_part_of_it_shows(server: Server, greedy: list[dict[str, Any]]) -> None:
    before, stop = find_boundary(greedy[0], ask(server, logprobs=0).choices[0].logprobs)
    whole = ask(server, stop=[stop, "never there"])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (before, "stop")
    assert 0 < whole.usage.completion_tokens <= NUM_NEW
    chunks = list(ask(server, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == before
    assert chunks[-1].choices[0].finish_reason == "stop"
    server.wait_until_idle()


def test_choices_of_one_seed_are_those_of_the_seeds_that_follow(server: Server, sampled: list[dict[str, Any]]) -> None:
    several = ask(server, **SAMPLED, n=3)
    texts = [choice.text for choice in several.choices]
    assert texts[0] == sampled[0]["text"] and len(set(texts)) == 3
    assert texts[2] == ask(server, **{**SAMPLED, "seed": 13}).choices[0].text
    streamed = ["", "", ""]
    for chunk in ask(server, **SAMPLED, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    assert several.usage.prompt_tokens == len(sampled[0]["prompt_token_ids"])


def test_log_probabilities_are_predicts(server: Server, greedy: list[dict[str, Any]]) -> None:
    found = ask(server, logprobs=3).choices[0].logprobs
    assert found.token_logprobs == greedy[0]["logprobs"]
    assert all(
        len(top) <= 3 and max(top.values()) == logprob for top, logprob in zip(found.top_logprobs, found.token_logprobs, strict=True)
    )
    content = chat(server, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [one.logprob for one in content] == greedy[-1]["logprobs"]
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob == one.logprob for one in content)
    streamed = [one for chunk in ask(server, logprobs=0, stream=True) for one in chunk.choices[0].logprobs.token_logprobs]
    assert streamed == greedy[0]["logprobs"]


def test_an_echo_stands_before_the_answer(server: Server, greedy: list[dict[str, Any]]) -> None:
    assert ask(server, echo=True).choices[0].text == PROMPTS[0] + greedy[0]["text"]
    assert "".join(chunk.choices[0].text for chunk in ask(server, echo=True, stream=True)) == PROMPTS[0] + greedy[0]["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_with_the_bits_of_its_tokens_as_they_were_decoded(
    server: Server, greedy: list[dict[str, Any]], stream: bool
) -> None:
    """As evaluation programs ask: echo with logprobs, and no or one new token."""
    record = greedy[0]
    ids = [*record["prompt_token_ids"], *record["token_ids"]]
    for max_tokens in (0, 1):
        fields = {"prompt": [ids, ids[:1]], "max_tokens": max_tokens, "echo": True, "logprobs": 1, "stream": stream}
        chunks = list(ask(server, **fields)) if stream else [ask(server, **fields)]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        first, second = ([choice for choice in choices if choice.index == index] for index in (0, 1))
        found = first[0].logprobs
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert found.token_logprobs[len(record["prompt_token_ids"]) : len(ids)] == record["logprobs"]
        assert [max(top.values()) for top in found.top_logprobs[len(record["prompt_token_ids"]) : len(ids)]] == record["logprobs"]
        assert len(found.tokens) == len(found.text_offset) == len(ids) + max_tokens
        assert first[0].text.startswith(PROMPTS[0]) and found.text_offset[:2] == [0, 0], "the begin token has no text"
        assert second[0].logprobs.token_logprobs[0] is None and len(second[0].logprobs.tokens) == 1 + max_tokens
        assert [one[-1].finish_reason for one in (first, second)] == ["length"] * 2
        if not stream:
            assert chunks[0].usage.completion_tokens == 2 * max_tokens
            assert first[0].text[: found.text_offset[-1]] + found.tokens[-1] == first[0].text or "\ufffd" in first[0].text
    empty = ask(server, max_tokens=0, prompt="a")
    assert (empty.choices[0].text, empty.choices[0].finish_reason, empty.usage.completion_tokens) == ("", "length", 0)
    server.wait_until_idle()


def test_penalties_and_biases_change_what_is_chosen(server: Server, greedy: list[dict[str, Any]]) -> None:
    forced = 70
    forced_text = ask(server, logit_bias={str(forced): 100}, max_tokens=3, logprobs=0).choices[0]
    (token,) = set(forced_text.logprobs.tokens)
    assert forced_text.text == 3 * token
    # A bias that forces one id, and a penalty that grows with every time that it comes: the other forced id has to come, too.
    biases = {str(forced): 100, str(forced + 1): 99}
    penalized = ask(server, logit_bias=biases, frequency_penalty=0.6, max_tokens=6, logprobs=0).choices[0].logprobs.tokens
    assert len(set(penalized)) == 2
    present = ask(server, logit_bias=biases, presence_penalty=1.5, max_tokens=2, logprobs=0).choices[0].logprobs.tokens
    assert len(set(present)) == 2
    first = greedy[0]["token_ids"][0]
    assert ask(server, logit_bias={str(first): -100}).choices[0].text != greedy[0]["text"]


@pytest.mark.parametrize(
    ("path", "fields", "status", "words"),
    [
        ("completions", {"model": "gpt-4"}, 404, "'gpt-4' is not served here"),
        ("completions", {"prompt": "a " * 3000}, 400, "tokens, but the model's context is 2048"),
        ("completions", {"max_tokens": 2100}, 400, "asks for 2100 new ones"),
        ("completions", {"prompt": []}, 400, "prompt holds 0 prompts"),
        ("completions", {"prompt": [[]]}, 400, "has no tokens"),
        ("completions", {"prompt": [300]}, 400, "has id 300, but the vocabulary has 300"),
        ("completions", {"prompt": "\ud800"}, 400, "a lone surrogate"),
        ("completions", {"n": 17}, 400, "n is 17, but has to be an integer <= 16"),
        ("completions", {"prompt": ["a"] * 100, "n": 16}, 400, "1600 answers are requested at once"),
        ("completions", {"logit_bias": {"300": 1}}, 400, "logit_bias names id 300"),
        ("completions", {"prompt": "a" * 90_000}, 400, "prompt 0 has 90000 bytes, but this model can take at most"),
        ("chat/completions", {}, 400, "messages is missing"),
        ("chat/completions", {"messages": [{"role": "function", "content": "a"}]}, 400, "messages.0: role is 'function'"),
        ("chat/completions", {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools.0.function is missing"),
        ("chat/completions", {"messages": MESSAGES, "response_format": {"type": "xml"}}, 400, "type is 'xml'"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\udfff"}]}, 400, "a lone surrogate"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_refused_in_openais_form(
    server: Server, path: str, fields: dict[str, Any], status: int, words: str, stream: bool
) -> None:
    body = fields if path.startswith("chat") else {"prompt": "a", **fields}
    found, _, answer = server.ask("POST", f"/v1/{path}", {**body, "stream": stream})
    assert found == status, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"} and words in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("POST", "/v1/completions", b'{"prompt": ', {}, 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"\xff", {}, 400, ""),
        ("POST", "/v1/completions", b"[" * 90_000, {}, 400, ""),
        ("POST", "/v1/completions", b'{"prompt": "a"}', {"content_type": "text/plain"}, 400, "send the header Content-Type"),
        ("POST", "/v1/completions", b" " * 3_000_000, {}, 413, "but the maximum is 100000"),
        ("POST", "/v1/completions", b'{"prompt": "a"}', {"host": "evil.example"}, 403, "the Host header is 'evil.example'"),
        ("GET", "/health", None, {"host": "127.evil.example:80"}, 403, "the Host header is"),
        ("GET", "/v1/completions", None, {}, 405, "GET is not taken here"),
        ("GET", "/v1/nothing", None, {}, 404, "there is no GET /v1/nothing here"),
    ],
)
def test_what_is_no_request_is_refused_in_openais_form(
    server: Server, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int, words: str
) -> None:
    found, _, answer = server.ask(method, path, body, **headers)
    assert found == status, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"} and words in answer["error"]["message"]


def test_unknown_fields_are_ignored_and_named_in_the_log(server: Server, greedy: list[dict[str, Any]]) -> None:
    for _ in range(2):
        assert ask(server, chat_id="a", web_search_options={}).choices[0].text == greedy[0]["text"]
    for name in ("chat_id", "web_search_options"):
        assert server.stderr.count(f"warning: unknown field '{name}' in a request is ignored") == 1


def test_requests_with_extreme_numbers_end_no_rank(server: Server) -> None:
    before = server.status["restarts"]
    for fields in ({"top_k": 10**300}, {"top_k": 10**9}, {"temperature": 5e-324}, {"top_p": 5e-324}, {"seed": 10**300}):
        answer = server.complete("a", **{"max_tokens": 2, "temperature": 1, "ignore_eos": True, **fields})
        assert answer["usage"]["completion_tokens"] == 2
    assert server.status["restarts"] == before


def test_a_deadline_ends_an_answer(server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "timeout": 0.1}
    status, _, answer = server.ask("POST", "/v1/completions", body)
    assert (status, answer["error"]["code"]) == (504, "timeout") and "after 0.1 s" in answer["error"]["message"]
    with server.stream("a", max_tokens=2000, ignore_eos=True, timeout=0.1) as events:
        *_, last = events
    assert last["error"]["code"] == "timeout"
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_goes_away_frees_its_memory(server: Server, stream: bool) -> None:
    server.wait_until_idle()
    body = json.dumps({"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": stream, "n": 2})
    with server.connect() as connection:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        wait_until(lambda: server.status["blocks_used"], "blocks in use")
        assert server.status["running"] == 2
    server.wait_until_idle()


def test_metrics_tell_what_was_done(server: Server) -> None:
    before = read_metrics(server)
    answer = server.complete("I love", max_tokens=5, temperature=0, ignore_eos=True)
    after = read_metrics(server)
    done = {name: after[name] - before[name] for name in after if name in before}
    assert done["vllm:generation_tokens_total"] == 5
    assert done["vllm:prompt_tokens_total"] == answer["usage"]["prompt_tokens"]
    assert done["vllm:time_to_first_token_seconds_count"] == 1
    assert done["vllm:inter_token_latency_seconds_count"] == 4
    assert (after["tandem_healthy"], after["vllm:num_requests_running"]) == (1, 0) and after["tandem_kv_blocks"] > 0


def test_status_tells_what_the_page_shows(server: Server) -> None:
    server.complete("I love", max_tokens=5)
    wait_until(lambda: all(rank["step_seconds"] for rank in server.status["ranks"]), "steps")
    status = server.status
    assert (status["model"], status["state"], status["world_size"], status["num_layers"]) == ("tiny", "ready", 2, 2)
    assert (status["dtype"], status["context_tokens"], status["max_running"], status["loading"]) == ("float32", 2048, 8, None)
    assert [rank["heads"] for rank in status["ranks"]] == [[0, 6], [6, 9]]
    assert sorted(server.running.find_ranks().items()) == [(rank["rank"], rank["pid"]) for rank in status["ranks"]]
    for rank in status["ranks"]:
        assert 0 <= rank["gather_seconds"] <= rank["step_seconds"] and rank["rss_bytes"] > 0 and rank["bytes_per_second"] > 0


def test_one_connection_serves_many_requests(server: Server) -> None:
    with server.connect() as connection:
        connect = partial(connection.request, "POST", "/v1/completions", headers={"content-type": "application/json"})
        for _ in range(3):
            connect(body=json.dumps({"prompt": "a", "max_tokens": 1}))
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["object"]) == (200, "text_completion")
            sock = connection.sock
        assert sock is connection.sock
