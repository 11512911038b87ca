#!/usr/bin/env python3
"""Writes to a device, flushes, and says what is on stable storage; knows after a power cut what must be there, sector by sector.

  rawlog.py write DEVICE ROUND           writes for ever; prints `ACK rawW ROUND n .` when all of writer W up to its write n is durable
  rawlog.py check DEVICE ROUND WITNESS   checks the rounds before ROUND; exit code 1 if no allowed history explains the device

Each of the writers has a region of its own and one request in flight: a write of 1-64 sectors, some with FUA, or a discard. What the
n-th request of a round is, follows from the numbers alone. So after the cut a region must look exactly as after the first P requests of the
last round, for one P that is not below the last `ACK` that somebody outside of the machine had seen: nothing before P is missing, nothing
after it is there. `check` flushes the device, and prints P as `HAVE rawW ROUND P .`: it may not change any more.
"""
import fcntl, hashlib, mmap, os, re, struct, sys, threading

SECTOR, REGION, WRITERS, LONGEST = 512, 4096, 3, 64
SPACING = 40 << 20  # between the regions, so that they are in different places of the volume's map
HEAD = struct.Struct("<8sIIQQ")
BLKDISCARD = 0x1277
ZEROS = bytes(SECTOR)


def say(line):
    os.write(1, line.encode() + b"\n")  # whole, whoever else writes there


def plan(writer, round_, n):
    """(discard?, first sector, sectors, then: "fua", "flush" or None)"""
    a, b, c, _ = struct.unpack("<IIII", hashlib.blake2b(struct.pack("<IQQ", writer, round_, n), digest_size=16).digest())
    count = (1, 3, 8, 8, 8, 16, 33, LONGEST)[a % 8]
    first = b % (REGION - count)
    if count in (8, 16):
        first &= ~7
    discard = count == 16 and bool(a >> 8 & 1)
    then = "flush" if c % 4 == 1 else "fua" if c % 8 == 0 and not discard else None
    return discard, first, count, then


def sector(writer, number, round_, n):
    return HEAD.pack(b"vb-soak\0", writer, number, round_, n).ljust(SECTOR, bytes([n & 0xFF]))


def writer(device, w, round_, failures):
    plain = os.open(device, os.O_RDWR | os.O_DIRECT)
    durable = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    buffer = mmap.mmap(-1, LONGEST * SECTOR)
    n = 0
    try:
        while not failures:
            n += 1
            discard, first, count, then = plan(w, round_, n)
            at = w * SPACING + first * SECTOR
            if discard:
                fcntl.ioctl(plain, BLKDISCARD, struct.pack("<QQ", at, count * SECTOR))
            else:
                data = b"".join(sector(w, first + i, round_, n) for i in range(count))
                buffer[: len(data)] = data
                fd = durable if then == "fua" else plain
                if os.pwritev(fd, [memoryview(buffer)[: len(data)]], at) != len(data):
                    raise OSError("short write")
            if then == "flush":
                os.fsync(plain)
            if then:
                say(f"ACK raw{w} {round_} {n} .")
    except OSError as e:
        failures.append(f"raw{w}: request {n}: {e}")


def after(w, prefixes):
    """What the region holds after the first n requests of each round: (round, request) for each sector, or None."""
    state = [None] * REGION
    for round_, upto in prefixes:
        for n in range(1, upto + 1):
            discard, first, count, _ = plan(w, round_, n)
            state[first : first + count] = [None if discard else (round_, n)] * count
    return state


def differences(w, state, data):
    bad = []
    for s, want in enumerate(state):
        found = data[s * SECTOR : (s + 1) * SECTOR]
        if found != (sector(w, s, *want) if want else ZEROS):
            bad.append((s, want, HEAD.unpack_from(found) if any(found) else "zeros"))
    return bad


def check(device, round_, witness):
    acked, have = {}, {}
    with open(witness, encoding="ascii", errors="replace") as f:
        for line in f:
            if m := re.fullmatch(r"(ACK|HAVE) raw(\d+) (\d+) (\d+) \.\n", line):
                key, n = (int(m[2]), int(m[3])), int(m[4])
                if m[1] == "HAVE":
                    have[key] = n
                else:
                    acked[key] = max(acked.get(key, 0), n)
    fd = os.open(device, os.O_RDWR)
    good, lines = True, []
    for w in range(WRITERS):
        data = os.pread(fd, REGION * SECTOR, w * SPACING)
        found = {}
        for s in range(REGION):
            magic, _, _, r, n = HEAD.unpack_from(data, s * SECTOR)
            if magic == b"vb-soak\0":
                found[r] = max(found.get(r, 0), n)
        prefixes = []
        for r in range(1, round_):
            upto = have.get((w, r))
            prefixes.append((r, max(acked.get((w, r), 0), found.get(r, 0)) if upto is None else upto))
        # The last round that wrote: requests after the last one to be seen may have been discards, or written over nothing that is seen.
        tail = max((i for i, (r, n) in enumerate(prefixes) if n and (w, r) not in have), default=None)
        first = None
        for more in range(1 if tail is None else 4):
            tried = [(r, n + more if i == tail else n) for i, (r, n) in enumerate(prefixes)]
            bad = differences(w, after(w, tried), data)
            first = first or (tried, bad)
            if not bad:
                break
        else:
            good = False
            tried, bad = first
            for s, want, got in bad[:8]:
                say(f"raw{w} sector {s}: should be from (round, request) {want}; found {got}")
            say(f"raw{w}: {len(bad)} sectors are not as after {tried[-1:]}; acknowledged: {acked.get((w, round_ - 1), 0)}")
        for r, n in tried:
            if (w, r) not in have:
                lines.append(f"HAVE raw{w} {r} {n} .")
    os.fsync(fd)
    for line in lines if good else ():
        say(line)
    sys.exit(not good)


def main():
    if sys.argv[1] == "check":
        check(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    failures = []
    threads = [threading.Thread(target=writer, args=(sys.argv[2], w, int(sys.argv[3]), failures)) for w in range(WRITERS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for f in failures:
        say(f)
    sys.exit(3)


main()
