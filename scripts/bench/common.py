"""What the benchmarks share: where things are, the S3 server in memory, the program over NBD, and medians."""

import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

REPO = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))
CACHE = pathlib.Path(os.environ.get("VB_CACHE", REPO / "target/guest"))
VB, S3 = TARGET / "release/vb-ublk", TARGET / "release/examples/s3"
GIB = 1 << 30


def build(*examples):
    """Builds the program, and examples."""
    wanted = [word for e in examples for word in ("--example", e)]
    subprocess.run(["cargo", "build", "--release", "--locked", "--bin", "vb-ublk", *wanted], cwd=REPO, check=True)


def note(text):
    print(text, file=sys.stderr, flush=True)


def median(values):
    return statistics.median(list(values))


def wait_for(path, process, what, seconds=60):
    """Until a socket or a file is there. Exits when the process that is to make it has ended, or takes too long."""
    end = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            sys.exit(f"{what} does not serve: it has not made {path}")
        time.sleep(0.05)


class Work:
    """A folder that goes in the end."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"run.{os.getpid()}"

    def __enter__(self):
        self.path.mkdir()
        (self.path / "none.toml").write_text("")
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)


def environment(work):
    """What our program is to know: keys for the server, and no configuration of the machine's."""
    keys = dict(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench")
    places = dict(VB_UBLK_CONFIG=work / "none.toml", VB_UBLK_DATA_DIR=work / "data", VB_UBLK_RUN_DIR=work / "run")
    return dict(os.environ, **keys, **{k: str(v) for k, v in places.items()})


class Server:
    """examples/s3: an S3 server in memory, on loopback. `room`: bytes of memory that are there from the start, so that none of what is put
    has to wait for fresh memory, which takes a virtual machine longer than all the rest of it."""

    def __init__(self, work, *options, room=0):
        self.work = work
        self.process = subprocess.Popen([S3, "serve", "--room", str(room), *map(str, options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoint = self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def bare(self, what):
        """Bytes per second of the bare SDK, 16 requests in flight."""
        ran = subprocess.run([S3, what, "--endpoint", self.endpoint], check=True, capture_output=True, text=True)
        return float(ran.stdout)

    def hold(self, hold):
        """Chunks that are put wait from now on, or do not any more."""
        request = urllib.request.Request(f"{self.endpoint}/bench/hold", method="PUT" if hold else "DELETE")
        urllib.request.urlopen(request).close()

    def until_idle(self, seconds=60):
        """Until it has had nothing to do for two seconds, or so long at most."""
        ticks = lambda: sum(map(int, pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
        end, before, quiet = time.monotonic() + seconds, -1, 0
        while quiet < 4 and time.monotonic() < end:
            now = ticks()
            quiet = quiet + 1 if now - before <= 1 else 0
            before = now
            time.sleep(0.5)

    def where(self):
        return ["--store", "s3://bench/v", "--endpoint", self.endpoint]

    def vb(self, *command):
        ran = subprocess.run([VB, *map(str, command), *self.where()], env=environment(self.work), capture_output=True, text=True)
        if ran.returncode:
            sys.exit(f"vb-ublk {' '.join(map(str, command))}: {ran.stderr}")
        return ran.stdout

    def bench(self, *options):
        return json.loads(self.vb("bench", "--overwrite", "--json", *options))


class Serving:
    """`vb-ublk nbd` of volumes, from its first answer on; without volumes it serves those that clients ask for.

    `process` and `socket`; what it says goes to the log in the folder `work`."""

    def __init__(self, work, volumes, *options, where=()):
        # A path of a socket may have no more than 107 bytes.
        self.folder = tempfile.TemporaryDirectory()
        self.socket = pathlib.Path(self.folder.name) / "nbd"
        named = [word for v in volumes for word in ("--volume", v)]
        command = [VB, *where, "nbd", "--unix", self.socket, *named, *options]
        with open(work / "log", "a") as log:
            self.process = subprocess.Popen([*map(str, command)], env=environment(work), stdout=subprocess.PIPE, stderr=log, text=True)
        if not self.process.stdout.readline():
            sys.exit(f"vb-ublk nbd does not start: {(work / 'log').read_text()[-2000:]}")

    def uri(self, volume):
        return f"nbd+unix:///{volume}?socket={self.socket}"

    def attach(self, volume):
        """Seconds until a client has been served: a volume is attached when the first one comes."""
        begun = time.monotonic()
        subprocess.run(["nbdinfo", "--size", self.uri(volume)], check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - begun

    def memory(self):
        """Bytes of its own that are in memory."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) * 1024

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(300)
        self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
