"""What serving can be asked for. No torch."""

from dataclasses import dataclass

from flexigpt.runtime import RunOptions, option

_WHERE = "Where to serve"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(RunOptions):
    """Where to serve.

    Attributes:
        port: to listen at.
        host: name or address to listen at; 0.0.0.0 lets other machines in, and nobody is asked who they are.
    """

    port: int = option(8000, group=_WHERE, everyday=True, least=1, most=2**16 - 1)
    host: str = option("localhost", group=_WHERE)
