# shellcheck shell=bash
# For the tests in tests/: a store, a data folder and a run folder of the test's own, and words to say what is expected.
#
# $W is the test's folder. `vb` runs the program on the current "host": `host NAME` chooses another data and run folder.
set -euo pipefail

say() { printf '%s  %s\n' "$(date +%T)" "$*"; }
figure() { printf 'figure: %s\n' "$*"; }
fail() {
	printf 'FAILED: %s\n' "$*"
	exit 1
}
skip() {
	printf '%s\n' "$*"
	exit 77
}
trap 'printf "FAILED: line %s of %s: %s\n" "$LINENO" "${BASH_SOURCE[0]##*/}" "$BASH_COMMAND"' ERR
set -E

data=$W/data run=$W/run

# Another host, as far as the program can tell: its own log and state.
host() {
	data=$W/data-$1 run=$W/run-$1
}

vb() {
	"$E2E_BIN" --data-dir "$data" --run-dir "$run" "$@"
}

# Makes the store that this run of the test is for, and points the program to it.
make_store() {
	case ${E2E_STORE:?} in
	file)
		export VB_UBLK_STORE=file://$W/store
		;;
	s3)
		start_moto
		export VB_UBLK_STORE=s3://vb-test/volumes
		;;
	esac
}

# An S3 server with the bucket vb-test and nothing else: in the VM the host's ($S3_SERVER), for an emulated CPU is slow at Python.
start_moto() {
	local i
	s3_server=${S3_SERVER:-http://127.0.0.1:5555}
	if [ -z "${S3_SERVER:-}" ]; then
		"$E2E_MOTO" -H 127.0.0.1 -p 5555 >"$W/moto.log" 2>&1 </dev/null &
		echo $! >"$W/moto.pid"
		for ((i = 0; i < 600; i++)); do
			if curl -sf -o /dev/null "$s3_server/moto-api/"; then break; fi
			kill -0 "$(cat "$W/moto.pid")" || fail "the S3 server does not start: $(cat "$W/moto.log")"
			sleep 0.2
		done
	fi
	export AWS_ENDPOINT_URL_S3=$s3_server AWS_REGION=us-east-1
	export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
	# It may have served other tests, and may have been told to look at signatures.
	s3_request POST /moto-api/reset-auth s3 inf text/plain >/dev/null || fail "the S3 server at $s3_server does not answer"
	s3_request POST /moto-api/reset s3 >/dev/null
	s3_request PUT /vb-test s3 >/dev/null
}

# The store does not answer from now on; it comes back as it was.
store_away() {
	case $E2E_STORE in
	file) mv "$W/store" "$W/store-away" ;;
	s3) if [ -n "${S3_SERVER:-}" ]; then ip link set eth0 down; else kill -STOP "$(cat "$W/moto.pid")"; fi ;;
	esac
}
store_back() {
	case $E2E_STORE in
	file) mv "$W/store-away" "$W/store" ;;
	s3) if [ -n "${S3_SERVER:-}" ]; then ip link set eth0 up; else kill -CONT "$(cat "$W/moto.pid")"; fi ;;
	esac
}

# s3_request METHOD PATH SERVICE [FORM]: asks moto, which looks at no signature until it is told to.
s3_request() {
	curl -sf -X "$1" "$s3_server$2" -d "${4:-}" -H "Content-Type: ${5:-application/x-www-form-urlencoded}" \
		-H "Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/$3/aws4_request, SignedHeaders=host, Signature=0"
}

# null_disk NAME MIB [KEY=VALUE]…: makes a disk in memory that can be made slow, or to fail; it is $null, its settings are in $null_config.
null_disk() {
	local config=/sys/kernel/config/nullb option
	[ -d $config ] || modprobe -q null_blk || true
	[ -d $config ] || skip "null_blk with configfs is not here: there is no disk that can be made slow, or to fail"
	null_config=$config/$1
	mkdir -p "$null_config"
	for option in memory_backed=1 "size=$2" "${@:3}" power=1; do echo "${option#*=}" >"$null_config/${option%%=*}"; done
	# Older drivers number their devices, later ones give them the folder's name.
	null=/dev/$1
	[ -b "$null" ] || null=/dev/nullb$(cat "$null_config/index")
	udevadm settle
	[ -b "$null" ] || fail "there is no $null"
}
null_gone() { echo 0 >"$null_config/power" && rmdir "$null_config"; }

