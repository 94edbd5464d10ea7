"""Room for one parcel: a slot of the own arena, and the decode worker's promise, which grow together or not at all."""

from __future__ import annotations

from prefill_worker.kv_sender import KVSender, Ticket
from prefill_worker.parcel.store import ParcelStore
from shared.kv.arena import Slot
from shared.kv.manifest import Manifest
from shared.kv.transport.base import Parcel


class ParcelRoom:
    """Owner of a parcel's slot until it is complete. Lives on the event loop; nothing may be written in the slot before
    it grows.

    Attributes:
        slot: Where the parcel lies.
        body: Its bytes, as many as were asked for.
    """

    def __init__(self, store: ParcelStore, slot: Slot, nbytes: int) -> None:
        self._store = store
        self.slot, self.body = slot, store.view(slot, nbytes)
        self._owns_slot = True

    @classmethod
    async def reserve(cls, store: ParcelStore, nbytes: int) -> ParcelRoom:
        """Waits for a slot.

        Raises:
            TooLargeError: The parcel is larger than the whole arena.
        """
        return cls(store, await store.allocate(nbytes), nbytes)

    async def grow(self, nbytes: int, sender: KVSender, ticket: Ticket, kept_tokens_bound: int) -> bool:
        """Asks for more at both ends, where nobody has to wait for it; False, and all stays, where one refuses."""
        slot = self._store.allocate_now(nbytes)
        if slot is None:
            return False
        granted = False
        try:
            granted = await sender.grow(ticket, kept_tokens_bound)
        finally:
            self._store.free(self.slot if granted else slot)
        if granted:
            self.slot, self.body = slot, self._store.view(slot, nbytes)
        return granted

    def parcel(self, manifest: Manifest) -> Parcel:
        """The complete parcel; what its bound had too much is given back."""
        self.slot = self._store.shrink(self.slot, manifest.body_bytes)
        self.body = self.body[: manifest.body_bytes]
        return Parcel(manifest=manifest, body=self.body, slot=self.slot)

    def hand_over(self) -> None:
        """The slot has another owner from now on."""
        self._owns_slot = False

    def free(self) -> None:
        """Gives the slot back, unless it was handed over."""
        if self._owns_slot:
            self._store.free(self.slot)
