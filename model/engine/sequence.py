"""A sequence that the engine decodes, and its part of a pass."""

from dataclasses import dataclass, field

from model.engine.block_pool import ROOT
from model.engine.grammar import GrammarState
from model.engine.request import Request
from model.engine.sampling import SamplingState
from model.engine.speculation import DraftPace, PromptLookup
from model.layers.cache import KeyValueCache


@dataclass(slots=True, eq=False)
class ModelDraft:
    """The state of a sequence in a draft model."""

    cache: KeyValueCache
    """Its KV cache: the sequence's own blocks, in the draft model's store."""
    pace: DraftPace
    """Number of tokens to draft."""


@dataclass(slots=True, eq=False)
class LiveSequence:
    """An unfinished request."""

    request: Request
    """The request."""
    sampling: SamplingState
    """Sampling state."""
    cache: KeyValueCache
    """KV cache of its first tokens."""
    ids: list[int]
    """Prompt and new tokens."""
    lookup: PromptLookup | None = None
    """Drafts its tokens from its own text, if that is enabled."""
    draft: ModelDraft | None = None
    """Its state in the draft model, if there is one."""
    num_new: int = 0
    """Number of new tokens."""
    hollow: bool = False
    """Whether any of its keys and values were not computed."""
    chain: int = field(default=ROOT)
    """Chain of its cached blocks, see BlockPool."""
    num_known: int = 0
    """Number of cached blocks."""
    grammar: GrammarState | None = None
    """Its parser, on rank 0, if its text is limited by a grammar."""
    adapter: int = 0
    """Number of its LoRA adapter, from 1; 0: none."""
    num_scored: int = 0
    """Prompt tokens after which the next one has been scored, see SamplingParams.prompt_logprobs."""

    @property
    def num_unscored(self) -> int:
        """Number of prompt tokens after which the next one still has to be scored."""
        return len(self.request.prompt_ids) - 1 - self.num_scored if self.request.params.prompt_logprobs else 0

    @property
    def num_pending(self) -> int:
        """Number of tokens that have not gone through the model; the last of them yields the next token."""
        return len(self.ids) - self.cache.length

    @property
    def is_decoding(self) -> bool:
        """Whether the next pass yields a new token, rather than processing part of the existing ones."""
        return self.num_new > 0 and self.num_pending == 1

    @property
    def is_over(self) -> bool:
        """Whether an earlier attempt finished this request, so that its results are not needed."""
        return self.request.known_reason is not None

    @property
    def final_ids(self) -> tuple[int, ...]:
        """Prompt and new tokens, including all resumed ones."""
        return self.request.prompt_ids + self.request.resumed_ids

    def judge(self, drafted: int, accepted: int) -> None:
        """Record how many of the last draft tokens were accepted."""
        if self.draft is not None:
            self.draft.pace.judge(drafted, accepted)
        if self.lookup is not None:
            self.lookup.judge(drafted, accepted)

    def knows(self, ahead: int) -> int | None:
        """Return the new token `ahead` positions ahead if it is a resumed one."""
        known, place = self.request.resumed_ids, self.num_new + ahead
        return known[place] if place < len(known) else None


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one sequence in a pass."""

    sequence: LiveSequence
    """The sequence."""
    first: int
    """Number of its tokens before this part."""
    count: int
    """Number of its tokens in the pass."""
    decodes: bool
    """Whether this is a decode step, see LiveSequence."""
    drafts: tuple[int, ...] = ()
    """Draft tokens appended to them."""

    @property
    def ids(self) -> list[int]:
        """Token ids in the pass."""
        return [*self.sequence.ids[self.first : self.first + self.count], *self.drafts]

    @property
    def is_last(self) -> bool:
        """Whether it yields the next token."""
        return self.first + self.count == len(self.sequence.ids)
