# shellcheck shell=bash
# Shared by scripts/setup and scripts/guest/*: where the cache is, how to reach Debian packages.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Everything fetched or built lands here; target/ is ignored by git.
VB_CACHE=${VB_CACHE:-$repo/target/guest}

note() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
	note "$*"
	exit "${die_code:-1}"
}

# Prints "ID CODENAME" of the running distribution, such as "debian bookworm".
distro() (
	# shellcheck disable=SC1091
	. /etc/os-release
	echo "${ID:-unknown} ${VERSION_CODENAME:-unknown}"
)

# The Debian archive this system already uses. Nothing here names a mirror: a machine behind a proxy
# registry and one on the public network both keep to what their administrator chose.
debian_mirror() {
	if [ -n "${VB_DEBIAN_MIRROR:-}" ]; then
		echo "$VB_DEBIAN_MIRROR"
		return
	fi
	local id code found
	read -r id code < <(distro)
	[ "$id" = debian ] || die "not a Debian system: set VB_DEBIAN_MIRROR to the address of a Debian archive"
	found=$({
		cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
			sed -n 's/^deb[[:space:]]*\(\[[^]]*\]\)\{0,1\}[[:space:]]*//p' |
			awk -v code="$code" '$2 == code { print $1 }' || true
		for f in /etc/apt/sources.list.d/*.sources; do
			[ -f "$f" ] || continue
			# deb822: paragraphs of "Field: values"; a comment may stand anywhere.
			grep -v '^#' "$f" | awk -v code="$code" '
				BEGIN { RS = ""; FS = "\n" }
				{
					uri = ""; deb = suite = 0; on = 1
					for (i = 1; i <= NF; i++) {
						n = split($i, w, /[ \t]+/); key = tolower(w[1])
						for (j = 2; j <= n; j++) {
							if (key == "types:" && w[j] == "deb") deb = 1
							if (key == "uris:" && uri == "") uri = w[j]
							if (key == "suites:" && w[j] == code) suite = 1
							if (key == "enabled:" && tolower(w[j]) == "no") on = 0
						}
					}
					if (deb && suite && on) print uri
				}'
		done
	} | grep -E '^(https?|file|mirror\+https?):' | head -n1 || true)
	[ -n "$found" ] || die "no archive for $code in the system's apt sources: set VB_DEBIAN_MIRROR"
	echo "$found"
}

# Writes an apt configuration of our own for the named suites and fetches its lists, so that the system's
# sources stay as they are. Use: apt_private NAME SUITE…; then "${apt_opts[@]}" with apt-get or apt-cache.
apt_private() {
	local name=$1 dir mirror key=/usr/share/keyrings/debian-archive-keyring.gpg
	shift
	dir=$VB_CACHE/apt/$name
	mirror=$(debian_mirror)
	[ -f "$key" ] || die "$key is missing: install debian-archive-keyring"
	mkdir -p "$dir/lists/partial" "$dir/archives/partial"
	printf "deb [signed-by=$key] $mirror %s main\n" "$@" >"$dir/sources.list"
	apt_opts=(
		-o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
		-o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
		-o "Dir::State::Lists=$dir/lists" -o "Dir::Cache::archives=$dir/archives"
		-o "Dir::Cache::pkgcache=$dir/pkgcache.bin" -o "Dir::Cache::srcpkgcache="
		-o Acquire::Languages=none -o APT::Sandbox::User=root
	)
	# What an administrator set to reach the archive (proxies, certificates) still applies.
	[ -n "$(find "$dir/lists" -maxdepth 1 -name '*Packages*' -mmin -720 -print -quit)" ] ||
		apt-get "${apt_opts[@]}" -qq update || die "apt-get update failed for: $*"
}
