"""Copies of whole pages of the KV cache, in all layers of a model at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_steer.common.errors import SteeringError

FEW_ROWS = ("FLASHINFER",)  # vllm/v1/attention/backends/flashinfer.py sizes its buffers by max_num_seqs


class Pages:
    """The KV caches of a model's layers, [pages, ...] each, with the same pages."""

    def __init__(self, caches: Sequence[Tensor]):
        """Raises SteeringError unless every cache is laid out page by page."""
        for cache in caches:
            if cache[0].numel() != cache.stride(0) or max(cache.stride()) != cache.stride(0):
                raise SteeringError(
                    f"a KV cache has the shape {tuple(cache.shape)} and strides {cache.stride()}, trees need one block "
                    "after the other: choose another --attention-backend, or serve without a tree"
                )
        self._caches = list(caches)
        self._addresses: Tensor | None = None
        if caches and caches[0].is_cuda:
            self._addresses = torch.tensor([cache.data_ptr() for cache in caches], device=caches[0].device)
            self._words = torch.tensor(
                [cache.stride(0) * cache.element_size() // 4 for cache in caches], device=caches[0].device
            )
            self._most = max(cache.stride(0) * cache.element_size() // 4 for cache in caches)

    def copy(self, source: Tensor, to: Tensor) -> None:
        """Copy page source[i] to page to[i] in every layer, in one launch; both [n] integer, on the device.

        No page may be both read and written, but as a copy onto itself.
        """
        if self._addresses is not None:
            from vllm_steer.serving import kernels

            kernels.copy_pages(self._addresses, self._words, self._most, source, to)
            return
        moved = source != to
        source, to = source[moved].long(), to[moved].long()
        for cache in self._caches:
            cache[to] = cache[source]


class Paged:
    """Has the pages of target and drafter, found when first asked for: vLLM binds the caches after all else."""

    @functools.cached_property
    def _target(self) -> Pages:
        return self._pages(target=True)

    @functools.cached_property
    def _drafter(self) -> Pages:
        return self._pages(target=False)

    def _pages(self, target: bool) -> Pages:
        raise NotImplementedError


def pages_of(layers: Mapping[str, Any], kv_cache_config: Any, wanted: Callable[[str], bool]) -> Pages:
    """The pages of an engine's attention layers of `wanted` names; layers that share a cache count once.

    Raises SteeringError for layers in several KV cache groups, whose pages are not the same, for a backend that splits
    vLLM's blocks into pages of its own, and for one that takes no more rows than requests.
    """
    if (groups := len(kv_cache_config.kv_cache_groups)) != 1:
        raise SteeringError(
            f"the layers of target and drafter are in {groups} KV cache groups, draft trees need all in one: serve "
            "this pair without a tree"
        )
    chosen = [layers[name] for name in kv_cache_config.kv_cache_groups[0].layer_names if wanted(name)]
    for layer in chosen:
        backend, pages, blocks = layer.attn_backend.get_name(), len(layer.kv_cache), kv_cache_config.num_blocks
        few = "takes no more rows than requests" if backend in FEW_ROWS else None
        split = f"makes {pages} pages of {blocks} blocks" if pages != blocks else None
        if what := few or split:
            raise SteeringError(
                f"the attention backend {backend} {what}, draft trees need more rows and whole blocks: choose another "
                "--attention-backend (FLASH_ATTN, TRITON_ATTN), for split blocks a smaller --block-size, or serve "
                "without a tree"
            )
    caches = [layer.kv_cache for layer in chosen]
    return Pages(list({cache.data_ptr(): cache for cache in caches}.values()))
