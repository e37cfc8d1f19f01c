"""Fidelity: how much eviction changes a model's predictions on given texts.

A text is fed as an unprotected prompt, so it is compacted exactly as if the model had written it. The log probability
of each next token shows the cost of eviction at that position.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import KVPolicyError
from .arms import WHOLE, Arm, Arms, Request, Serve, check_methods
from .comparison import Positions, summarise
from .engine import Done, Scores, Setup, serve
from .texts import Text

TOP = 20
"""Number of most likely tokens to compare."""


class Fidelity:
    """A run and its folder.

    Args:
        setup: settings of all engines.
        methods: to measure; "full" is always measured and must not be listed.
        budgets: in tokens.
        texts: of equal length, within `setup.longest`.
        out: folder of the results; those already in it are used.
        serve: starts engines.

    Raises:
        KVPolicyError: bad input, or the folder holds results of other settings.
    """

    def __init__(
        self,
        setup: Setup,
        methods: Sequence[str],
        budgets: Sequence[int],
        texts: Sequence[Text],
        out: Path,
        serve: Serve = serve,
    ) -> None:
        if not texts:
            raise KVPolicyError("--texts: no text was given")
        check_methods(setup, methods, budgets)
        self.setup, self.texts = setup, texts
        self.evicting = [Arm(method, budget) for budget in budgets for method in methods]
        self._arms = Arms(setup, out, serve)
        self._requests = [Request(text.digest, text.name, text.tokens, top=TOP) for text in texts]

    def __call__(self) -> dict[str, Any]:
        """Measure the arms without saved results, and summarise.

        Returns:
            `full_nll`: of full KV over all positions; `rows`: see `comparison.summarise`, with `method` and `budget`.

        Raises:
            RunError: an engine failed, or a method never compacted a text that exceeds its bound.
            KeyboardInterrupt: interrupted; the same run can be resumed.
        """
        self._arms.run(dict.fromkeys([WHOLE, *self.evicting], self._requests), self._keep, "text")
        whole = [self._arms.load(WHOLE, request)["logprobs"][:, 0] for request in self._requests]
        return {
            "full_nll": float(-np.mean(whole, dtype=np.float64)),
            "rows": [{"method": arm.method, "budget": arm.budget, **self._figures(arm)} for arm in self.evicting],
        }

    def _keep(self, arm: Arm, request: Request, done: Done) -> dict[str, Any]:
        assert done.scores is not None
        if arm == WHOLE:
            return vars(done.scores)
        full = Scores(**self._arms.load(WHOLE, request))
        return vars(Positions.compare(full, done.scores)) | {"compactions": done.compactions}

    def _figures(self, arm: Arm) -> dict[str, Any]:
        results = [self._arms.load(arm, request) for request in self._requests]
        compactions = [int(result.pop("compactions")) for result in results]
        compared = [Positions(**result) for result in results]
        sources = [text.source for text in self.texts]
        return summarise(compared, sources, compactions, self.setup.bound(arm.budget), self.setup.buffer)
