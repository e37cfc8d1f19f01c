"""Reading and moving single tokens inside vLLM's KV pages, whatever their physical layout.

vLLM hands out one tensor per layer with the logical shape `[pages, kv_heads, page_size, 2 * D]`. On GPUs
a token's K and V lie side by side in the last dimension, in any physical order of the others; indexing
the logical view is enough. The CPU attention kernel packs each (page, head) cell as a K region followed by
a V region and permutes tokens inside them, so there a token is not a row: its elements are found through
strided views. The views were checked bit by bit against the kernel's own writer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KVPolicyError

NULL_PAGE = 0
"""vLLM's block that belongs to nobody; padding is written there."""


class TokenView(NamedTuple):
    """A strided view in which a token's elements are addressed by page, head and offset.

    `view` is `[pages, H, page_size / tile, tile, *features]`; the features in order are the token's vector.
    """

    view: Tensor

    @property
    def tile(self) -> int:
        """Tokens that are interleaved with each other."""
        return self.view.shape[3]

    @property
    def _features(self) -> torch.Size:
        return self.view.shape[4:]

    def read_pages(self, pages: Tensor, length: int) -> Tensor:
        """The first `length` tokens of a request, `[H, length, D]`, in slot order."""
        rows = self.view[pages].transpose(0, 1)
        return rows.reshape(rows.shape[0], -1, self._features.numel())[:, :length]

    def gather(self, page: Tensor, head: Tensor, offset: Tensor) -> Tensor:
        """Vectors `[..., D]` of single tokens; the indices broadcast against each other."""
        return self.view[page, head, offset // self.tile, offset % self.tile].flatten(-len(self._features))

    def scatter(self, page: Tensor, head: Tensor, offset: Tensor, values: Tensor) -> None:
        """Overwrite single tokens with `values` `[..., D]`."""
        self.view[page, head, offset // self.tile, offset % self.tile] = values.unflatten(-1, self._features)


class LayerPages(NamedTuple):
    """The KV pages of one layer.

    Attributes:
        raw: vLLM's tensor, for whole-page copies.
        keys: the keys, for scoring.
        cells: what must be moved for a token to move: K and V together, or one after the other.
    """

    raw: Tensor
    keys: TokenView
    cells: tuple[TokenView, ...]

    @property
    def page_size(self) -> int:
        """Tokens per page of this tensor; vLLM may split its blocks into smaller kernel pages."""
        return self.raw.shape[2]

    @property
    def num_heads(self) -> int:
        """KV heads on this rank."""
        return self.raw.shape[1]

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages, content unseen."""
        self.raw[target] = self.raw[source]

    def move(self, source_pages: Tensor, target_pages: Tensor, source: Tensor, hole: Tensor, valid: Tensor) -> None:
        """Move tokens of one request between its slots.

        Args:
            source_pages: int64 page of each group of `page_size` slots before the compaction.
            target_pages: the same afterwards.
            source: int64 `[H, M]` slots to move from.
            hole: int64 `[H, M]` slots to move to; disjoint from `source`.
            valid: bool `[H, M]`; other entries are padding.
        """
        size = self.page_size
        head = torch.arange(self.num_heads, device=source.device)[:, None]
        to_page = torch.where(valid, target_pages[hole // size], NULL_PAGE)
        for cell in self.cells:
            moved = cell.gather(source_pages[source // size], head, source % size)
            cell.scatter(to_page, head, hole % size, moved)


def gpu_pages(kv_cache: Tensor) -> LayerPages:
    """Pages of FlashAttention, FlashInfer and Triton: K is the first half of the last dimension."""
    dim = kv_cache.shape[3] // 2
    together = TokenView(kv_cache.unsqueeze(3))
    return LayerPages(kv_cache, TokenView(together.view[..., :dim]), (together,))


def cpu_pages(kv_cache: Tensor, isa: str) -> LayerPages:
    """Pages of vLLM's CPU attention for an instruction set as its backend names it.

    Raises:
        KVPolicyError: an instruction set whose layout is not known.
    """
    n_pages, heads, size, double = kv_cache.shape
    dim = double // 2
    # Within a (page, head) cell: K region of size * D elements, then the V region.
    keys, values = kv_cache.view(n_pages, heads, 2 * size, dim).chunk(2, dim=2)
    outer = (keys.stride(0), keys.stride(1))
    if isa in ("vec", "vec16"):
        # K is stored transposed, `[D, size]`; V as it is.
        k_view = keys.as_strided((n_pages, heads, size, 1, dim), (*outer, 1, 1, size))
        v_view = values.unsqueeze(3)
    elif isa == "amx":
        # K `[size / 16, D / 2, 16 tokens, 2]`: pairs along D. V `[D / 16, size / 2, 16, 2 tokens]`: pairs of tokens.
        k_view = keys.as_strided(
            (n_pages, heads, size // 16, 16, dim // 2, 2), (*outer, 16 * dim, 2, 32, 1), keys.storage_offset()
        )
        v_view = values.as_strided(
            (n_pages, heads, size // 2, 2, dim // 16, 16), (*outer, 32, 1, 16 * size, 2), values.storage_offset()
        )
    else:
        raise KVPolicyError(
            f"--kv-policy does not know the CPU page layout {isa!r} (known: vec, vec16, amx); "
            "use --block-size 32 or a multiple, or start without --kv-policy"
        )
    k_tokens, v_tokens = TokenView(k_view), TokenView(v_view)
    return LayerPages(kv_cache, k_tokens, (k_tokens, v_tokens))


def kernel_pages(pages: list[int], ratio: int, device: torch.device) -> Tensor:
    """Block ids as page ids of the kernels' tensors, where one block is `ratio` kernel pages. int64."""
    blocks = to_device(pages, torch.int64, device)
    if ratio == 1:
        return blocks
    return (blocks[:, None] * ratio + torch.arange(ratio, device=device)).flatten()


def to_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers as a device tensor, without making the host wait."""
    host = torch.as_tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