# add VOLUME [OPTION]…: attaches; the device is in $dev.
add() {
	local volume=$1
	shift
	dev=$(vb add --volume "$volume" "$@") || fail "add --volume $volume $* failed"
	[[ $dev =~ ^/dev/ublkb[0-9]+$ && -b $dev ]] || fail "add printed '$dev', which is no device"
	udevadm settle --timeout=20 || true
	say "$volume is $dev"
}

# del VOLUME [OPTION]…: detaches cleanly.
del() {
	local volume=$1
	shift
	vb del --volume "$volume" --timeout 120 "$@" || fail "del --volume $volume $* failed"
	say "$volume is detached"
}

daemon_pid() { jq -re .pid "$run/$1.json"; }

# Kills a volume's daemon as a crash would, and waits until it has gone.
kill_daemon() {
	local pid i
	pid=$(daemon_pid "$1")
	kill -KILL "$pid"
	for ((i = 0; i < 200; i++)); do
		[ -e "/proc/$pid" ] || return 0
		sleep 0.05
	done
	fail "process $pid is still there 10 s after kill -9"
}

# nbd_serve [OPTION]…: starts the NBD server on a free port; its address is in $nbd_port, its process in $nbd_pid.
nbd_serve() {
	local i
	: >"$W/nbd.uri"
	# Not by vb: the process of a function in the background is a shell's.
	"$E2E_BIN" --data-dir "$data" --run-dir "$run" nbd --listen 127.0.0.1:0 "$@" >"$W/nbd.uri" 2>>"$W/nbd.log" </dev/null &
	nbd_pid=$!
	echo "$nbd_pid" >"$W/nbd.pid"
	for ((i = 0; i < 600; i++)); do
		nbd_port=$(sed -n 's,^nbd://127\.0\.0\.1:\([0-9]*\)/*$,\1,p' "$W/nbd.uri")
		[ -z "$nbd_port" ] || break
		kill -0 "$nbd_pid" 2>/dev/null || fail "vb-ublk nbd does not start: $(cat "$W/nbd.log")"
		sleep 0.1
	done
	[ -n "$nbd_port" ] || fail "vb-ublk nbd does not say where it listens: $(cat "$W/nbd.uri")"
	say "nbd server $nbd_pid on port $nbd_port"
}

# Ends the NBD server as systemd would: everything is in the store then.
nbd_stop() {
	local rc=0
	kill -TERM "$nbd_pid"
	wait "$nbd_pid" || rc=$?
	rm "$W/nbd.pid"
	[ "$rc" = 0 ] || fail "vb-ublk nbd ended with $rc: $(tail -n 5 "$W/nbd.log")"
}

# status VOLUME JQ-FILTER
status() { vb status "$1" --json | jq -re "$2"; }

# refused CODE REGEX COMMAND…: it must fail with this code and exactly one line on stderr that matches.
refused() {
	local code=$1 words=$2 rc=0 lines
	shift 2
	# In a subshell: bash tells of its jobs that were killed on the stderr of whatever function runs just then.
	("$@") >"$W/refused.out" 2>"$W/refused.err" || rc=$?
	lines=$(wc -l <"$W/refused.err")
	say "exit code $rc: $(cat "$W/refused.err")"
	[ "$rc" = "$code" ] || fail "exit code $rc, not $code, of: $*"
	[ "$lines" = 1 ] || fail "$lines lines on stderr, not 1, of: $*"
	[ ! -s "$W/refused.out" ] || fail "something on stdout: $(cat "$W/refused.out")"
	grep -Eiq -- "$words" "$W/refused.err" || fail "the message has nothing of '$words': $*"
	grep -q '^vb-ublk: ' "$W/refused.err" || fail "the message does not begin with 'vb-ublk: '"
}

# What a command that failed must leave as it was: a folder's files, none written anew, not even with what was there.
sum_of() { (cd "$1" && find . -type f -printf '%P %s %i %T@\n' | sort | sha256sum); }

now_ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

rss_kib() { awk '/^VmRSS:/ { print $2 }' "/proc/$1/status"; }
