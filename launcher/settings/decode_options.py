"""Options of the commands that generate text: predict, chat and serve."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from launcher.settings.option_declarations import GENERATION, MEMORY, MODEL, OUTPUT, PARALLELISM, SERVER, also, argument, option
from launcher.settings.options import MAX_SECONDS, ClusterOptions, EngineOptions, LogLevel, SamplingOptions

ToolCallParser = Literal["hermes", "llama3_json", "mistral"]
OutputFormat = Literal["text", "mindformers", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions(SamplingOptions, ClusterOptions):
    """Options of `tandem predict`."""

    adapter: Annotated[
        str | None,
        option("--adapter", metavar="NAME", help="Adapter of --lora to use. Default: the only one.", panel=MODEL),
    ] = None
    prompts: Annotated[
        tuple[str, ...],
        option("--prompt", help="Prompt; repeatable. Default: standard input, as one prompt.", panel=GENERATION),
    ] = ()
    prompts_file: Annotated[
        Path | None,
        option("--prompts-file", help='Prompts, one per line; .jsonl: objects with "prompt"; -: standard input.', panel=GENERATION),
    ] = None
    max_length: Annotated[
        int | None,
        option(
            "--max-length",
            help="Maximum tokens of prompt and continuation. Default: 1024.",
            panel=GENERATION,
        ),
    ] = None
    ignore_eos: Annotated[bool, option("--ignore-eos", help="Continue past the end-of-sequence token.", panel=GENERATION)] = False
    logprobs: Annotated[bool, option("--logprobs", help="Add log-probabilities to --output and --format json.", panel=OUTPUT)] = False
    output_format: Annotated[
        OutputFormat,
        option(
            "--format",
            help="Format of standard output; text is streamed. Default: text.",
            panel=OUTPUT,
        ),
    ] = "text"
    output: Annotated[
        Path | None,
        option("--output", metavar="FILE", help="Append one JSON object per finished prompt. Default: none.", panel=OUTPUT),
    ] = None
    resume: Annotated[bool, option("--resume", help="Skip prompts already in the --output file.", panel=OUTPUT)] = False
    save_file: Annotated[
        Path | None, option("--save_file", help="Write the results to this file as MindFormers does.", panel=OUTPUT, hidden=True)
    ] = None
    stats: Annotated[
        Path | None, option("--stats", metavar="FILE", help="Write speeds, bytes and memory to this JSON file.", panel=OUTPUT)
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(SamplingOptions, EngineOptions):
    """Options of `tandem chat`."""

    adapter: Annotated[
        str | None,
        option("--adapter", metavar="NAME", help="Adapter of --lora to use. Default: the only one.", panel=MODEL),
    ] = None
    system: Annotated[
        str | None, option("--system", metavar="TEXT", help="System message of the conversation. Default: none.", panel=GENERATION)
    ] = None
    max_batch_size: int | None = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiOptions(ClusterOptions):
    """Options of the commands that take requests of OpenAI's API: serve and batch."""

    served_model_name: Annotated[
        str | None, option("--served-model-name", help="Model name of the API. Default: the checkpoint's name.", panel=SERVER)
    ] = None
    prefill_tokens: Annotated[
        int,
        option(
            "--prefill-tokens",
            help="Maximum prompt tokens per forward pass; lower values delay others less. Default: 256.",
            panel=MEMORY,
            min=16,
            max=512,
        ),
        also("--max-num-batched-tokens"),
    ] = 256
    strict_fields: Annotated[
        bool, option("--strict-fields", help="Reject requests with unknown fields instead of ignoring them.", panel=SERVER)
    ] = False
    tool_call_parser: Annotated[
        ToolCallParser | None,
        option("--tool-call-parser", help="Form of the model's tool calls. Default: recognized by its chat template.", panel=SERVER),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions(ApiOptions):
    """Options of `tandem batch`."""

    input: Annotated[
        Path | None, argument(metavar="INPUT", help="Requests, one JSON object per line, in OpenAI's batch format.", is_first=True)
    ] = None
    output: Annotated[
        Path | None, option("--output", "-o", metavar="FILE", help="Answers, one JSON object per line. Required.", panel=OUTPUT)
    ] = None
    resume: Annotated[bool, option("--resume", help="Skip requests already answered in the --output file.", panel=OUTPUT)] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(ApiOptions):
    """Options of `tandem serve`."""

    host: Annotated[
        str, option("--host", help="Address to listen on; outside loopback it needs --api-key-file. Default: 127.0.0.1.", panel=SERVER)
    ] = "127.0.0.1"
    port: Annotated[int, option("--port", help="Port to listen on; 0: any free one. Default: 8000.", panel=SERVER, min=0, max=65535)] = 8000
    api_key_file: Annotated[
        Path | None, option("--api-key-file", help="File of API keys, one per line, for bearer tokens. Default: none.", panel=SERVER)
    ] = None
    insecure: Annotated[bool, option("--insecure", help="Listen on any address without an API key.", panel=SERVER)] = False
    max_waiting: Annotated[
        int, option("--max-queue", help="Maximum queued sequences; more are rejected (429). Default: 256.", panel=SERVER, min=0)
    ] = 256
    request_seconds: Annotated[
        float,
        option(
            "--request-timeout",
            help="Per-request time limit in seconds; a client may ask for less. Default: 600.",
            panel=SERVER,
            above=0,
            max=MAX_SECONDS,
        ),
    ] = 600.0
    drain_seconds: Annotated[
        float,
        option(
            "--drain",
            help="Seconds to drain requests after SIGTERM or SIGINT. Default: 30.",
            panel=SERVER,
            min=0,
            max=MAX_SECONDS,
        ),
    ] = 30.0
    max_body_megabytes: Annotated[
        float, option("--max-body-mb", help="Maximum request body in megabytes. Default: 4.", panel=SERVER, min=0.001, max=1000)
    ] = 4.0
    max_connections: Annotated[
        int | None,
        option("--max-connections", help="Maximum open connections. Default: the open-file limit, up to 1024.", panel=SERVER, min=1),
    ] = None
    max_client_connections: Annotated[
        int | None,
        option("--max-client-connections", help="Maximum open connections per address. Default: half of all.", panel=SERVER, min=1),
    ] = None
    max_client_requests: Annotated[
        int,
        option(
            "--max-client-requests",
            help="Maximum concurrent requests per client (API key or address). Default: 128.",
            panel=SERVER,
            min=1,
        ),
    ] = 128
    allowed_origins: Annotated[
        tuple[str, ...],
        option("--allow-origin", help="Origin of web pages that may call the server; repeatable. Default: none.", panel=SERVER),
    ] = ()
    max_restarts: Annotated[
        int | None,
        option(
            "--max-restarts",
            help="Maximum restarts after rank failures; the server exits after three failed starts in a row. Default: 1000.",
            panel=PARALLELISM,
            min=0,
        ),
    ] = None
    log_level: Annotated[LogLevel, option("--log-level", help="Minimum severity of log messages. Default: info.", panel=OUTPUT)] = "info"
