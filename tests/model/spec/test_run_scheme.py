"""What --activations and --lm-head make of a checkpoint's scheme, and where they are refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.spec.linear_scheme import LinearGroup, LinearScheme
from model.spec.run_scheme import INT8_HEAD, plan_run_scheme
from model.spec.scheme import Scheme, write_scheme
from parallel.errors import ConfigError

WEIGHTS = (LinearScheme(), LinearScheme(bits=4, group_size=64), LinearScheme(bits=4, group_size=32, symmetric=False, act_order=True))
DYNAMIC = LinearScheme(packed=False, activation="token")
STATIC = LinearScheme(packed=False, activation="tensor", activation_symmetric=False)
FLOAT8 = LinearScheme(packed=False, float8=True)


def plan(stored: Scheme, activations: str = "auto", lm_head: str = "auto", *, tied: bool = False) -> Scheme:
    return plan_run_scheme(stored, tied=tied, kv_cache=stored.kv_cache, activations=activations, lm_head=lm_head)


@given(st.sampled_from((*WEIGHTS, DYNAMIC, STATIC, FLOAT8)), st.sampled_from([None, "token", "channel"]))
def test_auto_is_what_the_checkpoint_says(linear: LinearScheme, kv_cache: str | None) -> None:
    stored = Scheme(linear, ("lm_head",), kv_cache)
    assert plan(stored) == stored
    assert plan(Scheme()) == Scheme()


@pytest.mark.parametrize("linear", WEIGHTS)
def test_int8_activations_change_nothing_else_of_any_group(linear: LinearScheme) -> None:
    stored = Scheme(linear, ("lm_head",), others=(LinearGroup(("re:.*down_proj",), LinearScheme(group_size=128)),))
    asked = plan(stored, activations="int8")
    assert asked.find_linear("model.layers.0.mlp.up_proj") == replace(linear, activation="token")
    assert asked.find_linear("model.layers.0.mlp.down_proj") == LinearScheme(group_size=128, activation="token")
    assert asked.find_linear("lm_head") is None
    assert asked.name.startswith(f"a8w{linear.bits}-dynamic")


def test_a_checkpoint_with_dynamic_activations_has_what_is_asked_for() -> None:
    assert plan(Scheme(DYNAMIC), activations="int8") == Scheme(DYNAMIC)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (Scheme(), "holds float weights"),
        (Scheme(kv_cache="token"), "holds float weights"),
        (Scheme(FLOAT8), "FP8 weights"),
        (Scheme(LinearScheme(), others=(LinearGroup(("re:.*down_proj",), FLOAT8),)), "FP8 weights"),
        (Scheme(STATIC), "stored scales (a8w8-static)"),
    ],
)
def test_int8_activations_that_mean_nothing_are_refused(stored: Scheme, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(stored, activations="int8")
    assert words in str(refused.value) and "--activations" in str(refused.value)


def test_an_int8_head_is_declared_nowhere_and_named_in_stats() -> None:
    for stored, name in ((Scheme(), "h8"), (Scheme(LinearScheme(), ("lm_head",), "token"), "rtn-a16w8-h8-c8")):
        asked = plan(stored, lm_head="int8")
        assert asked.find_linear("lm_head") == INT8_HEAD and asked.has_integers
        assert asked.name == name
        assert asked.linear is None or write_scheme(asked) == write_scheme(stored)
    both = plan(Scheme(LinearScheme(), ("lm_head",)), activations="int8", lm_head="int8")
    assert both.find_linear("lm_head") == INT8_HEAD


def test_the_inputs_of_a_stored_int8_head_stay_as_they_are() -> None:
    asked = plan(Scheme(LinearScheme()), activations="int8", lm_head="int8")
    assert asked.find_linear("lm_head") == LinearScheme()
    assert asked.find_linear("model.layers.0.mlp.up_proj") == LinearScheme(activation="token")
    assert plan(Scheme(DYNAMIC), activations="int8").find_linear("lm_head") == DYNAMIC


def test_a_tied_head_is_stored_as_floats_whatever_the_scheme_says() -> None:
    assert plan(Scheme(LinearScheme()), lm_head="int8", tied=True).find_linear("lm_head") == INT8_HEAD


def test_a_stored_int8_head_is_used_as_it_is_and_another_is_refused() -> None:
    assert plan(Scheme(LinearScheme()), lm_head="int8") == Scheme(LinearScheme())
    for linear in (LinearScheme(bits=4, group_size=32), FLOAT8):
        with pytest.raises(ConfigError, match=f"--lm-head is int8, but the checkpoint stores its output head as {linear.name}"):
            plan(Scheme(linear), lm_head="int8")
