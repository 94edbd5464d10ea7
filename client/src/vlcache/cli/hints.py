"""What to do about an error: a line below it, where there is something to say."""

import argparse

import grpc

from vlcache._errors import Unauthenticated, Unavailable, VlcacheError
from vlcache.cli.options import TOKEN_VARIABLE
from vlcache.cli.probe import Peer, peer_at

_BY_REASON = {
    "NO_WORKER": "`vlcache status` shows the workers; one that has just been started is still loading its model",
    "NO_TOKEN": f"put a token into {TOKEN_VARIABLE}; who runs the service makes one with `vlcache token TENANT`",
    "BAD_TOKEN": f"the token in {TOKEN_VARIABLE} is not in the service's list; `vlcache token TENANT` makes one for it",
    "UNKNOWN_MODEL": "--model names one of those that are served",
    "QUEUE_FULL": "--timeout leaves it more time to be tried again",
}


def describe(error: Exception, args: argparse.Namespace) -> str:
    """The error in one line, and what helps in a second one."""
    line = "vlcache: " + " ".join(str(error).split())
    hint = hint_for(error, args) if isinstance(error, VlcacheError) else ""
    return f"{line}\n         {hint}" if hint else line


def hint_for(error: VlcacheError, args: argparse.Namespace) -> str:
    """What helps; empty when nothing is known to. Looks at who answers at the address when no call came through."""
    if error.reason:
        return _BY_REASON.get(error.reason, "")
    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return f"what answers at {args.address} is no router; workers are not asked"
    if isinstance(error, Unauthenticated):
        return _BY_REASON["NO_TOKEN"]
    return _about_peer(args) if isinstance(error, Unavailable) else ""


def _about_peer(args: argparse.Namespace) -> str:
    address, has_tls = args.address, any((args.ca_file, args.cert_file, args.key_file))
    match peer_at(address):
        case Peer.NOBODY:
            return f"nobody listens at {address}: `vlcache serve` starts a service here, --address names another one"
        case Peer.METRICS | Peer.HTTP as peer:
            return f"{peer.value} answers at {address}: --address wants the router's gRPC port"
        case Peer.TLS if not has_tls:
            return f"{address} speaks TLS: --ca-file says which CA vouches for it"
        case Peer.TLS:
            return f"{address} speaks TLS, but its certificate is for another name or of another CA, or it wants ours"
        case Peer.GRPC if has_tls:
            return f"{address} speaks no TLS: leave --ca-file, --cert-file and --key-file out"
        case _:
            return ""
