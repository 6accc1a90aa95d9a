"""Whether this process makes OpenTelemetry traces: off, unless ``OTEL_TRACES_EXPORTER`` says otherwise.

Where it is off, nothing of OpenTelemetry is imported, and no call enters this module.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flower_split.runtime.spans import Tracing

logger = logging.getLogger(__name__)

EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"


class TracingSwitch:
    """The traces of a process. Edges switch it on once; connections ask it when they are made.

    Attributes:
        current: The maker of spans; None: off.
    """

    def __init__(self) -> None:
        self.current: Tracing | None = None

    def switch_on_from(self, environment: Mapping[str, str], service: str) -> None:
        """Make traces as the standard OTEL variables say; once it is on, nothing changes.

        Traces that cannot be made do not end a run: a warning says what is missing.

        Args:
            environment: This process's environment. ``OTEL_TRACES_EXPORTER``: ``otlp``, ``console`` or
                another installed exporter's name; missing, empty or ``none``: off.
            service: This process's ``service.name``, where the environment names none.
        """
        name = environment.get(EXPORTER_VARIABLE, "").strip().lower()
        off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
        if self.current is not None or off or name in ("", "none"):
            return
        try:
            from flower_split.runtime.spans import exporting
        except ModuleNotFoundError as error:
            logger.warning(
                "%s=%s asks for traces, but %s is not installed: none are made. Run: pip install "
                "'flower-split[tracing]', or set the variable to none.",
                EXPORTER_VARIABLE,
                name,
                error.name,
            )
            return
        self.current = exporting(name, environment, service)

    def use(self, tracing: "Tracing | None") -> None:
        """Make spans by ``tracing`` from now on, as a program that has a provider of its own does."""
        self.current = tracing

    def flush(self) -> None:
        """Hand over what has been collected: this process may be ended without a word."""
        if self.current is not None:
            self.current.flush()


PROCESS_TRACING = TracingSwitch()
"""The traces of this process."""
