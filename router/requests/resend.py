"""A retained parcel on its way to another decode worker."""

from __future__ import annotations

from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import prefill_pb2

from router.admission.admission import Lease
from router.deadline import Deadline
from router.requests.parcels import Parcel
from router.requests.recovery import Loss, LostError, is_of_receiver
from router.stages import TRANSFER
from router.workers.worker import PROMPT, TOKENS, UNREACHABLE
from shared.errors import DataLossError, NotFoundError, ServiceError


async def resend(parcel: Parcel, lease: Lease, *, timeout_s: float, deadline: Deadline) -> pb.Transfer:
    """Has `parcel` sent to the memory of `lease`; afterwards its sequence can be attached there.

    Raises:
        LostError: It did not arrive; says whose fault that is and whether it can be tried again.
        DeadlineExceededError: The client's deadline came first.
    """
    request = prefill_pb2.ResendRequest(parcel=parcel.secret, attempt=lease.attempt, ticket=lease.ticket)
    try:
        response = await parcel.worker.client.resend(request, timeout_s=deadline.at_most(timeout_s))
    except ServiceError as error:
        if deadline.passed:
            raise deadline.error(TRANSFER) from error
        loss = _loss(error, parcel, lease)
        lease.prefill_charge.failed(PROMPT, error)
        lease.decode_charge.failed(TOKENS, error)
        raise LostError(loss) from error
    finally:
        lease.prefill_charge.end()
    return response.transfer


def _loss(error: ServiceError, parcel: Parcel, lease: Lease) -> Loss:
    holder, receiver = parcel.worker, lease.pair.decode
    if isinstance(error, NotFoundError) and error.reason == "NO_PARCEL":
        parcel.gone = True
        return Loss(error.at(TRANSFER, holder.info.name), None, parcel_gone=True)
    if isinstance(error, DataLossError):
        # damaged more than once: rather what is sent than the way it takes
        return Loss(error.at(TRANSFER, receiver.info.name), holder, parcel_gone=True)
    hangs = error.reason == "WORKER_TIMEOUT" and holder.state != UNREACHABLE
    if hangs or is_of_receiver(error, receiver):
        return Loss(error.at(TRANSFER, receiver.info.name), receiver, parcel_gone=False)
    return Loss(error.at(TRANSFER, holder.info.name), holder, parcel_gone=True)
