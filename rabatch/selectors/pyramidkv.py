"""PyramidKV (arXiv 2406.02069): SnapKV's choice, with budgets that fall over the layers (`rabatch.budgets`)."""

from __future__ import annotations

from rabatch.selectors.snapkv import SnapKvSelection, open_snapkv

PyramidKvSelection = SnapKvSelection
open_pyramidkv = open_snapkv
