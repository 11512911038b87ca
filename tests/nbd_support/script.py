# Run by tests/nbd_interop.rs with `h`, a libnbd handle connected to a volume of 64 MiB of zeros.
import errno

size = h.get_size()
assert size == 64 << 20, size
for can in (h.can_flush, h.can_fua, h.can_trim, h.can_zero, h.can_multi_conn, h.can_df, h.can_cache):
    assert can(), can
assert not h.is_read_only()
assert h.get_structured_replies_negotiated()
assert h.can_meta_context("base:allocation")
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20


def extents(offset, length, flags=0):
    seen = []

    def one(context, at, entries, error):
        assert context == "base:allocation" and at == offset
        seen.extend(zip(entries[::2], entries[1::2]))

    h.block_status(length, offset, one, flags)
    return seen


def refused(number, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errnum == number, (e.errnum, number)
    else:
        raise AssertionError("not refused")


# The library lets nothing out that is not of whole sectors, unless it is told to.
h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_ALIGN)
data = bytes(range(256)) * 64
for offset in (0, 1, 511, 4095, 65536 - 77):
    h.pwrite(data, offset, nbd.CMD_FLAG_FUA)
    assert h.pread(len(data), offset) == data, offset
h.zero(8192, 65536, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(8192, 65536) == bytes(8192)
h.trim(size, 0)
assert h.pread(1 << 20, 0) == bytes(1 << 20)
assert extents(0, size) == [(size, 3)]
h.pwrite(data, 1 << 20)
assert extents(0, 2 << 20)[:2] == [(1 << 20, 3), (len(data), 0)]
assert extents(0, 2 << 20, nbd.CMD_FLAG_REQ_ONE) == [(1 << 20, 3)]
h.cache(1 << 20, 1 << 20)
h.flush()

# A structured read says where the hole is.
pieces = []
buf = h.pread_structured(2 << 20, 0, lambda b, at, kind, error: pieces.append((at, len(b), kind)))
assert buf == bytes(1 << 20) + data + bytes((1 << 20) - len(data))
pieces.sort()
assert pieces[0] == (0, 1 << 20, nbd.READ_HOLE), pieces
one = []
h.pread_structured(2 << 20, 0, lambda b, at, kind, error: one.append(kind), nbd.CMD_FLAG_DF)
assert len(one) == 1, one

# Nor anything else that is wrong.
h.set_strict_mode(0)
refused(errno.ENOSPC, h.pwrite, data, size - 512)
refused(errno.EINVAL, h.pread, 4096, size - 512)
refused(errno.EINVAL, h.trim, 4096, size)
refused(errno.ENOSPC, h.zero, 4096, size)
refused(errno.EINVAL, h.pread, 512, 0, 1 << 9)

# Many at once.
buffers = []
for n in range(200):
    b = nbd.Buffer.from_bytearray(bytearray([n]) * 4096)
    buffers.append((h.aio_pwrite(b, n * 4096), b))
while h.aio_in_flight() > 0:
    h.poll(-1)
for cookie, _ in buffers:
    assert h.aio_command_completed(cookie)
for n in range(200):
    assert h.pread(4096, n * 4096) == bytes([n]) * 4096, n
h.shutdown()
