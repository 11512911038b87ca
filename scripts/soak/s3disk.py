#!/usr/bin/env python3
"""An S3 server for tests of outages: what it has acknowledged is on its disk, synced, and outlives a `kill -9` or a power cut.

  s3disk.py FOLDER PORT BUCKET

On 127.0.0.1 only; no signatures are checked. It knows PUT with If-Match and If-None-Match, GET with a range, DELETE and ListObjectsV2:
what vb-ublk asks for. Anything else gets 501. An object is a file, whose first 32 bytes are its ETag.
"""
import hashlib, os, re, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

FOLDER, PORT, BUCKET = sys.argv[1], int(sys.argv[2]), sys.argv[3]
publish = threading.Lock()


def sync_folder():
    fd = os.open(FOLDER, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, code):
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode(), Content_Type="application/xml")

    def path_of(self):
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        if bucket != BUCKET:
            self.refuse(404, "NoSuchBucket")
            return None
        # A flat folder: no key is in another's way.
        return os.path.join(FOLDER, quote(key, safe="")) if key else FOLDER

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path_of()
        if path is None:
            return
        if self.headers.get("x-amz-content-sha256", "").startswith("STREAMING") or self.headers.get("x-amz-copy-source"):
            self.refuse(501, "NotImplemented")
            return
        etag = hashlib.md5(body).hexdigest()
        new = f"{FOLDER}/.new-{threading.get_ident()}"
        with open(new, "wb") as f:
            f.write(etag.encode() + body)
            f.flush()
            os.fsync(f.fileno())
        with publish:
            now = self.etag(path)
            match, none = self.headers.get("If-Match"), self.headers.get("If-None-Match")
            if (none is not None and now is not None) or (match is not None and now is not None and match.strip('"') != now):
                refused = (412, "PreconditionFailed")
            elif match is not None and now is None:
                refused = (404, "NoSuchKey")
            else:
                refused = None
                os.rename(new, path)
                sync_folder()
        if refused:
            os.unlink(new)
            self.refuse(*refused)
        else:
            self.answer(200, ETag=f'"{etag}"')

    @staticmethod
    def etag(path):
        try:
            with open(path, "rb") as f:
                return f.read(32).decode()
        except FileNotFoundError:
            return None

    def do_GET(self):
        path = self.path_of()
        if path is None:
            return
        if path == FOLDER:
            self.list()
            return
        try:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size - 32
                etag = f.read(32).decode()
                if m := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                    first, last = int(m[1]), min(int(m[2]), size - 1)
                    if first >= size:
                        self.refuse(416, "InvalidRange")
                        return
                    f.seek(32 + first)
                    self.answer(206, f.read(last - first + 1), ETag=f'"{etag}"', Content_Range=f"bytes {first}-{last}/{size}")
                else:
                    self.answer(200, f.read(), ETag=f'"{etag}"')
        except FileNotFoundError:
            self.refuse(404, "NoSuchKey")

    def list(self):
        query = parse_qs(urlsplit(self.path).query)
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        if query.get("list-type") != ["2"] or "delimiter" in query:
            self.refuse(501, "NotImplemented")
            return
        keys = sorted(unquote(name) for name in os.listdir(FOLDER) if not name.startswith(".new-"))
        keys = [key for key in keys if key.startswith(prefix) and key > after]
        page, xml = keys[:1000], []
        for key in page:
            try:
                size = os.stat(os.path.join(FOLDER, quote(key, safe=""))).st_size - 32
            except FileNotFoundError:
                continue
            xml.append(f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size></Contents>")
        more = len(keys) > len(page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        self.answer(
            200,
            (
                f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{BUCKET}</Name><KeyCount>{len(xml)}</KeyCount>'
                f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(xml)}</ListBucketResult>"
            ).encode(),
            Content_Type="application/xml",
        )

    def do_DELETE(self):
        path = self.path_of()
        if path is None:
            return
        try:
            os.unlink(path)
            sync_folder()
        except FileNotFoundError:
            pass
        self.answer(204)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.refuse(501, "NotImplemented")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


os.makedirs(FOLDER, exist_ok=True)
Server(("127.0.0.1", PORT), Handler).serve_forever()
