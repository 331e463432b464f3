"""The pilot: holds secrets in every place where pilots hold them, and runs one command, as a pilot does. A program of its own, copied to the site.

pilot.py SETUP COMMAND…   SETUP: JSON file with `secrets` ({kind: text}), `tmp` (a path for the pilot's temporary file), `shm`, `targets` (where to
write down for the payload what there is to attack) and `report` (where the pilot says at the end what was done to it).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading


def serve(server, secret):
    """Tell the secret to whoever connects, as services on loopback do that trust everything local."""
    server.listen(16)
    while True:
        peer, _ = server.accept()
        peer.sendall(secret.encode())
        peer.close()


def listen(family, address, secret):
    server = socket.socket(family)
    server.bind(address)
    threading.Thread(target=serve, args=(server, secret), daemon=True).start()
    return server.getsockname()


def private_file(path, text):
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def main():
    with open(sys.argv[1]) as file:
        setup = json.load(file)
    secrets, hits = setup["secrets"], []
    signal.signal(signal.SIGUSR1, lambda *_: hits.append("SIGUSR1"))
    in_memory = bytearray(secrets["memory"].encode()) * 64
    for kind in ("tmp", "shm"):
        private_file(setup[kind], secrets[kind])
    inherited = os.open(setup["tmp"], os.O_RDONLY)
    os.set_inheritable(inherited, True)
    targets = {"pid": os.getpid(), "proxy": os.environ["X509_USER_PROXY"], "tmp": setup["tmp"], "shm": setup["shm"], "fd": inherited}
    targets["loopback"] = listen(socket.AF_INET, ("127.0.0.1", 0), secrets["loopback"])
    targets["abstract"] = listen(socket.AF_UNIX, "\0" + setup["abstract"], secrets["abstract"]).decode()
    with open(setup["targets"], "w") as file:
        json.dump(targets, file)
    child = subprocess.Popen(sys.argv[2:], close_fds=False)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    for kind in ("tmp", "shm"):
        os.unlink(setup[kind])
    with open(setup["report"], "w") as file:
        json.dump({"exit": code, "signals": hits, "memory": len(in_memory)}, file)
    return code if code >= 0 else 128 - code


sys.exit(main())
