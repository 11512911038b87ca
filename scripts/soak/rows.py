#!/usr/bin/env python3
"""A database that commits all the time and says so: sqlite, whose commits must outlive what comes.

  rows.py write DB MODE NAME ROUND [STOP]   commits rows until the file STOP is there; after each it prints `ACK NAME ROUND n .`
  rows.py check DB NAME WITNESS             exit code 1 if a commit that WITNESS has is missing, or anything is damaged

MODE is `wal` (synchronous=FULL) or `journal` (a rollback journal with synchronous=EXTRA: with FULL sqlite does not sync the folder after
it has unlinked the journal, so that a power cut may bring the transaction before back). Each transaction adds one row, the next number,
and counts it in a second table. `check` prints how many commits there are: `HAVE NAME n .`
"""
import os, random, re, sqlite3, sys, time, zlib

PRAGMAS = {
    "wal": ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=200"),
    "journal": ("journal_mode=DELETE", "synchronous=EXTRA"),
}


def say(line):
    os.write(1, line.encode() + b"\n")  # whole, whoever else writes there


def checksum(n, body):
    return zlib.crc32(body, n)


def write(path, mode, name, round_, stop=None):
    db = sqlite3.connect(path, isolation_level=None)
    for pragma in PRAGMAS[mode]:
        db.execute(f"PRAGMA {pragma}").fetchall()
    db.execute("CREATE TABLE IF NOT EXISTS rows (n INTEGER PRIMARY KEY, body BLOB NOT NULL, sum INTEGER NOT NULL)")
    db.execute("CREATE TABLE IF NOT EXISTS last (n INTEGER NOT NULL)")
    n = db.execute("SELECT coalesce(max(n), 0) FROM rows").fetchone()[0]
    longest = 0.0
    while not (stop and os.path.exists(stop)):
        n += 1
        body = random.randbytes(random.randrange(10, 4000))
        begun = time.monotonic()
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO rows VALUES (?, ?, ?)", (n, body, checksum(n, body)))
        db.execute("DELETE FROM last")
        db.execute("INSERT INTO last VALUES (?)", (n,))
        db.execute("COMMIT")
        longest = max(longest, time.monotonic() - begun)
        say(f"ACK {name} {round_} {n} .")
    db.close()
    say(f"LONGEST {name} {longest * 1000:.0f}")


def check(path, name, witness):
    acked = 0
    with open(witness, encoding="ascii", errors="replace") as f:
        for line in f:
            if m := re.fullmatch(rf"ACK {name} \d+ (\d+) \.\n", line):
                acked = max(acked, int(m[1]))
    if not os.path.exists(path):
        say(f"HAVE {name} 0 .")
        sys.exit(f"{path} is missing; {acked} commits were acknowledged" if acked else 0)
    db = sqlite3.connect(path, isolation_level=None)
    verdict = [row[0] for row in db.execute("PRAGMA integrity_check")]
    if verdict != ["ok"]:
        sys.exit(f"{name}: integrity_check says {verdict[:5]}")
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'last'").fetchone():
        say(f"HAVE {name} 0 .")
        sys.exit(f"{name}: no tables; {acked} commits were acknowledged" if acked else 0)
    count = 0
    for n, body, sum_ in db.execute("SELECT n, body, sum FROM rows ORDER BY n"):
        count += 1
        if n != count:
            sys.exit(f"{name}: row {count} is missing, the next one is {n}; {acked} were acknowledged")
        if sum_ != checksum(n, body):
            sys.exit(f"{name}: row {n} is not what was written")
    last = db.execute("SELECT coalesce(max(n), 0) FROM last").fetchone()[0]
    db.close()
    if last != count:
        sys.exit(f"{name}: {count} rows, but the counter of the same transactions is {last}")
    if count < acked:
        sys.exit(f"{name}: {acked} commits were acknowledged, {count} are there")
    say(f"HAVE {name} {count} .")


{"write": write, "check": check}[sys.argv[1]](*sys.argv[2:])
