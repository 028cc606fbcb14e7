//! Tables for people.

use comfy_table::{CellAlignment, Table, presets};
use fmalloc_proto::PAGE;
use fmalloc_proto::messages::{ClientRow, LatencyRow, RegionRow};
use fmalloc_proto::size::Size;

use super::json::Status;

fn pages(count: u64) -> String {
    Size(count.saturating_mul(PAGE)).to_string()
}

fn table(headings: &[&str], numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    if !headings.is_empty() {
        table.set_header(headings);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if numbers.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

pub(super) fn status(status: &Status) -> String {
    let yes_no = |yes| if yes { "yes" } else { "no" };
    let name = |text: &str| if text.is_empty() { "(no name)".to_owned() } else { text.to_owned() };
    let mut table = table(&[], &[]);
    let state = if status.draining { "shutting down" } else { "serving" };
    let mut row = |key: &str, value: String| {
        table.add_row([key.to_owned(), value]);
    };
    row("fmallocd", format!("{}, process {}, {state}", status.version, status.pid));
    row("running for", duration(status.uptime_seconds));
    row("socket", name(&status.socket));
    row("RAM pool", format!("{} of {} granted", Size(status.pool_granted_bytes), Size(status.pool_bytes)));
    row("swap", name(&status.swap_path));
    let (claimed, used) = (Size(status.swap_claimed_bytes), Size(status.swap_used_bytes));
    row("swap size", format!("{}, {claimed} claimed, {used} in use", Size(status.swap_bytes)));
    row("direct I/O", yes_no(status.direct_io).to_owned());
    row("io_uring", yes_no(status.io_uring).to_owned());
    row("clients", status.clients.to_string());
    row("regions", status.regions.to_string());
    if status.write_protect_clients > 0 {
        let text =
            "without UFFDIO_MOVE (Linux 6.8): O_DIRECT and io_uring reads into their regions can be lost";
        row("unsafe", format!("{} clients {text}", status.write_protect_clients));
    }
    table.trim_fmt()
}

fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

pub(super) fn clients(rows: &[ClientRow]) -> String {
    let headings = [
        "CLIENT",
        "PID",
        "UID",
        "NAME",
        "PARENT",
        "GROUP",
        "BUDGET",
        "RESIDENT",
        "DAEMON",
        "SWAPPED",
        "PACKED",
        "CLAIMED",
        "REGIONS",
        "FAULTS",
        "IN",
        "OUT",
        "HINDERED BY",
    ];
    let mut table = table(&headings, &[0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    for row in rows {
        let stats = &row.stats;
        table.add_row([
            row.client.to_string(),
            row.pid.to_string(),
            row.uid.to_string(),
            row.name.clone(),
            if row.parent == 0 { "-".to_owned() } else { row.parent.to_string() },
            row.group.to_string(),
            Size(stats.budget_bytes).to_string(),
            pages(stats.resident_pages),
            Size(stats.overhead_bytes).to_string(),
            pages(stats.swapped_pages),
            pages(stats.packed_pages),
            pages(stats.claimed_pages),
            row.regions.to_string(),
            stats.faults.to_string(),
            pages(stats.pages_in),
            pages(stats.pages_out),
            hindrance(row),
        ]);
    }
    table.trim_fmt()
}

fn hindrance(row: &ClientRow) -> String {
    let stats = &row.stats;
    let mut text = row.condition.clone();
    let mut add = |count: u64, what: &str| {
        if count > 0 {
            let comma = if text.is_empty() { "" } else { ", " };
            text.push_str(&format!("{comma}{count} {what}"));
        }
    };
    add(stats.unevictable_pages, "pages unevictable");
    add(stats.poisoned_pages, "pages lost");
    add(stats.io_errors, "I/O errors");
    text
}

pub(super) fn latency(rows: &[LatencyRow]) -> String {
    let headings = ["STEP", "SAMPLES", "P50", "P90", "P99", "P99.9", "LONGEST"];
    let mut table = table(&headings, &[1, 2, 3, 4, 5, 6]);
    for row in rows {
        table.add_row([
            row.step.clone(),
            row.samples.to_string(),
            micros(row.p50_ns),
            micros(row.p90_ns),
            micros(row.p99_ns),
            micros(row.p999_ns),
            micros(row.max_ns),
        ]);
    }
    table.trim_fmt()
}

fn micros(nanos: u64) -> String {
    format!("{}.{} µs", nanos / 1000, nanos / 100 % 10)
}

pub(super) fn regions(rows: &[RegionRow]) -> String {
    let headings =
        ["CLIENT", "REGION", "LABEL", "ADDRESS", "LENGTH", "CLAIMED", "RESIDENT", "SWAPPED", "LOST"];
    let mut table = table(&headings, &[0, 1, 3, 4, 5, 6, 7, 8]);
    for row in rows {
        table.add_row([
            row.client.to_string(),
            row.region.to_string(),
            row.label.clone(),
            format!("{:#x}", row.addr),
            Size(row.len).to_string(),
            Size(row.claimed_bytes).to_string(),
            pages(row.resident_pages),
            pages(row.swapped_pages),
            pages(row.poisoned_pages),
        ]);
    }
    table.trim_fmt()
}
