"""One answer of an `LLM` as its tokens arrive."""

from typing import TYPE_CHECKING, cast

from launcher.server.api_answers import ChoiceText, TextRules, token_text
from launcher.server.engine_messages import Token
from model.text.tokenizer import Tokenizer
from tandem.outputs import CompletionOutput, Logprob, StreamedToken
from tandem.prompts import PromptTokens
from tandem.sampling_params import SamplingParams

if TYPE_CHECKING:
    from launcher.server.inflight_requests import NewToken


class GrowingAnswer:
    """One answer to a prompt, as its tokens arrive."""

    def __init__(self, number: int, choice: int, prompt: PromptTokens, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.number, self.output = number, CompletionOutput(choice)
        self._tokenizer = tokenizer
        rules = TextRules(stops=params.stops, stop_token_ids=frozenset(params.stop_token_ids or ()))
        self._text = ChoiceText(tokenizer, prompt.ids, rules)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def push(self, token: Token) -> StreamedToken:
        """Add a token."""
        piece, output, logprobs = self._text.push(cast("NewToken", token)), self.output, None  # equal fields
        output.text += piece.text
        output.token_ids.append(token.token_id)
        if output.logprobs is not None and output.cumulative_logprob is not None:
            logprobs = self._list_logprobs(token)
            output.logprobs.append(logprobs)
            output.cumulative_logprob += logprobs[token.token_id].logprob
        if piece.finish_reason:
            output.finish_reason, output.stop_reason = piece.finish_reason, piece.stop_reason
        return StreamedToken(self.number, output.index, token.token_id, piece.text, logprobs, piece.finish_reason)

    def _list_logprobs(self, token: Token) -> dict[int, Logprob]:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top_logprobs, 1)}
        assert token.logprob is not None, "log-probabilities were requested"
        values = {token.token_id: token.logprob, **dict(token.top_logprobs)}
        return {token_id: Logprob(value, ranks.get(token_id), token_text(self._tokenizer, token_id)) for token_id, value in values.items()}
