"""Tokenizer settings: special tokens, added tokens, and tokens placed around a text.

The same for every kind of vocabulary. Files are merged as in transformers 5: `added_tokens_decoder` of tokenizer_config.json replaces
special_tokens_map.json and added_tokens.json; without it, special_tokens_map.json takes precedence over tokenizer_config.json.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from model.spec.json_file import read_optional_object
from model.spec.quoting import quote
from parallel.errors import CheckpointError

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Roles that every tokenizer may define; a checkpoint can add others, such as `image_token`."""
_EXTRA, _ADDITIONAL, _DECODER = "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"
_MAX_ID = 2**31
_CODE_LLAMA = "CodeLlamaTokenizer"
"""LlamaTokenizer that is never legacy; its tokens for infilling are in the vocabulary, or never used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is matched in a text before the text is split into words."""

    content: str
    special: bool = False
    """Skipped when decoding."""
    normalized: bool | None = None
    """Matched in the normalized text rather than the original. None: if not special."""
    lstrip: bool = False
    """Strips the whitespace before it."""
    rstrip: bool = False
    """Strips the whitespace after it."""
    single_word: bool = False
    """Matched only between word boundaries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """Settings from the files that come with a vocabulary."""

    special_tokens: Mapping[str, AddedToken | None] = field(default_factory=dict)
    """By role, in the order of `ROLES`, then the checkpoint's own roles. None: explicitly unset."""
    extra_special_tokens: tuple[AddedToken, ...] | None = None
    """Special tokens without a role. None: not specified in tokenizer_config.json."""
    listed_special_tokens: tuple[AddedToken, ...] | None = None
    """Those of special_tokens_map.json, which apply only to a tokenizer.json."""
    added_tokens: Mapping[int, AddedToken] = field(default_factory=dict)
    """By declared id."""
    lists_all_added: bool = False
    """Whether `added_tokens` is complete, so that the list in tokenizer.json adds nothing."""
    tokenizer_class: str | None = None
    """Hugging Face's class, without `Fast`."""
    add_bos_token: bool | None = None
    """Prepend the bos token to every text. None: not specified."""
    add_eos_token: bool | None = None
    """Append the eos token to every text. None: not specified."""
    legacy: bool | None = None
    """Prepend a space after every special token, not only to the whole text. None: not specified."""
    add_prefix_space: bool | None = None
    """Prepend a space to a text. None: not specified."""
    split_special_tokens: bool = False
    """Encode special tokens in a text as ordinary text."""
    has_config: bool = False
    """Whether there is a tokenizer_config.json."""
    chat_template: str | None = None
    """A chat template that takes precedence over those of the files."""

    @property
    def bos_token(self) -> str | None:
        """Begin-of-text token."""
        return self.find("bos_token")

    @property
    def eos_token(self) -> str | None:
        """End-of-text token."""
        return self.find("eos_token")

    @property
    def pad_token(self) -> str | None:
        """Padding token."""
        return self.find("pad_token")

    @property
    def unk_token(self) -> str | None:
        """Token for text outside the vocabulary."""
        return self.find("unk_token")

    def find(self, role: str) -> str | None:
        """Return the token of a role."""
        token = self.special_tokens.get(role)
        return None if token is None else token.content

    def with_defaults(self, **tokens: str | None) -> "TokenizerSettings":
        """Return a copy with tokens for the roles that the files leave unspecified."""
        given = {role: AddedToken(content=text, special=True, normalized=False) for role, text in tokens.items() if text is not None}
        return replace(self, special_tokens=_order_roles({**given, **self.special_tokens}))

    def list_tokens(self, known: Collection[str]) -> list[AddedToken]:
        """List the tokens to add to a vocabulary whose added tokens are `known`: those with ids, by id; those with roles; the rest."""
        named = [token for token in self.special_tokens.values() if token is not None]
        names = {token.content for token in named}
        tokens = {token.content: token for _, token in sorted(self.added_tokens.items())}
        for token in (*named, *(self.extra_special_tokens or ())):
            if token.content not in known:
                tokens.setdefault(token.content, token)
        return [replace(token, special=True) if token.content in names else token for token in tokens.values()]


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
    """Read the settings that come with a vocabulary. Raises CheckpointError for malformed files and invalid values."""
    config_path, map_path, added_path = (folder / f"{name}.json" for name in ("tokenizer_config", "special_tokens_map", "added_tokens"))
    raw = read_optional_object(config_path)
    has_config = config_path.is_file()
    lists_all = _DECODER in raw
    roles: dict[str, Any] = {name: raw[name] for name in raw if name in ROLES or (name.endswith("_token") and _is_token(raw[name]))}
    extra = raw.get(_EXTRA) or raw.get(_ADDITIONAL, raw.get(_EXTRA))
    additional = None
    if lists_all:
        added = _read_decoder(raw[_DECODER], config_path)
    else:
        listed = read_optional_object(map_path)
        roles |= {name: _mark_special(listed[name]) for name in listed if name.endswith("_token")}
        extra, additional = _merge_extra(extra, listed, map_path), listed.get(_ADDITIONAL)
        special = {_content(roles[name]) for name in ROLES if roles.get(name)} | {
            _content(token) for token in (extra if isinstance(extra, list) else ())
        }
        added = _read_added(read_optional_object(added_path), special, added_path)
    if isinstance(extra, dict):
        roles, extra = {**roles, **extra}, None

    def read_tokens(value: Any, path: Path) -> tuple[AddedToken, ...] | None:
        if value is not None and not isinstance(value, list):
            raise CheckpointError(f"{path}: its special tokens are {quote(value)}, but a list of tokens is needed")
        return None if value is None else tuple(_read_token(token, path, special=True) for token in value)

    def read_flag(name: str) -> bool | None:
        if name in raw and raw[name] is not None and not isinstance(raw[name], bool):
            raise CheckpointError(f"{config_path}: {name} is {quote(raw[name])}, but true or false is needed")
        return bool(raw[name]) if name in raw else None

    tokenizer_class, legacy = _read_class(raw, folder), read_flag("legacy")
    if tokenizer_class == _CODE_LLAMA:
        tokenizer_class, legacy = "LlamaTokenizer", False
    return TokenizerSettings(
        special_tokens=_order_roles({name: _read_role(name, value, config_path) for name, value in roles.items()}),
        extra_special_tokens=read_tokens(extra, config_path),
        listed_special_tokens=read_tokens(additional, map_path),
        added_tokens=MappingProxyType(added),
        lists_all_added=lists_all,
        tokenizer_class=tokenizer_class,
        add_bos_token=read_flag("add_bos_token"),
        add_eos_token=read_flag("add_eos_token"),
        legacy=legacy,
        add_prefix_space=None if raw.get("add_prefix_space") is None else read_flag("add_prefix_space"),
        split_special_tokens=bool(read_flag("split_special_tokens")),
        has_config=has_config,
    )


