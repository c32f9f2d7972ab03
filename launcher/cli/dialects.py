"""Words of other programs' command lines that no option declaration can express, rewritten as tandem's own.

Golden Stick's `quant_ckpt.py` has had two dialects, told apart by values: in the released 0.6.0 `-a` is the activation type and `-q` the
approach; before, `-a` was the approach and `-n` the network. msrun takes -1 for no time limit.
"""

from launcher.settings.options import MAX_SECONDS
from launcher.settings.program_options import separate_program

_BLACKLIST = ("-b", "--opname_blacklist", "--not-converted")
_DTYPES = ("int8", "none", "None")
_NETWORKS = ("LlamaForCausalLM", "ParallelLlamaForCausalLM")
_NETWORK_FLAGS = ("-n", "--network")
_MSRUN_TIMEOUT = "--cluster_time_out"


def translate(arguments: list[str]) -> list[str]:
    """Rewrite the words after `tandem`."""
    if arguments[:1] == ["run"]:
        words = ["run", *separate_program(arguments[1:])]
        program = words.index("--") if "--" in words else len(words)
        return [*_lift_time_limit(words[:program]), *words[program:]]
    if arguments[:1] == ["quantize"]:
        return _translate_quantize(arguments)
    return _lift_time_limit(arguments)


def _translate_quantize(arguments: list[str]) -> list[str]:
    """Expand `-b lm_head w2` to `-b lm_head -b w2`, take `-a int8` for the activation type, and leave out `-n LlamaForCausalLM`."""
    translated: list[str] = []
    flag = ""
    for word in _lift_time_limit(arguments):
        is_value = not word.startswith("-")
        if flag in _NETWORK_FLAGS and word in _NETWORKS:
            translated.pop()
        else:
            if flag == "-a" and word in _DTYPES:
                translated[-1] = "--act-quant-dtype"
            elif is_value and flag in _BLACKLIST and translated[-1] != flag:
                translated.append(flag)
            translated.append(word)
        # A list goes on after its first value, any other flag has one.
        flag = flag if is_value and flag in _BLACKLIST else "" if is_value else word
    return translated


def _lift_time_limit(arguments: list[str]) -> list[str]:
    words: list[str] = []
    for word in arguments:
        flag, _, value = word.partition("=")
        if flag == _MSRUN_TIMEOUT and value:
            words += [flag, value]
        else:
            words.append(word)
        if words[-2:-1] == [_MSRUN_TIMEOUT] and _is_negative(words[-1]):
            words[-1] = str(MAX_SECONDS)
    return words


def _is_negative(word: str) -> bool:
    try:
        return float(word) < 0
    except ValueError:
        return False
