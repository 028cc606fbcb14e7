//! JSON for programs. The fields and their descriptions are declared once, below: the help text is made from the same
//! table as the structs, so none can be missing from it. Sizes are in bytes; a field is never renamed or reused.

use std::collections::BTreeMap;
use std::io::{self, Write};

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::{ClientRow, LatencyRow, RegionRow, Status as StatusMessage};
use fmalloc_proto::num::to_u64;
use serde::Serialize;

/// Declares what a command prints.
macro_rules! object {
    ($(#[$meta:meta])* $name:ident, $what:literal { $($field:ident: $type:ty = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Serialize)]
        pub struct $name {
            $(#[doc = $text] pub $field: $type,)*
        }

        impl $name {
            fn help(out: &mut String) {
                out.push_str(concat!("\n", $what, "\n"));
                $(out.push_str(&format!("  {:<24}{}\n", stringify!($field), $text));)*
            }
        }
    };
}

object! {
    /// Printed by `fmallocctl --json status`.
    Status, "status: an object" {
        version: String = "version of the daemon",
        pid: u32 = "its process id",
        uptime_seconds: u64 = "seconds since it started",
        socket: String = "its socket",
        swap_path: String = "swap file or device, empty if it has no name",
        swap_bytes: u64 = "size of swap",
        swap_claimed_bytes: u64 = "promised to committed memory",
        swap_used_bytes: u64 = "taken by slots",
        direct_io: bool = "swap I/O bypasses the page cache",
        io_uring: bool = "swap I/O goes through io_uring",
        pool_bytes: u64 = "RAM that may be granted in all",
        pool_granted_bytes: u64 = "RAM granted",
        clients: u64 = "clients",
        regions: u64 = "regions of all clients",
        write_protect_clients: u64 = "clients without UFFDIO_MOVE: O_DIRECT into their regions is unsafe",
        draining: bool = "shutting down, no new clients",
    }
}

object! {
    /// A row of `fmallocctl --json clients`.
    Client, "clients: an array of objects" {
        client: u64 = "number of the client, never given twice",
        pid: u32 = "process id, 0 if not visible to the daemon",
        uid: u32 = "user id",
        name: String = "name that the client gave",
        parent: u64 = "client that it was forked from, 0 if none",
        group: u64 = "first of the clients that share its budget",
        condition: String = "what hinders it, for people; empty if nothing",
        mover: &'static str = "move, or write-protect (kernels before 6.8)",
        regions: u32 = "regions",
        budget_bytes: u64 = "RAM budget",
        resident_bytes: u64 = "memory of its regions in RAM",
        peak_resident_bytes: u64 = "highest value of that",
        overhead_bytes: u64 = "held for it by the daemon, part of the budget",
        peak_held_bytes: u64 = "highest value of both together",
        swapped_bytes: u64 = "memory that only the daemon has, in swap or packed in RAM",
        packed_bytes: u64 = "of that, packed in RAM",
        packed_ram_bytes: u64 = "RAM that it takes, part of overhead_bytes",
        slot_bytes: u64 = "taken in swap, clean copies included",
        claimed_bytes: u64 = "promised in swap",
        unevictable_bytes: u64 = "pinned, locked or protected at present",
        poisoned_bytes: u64 = "lost to I/O errors: an access gives SIGBUS",
        file_in_bytes: u64 = "read from mapped files",
        file_out_bytes: u64 = "written to mapped files",
        in_bytes: u64 = "read from swap",
        readahead_bytes: u64 = "of these, ahead of a fault",
        readahead_unused_bytes: u64 = "of these, for streams that broke off before, at most",
        out_bytes: u64 = "written to swap",
        clean_bytes: u64 = "evicted without a write, swap had the same bytes",
        zero_bytes: u64 = "evicted without a write, all zeros or all alike",
        spilled_bytes: u64 = "packed, and written to swap later",
        faults: u64 = "faults served",
        faults_zero: u64 = "of these, first touches",
        faults_read: u64 = "of these, answered by a read from swap",
        faults_packed: u64 = "of these, answered by unpacking",
        faults_rescued: u64 = "of these, answered from a buffer, without I/O",
        faults_stalled: u64 = "faults that waited for a free frame",
        io_errors: u64 = "failed reads, writes and checks of swap",
    }
}

object! {
    /// A row of `fmallocctl --json regions`.
    Region, "regions: an array of objects" {
        client: u64 = "number of the client",
        region: u32 = "number of the region within it",
        label: String = "label that the client gave",
        addr: u64 = "address in the client",
        length_bytes: u64 = "length",
        claimed_bytes: u64 = "promised in swap",
        resident_bytes: u64 = "in RAM",
        swapped_bytes: u64 = "only in swap, or packed in RAM",
        poisoned_bytes: u64 = "lost",
    }
}

object! {
    /// Printed by `fmallocctl --json limit`.
    Limit, "limit: an object" {
        client: u64 = "number of the client",
        budget_bytes: u64 = "its budget now",
    }
}

object! {
    /// Printed by `fmallocctl --json evict`.
    Evict, "evict: an object" {
        client: u64 = "number of the client",
        evicted_bytes: u64 = "memory that left RAM",
    }
}

object! {
    /// A row of `fmallocctl --json latency`.
    Latency, "latency: an array of objects, one for each step" {
        step: String = "what was timed",
        samples: u64 = "how often",
        p50_ns: u64 = "half of them took no longer, in nanoseconds",
        p90_ns: u64 = "the same for 90 of 100",
        p99_ns: u64 = "the same for 99 of 100",
        p999_ns: u64 = "the same for 999 of 1000",
        max_ns: u64 = "the longest",
    }
}

object! {
    /// Printed by `fmallocctl --json doctor`.
    Doctor, "doctor: an object" {
        usable: bool = "fmalloc can run here, by one way at least",
        service: bool = "with the service",
        private: bool = "with private daemons",
        private_user_mode: bool = "with private daemons for programs that accept user_mode_only",
        features: BTreeMap<&'static str, &'static str> = "each UFFD_FEATURE: yes, no, or denied to this user",
        figures: BTreeMap<&'static str, u64> = "what was measured; the unit is part of the name",
        checks: Vec<Check> = "what was looked at, in order",
    }
}

object! {
    /// An element of `checks` in [`Doctor`].
    Check, "checks of doctor: objects" {
        area: String = "heading",
        check: String = "what was looked at",
        state: String = "ok, note, costs (works, at a price), blocks (closes one way)",
        found: String = "what was found, for people",
        cost: Option<String> = "what it costs, null if nothing",
        mend: Option<String> = "the command that mends it, null if there is none",
    }
}

/// Describes every field, for the long help.
#[must_use]
pub fn fields_help() -> String {
    let mut out = "Fields of --json, sizes in bytes:\n".to_owned();
    for help in [
        Status::help,
        Client::help,
        Region::help,
        Limit::help,
        Evict::help,
        Latency::help,
        Doctor::help,
        Check::help,
    ] {
        help(&mut out);
    }
    out.truncate(out.trim_end().len());
    out
}

/// Prints one value and a line end.
pub(super) fn print(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

fn pages(count: u64) -> u64 {
    count.saturating_mul(PAGE)
}

impl Status {
    /// From what the daemon says, and the rows of its clients.
    pub(super) fn new(status: &StatusMessage, clients: &[ClientRow]) -> Self {
        Self {
            version: status.version.clone(),
            pid: status.pid,
            uptime_seconds: status.uptime_seconds,
            socket: status.socket.clone(),
            swap_path: status.swap_path.clone(),
            swap_bytes: status.swap_bytes,
            swap_claimed_bytes: status.swap_claimed_bytes,
            swap_used_bytes: status.swap_used_bytes,
            direct_io: status.direct_io,
            io_uring: status.io_uring,
            pool_bytes: status.pool_bytes,
            pool_granted_bytes: status.pool_granted_bytes,
            clients: status.clients,
            regions: status.regions,
            write_protect_clients: to_u64(clients.iter().filter(|row| row.write_protect).count()),
            draining: status.draining,
        }
    }
}

impl From<&LatencyRow> for Latency {
    fn from(row: &LatencyRow) -> Self {
        Self {
            step: row.step.clone(),
            samples: row.samples,
            p50_ns: row.p50_ns,
            p90_ns: row.p90_ns,
            p99_ns: row.p99_ns,
            p999_ns: row.p999_ns,
            max_ns: row.max_ns,
        }
    }
}

impl From<&ClientRow> for Client {
    fn from(row: &ClientRow) -> Self {
        let stats = &row.stats;
        Self {
            client: row.client,
            pid: row.pid,
            uid: row.uid,
            name: row.name.clone(),
            parent: row.parent,
            group: row.group,
            condition: row.condition.clone(),
            mover: if row.write_protect { "write-protect" } else { "move" },
            regions: row.regions,
            budget_bytes: stats.budget_bytes,
            resident_bytes: pages(stats.resident_pages),
            peak_resident_bytes: pages(stats.peak_resident_pages),
            overhead_bytes: stats.overhead_bytes,
            peak_held_bytes: stats.peak_held_bytes,
            swapped_bytes: pages(stats.swapped_pages),
            packed_bytes: pages(stats.packed_pages),
            packed_ram_bytes: stats.packed_bytes,
            slot_bytes: pages(stats.slots),
            claimed_bytes: pages(stats.claimed_pages),
            unevictable_bytes: pages(stats.unevictable_pages),
            poisoned_bytes: pages(stats.poisoned_pages),
            file_in_bytes: pages(stats.file_pages_in),
            file_out_bytes: pages(stats.file_pages_out),
            in_bytes: pages(stats.pages_in),
            readahead_bytes: pages(stats.pages_readahead),
            readahead_unused_bytes: pages(stats.pages_readahead_unused),
            out_bytes: pages(stats.pages_out),
            clean_bytes: pages(stats.pages_clean),
            zero_bytes: pages(stats.pages_zero),
            spilled_bytes: pages(stats.pages_spilled),
            faults: stats.faults,
            faults_zero: stats.faults_zero,
            faults_read: stats.faults_read,
            faults_packed: stats.faults_packed,
            faults_rescued: stats.faults_rescued,
            faults_stalled: stats.faults_stalled,
            io_errors: stats.io_errors,
        }
    }
}

impl From<&RegionRow> for Region {
    fn from(row: &RegionRow) -> Self {
        Self {
            client: row.client,
            region: row.region,
            label: row.label.clone(),
            addr: row.addr,
            length_bytes: row.len,
            claimed_bytes: row.claimed_bytes,
            resident_bytes: pages(row.resident_pages),
            swapped_bytes: pages(row.swapped_pages),
            poisoned_bytes: pages(row.poisoned_pages),
        }
    }
}

#[cfg(test)]
mod tests {
    use fmalloc_proto::messages::ClientStats;

    use super::*;

    #[test]
    fn pages_become_bytes() {
        let stats = ClientStats { resident_pages: 3, pages_out: 2, faults: 9, ..ClientStats::default() };
        let row = ClientRow {
            client: 1,
            pid: 2,
            uid: 3,
            name: "x".to_owned(),
            parent: 0,
            group: 1,
            condition: String::new(),
            write_protect: false,
            regions: 0,
            stats,
        };
        let value = serde_json::to_value(Client::from(&row)).unwrap();
        assert_eq!(value["resident_bytes"], 3 * PAGE);
        assert_eq!(value["out_bytes"], 2 * PAGE);
        assert_eq!(value["faults"], 9);
    }

    #[test]
    fn help_describes_every_object() {
        let help = fields_help();
        for text in ["status: an object", "swap_claimed_bytes", "evicted_bytes", "addr "] {
            assert!(help.contains(text), "{text}");
        }
    }
}
