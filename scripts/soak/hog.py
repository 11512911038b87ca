#!/usr/bin/env python3
"""Takes memory and never rests: hog.py MIB. It lets go of a part of it all the time, to ask for as much again at once."""
import sys

PART = 8 << 20
with open("/proc/self/oom_score_adj", "w") as f:
    f.write("1000")
parts = [None] * max(1, (int(sys.argv[1]) << 20) // PART)
i = 0
while True:
    parts[i % len(parts)] = None
    part = bytearray(PART)
    part[::4096] = b"x" * (PART // 4096)
    parts[i % len(parts)] = part
    i += 1
