"""Proof that whoever orders, or wants to read, belongs to the fleet."""

import hashlib
import hmac


class Seal:
    """HMAC-SHA256 with the fleet's secret. Without a secret it signs with nothing and believes everyone."""

    def __init__(self, secret: str | None) -> None:
        self._key = None if secret is None else secret.encode()

    def sign(self, text: str) -> str:
        if self._key is None:
            return ""
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def verifies(self, mac: str, text: str) -> bool:
        return self._key is None or hmac.compare_digest(mac.encode(), self.sign(text).encode())
