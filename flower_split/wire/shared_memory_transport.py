"""Transports that send payloads through shared memory where client and trunk share host and user.

gRPC keeps control, ordering, deadlines, status codes and retries: a call is the one frame of its header,
which says where the payloads lie. What finds no room there travels in frames.
"""

import logging
import threading
from collections.abc import Callable, Iterator

from google.protobuf.message import Message
from torch import Tensor

from flower_split.config.validation import ENVIRONMENT
from flower_split.errors import TrunkError
from flower_split.proto import trunk_pb2 as pb
from flower_split.runtime.closing import Closing
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.device_memory import DeviceBuffer, named_devices
from flower_split.wire.grpc_transport import TrunkChannel
from flower_split.wire.placed_payloads import in_memory
from flower_split.wire.possession import ClientKey
from flower_split.wire.sending import Outgoing
from flower_split.wire.shared_memory import SharedFrames, SharedMemory, host_identity
from flower_split.wire.shared_slots import aligned
from flower_split.wire.transport import Reply, Result

logger = logging.getLogger(__name__)

_OFFER_SECONDS = 10.0
_DEVICE_SLOTS = 6  # of the size of a first tensor, in a half of a GPU's memory


class AutomaticChannel(Closing):
    """A :class:`~flower_split.wire.transport.Transport` that shares memory where it can.

    The trunk is asked once, before the first call with tensors.

    Args:
        address: ``host:port``.
        token: Sent with every call.
        timeout: Seconds that one call may take, retries included.
        key: With which every call proves that the token is its own; None: the token needs no proof.
        root_certificates: CA for TLS; empty: plain text, on loopback only.
        certificate: What this side shows over TLS.
        proxy: As ``trunk.proxy`` says.

    Raises:
        ConfigError: See :class:`~flower_split.wire.grpc_transport.TrunkChannel`.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str,
        timeout: float,
        key: ClientKey | None = None,
        root_certificates: str = "",
        certificate: ClientCertificate = NO_CERTIFICATE,
        proxy: str = ENVIRONMENT,
    ) -> None:
        self.address = address
        self._grpc = TrunkChannel(
            address,
            token=token,
            timeout=timeout,
            key=key,
            root_certificates=root_certificates,
            certificate=certificate,
            proxy=proxy,
        )
        self._timeout = timeout
        self._lock = threading.Lock()
        self._asked = False
        self._memory: SharedMemory | None = None

    def unary(
        self,
        method: str,
        request: Message,
        reply_type: type[Reply],
        *,
        timeout: float | None = None,
        retry: bool = True,
    ) -> Reply:
        """Make one control call; see :class:`~flower_split.wire.transport.Transport`."""
        if method == "CloseSession" and self._memory is not None:
            self._memory.close_device()  # before the trunk, which has made it, gives it back
        return self._grpc.unary(method, request, reply_type, timeout=timeout, retry=retry)

    def stream(
        self, method: str, message: Outgoing, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """Make one call that sends and reads frames; see ``Transport``."""
        memory = self._shared()
        if memory is None:
            return self._grpc.stream(method, message.on_host(), read)
        message, places = in_memory(memory, message)
        result = self._grpc.stream(
            method, message, lambda frames: read(SharedFrames(frames, memory))
        )
        # A call that failed keeps its places: a late attempt of it may still be under way.
        places.answered()
        return result

    def takes(self, tensor: Tensor) -> bool:
        """Return whether the trunk shares memory of its GPU with a client on the tensor's."""
        memory = self._shared(tensor)
        device = None if memory is None else memory.device
        return device is not None and device.device == tensor.device

    def download(
        self, method: str, request: Message, read: Callable[[Iterator[bytes]], Result]
    ) -> Result:
        """Make one call that sends a message and reads frames; see ``Transport``."""
        return self._grpc.download(method, request, read)

    def close(self) -> None:
        """Close the connections, and let go of the memory. Idempotent."""
        self._grpc.close()
        if self._memory is not None:
            self._memory.close_device()
        self._memory = None

    def _shared(self, like: Tensor | None = None) -> SharedMemory | None:
        """Return the memory shared with the trunk; None: there is none.

        Args:
            like: A tensor of a GPU that calls will carry; None: there is none.
        """
        with self._lock:
            if not self._asked:
                self._asked = True
                try:
                    self._memory = self._agree(like)
                except (OSError, TrunkError) as error:
                    self._refuse(str(error))
            return self._memory

    def _agree(self, like: Tensor | None) -> SharedMemory:
        """Open the memory that the trunk offers.

        Raises:
            OSError: It offers none, or this process cannot open it.
            TrunkError: It did not answer.
        """
        boot_id, user = host_identity()
        if not boot_id:
            raise OSError("this host has no Linux kernel that tells its boot id")
        request = pb.ShareMemoryRequest(boot_id=boot_id, user=user)
        if like is not None:
            request.devices.extend(named_devices(like.device))
            request.device_bytes = _DEVICE_SLOTS * aligned(like.nbytes)
        offer = self._grpc.unary(
            "ShareMemory",
            request,
            pb.ShareMemoryReply,
            timeout=min(self._timeout, _OFFER_SECONDS),
            retry=False,
        )
        if not offer.process:
            raise OSError("the trunk runs on another host or as another user")
        memory = SharedMemory.of_process(
            offer.process, offer.descriptor, offer.num_bytes, offer.nonce
        )
        if like is not None and offer.device_handle:
            handle, num_bytes = offer.device_handle, offer.device_bytes
            there = named_devices(like.device).get(offer.device, like.device)
            try:
                memory.share_device(DeviceBuffer.open(handle, num_bytes, there), like.device)
            except OSError as error:
                logger.debug("tensors go to the trunk through the host's memory: %s", error)
        return memory

    def _refuse(self, why: str) -> None:
        """Go on with frames."""
        logger.debug("payloads to the trunk at %s travel in frames: %s", self.address, why)


class SharedMemoryChannel(AutomaticChannel):
    """As :class:`AutomaticChannel`, but calls with tensors fail where no memory can be shared."""

    def _refuse(self, why: str) -> None:
        self._asked = False  # the next call asks again
        raise TrunkError(
            f"no memory can be shared with the trunk at {self.address}: {why}. Client and trunk must "
            "run on one Linux host as one user, and see each other's processes. Set trunk.transport "
            '= "auto", or "grpc".'
        )
