"""The tokens of a GGUF vocabulary that end an answer, by llama.cpp's rules (`llama_vocab::impl::load`, special_eog_ids)."""

from collections.abc import Iterable

from model.checkpoint.gguf_metadata import GgufMetadata

END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""Of `tokenizer.ggml.*_token_id`."""
TURN_ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|eom_id|> <EOT> _<EOT> [EOT] <end_of_utterance> <turn|>"
    " <|return|> <|call|> <|calls|> <|flush|>".split()
)
"""Names of tokens that end a turn."""
END_NAMES = TURN_ENDS | frozenset(
    "<|endoftext|> <|end_of_text|> <eos> [EOS] <|tool_response>"
    " <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>".split()
)
"""Names of tokens that end an answer, whatever type the file gives them."""
_CONTROL_NAMES = frozenset({"</s>"})
"""The same where the file calls them control tokens: elsewhere this is a tag of HTML."""
_CONTROL = 3
_HARMONY, _SOLAR = {"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"}


def find_end_ids(metadata: GgufMetadata) -> list[int]:
    """Ids that end an answer: those that the metadata name as such, then tokens by name, in rising order."""
    named = [metadata.read_token(key) for key in END_KEYS]
    tokens = metadata.read("tokenizer.ggml.tokens", [])
    types = metadata.read("tokenizer.ggml.token_type", [])
    by_name = {
        token: number
        for number, token in enumerate(tokens)
        if isinstance(token, str)  # a damaged file may hold anything
        and (token in END_NAMES or (token in _CONTROL_NAMES and types[number : number + 1] == [_CONTROL]))
    }
    ends = [by_name[name] for name in drop_message_ends(by_name)]
    return list(dict.fromkeys([*(one for one in named if one is not None), *sorted(ends)]))


def drop_message_ends(names: Iterable[str]) -> list[str]:
    """Names of ends without `<|end|>` where that only ends a message inside an answer, as in gpt-oss and Solar Open."""
    names = list(names)
    inside = any(others.issubset(names) for others in (_HARMONY, _SOLAR))
    return [name for name in names if name != "<|end|>" or not inside]
