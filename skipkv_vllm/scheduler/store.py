"""Room for the tokens of running requests in host memory: which request has which pages, by counts alone.

Whatever a request computes behind its protected prompt is stored at its next compaction, evicted or not, so a token is
copied once. If no page is free, the request with most pages loses the first one of its own, for ever.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ..core.limits import STORED_PAGE, Limits, ceil_div
from ..core.orders import Stored

logger = logging.getLogger("vllm.skipkv")


@dataclass
class StoredText:
    """The stored tokens of a request.

    Attributes:
        first: position of the first stored token.
        begin: position of the first one that the last compaction copies there.
        end: position behind the last one.
        pages: their pages, in order.
        number: most tokens that come back.
    """

    first: int
    begin: int
    end: int
    pages: list[int] = field(default_factory=list)
    number: int = 0


class TokenStore:
    """The pages of the store.

    Args:
        num_pages: pages for all requests together.

    Attributes:
        num_pages: see above.
        num_dropped: tokens that were dropped for lack of pages, of all requests ever.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_dropped = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._texts: dict[str, StoredText] = {}

    @property
    def num_used(self) -> int:
        """Pages in use."""
        return self.num_pages - len(self._free)

    @property
    def num_tokens(self) -> int:
        """Stored tokens of all requests."""
        return sum(max(0, text.end - text.first) for text in self._texts.values())

    def compact(self, request_id: str, limits: Limits, num_logical: int) -> None:
        """Make room for what a request has computed since its last compaction, if any of its tokens may come back.

        Args:
            request_id: the request.
            limits: its limits.
            num_logical: tokens computed so far.
        """
        if not limits.num_recalled:
            return
        text = self._texts.setdefault(request_id, StoredText(limits.protected, limits.protected, limits.protected))
        text.begin, text.end = text.end, num_logical
        while len(text.pages) < ceil_div(text.end - text.first, STORED_PAGE):
            if not self._free:
                self._drop_page(text)
            text.pages.append(self._free.pop())
        text.number = limits.num_recalled

    def stored(self, request_id: str, *, copies: bool) -> Stored | None:
        """Return the stored tokens of a request; None if there are none.

        Ask when all requests of a step have got their room, because one may lose a page to another.

        Args:
            request_id: the request.
            copies: whether this step copies those computed since the compaction before.
        """
        text = self._texts.get(request_id)
        if text is None or text.first >= text.end:
            return None
        begin = max(text.begin, text.first) if copies else text.end
        return Stored(text.first, begin, text.end, list(text.pages), text.number)

    def forget(self, request_id: str) -> None:
        """Free the pages of a request that ended or lost its blocks."""
        text = self._texts.pop(request_id, None)
        if text is not None:
            self._free += reversed(text.pages)

    def _drop_page(self, needy: StoredText) -> None:
        """Free the first page of the request with most pages; of equal ones not that of the request that needs it."""
        largest = max(self._texts.values(), key=lambda text: (len(text.pages), text is not needy))
        self._free.append(largest.pages.pop(0))
        number = min(STORED_PAGE, largest.end - largest.first)
        largest.first += STORED_PAGE
        if largest is not needy and not largest.pages:
            # What it computes from now on begins a page.
            largest.first = largest.end
        if not self.num_dropped:
            logger.warning(
                "SkipKV: the host memory for evicted tokens is full: it holds %d tokens. The requests with most tokens "
                "there lose their earliest ones for ever; raise --kv-recall-memory. Said once; the metric "
                "skipkv_dropped_stored_tokens_total counts on",
                self.num_pages * STORED_PAGE,
            )
        self.num_dropped += number

    def check_integrity(self) -> None:
        """Verify that each page is free or belongs to one request.

        Raises:
            AssertionError: a page was lost or is used twice.
        """
        used = [page for text in self._texts.values() for page in text.pages]
        assert sorted((*self._free, *used)) == list(range(self.num_pages)), "a page of the token store was lost"
