# shellcheck shell=bash
# For scripts/soak's parts, in the guest: the workload whose every acknowledgement is written down, and the S3 server with a disk.
# shellcheck source=scripts/e2e/lib.sh
. "$E2E_DIR/lib.sh"
soak=$E2E_DIR/soak
# What the databases and the verifying fio have got acknowledged; a test that looks at nothing else must not pass when it lies.
acks=$W/acks
mounted=$W/mnt
stop=$W/stop
seen=$(dmesg | wc -l)

# between FROM TO: a random number of milliseconds, in seconds.
between() { awk -v a="$1" -v b="$2" -v r="$SRANDOM" 'BEGIN { printf "%.3f", (a + (b - a) * r / 4294967295) / 1000 }'; }

no_errors() {
	! dmesg | tail -n "+$((seen + 1))" |
		grep -E "I/O error|EXT4-fs.*(error|abort|warning)|JBD2.*(error|abort)|hung task|blocked for more|Out of memory.*vb-ublk" ||
		fail "the kernel reports errors"
}

# --- the S3 server

s3_port=5556
s3_env() {
	export AWS_ENDPOINT_URL_S3=http://127.0.0.1:$s3_port AWS_REGION=us-east-1 AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
	export VB_UBLK_STORE=s3://vb-test/volumes
}
# s3_up [FOLDER]
s3_up() {
	local i
	s3_folder=${1:-${s3_folder:-$W/s3}}
	python3 "$soak/s3disk.py" "$s3_folder" "$s3_port" vb-test >>"$W/s3.log" 2>&1 </dev/null &
	echo $! >"$W/s3.pid"
	for ((i = 0; i < 600; i++)); do
		if curl -s -o /dev/null "http://127.0.0.1:$s3_port/"; then return 0; fi
		kill -0 "$(cat "$W/s3.pid")" || fail "the S3 server does not start: $(cat "$W/s3.log")"
		sleep 0.1
	done
	fail "the S3 server does not answer"
}
s3_down() {
	local pid
	pid=$(cat "$W/s3.pid")
	kill -KILL "$pid"
	wait "$pid" || true
}

# --- the workload: two databases and fio, on a mounted file system

fio_size=32m
[ -z "${E2E_SHORT:-}" ] || fio_size=8m
start_load() {
	: >"$acks"
	rm -f "$stop"
	python3 "$soak/rows.py" write "$mounted/wal.db" wal wal 1 "$stop" >>"$acks" 2>"$W/wal.err" &
	load=($!)
	python3 "$soak/rows.py" write "$mounted/journal.db" journal journal 1 "$stop" >>"$acks" 2>"$W/journal.err" &
	load+=($!)
	while [ ! -e "$stop" ]; do
		fio --name=v --directory="$mounted" --ioengine=libaio --direct=1 --rw=randrw --bsrange=4k-64k --size="$fio_size" --iodepth=4 --fsync=16 \
			--verify=crc32c --verify_backlog=32 --output="$W/fio.out" 2>"$W/fio.err" || exit 1
		echo pass >>"$W/fio.passes"
	done &
	load+=($!)
}

# The load must still be there: a device that fails ends it.
load_lives() {
	local p
	for p in "${load[@]}"; do
		kill -0 "$p" 2>/dev/null || fail "the load has ended: $(tail -n 3 "$W/wal.err" "$W/journal.err" "$W/fio.out" "$W/fio.err")"
	done
}

stop_load() {
	local p
	: >"$stop"
	for p in "${load[@]}"; do
		wait "$p" || fail "the load failed: $(tail -n 3 "$W/wal.err" "$W/journal.err" "$W/fio.out" "$W/fio.err")"
	done
	# To see the check fail: one commit more than there was.
	if [ "${SOAK_BREAK:-}" = witness ]; then
		awk '$1 == "ACK" && $4 > last[$2] { last[$2] = $4 } END { for (k in last) print "ACK", k, 1, last[k] + 1, "." }' "$acks" >"$acks.more"
		cat "$acks.more" >>"$acks"
	fi
}

# count REGEX: how often it is in the table, its first line aside.
# shellcheck disable=SC2154 # the table is the caller's
count() { tail -n +3 "$table" | { grep -oE -- "$1" || true; } | wc -l; }
commits() { grep -c '^ACK' "$acks" || true; }

# log_use VOLUME: how full its log is, for people.
log_use() { vb status "$1" --json | jq -c '.. | .log? // empty | objects' | head -n1; }

# Every acknowledged commit is there, and the file system is clean; $dev is not mounted.
check_load() {
	local name
	fsck.ext4 -fn "$dev" >"$W/fsck.out" 2>&1 || fail "fsck: $(cat "$W/fsck.out")"
	mount -o "$1" "$dev" "$mounted"
	for name in wal journal; do
		# A copy: sqlite wants to write to what it reads.
		rm -f "$W"/copy.db*
		cp "$mounted/$name.db" "$W/copy.db"
		[ ! -e "$mounted/$name.db-wal" ] || cp "$mounted/$name.db-wal" "$W/copy.db-wal"
		[ ! -e "$mounted/$name.db-journal" ] || cp "$mounted/$name.db-journal" "$W/copy.db-journal"
		python3 "$soak/rows.py" check "$W/copy.db" "$name" "$acks" || fail "the database $name"
	done
	# The whole tree, to compare it with what comes from the store alone.
	sum_of "$mounted" >"$W/sum.$1"
	umount "$mounted"
}

# Detaches, forgets all local state, and attaches from the store.
compare_with_store() {
	check_load rw
	del life
	rm -rf "$data"
	add life --read-only
	check_load ro
	cmp "$W/sum.rw" "$W/sum.ro" || fail "what comes from the store alone differs"
	del life
	no_errors
}

# --- kills

# recover_life: it must succeed; how long it took is in $took (milliseconds).
recover_life() {
	local from again
	from=$(now_ms)
	again=$(vb recover --volume life) || fail "recover"
	took=$(($(now_ms) - from))
	[ "$again" = "$dev" ] || fail "recover printed '$again', not $dev"
	[ "$took" -le "${SOAK_RECOVER_LIMIT:-10000}" ] || fail "a recovery took $took ms"
}

# interrupt_recovery MS: starts one and kills it and its daemon within that time; $interrupted says what was hit.
# shellcheck disable=SC2034 # for the caller
interrupt_recovery() {
	local pid kids i
	"$E2E_BIN" --data-dir "$data" --run-dir "$run" recover --volume life >"$W/interrupted.out" 2>"$W/interrupted.err" </dev/null &
	pid=$!
	sleep "$(between 0 "$1")"
	interrupted=during kids=()
	# Stopped first, or it would fork meanwhile.
	if kill -STOP "$pid" 2>/dev/null && [ -e "/proc/$pid/task/$pid/children" ]; then
		read -ra kids <"/proc/$pid/task/$pid/children" || true
	fi
	for i in ${kids[@]+"${kids[@]}"} "$pid"; do kill -KILL "$i" 2>/dev/null || true; done
	wait "$pid" 2>/dev/null || true
	for i in ${kids[@]+"${kids[@]}"}; do
		for _ in {1..200}; do
			[ -e "/proc/$i" ] || break
			sleep 0.05
		done
	done
	i=$(daemon_pid life)
	if [ -e "/proc/$i" ]; then
		interrupted=after
		kill_daemon life
	fi
}
