"""The neurons of papers' code, by the names and fields of their classes, wherever those are defined."""

from __future__ import annotations

from trtkern.interop.adapters import Adapter

ADAPTERS: tuple[Adapter, ...] = ()
