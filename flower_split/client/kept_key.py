"""This node's key for a run, which Flower keeps between its messages: in the SuperNode's memory."""

from flwr.app import ConfigRecord, Context

from flower_split.wire.possession import ClientKey

_RECORD = "flower_split client key"  # of the context's state, which does not leave the node
_PRIVATE = "private"


def kept_key(context: Context) -> ClientKey | None:
    """Return the key that this node made in the run's handshake; None: it made none, or lost it."""
    record = context.state.config_records.get(_RECORD)
    private = None if record is None else record.get(_PRIVATE)
    return ClientKey(private) if isinstance(private, bytes) else None


def made_key(context: Context) -> ClientKey:
    """Return this node's key for the run; make and keep it where there is none."""
    key = kept_key(context)
    if key is None:
        key = ClientKey()
        context.state[_RECORD] = ConfigRecord({_PRIVATE: key.private})
    return key
