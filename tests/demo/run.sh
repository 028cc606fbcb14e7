#!/usr/bin/env bash
# The demo: sorts text of this machine in memory eight times larger than its RAM budget, measures the memory from
# outside, and compares the result with sort(1). `make demo` builds what it runs. FMALLOC_DEMO_MIB is the size in MiB.
set -euo pipefail
cd "$(dirname "$0")/../.."

mib=${FMALLOC_DEMO_MIB:-512}
if [[ ! $mib =~ ^[1-9][0-9]*$ ]] || ((mib < 64)); then
    echo "demo: FMALLOC_DEMO_MIB must be a number of at least 64" >&2
    exit 1
fi
budget=$((mib / 8))
allowance=16
target=$(cargo metadata --format-version 1 --no-deps | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
work=$target/demo
sorter=
cleanup() {
    if [[ -n $sorter ]]; then kill "$sorter" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
rm -rf "$work"
mkdir -p "$work/swap"

# Swap, the result, and what sort(1) needs for itself.
free=$(df --output=avail -m "$work" | tail -n 1)
if ((free < 4 * mib)); then
    echo "demo: needs $((4 * mib)) MiB of disk in $work, which has $free; see FMALLOC_DEMO_MIB and CARGO_TARGET_DIR" >&2
    exit 1
fi

echo "demo: looking for $mib MiB of text"
names=()
for extension in html rs md txt h hpp c cpp py pl pm js css json xml svg toml po tcl rb sh conf; do
    names+=(-o -name "*.$extension")
done
sizes=() files=()
while IFS=$'\t' read -r -d '' size file; do
    sizes+=("$size") files+=("$file")
done < <(find "$(rustc --print sysroot)/share/doc" "$(rustc --print sysroot)/lib/rustlib" /usr/share /usr/include \
    "${CARGO_HOME:-$HOME/.cargo}/registry/src" "$PWD/proto" "$PWD/daemon" "$PWD/client" \
    -type f -size +0 -readable \( -false "${names[@]}" \) -printf '%s\t%p\0' 2>/dev/null || true)
want=$((mib << 20)) bytes=0 count=0
while ((bytes < want)); do
    for index in "${!files[@]}"; do
        ((bytes < want)) || break
        printf '%s\0' "${files[index]}"
        ((bytes += sizes[index], count += 1))
    done
done >"$work/list"
echo "demo: $count files, $((bytes >> 20)) MiB$( ((count <= ${#files[@]})) || echo ' (some more than once)')"

# root pages with a daemon of its own, others with the running service if there is one.
mode=()
[[ $EUID -eq 0 ]] && mode=(--private)
export FMALLOC_DAEMON=$target/release/fmallocd FMALLOC_SWAP_DIR=$work/swap FMALLOC_DAEMON_LOG=$work/fmallocd.log

# Value of a field in KiB, or nothing if the process has ended.
field() { sed -n "s/^$2:[[:space:]]*\([0-9]*\) kB/\1/p" "$1" 2>/dev/null || true; }

echo "demo: sorting within $budget MiB of RAM"
"$target/release/examples/sort_lines" --ram "${budget}M" --output "$work/sorted" --stats-json "$work/stats.json" \
    --files0-from "$work/list" "${mode[@]}" &
sorter=$!
peak=0 together=0 daemon=
while now=$(field /proc/$sorter/status VmHWM) && [[ -n $now ]]; do
    peak=$now
    if [[ -z $daemon ]]; then
        # The private daemon is the one that was told about our directory.
        for cmdline in $(grep -lsF -- "$work/swap" /proc/[0-9]*/cmdline || true); do
            pid=${cmdline//[!0-9]/}
            [[ $(cat "/proc/$pid/comm" 2>/dev/null) == fmallocd ]] && daemon=$pid
        done
    else
        sum=0
        for pid in $sorter $daemon; do
            pss=$(field /proc/$pid/smaps_rollup Pss)
            ((sum += ${pss:-0})) || true
        done
        if ((sum > together)); then together=$sum; fi
    fi
    sleep 0.1
done
status=0
wait "$sorter" || status=$?
sorter=
if ((status != 0)); then
    echo "demo: FAILED: sort_lines ended with status $status; the last words of its daemon:" >&2
    tail -n 20 "$work/fmallocd.log" 2>/dev/null >&2 || true
    exit 1
fi

echo "demo: seen from outside: peak resident $((peak >> 10)) MiB of at most $((budget + allowance)) MiB"
if ((together > 0)); then
    echo "demo: with fmallocd itself, shared memory counted once: $((together >> 10)) MiB at most"
fi
if ((peak == 0 || peak > (budget + allowance) << 10)); then
    echo "demo: FAILED: peak resident set of $peak KiB is over the budget of $budget MiB and $allowance MiB" >&2
    exit 1
fi

echo "demo: comparing with LC_ALL=C sort"
begin=$SECONDS
if ! LC_ALL=C sort -S 256M -T "$work" --files0-from="$work/list" | cmp - "$work/sorted"; then
    echo "demo: FAILED: the result differs from that of sort" >&2
    exit 1
fi
echo "demo: identical to the result of sort, which took $((SECONDS - begin)) s with 256 MiB of RAM and temporary files"
