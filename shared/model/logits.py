"""Changes to logits before a token is drawn: bias, a least length, and penalties for what was said before.

In this order, as vLLM has it; a constraint (`constraint.py`) comes after them. Repetition penalty: CTRL (Keskar et al.,
2019); presence and frequency penalties: as in OpenAI's API, on the counts of the answer alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import torch

from shared.request.sampling import Sampling


class LogitChanges:
    """The changes that one answer asks for; knows what the answer has said so far.

    A function of the prompt's and the answer's tokens: a worker that goes on with an answer pushes its tokens again.
    """

    def __init__(self, sampling: Sampling, eos_token_ids: Collection[int], prompt_tokens: Iterable[int] = ()) -> None:
        """Nothing is said yet.

        Args:
            prompt_tokens: Read where the sampling has a repetition penalty; their order and number do not matter.
        """
        self._sampling = sampling
        self._eos_token_ids = sorted(eos_token_ids)
        self._said: Counter[int] = Counter()
        self._num_said = 0
        self._repeated = set(prompt_tokens if sampling.reads_prompt else ())

    def push(self, token: int) -> None:
        """The answer goes on with `token`."""
        self._num_said += 1
        if self._sampling.counts_answer:
            self._said[token] += 1
        if self._sampling.reads_prompt:
            self._repeated.add(token)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [vocab] that the next token is drawn from; a new tensor, fp32."""
        changed = logits.float().clone()
        if self._sampling.logit_bias:
            tokens, bias = zip(*self._sampling.logit_bias, strict=True)
            changed[_index(tokens, changed)] += changed.new_tensor(bias)
        if self._num_said < self._sampling.min_new_tokens and self._eos_token_ids:
            changed[_index(self._eos_token_ids, changed)] = -torch.inf
        if self._repeated:
            self._punish_repeated(changed)
        if self._said:
            self._punish_said(changed)
        return changed

    def _punish_repeated(self, changed: torch.Tensor) -> None:
        tokens, penalty = _index(self._repeated, changed), self._sampling.repetition_penalty
        found = changed[tokens]
        changed[tokens] = torch.where(found > 0, found / penalty, found * penalty)

    def _punish_said(self, changed: torch.Tensor) -> None:
        counts = changed.new_tensor(list(self._said.values()))
        penalty = counts * self._sampling.frequency_penalty + self._sampling.presence_penalty
        changed[_index(self._said, changed)] -= penalty


def _index(tokens: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=like.device)
