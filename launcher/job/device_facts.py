"""What a host knows of its accelerators before a rank starts."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """The visible devices of one type."""

    kind: str | None
    """Device type, such as "cuda"; None without a device."""
    count: int = 0
    """Number of visible devices."""
    free_bytes: tuple[int, ...] = ()
    """Free memory of each device that was asked."""
    total_bytes: tuple[int, ...] = ()
    """All memory of each of these."""
    complaint: str | None = None
    """Why `--device auto` does not use them; None if the self-check of their backend has passed."""

    def to_json(self) -> str:
        """Serialize for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "DeviceFacts":
        """Inverse of `to_json`."""
        raw = json.loads(text)
        return cls(**raw | {name: tuple(raw[name]) for name in ("free_bytes", "total_bytes")})
