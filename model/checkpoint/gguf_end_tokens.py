"""The end-of-generation tokens of a GGUF vocabulary, by llama.cpp's rules (`llama_vocab::impl::load`, special_eog_ids)."""

from collections.abc import Iterable

from model.checkpoint.gguf_metadata import GgufMetadata

END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""Keys of the form `tokenizer.ggml.*_token_id`."""
TURN_ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|eom_id|> <EOT> _<EOT> [EOT] <end_of_utterance> <turn|>"
    " <|return|> <|call|> <|calls|> <|flush|>".split()
)
"""Names of tokens that end a turn."""
END_NAMES = TURN_ENDS | frozenset(
    "<|endoftext|> <|end_of_text|> <eos> [EOS] <|tool_response>"
    " <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>".split()
)
"""Names of tokens that end generation, whatever their type in the file."""
_CONTROL_NAMES = frozenset({"</s>"})
"""Also these if they are control tokens; otherwise this is an HTML tag."""
_CONTROL = 3
_HARMONY, _SOLAR = {"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"}


def find_end_ids(metadata: GgufMetadata) -> list[int]:
    """Return the end-of-generation ids in ascending order: those named in the metadata, then tokens by name."""
    named = [metadata.read_token(key) for key in END_KEYS]
    tokens = metadata.read("tokenizer.ggml.tokens", [])
    types = metadata.read("tokenizer.ggml.token_type", [])
    by_name = {
        token: number
        for number, token in enumerate(tokens)
        if isinstance(token, str)  # a corrupt file may hold any type
        and (token in END_NAMES or (token in _CONTROL_NAMES and types[number : number + 1] == [_CONTROL]))
    }
    ends = [by_name[name] for name in drop_message_ends(by_name)]
    return list(dict.fromkeys([*(one for one in named if one is not None), *sorted(ends)]))


def drop_message_ends(names: Iterable[str]) -> list[str]:
    """Drop `<|end|>` from the end names where it only ends a message within a reply, as in gpt-oss and Solar Open."""
    names = list(names)
    inside = any(others.issubset(names) for others in (_HARMONY, _SOLAR))
    return [name for name in names if name != "<|end|>" or not inside]
