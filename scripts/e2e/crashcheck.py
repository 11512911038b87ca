#!/usr/bin/env python3
"""Writes to a device and knows afterwards, sector by sector, what must be there.

  crashcheck.py write DEVICE FOLDER SECONDS   writes until the time is up or a request fails; exit code 0 or 3
  crashcheck.py check DEVICE FOLDER           exit code 1 if a sector holds what no allowed history explains

Each thread has a region of its own, and one request in flight: a write of 1-128 sectors, or a discard. It notes a request in its
log before the request is issued, and that it completed, after. Every sector of a write bears the region, its own number and the
request's generation. A completed request must be there; the last one, if it did not complete, may be there or not, for each sector.
What the check finds is the base for the next round.
"""
import fcntl, mmap, os, random, struct, sys, threading, time

SECTOR, REGION, THREADS, LONGEST = 512, 16384, 4, 128
HEAD = struct.Struct("<8sQQQ")
NOTE = struct.Struct("<cQQQc")  # I/C, generation, first sector, sectors, W/D
BLKDISCARD = 0x1277


def sector(region, number, generation):
    return HEAD.pack(b"vb-crash", region, number, generation).ljust(SECTOR, bytes([generation & 0xFF]))


def load(path):
    """The generation of each sector of a region; 0 is zeros."""
    try:
        with open(path, "rb") as f:
            return list(struct.unpack(f"<{REGION}Q", f.read()))
    except FileNotFoundError:
        return [0] * REGION


def writer(device, folder, region, until, failures):
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    log = os.open(f"{folder}/{region}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    generation = max(load(f"{folder}/{region}.state"))
    try:
        with open(f"{folder}/{region}.generation", "rb") as f:
            generation = max(generation, int(f.read()))
    except FileNotFoundError:
        pass
    buffer = mmap.mmap(-1, LONGEST * SECTOR)
    rng = random.Random()
    count = 0
    while time.monotonic() < until and not failures:
        generation += 1
        count += 1
        n = rng.choice((1, 3, 8, 8, 8, 8, 16, 33, LONGEST))
        first = rng.randrange(REGION - n)
        if n in (8, 16):
            first &= ~7
        kind = b"D" if n == 16 and rng.random() < 0.5 else b"W"
        os.write(log, NOTE.pack(b"I", generation, first, n, kind))
        at = (region * REGION + first) * SECTOR
        try:
            if kind == b"D":
                fcntl.ioctl(fd, BLKDISCARD, struct.pack("<QQ", at, n * SECTOR))
            else:
                data = b"".join(sector(region, first + i, generation) for i in range(n))
                buffer[: len(data)] = data
                if os.pwritev(fd, [memoryview(buffer)[: len(data)]], at) != len(data):
                    raise OSError("short write")
        except OSError as e:
            failures.append(f"region {region}: {e}")
            break
        os.write(log, NOTE.pack(b"C", generation, first, n, kind))
    os.close(fd)
    print(f"region {region}: {count} requests", flush=True)


def check(device, folder, region):
    state = load(f"{folder}/{region}.state")
    with open(f"{folder}/{region}.log", "rb") as f:
        log = f.read()
    whole = len(log) // NOTE.size * NOTE.size
    issued = completed = None
    last = 0
    for mark, generation, first, n, kind in NOTE.iter_unpack(log[:whole]):
        last = generation
        if mark == b"I":
            issued = (generation, first, n, kind)
            continue
        completed, issued = generation, None
        state[first : first + n] = [0 if kind == b"D" else generation] * n
    may = {}
    if issued:
        generation, first, n, kind = issued
        may = {s: 0 if kind == b"D" else generation for s in range(first, first + n)}
    bad = []
    with open(device, "rb") as f:
        f.seek(region * REGION * SECTOR)
        data = f.read(REGION * SECTOR)
    zeros = bytes(SECTOR)
    for s in range(REGION):
        found = data[s * SECTOR : (s + 1) * SECTOR]
        want = state[s]
        if found == (sector(region, s, want) if want else zeros):
            continue
        other = may.get(s)
        if other is not None and found == (sector(region, s, other) if other else zeros):
            state[s] = other
            continue
        head = HEAD.unpack_from(found)
        bad.append(f"region {region} sector {s}: generation {want} is missing; found {head if any(found) else 'zeros'}")
    for line in bad[:10]:
        print(line)
    print(f"region {region}: {last} generations, the last completed one is {completed}; {len(bad)} sectors are wrong", flush=True)
    with open(f"{folder}/{region}.state", "wb") as f:
        f.write(struct.pack(f"<{REGION}Q", *state))
    with open(f"{folder}/{region}.generation", "w") as f:
        f.write(str(last))
    return not bad


def main():
    what, device, folder = sys.argv[1:4]
    os.makedirs(folder, exist_ok=True)
    if what == "write":
        failures = []
        until = time.monotonic() + float(sys.argv[4])
        threads = [threading.Thread(target=writer, args=(device, folder, r, until, failures)) for r in range(THREADS)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for f in failures:
            print(f)
        sys.exit(3 if failures else 0)
    sys.exit(0 if all([check(device, folder, r) for r in range(THREADS)]) else 1)


main()
