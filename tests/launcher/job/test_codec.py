"""What one process writes another reads back as the same value, to the last bit of a float."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from launcher.job.codec import read_task, write
from launcher.job.tasks import Decode
from model.engine.request import Request
from model.engine.sampling import SamplingParams

NUMBERS = st.floats(allow_nan=False)
IDS = st.integers(0, 2**31)
PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 9),
    temperature=st.floats(0, exclude_min=True, allow_nan=False),
    top_k=st.integers(0, 10**30),
    seed=st.integers(0, 2**32 - 1),
    logit_bias=st.lists(st.tuples(IDS, NUMBERS)).map(tuple),
    stop_token_ids=st.lists(IDS).map(tuple),
)
REQUESTS = st.builds(
    Request,
    st.integers(0),
    st.lists(IDS, min_size=1).map(tuple),
    PARAMS,
    st.lists(IDS).map(tuple),
    st.sampled_from([None, "eos", "length"]),
)


@given(st.lists(REQUESTS).map(tuple))
def test_requests_come_back_with_the_same_bits(requests: tuple[Request, ...]) -> None:
    back = read_task(write(Decode(requests)))
    assert back == Decode(requests)
    assert repr(back) == repr(Decode(requests)), "-0.0 is equal to 0.0"


def test_whole_numbers_stand_for_floats_and_infinity_stays() -> None:
    params = replace(SamplingParams(max_new_tokens=1), temperature=float("inf"), top_p=1)
    assert read_task(write(Decode((Request(0, (1,), params),)))) == Decode((Request(0, (1,), params),))
