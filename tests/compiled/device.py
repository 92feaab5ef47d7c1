"""Scenes of the reference tests on the device that the kernels run on, everything poisoned."""

from typing import Any

import pytest
import torch
from reference.scene import Scene
from torch import Tensor

from entmaxkv_kernels import Counter, PagedCache, Selector, reference
from entmaxkv_kernels.reference.select import select_pages
from entmaxkv_kernels.triton.decode import decode, step_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
"""Triton's interpreter multiplies bf16 matrices wrongly."""
on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="too long for the interpreter")


def on_device(cache: PagedCache) -> PagedCache:
    """A copy of the pages on the device, with the strides that they have."""
    flat = torch.empty(0, dtype=torch.uint8).set_(cache.key.untyped_storage())
    flat = flat.to(DEVICE, copy=True)

    def moved(view: Tensor) -> Tensor:
        return flat.view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset())

    return PagedCache(*map(moved, cache[:4]), cache.layout)


class Step:
    """One decode step of a scene, compiled and by the reference, over a poisoned workspace."""

    def __init__(
        self, scene: Scene, selector: Selector, *, certify: bool = False, **options: Any
    ) -> None:
        self.scene, self.certify = scene, certify
        self.options = {
            "scale": scene.scale,
            "alpha": 1.5,
            "selector": selector,
            "alibi_slopes": None,
            "sliding_window": None,
            "exact_rows": None,
            "exact_below": 0,
            **options,
        }
        query = scene.last_queries
        context = query.to(DEVICE), scene.cache, scene.block_table
        exact_below = self.options["exact_below"]
        self.shape = step_shape(*context, selector, exact_below, certify)
        self.counters = torch.zeros(len(Counter), dtype=torch.int64)

    def run(self, workspace_size: int | None = None) -> Tensor:
        scene, options = self.scene, dict(self.options)
        for name, value in options.items():
            options[name] = value.to(DEVICE) if isinstance(value, Tensor) else value
        size = self.shape.good_size if workspace_size is None else workspace_size
        self.workspace = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
        query, counters = scene.last_queries.to(DEVICE), torch.zeros_like(self.counters).to(DEVICE)
        out = torch.full_like(query, torch.nan)
        options["certificate"] = self._certificate(query)
        context = on_device(scene.cache), scene.block_table.to(DEVICE), scene.seq_lens.to(DEVICE)
        decode(query, *context, **options, counters=counters, out=out, workspace=self.workspace)
        self.counters = counters.cpu()
        self.certificate = options["certificate"].cpu() if self.certify else None
        return out.cpu()

    def _certificate(self, query: Tensor) -> Tensor | None:
        """[B, query_heads], poisoned, with rows that are not neighbours."""
        whole = query.new_full((*query.shape[:2], 2), torch.nan, dtype=torch.float32)
        return whole.flatten(1)[:, : query.shape[1]] if self.certify else None

    def run_reference(self) -> tuple[Tensor, Tensor]:
        """Output and counters of the reference in the scene's dtype."""
        query, counters = self.scene.last_queries, torch.zeros_like(self.counters)
        context = self.scene.cache, self.scene.block_table, self.scene.seq_lens
        out, certificate = torch.empty_like(query), self._certificate(query)
        more = {"counters": counters, "out": out, "certificate": certificate}
        reference.decode(query, *context, **self.options, **more)
        self.expected_certificate = certificate
        return out, counters

    def run_selection(self) -> Tensor:
        """Pages [B, kv_heads, P] that the reference selects."""
        context = self.scene.cache, self.scene.block_table, self.scene.seq_lens.long()
        return select_pages(self.scene.last_queries, *context, **self.options).selected

    def scratch(self, name: str) -> Tensor:
        """One part of the workspace, as the step has left it."""
        capacity = self.shape.capacity(len(self.workspace))
        return self.shape.divide(self.workspace, capacity)[name].cpu()
