"""Builds a combined worker: both roles in one process, over one copy of the weights, without a transfer."""

from __future__ import annotations

from dataclasses import dataclass

import decode_worker.worker as decode
import prefill_worker.worker as prefill
from deploy.combined.config import CombinedConfig
from shared.model.checkpoint import open_checkpoint
from shared.model.loading import load_prefill_model, load_tokenizer
from shared.model.packing import pack_linears
from shared.rpc.identity import Identity
from shared.rpc.lifecycle import new_epoch


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """One model as each half wants to have it."""

    prefill: prefill.LoadedModel
    decode: decode.LoadedModel


def load_model(config: CombinedConfig) -> LoadedModel:
    """Loads the checkpoint once. Takes seconds; nothing is served before.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        UnsupportedModelError: Its architecture cannot be served.
    """
    checkpoint = open_checkpoint(config)
    # The model thread and the step thread call this one model at the same time. They can, because a forward pass keeps
    # nothing on the modules: KV and mask come from the caller's cache and hook, and `VLMSpec` refuses the rotary
    # embeddings that remember the longest prompt. On a GPU steps and copies have streams of their own and do not wait
    # for a prefill, which has the default one.
    model = load_prefill_model(checkpoint.path, dtype=checkpoint.dtype, device=checkpoint.device)
    pack_linears(model)
    return LoadedModel(
        prefill=prefill.with_model(checkpoint, model, config),
        decode=decode.LoadedModel(
            model=model,
            tokenizer=load_tokenizer(checkpoint.path),
            spec=checkpoint.spec,
            identity=checkpoint.identity,
        ),
    )


def build_workers(
    config: CombinedConfig, model: LoadedModel, identity: Identity | None = None
) -> tuple[prefill.PrefillWorker, decode.DecodeWorker]:
    """Both halves, ready; must be called on the event loop that they serve on.

    They share a boot id, by which the decode half knows that a parcel need not travel.

    Args:
        identity: Of the process; the parcels that do travel, to other workers, go in plaintext without one.
    """
    epoch, decode_config = new_epoch(), config.decode()
    pool, engine = decode.build_engine(decode_config, model.decode)
    decode_half = decode.DecodeWorker(decode_config, model.decode, pool, engine, epoch=epoch)
    prefill_half = prefill.PrefillWorker(
        config.prefill(), model.prefill, epoch=epoch, local=decode_half.receiver, identity=identity
    )
    return prefill_half, decode_half
