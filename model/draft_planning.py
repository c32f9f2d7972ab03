"""The plan of ranks that hold a draft model next to the large one."""

from collections.abc import Sequence
from dataclasses import replace

from model.planning import RankPlan


def add_draft_model(plans: Sequence[RankPlan], drafts: Sequence[RankPlan]) -> list[RankPlan]:
    """Return the plans of a model with the bytes of its draft model, planned for the same ranks and workload.

    The draft model is loaded last, so all of it adds to the peak, but only one of the two computes at a time.
    """
    return [
        replace(
            plan,
            file_bytes=plan.file_bytes + draft.file_bytes,
            weight_bytes=plan.weight_bytes + draft.weight_bytes,
            kv_cache_bytes=plan.kv_cache_bytes + draft.kv_cache_bytes,
            activation_bytes=max(plan.activation_bytes, draft.activation_bytes),
            peak_bytes=plan.peak_bytes + draft.weight_bytes + draft.kv_cache_bytes + max(0, draft.activation_bytes - plan.activation_bytes),
        )
        for plan, draft in zip(plans, drafts, strict=True)
    ]
