"""What tests raise where a process would end."""


class Ended(Exception):  # noqa: N818 - not an error
    """Raised instead of exiting the process."""
