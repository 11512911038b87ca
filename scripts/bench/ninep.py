"""As much of 9P2000.L as it takes to make a file of a size: ZeroFS's NBD devices are files of its own file system."""

import socket
import struct

# Requests of 9P2000.L, and the answer of one that failed.
VERSION, ATTACH, WALK, MKDIR, LCREATE, SETATTR, LERROR = 100, 104, 110, 72, 14, 26, 7
NO_FID = 0xFFFFFFFF


def make_file(path_of_socket, folder, name, size):
    """Makes `folder`/`name` of `size` bytes, sparse; the folder is made if it is missing. OSError when the server refuses."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(path_of_socket))
        text = lambda t: struct.pack("<H", len(t)) + t.encode()

        def read(n):
            out = b""
            while len(out) < n:
                part = s.recv(n - len(out))
                if not part:
                    raise OSError(f"{path_of_socket} has hung up")
                out += part
            return out

        def ask(kind, body, tag=1, may_fail=False):
            s.sendall(struct.pack("<IBH", 7 + len(body), kind, tag) + body)
            answer = read(struct.unpack("<I", read(4))[0] - 4)
            failed = answer[0] == LERROR
            if failed and not may_fail:
                raise OSError(struct.unpack("<I", answer[3:7])[0], f"9P request {kind} for {folder}/{name}")
            return not failed

        ask(VERSION, struct.pack("<I", 8192) + text("9P2000.L"), tag=0xFFFF)
        ask(ATTACH, struct.pack("<II", 0, NO_FID) + text("root") + text("") + struct.pack("<I", 0))
        walk = lambda **how: ask(WALK, struct.pack("<IIH", 0, 1, 1) + text(folder), **how)
        if not walk(may_fail=True):
            ask(MKDIR, struct.pack("<I", 0) + text(folder) + struct.pack("<II", 0o755, 0))
            walk()
        ask(LCREATE, struct.pack("<I", 1) + text(name) + struct.pack("<III", 2, 0o644, 0))
        only_the_size = 8
        ask(SETATTR, struct.pack("<IIIIIQQQQQ", 1, only_the_size, 0, 0, 0, size, 0, 0, 0, 0))
