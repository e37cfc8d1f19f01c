"""Access to single tokens in vLLM's KV pages, in any physical layout.

vLLM allocates one tensor per layer with the logical shape `[pages, kv_heads, page_size, 2 * D]`, or
`[pages, 1, page_size, D]` for latents (MLA), whose keys contain their values. On GPUs a token's K
and V lie side by side in the last dimension, in any physical order of the others; indexing the logical view is enough.
The CPU attention kernel packs each (page, head) cell as a K region followed by a V region and permutes tokens inside
them, so a token is not a row there: strided views address its elements. Tests compare the views bit by bit with what
the kernel writes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import KVPolicyError


class Layout(IntEnum):
    """How a page is packed; also the `layout` of the operators."""

    ROWS = 0
    """GPUs: a token's K and V side by side."""
    VEC = 1
    """CPU, vector instructions: K `[D, P]`, V `[P, D]`."""
    AMX = 2
    """CPU, AMX tiles: K `[P / 16, D / 2, 16, 2]`, V `[D / 16, P / 2, 16, 2]`."""
    LATENT = 3
    """MLA: a token's latent, then `ROTATED` features with its position; K is both, V the latent."""


ROTATED = 64
"""Features of an MLA key that are rotated by its position, in all known models."""


MAX_HEAD_SIZE = 256
"""Largest head that the kernels for GPUs take."""

MAX_LATENT = 512
"""Most features of a latent that the kernels for GPUs take, beside those that are rotated."""

FP8_CACHES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""vLLM's `--kv-cache-dtype` -> dtype of the bytes in its tensors."""


class TokenView(NamedTuple):
    """A strided view in which a token's elements are addressed by page, head and offset.

    `view` is `[pages, H, page_size / tile, tile, *features]`; a token's features, in order, are its vector.
    """

    view: Tensor

    @property
    def tile(self) -> int:
        """Number of tokens that are interleaved with each other."""
        return self.view.shape[3]

    @property
    def _features(self) -> torch.Size:
        return self.view.shape[4:]

    def read_pages(self, pages: Tensor, length: int) -> Tensor:
        """Read the first `length` tokens of a request, `[H, length, D]`, in slot order; 8-bit elements as float32."""
        rows = self.view[pages].transpose(0, 1)
        if rows.dtype in FP8_CACHES.values():
            rows = rows.float()
        return rows.reshape(rows.shape[0], -1, self._features.numel())[:, :length]

    def gather(self, page: Tensor, head: Tensor, offset: Tensor) -> Tensor:
        """Read the vectors `[..., D]` of single tokens; the indices broadcast against each other."""
        return self.view[page, head, offset // self.tile, offset % self.tile].flatten(-len(self._features))

    def scatter(self, page: Tensor, head: Tensor, offset: Tensor, values: Tensor) -> None:
        """Overwrite single tokens with `values` `[..., D]`."""
        self.view[page, head, offset // self.tile, offset % self.tile] = values.unflatten(-1, self._features)


class LayerPages(NamedTuple):
    """The KV pages of one layer.

    Attributes:
        raw: vLLM's tensor, for whole-page copies.
        keys, values: for scoring.
        cells: the views to move a token in: one of K and V together, or one of each.
        layout: how a page is packed.
    """

    raw: Tensor
    keys: TokenView
    values: TokenView
    cells: tuple[TokenView, ...]
    layout: Layout

    @property
    def page_size(self) -> int:
        """Tokens per page of this tensor; vLLM may split its blocks into smaller kernel pages."""
        return self.raw.shape[2]

    @property
    def num_heads(self) -> int:
        """KV heads on this rank."""
        return self.raw.shape[1]

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages bit by bit."""
        self.raw[target] = self.raw[source]

    def move_cells(self, head: int, from_page: Tensor, from_offset: Tensor, to_page: Tensor, to_offset: Tensor) -> None:
        """Move tokens of one head; no cell is both read and written. All int64 `[n]`."""
        at = torch.as_tensor(head, device=from_page.device)
        for cell in self.cells:
            cell.scatter(to_page, at, to_offset, cell.gather(from_page, at, from_offset))


def layer_pages(kv_cache: Tensor, layout: Layout) -> LayerPages:
    """Describe the pages of one layer in a given layout."""
    n_pages, heads, size, width = kv_cache.shape
    dim = width // 2
    together = TokenView(kv_cache.unsqueeze(3))
    if layout is Layout.LATENT:
        return LayerPages(kv_cache, together, TokenView(together.view[..., :-ROTATED]), (together,), layout)
    if layout is Layout.ROWS:
        keys, values = TokenView(together.view[..., :dim]), TokenView(together.view[..., dim:])
        return LayerPages(kv_cache, keys, values, (together,), layout)
    # Within a (page, head) cell: K region of size * D elements, then the V region.
    k_region, v_region = kv_cache.view(n_pages, heads, 2 * size, dim).chunk(2, dim=2)
    outer = (k_region.stride(0), k_region.stride(1))
    if layout is Layout.VEC:
        # K is stored transposed, `[D, size]`; V as it is.
        k_view = k_region.as_strided((n_pages, heads, size, 1, dim), (*outer, 1, 1, size))
        v_view = v_region.unsqueeze(3)
    else:
        # K `[size / 16, D / 2, 16 tokens, 2]`: pairs along D. V `[D / 16, size / 2, 16, 2 tokens]`: pairs of tokens.
        k_view = k_region.as_strided(
            (n_pages, heads, size // 16, 16, dim // 2, 2), (*outer, 16 * dim, 2, 32, 1), k_region.storage_offset()
        )
        v_view = v_region.as_strided(
            (n_pages, heads, size // 2, 2, dim // 16, 16), (*outer, 32, 1, 16 * size, 2), v_region.storage_offset()
        )
    keys, values = TokenView(k_view), TokenView(v_view)
    return LayerPages(kv_cache, keys, values, (keys, values), layout)


def cpu_layout(isa: str) -> Layout:
    """Return the layout of vLLM's CPU attention for an instruction set, by its backend's name for it.

    Raises:
        KVPolicyError: an instruction set whose layout is not known.
    """
    layouts = {"vec": Layout.VEC, "vec16": Layout.VEC, "amx": Layout.AMX}
    if isa not in layouts:
        raise KVPolicyError(
            f"--kv-policy does not know the CPU page layout {isa!r} (known: vec, vec16, amx); "
            "use --block-size 32 or a multiple, or start without --kv-policy"
        )
    return layouts[isa]


class PagedCache(NamedTuple):
    """The KV pages of all layers of a rank: the first arguments of many operators.

    Attributes:
        caches: vLLM's tensors in model order, `[pages, H, page_size, 2 * D]` (latents: D), all alike.
        pointers: int64 `[layers]`, their addresses, on the device.
        layout: how a page is packed.
    """

    caches: list[Tensor]
    pointers: Tensor
    layout: Layout

    @staticmethod
    def of(caches: list[Tensor], layout: Layout) -> PagedCache:
        """Describe the pages.

        Raises:
            KVPolicyError: layers of different shape, dtype or strides.
        """
        first = caches[0]
        for i, cache in enumerate(caches):
            if (cache.shape, cache.dtype, cache.stride()) != (first.shape, first.dtype, first.stride()):
                raise KVPolicyError(
                    f"--kv-policy needs layers with equal pages; layer {i} has {tuple(cache.shape)} {cache.dtype}, "
                    f"layer 0 {tuple(first.shape)} {first.dtype}; start without --kv-policy"
                )
        return PagedCache(caches, torch.tensor([c.data_ptr() for c in caches], device=first.device), layout)
