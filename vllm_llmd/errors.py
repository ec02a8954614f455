"""Every error that a caller of this package can meet, as one tree."""


class LlmdError(Exception):
    """Anything this package raises on purpose."""


class ConfigError(LlmdError):
    """A setting is missing, unknown or ill-typed. The text names it and says what to write instead."""


class WireError(LlmdError):
    """A peer sent something that cannot be used."""


class UnknownVersionError(WireError):
    """A message carries a major protocol version that this side does not speak."""


class MalformedMessageError(WireError):
    """A message of a known version that does not decode."""


class TransferError(LlmdError):
    """KV blocks could not be moved."""


class LaunchError(LlmdError):
    """A process of the fleet could not be started. The text names its log file."""
