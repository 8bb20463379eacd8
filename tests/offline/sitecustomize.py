"""With this folder in `PYTHONPATH`, every Python process refuses to ask another machine.

What it refused is noted in the file that `OFFLINE` names.
"""

import os
import sys

LOOPBACK = "127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None


def refuse(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if (host.decode() if isinstance(host, bytes) else host) in LOOPBACK:
        return
    with open(os.environ["OFFLINE"], "a") as f:
        f.write(f"{host} by {' '.join(sys.orig_argv)[:200]}\n")
    raise OSError(101, f"{host} may not be asked: the tests need no network")


if "OFFLINE" in os.environ:
    sys.addaudithook(refuse)