def _order_roles(tokens: Mapping[str, AddedToken | None]) -> Mapping[str, AddedToken | None]:
    names = [*(role for role in ROLES if role in tokens), *(role for role in tokens if role not in ROLES)]
    return MappingProxyType({name: tokens[name] for name in names})


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _content(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _mark_special(value: Any) -> Any:
    return {**value, "special": True} if isinstance(value, dict) else value


def _merge_extra(extra: Any, listed: Mapping[str, Any], path: Path) -> Any:
    """Merge the extra tokens of tokenizer_config.json with the applicable ones of special_tokens_map.json."""
    found = listed.get(_EXTRA)
    if isinstance(found, list):
        if isinstance(extra, list):
            return [*extra, *(token for token in found if token not in extra)]
        return found
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{path}: {_EXTRA} is {quote(found)}, but a list of tokens is needed")
    return extra if found is None else found


def _read_role(role: str, value: Any, path: Path) -> AddedToken | None:
    if value is None:
        return None
    if not _is_token(value):
        raise CheckpointError(f"{path}: {quote(role)} is {quote(value)}, but a token is needed, as text or with its 'content'")
    return _read_token(value, path, special=isinstance(value, str))


def _read_token(value: Any, path: Path, *, special: bool) -> AddedToken:
    """Read a token given as text or as an object."""
    raw = {"content": value} if isinstance(value, str) else value
    if not isinstance(raw, dict) or not isinstance(raw.get("content"), str):
        raise CheckpointError(f"{path}: {quote(value)} is listed as a token, but a text, or an object with 'content', is needed")
    try:
        raw["content"].encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: the token {quote(raw['content'])} holds half of a surrogate pair, which is no character") from None
    flags = {}
    for name in ("special", "normalized", "lstrip", "rstrip", "single_word"):
        flag = raw.get(name)
        if flag is not None and not isinstance(flag, bool):
            raise CheckpointError(f"{path}: {name} of the token {quote(raw['content'])} is {quote(flag)}, but true or false is needed")
        flags[name] = flag
    return AddedToken(
        content=raw["content"],
        special=special if flags["special"] is None else flags["special"],
        normalized=flags["normalized"],
        lstrip=bool(flags["lstrip"]),
        rstrip=bool(flags["rstrip"]),
        single_word=bool(flags["single_word"]),
    )


def _read_decoder(raw: Any, path: Path) -> dict[int, AddedToken]:
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: {_DECODER} is {quote(raw)}, but an object of ids and tokens is needed")
    found: dict[int, AddedToken] = {}
    for key, value in raw.items():
        if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) < _MAX_ID):
            raise CheckpointError(f"{path}: {_DECODER} has the id {quote(key)}, but a number from 0 to {_MAX_ID - 1} is needed")
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: {_DECODER} says {quote(value)} of id {key}, but an object with 'content' is needed")
        found[int(key)] = _read_token(value, path, special=False)
    return found


def _read_added(raw: Mapping[str, Any], special: set[str | None], path: Path) -> dict[int, AddedToken]:
    found: dict[int, AddedToken] = {}
    for content, number in raw.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MAX_ID:
            raise CheckpointError(f"{path}: the id of {quote(content)} is {quote(number)}, but a number from 0 to {_MAX_ID - 1} is needed")
        if number in found:
            raise CheckpointError(
                f"{path} gives id {number} to {quote(found[number].content)} and to {quote(content)}: correct one of them"
            )
        token = _read_token({"content": content}, path, special=content in special)
        found[number] = replace(token, normalized=not token.special)
    return found


def _read_class(raw: Mapping[str, Any], folder: Path) -> str | None:
    """Return the class named in tokenizer_config.json, or else in config.json."""
    found = raw.get("tokenizer_class")
    if found is None and (folder / "config.json").is_file():
        found = read_optional_object(folder / "config.json").get("tokenizer_class")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{folder}: tokenizer_class is {quote(found)}, but a name is needed")
    return None if found is None else found.removesuffix("Fast")
