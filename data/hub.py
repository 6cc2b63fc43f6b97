"""Why the hub's client failed, in one line with the true cause."""

import errno

# What helps against an HTTP status; against others, trying again later.
REMEDIES = {
    401: "check the name, log in by `hf auth login`, or correct or unset HF_TOKEN",
    403: "log in by `hf auth login`, and check that your account may read it",
    404: "check the name",
    407: "log in to the proxy",
    429: "wait a few minutes and run this again",
    511: "log in to the network",
}


def http_status(error: BaseException | None) -> int | None:
    """The status of the HTTP answer that an exception is about, or the one it came from."""
    while error is not None:
        if status := getattr(getattr(error, "response", None), "status_code", None):
            return status
        error = error.__cause__
    return None


def explain(error: Exception) -> str:
    """The cause and a remedy. Which classes the client raises varies by its version."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}; make room and run this again"
    if status := http_status(error):
        return f"HTTP status {status}; {REMEDIES.get(status, 'run this again later')}"
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{reason}; check the network and run this again"
